"""Memory of learning a style token with Stable Diffusion 1.5, 2.1 and XL, counted without running or downloading.

    python -m benchmarks.memory_count

The base models are built from their published configurations without weights. See docs/memory.md.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig

from benchmarks.commands import make_parser
from benchmarks.pipelines import SD15
from benchmarks.report import format_table
from train_dsi import denoising_loss
from utils.forecast.report import Phase, gib
from utils.style.base_models import BaseModel, open_base_model
from utils.style.forecast import DsiRun, count_encoding, count_pictures, count_training

DOCS = Path(__file__).parents[1] / "docs" / "memory.md"
BEGIN, END = "<!-- begin: python -m benchmarks.memory_count -->", "<!-- end -->"
BATCH_SIZES = (1, 2, 4, 8, 16)
RESOLUTIONS = (512, 1024)
CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768,
}  # fmt: skip
# differences from the U-Net and text encoders of Stable Diffusion 1.5, from the repositories' config.json
UNETS = {
    "1.5": {},
    "2.1": {
        "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True,
        "upcast_attention": True, "sample_size": 96,
    },
    "XL": {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10], "cross_attention_dim": 2048,
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816, "sample_size": 128,
    },
}  # fmt: skip
TEXT_ENCODERS = {
    "1.5": [CLIP_L],
    "2.1": [
        {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
            "projection_dim": 512, "hidden_act": "gelu",
        },
    ],
    "XL": [
        CLIP_L,
        {
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
            "projection_dim": 1280, "hidden_act": "gelu",
        },
    ],
}  # fmt: skip
# of U-Net and text encoders, in the repositories' weights
NUM_PARAMETERS = {
    "1.5": [859_520_964, 123_060_480],
    "2.1": [865_910_724, 340_387_840],
    "XL": [2_567_463_684, 123_060_480, 694_659_840],
}
BODY = (
    "GiB that the device must have free, with a margin of 5 % and half a GiB, in bfloat16 or float16 where no "
    "precision is named: frozen weights in half precision, the token's rows in float32. *ck* is with gradient "
    "checkpointing. "
    "Encoding (16 images at a time, where latents are not cached) and the before/after pictures run in float32, at "
    "other times than training; the largest figure counts."
)


def write_configs(name: str, folder: Path) -> BaseModel:
    """Write the configs of a base model into a new folder, without weights, and open it."""
    with torch.device("meta"):
        unet, vae = dict(SD15.build_unet().config), SD15.build_vae()
        del unet["_use_default_values"]  # else they override the changes
        UNet2DConditionModel.from_config(unet | UNETS[name]).save_config(folder / "unet")
        vae.save_config(folder / "vae")
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    scheduler.save_config(folder / "scheduler")
    index = {"_class_name": "StableDiffusionXLPipeline" if name == "XL" else "StableDiffusionPipeline"}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"]}
    parts = zip(("text_encoder", "text_encoder_2"), ("CLIPTextModel", "CLIPTextModelWithProjection"))
    for (part, kind), config in zip(parts, TEXT_ENCODERS[name]):
        CLIPTextConfig(**config).save_pretrained(folder / part)
        index[part] = ["transformers", kind]
    (folder / "model_index.json").write_text(json.dumps(index))
    return open_base_model(str(folder), "--pretrained_model_name_or_path")


def count_rows(
    name: str, base_model: BaseModel, resolution: int, batch_sizes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
) -> list[dict[str, str]]:
    """Return the table rows of a base model at a resolution, without and with gradient checkpointing."""
    title = f"{name}, {resolution} px{', float32' if dtype == torch.float32 else ''}"
    one, two = (DsiRun(resolution, number, dtype) for number in (1, 2))
    encoding, rows = gib(count_encoding(base_model, one).needed), []
    for is_checkpointed in (False, True):
        first, second = (count_training(base_model, run, is_checkpointed, denoising_loss) for run in (one, two))
        row = {"base model": f"{title}{', ck' if is_checkpointed else ''}", "weights": gib(first.weights)}
        row |= {f"batch {number}": gib(at_batch(first, second, number).needed) for number in batch_sizes}
        row |= {"encoding": encoding, "pictures": gib(count_pictures(base_model, one, first.weights).needed)}
        rows.append(row)
    return rows


def at_batch(first: Phase, second: Phase, number: int) -> Phase:
    """Return a step's memory at a batch size, extrapolated from batch sizes 1 and 2."""
    added = second.activations - first.activations
    return dataclasses.replace(first, activations=first.activations + (number - 1) * added)


def write_table(text: str, path: Path = DOCS) -> None:
    """Replace the text between the two marks of a file."""
    begin, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    path.write_text(f"{begin}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main():
    args = make_parser(__doc__).parse_args()
    names, sizes = (["1.5"], (1, 2)) if args.small else (list(UNETS), BATCH_SIZES)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            base_model = write_configs(name, Path(folder) / name)
            for resolution in RESOLUTIONS[: 1 if args.small else None]:
                rows += count_rows(name, base_model, resolution, sizes)
            if name == "1.5":
                rows += count_rows(name, base_model, RESOLUTIONS[0], sizes, torch.float32)
    text = f"{BODY}\n\n{format_table(rows)}"
    print(text)
    if not args.small:
        write_table(text)


if __name__ == "__main__":
    main()
