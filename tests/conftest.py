"""Fixtures: a local Hub in place of the network, tiny models of the real classes, a small labelled image set."""

import atexit
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from tests.local_hub import LocalHub

# Before anything of Hugging Face is imported: the clients read their environment once.
_work_dir = tempfile.TemporaryDirectory(prefix="tests-")
_hub = LocalHub(Path(_work_dir.name) / "hub", lfs_threshold=2**20)
_hub.__enter__()
atexit.register(_hub.__exit__)
_environment = _hub.environment(Path(_work_dir.name) / "hf-home") | {"TOKENIZERS_PARALLELISM": "false"}
# as under `accelerate launch`: two threads on cores that others use wait for each other
_environment["OMP_NUM_THREADS"] = "1"
os.environ.clear()
os.environ.update(_environment)

import json

import numpy as np
import pytest
from PIL import Image as PILImage

CLASS_NAMES = ["red_square", "green circle", "blue-stripe"]


@pytest.fixture(scope="session")
def local_hub_server():
    """The session's Hub, which the clients in this process talk to as well."""
    return _hub


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Reset what `Accelerator` keeps between runs in one process (LIBRARIES: in-process tests must)."""
    from accelerate.state import AcceleratorState, PartialState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def draw_image(label: int, rng: np.random.Generator) -> PILImage.Image:
    """Return a 32-pixel image of a class: its own colour and shape at a random place, on noise."""
    pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
    top, left = rng.integers(2, 14, 2)
    rows, columns = np.mgrid[:32, :32]
    square = (rows >= top) & (rows < top + 14) & (columns >= left) & (columns < left + 14)
    circle = (rows - top - 7) ** 2 + (columns - left - 7) ** 2 < 49
    stripe = (rows >= top) & (rows < top + 6)
    pixels[(square, circle, stripe)[label], label] = 230
    return PILImage.fromarray(pixels)


def save_image_set(folder, splits: dict[str, int], class_names=tuple(CLASS_NAMES)) -> None:
    """Write a labelled parquet folder with `splits[name]` images of each class."""
    from datasets import ClassLabel, Dataset, Features, Image

    features = Features({"image": Image(), "label": ClassLabel(names=list(class_names))})
    rng = np.random.default_rng(0)
    for split, per_class in splits.items():
        labels = [label for _ in range(per_class) for label in range(len(class_names))]
        rows = {"image": [draw_image(label, rng) for label in labels], "label": labels}
        (folder / "data").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{split}-00000.parquet")


@pytest.fixture(scope="session")
def real_images_dir(tmp_path_factory):
    """A labelled folder: three classes, 20 training and 10 test images of each, 32 pixels."""
    folder = tmp_path_factory.mktemp("data") / "real-images"
    save_image_set(folder, {"train": 20, "test": 10})
    return folder


def save_tiny_tokenizer(folder):
    """Return a `CLIPTokenizer` with the alphabet and one word, 'style', made from files in `folder`."""
    from transformers import CLIPTokenizer

    folder.mkdir()
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789-_<>.,/")
    merges = [("s", "t"), ("st", "y"), ("sty", "l"), ("styl", "e</w>")]
    vocabulary = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77)


def tiny_text_config(tokenizer, **settings):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        **{
            "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "projection_dim": 16, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **settings,
        }
    )  # fmt: skip


def tiny_vae(**settings):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, layers_per_block=1, sample_size=32, **settings,
    )  # fmt: skip


def tiny_unet(**settings):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **settings,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory):
    """A saved `StableDiffusionPipeline` of the real classes at tiny size: 32 pixels, random weights, v-prediction."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    folder = tmp_path_factory.mktemp("models") / "tiny-pipeline"
    tokenizer = save_tiny_tokenizer(folder)
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(tiny_text_config(tokenizer))
    vae, unet = tiny_vae(), tiny_unet(cross_attention_dim=16)
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1, clip_sample=False
    )
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_xl_pipeline_dir(tmp_path_factory):
    """A saved `StableDiffusionXLPipeline` of the real classes at tiny size: 32 pixels, random weights, epsilon.

    Its second text encoder pools at the largest token id (`eos_token_id` 2), as that of the published model does.
    """
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder = tmp_path_factory.mktemp("models") / "tiny-xl-pipeline"
    tokenizer = save_tiny_tokenizer(folder)
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2}
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_text_config(tokenizer, **layers)),
        text_encoder_2=CLIPTextModelWithProjection(
            tiny_text_config(tokenizer, **layers, hidden_size=24, projection_dim=8, eos_token_id=2)
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=tiny_unet(
            cross_attention_dim=40, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=8 + 6 * 4,
        ),
        scheduler=EulerDiscreteScheduler(),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def tiny_t5():
    """Return a `T5Tokenizer` of single letters and a T5 encoder, 32 numbers wide."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789-_<>.,/"]
    tokenizer = T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_ff=32, d_kv=16, num_heads=2, num_layers=1,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return tokenizer, T5EncoderModel(config)


@pytest.fixture(scope="session")
def tiny_sd3_pipeline_dir(tmp_path_factory):
    """A saved `StableDiffusion3Pipeline` of the real classes at tiny size: 32 pixels, random weights, T5 as well."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    folder = tmp_path_factory.mktemp("models") / "tiny-sd3-pipeline"
    tokenizer = save_tiny_tokenizer(folder)
    torch.manual_seed(0)
    t5_tokenizer, t5 = tiny_t5()
    text_config = tiny_text_config(tokenizer, num_hidden_layers=2)
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(text_config),
        text_encoder_2=CLIPTextModelWithProjection(text_config),
        text_encoder_3=t5,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_flux_pipeline_dir(tmp_path_factory):
    """A saved `FluxPipeline` of the real classes at tiny size: random weights, guidance embedded as in FLUX.1-dev."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    folder = tmp_path_factory.mktemp("models") / "tiny-flux-pipeline"
    tokenizer = save_tiny_tokenizer(folder)
    torch.manual_seed(0)
    t5_tokenizer, t5 = tiny_t5()
    pipe = FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(tiny_text_config(tokenizer)),
        text_encoder_2=t5,
        tokenizer=tokenizer,
        tokenizer_2=t5_tokenizer,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


@contextmanager
def blank_figures():
    """Let figures be made as ever, and saved as a single pixel: to draw one takes longer than a tiny model's work."""
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **_: PILImage.new("RGB", (1, 1)).save(path))
        yield


def read_rows(folder) -> list:
    """Return the learned rows `(num_vectors, dim)` of each text encoder in a token's folder."""
    from utils.style.token import LEARNED_EMBEDS, load_learned_embeds

    return load_learned_embeds(folder / LEARNED_EMBEDS)
