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

from utils.data.images import to_rgb

OF_PILLOW = ("lanczos", "box", "hamming")  # interpolations of pictures, not of tensors
ROBUST_SCALE = (0.6, 1.0)  # smaller crops of few images miss what they show
DEFAULT_SCALE = (0.08, 1.0)  # torchvision's, with which the other recipes were made


@dataclass(frozen=True)
class ImageFormat:
    """What a checkpoint takes (`image_format` measures it): `size` as (height, width), and how values are normalised.

    `mean` and `std` belong to the output's channels, of pixels in [0, 1]; `channels` are the RGB channels that these
    show. Where a crop cannot be resized and normalised as the image processor does it, there is the `processor` itself.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.0,) * 3
    std: tuple[float, ...] = (1.0,) * 3
    interpolation: str = "bilinear"
    channels: tuple[int, ...] = (0, 1, 2)
    processor: object | None = None


def process(image_processor, image: Image.Image) -> torch.Tensor:
    """Return the pixels that an image processor makes of an RGB image, `(3, height, width)` float32."""
    # one that neither rescales nor normalises gives bytes, which no convolution takes
    return image_processor(image, return_tensors="pt")["pixel_values"][0].float()


def normalise(images: torch.Tensor, image_format: ImageFormat) -> torch.Tensor:
    """Return images `(batch, 3, height, width)` in [0, 1] as the checkpoint takes them, changed in place."""
    if image_format.channels != (0, 1, 2):
        images = images[:, list(image_format.channels)]
    return v2.functional.normalize(images, image_format.mean, image_format.std, inplace=True)


def open_image(value: dict) -> Image.Image:
    """Open an image of an undecoded column (`bytes`, `path`), without decoding where it is bytes or a local file."""
    if value["bytes"] is not None:
        return Image.open(io.BytesIO(value["bytes"]))
    if Path(value["path"]).is_file():
        return Image.open(value["path"])
    return datasets.Image().decode_example(value)


class CropAndFlip:
    """Turn an opened image into a random, perhaps mirrored crop `(3, height, width)` uint8, with a policy on top.

    `augmentation` is one of `AUGMENTATIONS`; `trivialaugment` and `randaugment` are torchvision's policies, which never
    mirror. Without `random_flip` nothing else changes. A crop for the checkpoint's own processor keeps its shape.

    Source: torchvision, v2.RandomResizedCrop, TrivialAugmentWide, RandAugment.
    """

    def __init__(self, image_format: ImageFormat, augmentation: str = "robust", random_flip: bool = True):
        scale = ROBUST_SCALE if augmentation == "robust" else DEFAULT_SCALE
        self.crop = v2.RandomResizedCrop(image_format.size, scale=scale)
        self.size = image_format.size
        self.keeps_shape = image_format.processor is not None
        self.interpolation = image_format.interpolation
        self.random_flip = random_flip
        policies = {"trivialaugment": v2.TrivialAugmentWide, "randaugment": v2.RandAugment}
        self.policy = policies[augmentation]() if augmentation in policies else None

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        with torch_seeded(int(rng.integers(2**63))):
            # a tensor without memory has the image's size, which is all that is asked for
            box = self.crop.make_params([torch.empty((1, image.height, image.width), device="meta")])
            # the processor may cut pixels out, and a smaller image is smoother than single pixels of the whole
            is_whole = self.keeps_shape or self.interpolation == "nearest-exact"
            image, box = decode_for_crop(image, **box, size=(image.height, image.width) if is_whole else self.size)
            size = tuple(max(3, edge) for edge in box[2:]) if self.keeps_shape else self.size  # 3 are needed to sharpen
            pixels = cut(image, box, size, self.interpolation)
            is_mirrored = rng.random() < 0.5  # drawn in any case: what is drawn after it stays the same
            if is_mirrored and self.random_flip:
                pixels = pixels.flip(-1)
            return self.policy(pixels) if self.policy else pixels


def cut(image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """Return a box (top, left, height, width) of an RGB image, resized to `size`, `(3, height, width)` uint8."""
    if interpolation in OF_PILLOW:
        return v2.functional.pil_to_tensor(
            v2.functional.resized_crop(image, *box, list(size), InterpolationMode(interpolation))
        )
    pixels = v2.functional.pil_to_tensor(image)  # resized there in a third of Pillow's time
    return v2.functional.resized_crop(pixels, *box, list(size), InterpolationMode(interpolation))


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
