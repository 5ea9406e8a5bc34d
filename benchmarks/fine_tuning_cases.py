"""Inputs of fine_tuning_speed: JPEGs of the size of photographs, classifiers with random weights."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from benchmarks.image_sets import write_shard

CLASS_NAMES = ["steep", "rising", "flat", "falling"]
IMAGE_SIZE = (500, 375)
NUM_TEST_IMAGES = 200


@dataclass(frozen=True)
class Case:
    """The inputs of both scripts."""

    name: str
    model_dir: Path
    images_dir: Path
    batch_size: int
    num_steps: int
    num_workers: int
    learning_rate: float
    bf16: bool = False


def write_photos(folder: Path, num_images: int, num_distinct: int | None = None) -> Path:
    """Write a labelled parquet set of JPEGs of the size of photographs; the direction of their stripes is the class.

    With `num_distinct`, a multiple of the number of classes, this many are drawn and then repeated.
    """
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[: IMAGE_SIZE[1], : IMAGE_SIZE[0]]

    def photo(label: int) -> bytes:
        angle = np.pi * (label / len(CLASS_NAMES) + rng.uniform(0, 0.1))
        stripes = np.sin((rows * np.cos(angle) + columns * np.sin(angle)) / rng.uniform(8, 16) + rng.uniform(0, 6))
        coarse = rng.normal(size=(25, 25, 3)).repeat(15, 0).repeat(20, 1)
        pixels = 128 + 40 * stripes[:, :, None] + 20 * coarse + 12 * rng.normal(size=(*rows.shape, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=90)
        return file.getvalue()

    for split, number in {"train": num_images, "validation": 8, "test": NUM_TEST_IMAGES}.items():
        labels = [index % len(CLASS_NAMES) for index in range(number)]
        photos = [(photo(label), label) for label in labels[:num_distinct]]
        write_shard(folder, f"{split}-00000", [photos[index % len(photos)] for index in range(number)], CLASS_NAMES)
    return folder


def save_model(folder: Path, architecture: str) -> Path:
    """Write a classifier with random weights: `resnet18`, `vit_b16`, or `tiny` for a test."""
    torch.manual_seed(0)
    if architecture == "vit_b16":
        ViTForImageClassification(ViTConfig(num_labels=10)).save_pretrained(folder)
        ViTImageProcessor().save_pretrained(folder)
        return folder
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    if architecture == "resnet18":
        sizes = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    config = ResNetConfig(**sizes, layer_type="basic", num_labels=10)
    ResNetForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 224 if architecture == "resnet18" else 64}).save_pretrained(folder)
    return folder


def make_cases(
    work_dir: Path, device: str, small: bool, num_workers: int, num_distinct: int | None = None
) -> list[Case]:
    """Return the cases for a device; `num_distinct` is as in `write_photos`."""
    if small:
        images_dir = write_photos(work_dir / "images", 64, num_distinct)
        model_dir = save_model(work_dir / "tiny", "tiny")
        return [Case("A test's size, 64 px, batch 8", model_dir, images_dir, 8, 8, num_workers, 1e-3)]
    if device == "cpu":
        images_dir = write_photos(work_dir / "images", 640, num_distinct)
        model_dir = save_model(work_dir / "resnet18", "resnet18")
        name = f"ResNet-18, 224 px, batch 32, float32, {num_workers} loader workers"
        return [Case(name, model_dir, images_dir, 32, 40, num_workers, 1e-3)]
    images_dir = write_photos(work_dir / "images", 8_192, num_distinct)
    return [
        Case(
            f"{title}, 224 px, batch 128, bfloat16, {num_workers} loader workers",
            save_model(work_dir / architecture, architecture), images_dir, 128, num_steps, num_workers, learning_rate,
            bf16=True,
        )
        for title, architecture, num_steps, learning_rate in (
            ("ResNet-18", "resnet18", 256, 1e-3),
            ("ViT-B/16", "vit_b16", 128, 1e-4),
        )
    ]  # fmt: skip
