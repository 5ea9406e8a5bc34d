"""Decoding of training images: large JPEGs only as large as their crops need."""

import io
from pathlib import Path

import datasets
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor

from utils.data.images import orientation, to_rgb

# times the model's input; then the smallest `robust` crop (60 % of the area, 3:4) is not smaller than the input
MIN_EDGE = 1.5


def open_image(value: dict) -> Image.Image:
    """Open an image of an undecoded column (`bytes`, `path`); bytes and local files are not decoded yet."""
    if value["bytes"] is not None:
        return Image.open(io.BytesIO(value["bytes"]))
    if Path(value["path"]).is_file():
        return Image.open(value["path"])
    return datasets.Image().decode_example(value)


def decode(image: Image.Image, size: tuple[int, int] | None) -> torch.Tensor:
    """Decode an opened image, upright and in RGB, `(3, height, width)` uint8, for crops that are resized to `size`.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its width and height if both stay at least `MIN_EDGE` times the larger edge
    of `size` (height, width). With a `size` of None, and for other formats, the image is decoded at full size.
    """
    if (factor := shrink_factor(image, size)) > 1:
        image.draft(None, (image.width // factor, image.height // factor))
    elif _is_plain_jpeg(image):
        image.fp.seek(0)
        # the same library as Pillow's, without its copies: 1.5 times as fast
        return decode_jpeg(torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8), ImageReadMode.RGB)
    return pil_to_tensor(to_rgb(image))


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.format == "JPEG" and image.mode == "RGB" and orientation(image) == 1


def shrink_factor(image: Image.Image, size: tuple[int, int] | None) -> int:
    """Return the factor by which `decode` divides an opened image's width and height: 1, 2, 4 or 8."""
    if size is None or image.format != "JPEG":
        return 1
    room = min(image.size) / (MIN_EDGE * max(size))
    return max(factor for factor in (1, 2, 4, 8) if factor <= max(1, room))
