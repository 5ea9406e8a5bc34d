"""Fixtures: a local Hub in place of the network, tiny models of the real classes, a small labelled image set."""

import atexit
import os
import tempfile
from pathlib import Path

from tests.local_hub import LocalHub

# Before anything of Hugging Face is imported: the clients read their environment once.
_work_dir = tempfile.TemporaryDirectory(prefix="tests-")
_hub = LocalHub(Path(_work_dir.name) / "hub", lfs_threshold=2**20)
_hub.__enter__()
atexit.register(_hub.__exit__)
_environment = _hub.environment(Path(_work_dir.name) / "hf-home") | {"TOKENIZERS_PARALLELISM": "false"}
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


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory):
    """A saved `StableDiffusionPipeline` of the real classes at tiny size: 32 pixels, random weights, v-prediction."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-pipeline"
    folder.mkdir()
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789-_<>.,/")
    merges = [("s", "t"), ("st", "y"), ("sty", "l"), ("styl", "e</w>")]
    vocabulary = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    tokenizer = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77)
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, projection_dim=16, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, layers_per_block=1, sample_size=32,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1, clip_sample=False
    )
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder
