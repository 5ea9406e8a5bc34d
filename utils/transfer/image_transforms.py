"""From an image file to the pixels of a random crop, in the loader's workers."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from transformers import TimmWrapperImageProcessor

from utils.data.images import to_rgb

INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # of Pillow
ROBUST_SCALE = (0.6, 1.0)  # smaller crops of few images miss what they show
DEFAULT_SCALE = (0.08, 1.0)  # torchvision's, with which the other recipes were made


@dataclass(frozen=True)
class ImageFormat:
    """What a checkpoint takes: `size` as (height, width), `mean` and `std` of pixels in [0, 1]."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


def read_image_format(image_processor) -> ImageFormat:
    """Return the image format of a checkpoint's image processor."""
    if isinstance(image_processor, TimmWrapperImageProcessor):
        config = image_processor.data_config
        size = tuple(config["input_size"][-2:])
        return ImageFormat(size, tuple(config["mean"]), tuple(config["std"]), config["interpolation"])
    config = image_processor.to_dict()
    edges = config.get("crop_size") if config.get("do_center_crop") else config["size"]
    edge = edges.get("shortest_edge")
    size = (edge, edge) if edge else (edges["height"], edges["width"])
    interpolation = INTERPOLATIONS[int(config["resample"])]
    if not config.get("do_normalize", True):
        return ImageFormat(size, (0.0,) * 3, (1.0,) * 3, interpolation)
    return ImageFormat(size, tuple(config["image_mean"]), tuple(config["image_std"]), interpolation)


def open_image(value: dict) -> Image.Image:
    """Open an image of an undecoded column (`bytes`, `path`), without decoding where it is bytes or a local file."""
    if value["bytes"] is not None:
        return Image.open(io.BytesIO(value["bytes"]))
    if Path(value["path"]).is_file():
        return Image.open(value["path"])
    return datasets.Image().decode_example(value)


class CropAndFlip:
    """Turn an opened image into a random, perhaps mirrored crop `(3, height, width)` uint8, with a policy on top.

    `augmentation` is one of `AUGMENTATIONS`; `trivialaugment` and `randaugment` are torchvision's policies.

    Source: torchvision, v2.RandomResizedCrop, TrivialAugmentWide, RandAugment.
    """

    def __init__(self, image_format: ImageFormat, augmentation: str = "robust"):
        scale = ROBUST_SCALE if augmentation == "robust" else DEFAULT_SCALE
        self.crop = v2.RandomResizedCrop(image_format.size, scale=scale)
        self.size = image_format.size
        self.interpolation = InterpolationMode(image_format.interpolation)
        policies = {"trivialaugment": v2.TrivialAugmentWide, "randaugment": v2.RandAugment}
        self.policy = policies[augmentation]() if augmentation in policies else None

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        with torch_seeded(int(rng.integers(2**63))):
            # a tensor without memory has the image's size, which is all that is asked for
            box = self.crop.make_params([torch.empty((1, image.height, image.width), device="meta")])
            pixels, box = decode_for_crop(image, **box, size=self.size)
            if self.interpolation != InterpolationMode.LANCZOS:  # which torch has not
                pixels = v2.functional.pil_to_tensor(pixels)  # resized there in a third of Pillow's time
            pixels = v2.functional.resized_crop(pixels, *box, list(self.size), self.interpolation)
            if self.interpolation == InterpolationMode.LANCZOS:
                pixels = v2.functional.pil_to_tensor(pixels)
            if rng.random() < 0.5:
                pixels = pixels.flip(-1)
            return self.policy(pixels) if self.policy else pixels


def decode_for_crop(
    image: Image.Image, top: int, left: int, height: int, width: int, size: tuple[int, int]
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """Decode an opened image, upright and in RGB; return it with the crop's box (top, left, height, width) in it.

    A JPEG is decoded at a half, a quarter or an eighth of its size where the crop is still no smaller than `size`.
    """
    full_width, full_height = image.size
    shrink = min(height / size[0], width / size[1])
    if image.format == "JPEG" and shrink >= 2:
        image.draft(None, (int(full_width / shrink), int(full_height / shrink)))
    image = to_rgb(image)
    if (full_width - full_height) * (image.width - image.height) < 0:  # turned upright: so is the crop
        full_width, full_height = full_height, full_width
        top, left, height, width = left, top, width, height
    down, across = image.height / full_height, image.width / full_width
    top, left = int(top * down), int(left * across)
    height = min(max(1, round(height * down)), image.height - top)
    width = min(max(1, round(width * across)), image.width - left)
    return image, (top, left, height, width)


@contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for a while: a hundredth of the time of `torch.random.fork_rng` and `manual_seed`."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
