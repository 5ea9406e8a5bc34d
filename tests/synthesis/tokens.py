"""Shared by the tests of synthesis: style tokens as train_dsi.py writes them, generators, hashes of a set."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.conftest import CLASS_NAMES
from utils.cli.records import write_record
from utils.synthesis.generators import Generator, open_generator

PLACEHOLDER = "<dsi-style>"
NOUNS = ["red square", "green circle", "blue-stripe"]


def save_token(folder, pipeline_dir, real_images_dir, dims=(16,), num_vectors=1, **changes):
    """Write the files of train_dsi.py, with a large random token; `dims` are the sizes of the text encoders."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    names = [PLACEHOLDER] if len(dims) == 1 else ["clip_l", "clip_g"]
    rows = {name: torch.randn(num_vectors, dim, generator=generator) * 3 for name, dim in zip(names, dims)}
    save_file(rows, folder / "learned_embeds.safetensors")
    record = {
        "base_model": {"id": str(pipeline_dir), "revision": None},
        "real_images": {"dataset_name": str(real_images_dir), "dataset_revision": None},
        "train_indices": [0, 3, 5],
        "class_names": CLASS_NAMES,
        "prompt_nouns": NOUNS,
        "prompt_templates": ["A {class} photo in the style of {token}"],
        "placeholder_token": PLACEHOLDER,
        "num_vectors": num_vectors,
        "resolution": 32,
    }
    write_record(folder / "dsi_config.json", record | changes)
    return folder


def shard_hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("data/*"))}


def open_folder(folder: Path) -> Generator:
    return open_generator(str(folder), "--model", None, None)
