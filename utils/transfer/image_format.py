"""The image processor of a checkpoint: its pixels for evaluation, and their format for training.

The processor is measured on images of one colour, ramps and noise. Training repeats its work by a crop, a resize and a
normalisation; if these do not give the same pixels, training calls the processor itself.
"""

import dataclasses
import functools
import logging
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from utils.cli.errors import UserError
from utils.data.images import to_rgb

logger = logging.getLogger(__name__)

INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "nearest-exact", "box", "hamming")
OF_PILLOW = ("lanczos", "box", "hamming")  # interpolations that only PIL images have
# in levels of 255: Pillow's and torch's rounding differ by 1, another interpolation by 15 and more
TOLERANCE = 2.0
# pixels of the result; this close to the edge of a crop, the processor's interpolation includes pixels beyond it
EDGE = 3
SCALE = 3  # pixels of a test image per pixel of the result; odd, so that the nearest one is in the middle
RAMP_NOISE = 8
COLOURS = 255 * np.array([(0, 0, 0), (1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], dtype=np.uint8)
LANDSCAPE, PORTRAIT = (48, 144), (144, 48)  # elongated, to detect padding


@dataclass(frozen=True)
class ImageFormat:
    """The input format of a checkpoint, from `read_image_format`: `size` (height, width) and normalisation.

    `mean` and `std` are for the output's channels, with pixels in [0, 1]; `channels` are the RGB channels in the
    output's order. `processor` is set if a crop, a resize and a normalisation do not give the processor's pixels.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.0,) * 3
    std: tuple[float, ...] = (1.0,) * 3
    interpolation: str = "bilinear"
    channels: tuple[int, ...] = (0, 1, 2)
    processor: object | None = None

    @property
    def crop_size(self) -> tuple[int, int] | None:
        """The size to which training resizes a crop; None if it needs the image's own pixels.

        That is the case with a `processor`, which may crop, and for nearest neighbours, as a smaller image is smoother.
        """
        return None if self.processor is not None or self.interpolation == "nearest-exact" else self.size


def process(image_processor, image: Image.Image) -> torch.Tensor:
    """Return the output of an image processor for an RGB image, `(3, height, width)` float32."""
    # without rescaling and normalisation, the output is bytes, which convolutions do not take
    return image_processor(image, return_tensors="pt")["pixel_values"][0].float()


def normalise(images: torch.Tensor, image_format: ImageFormat) -> torch.Tensor:
    """Normalise images `(batch, 3, height, width)` in [0, 1] for the checkpoint, in place, and return them."""
    if image_format.channels != (0, 1, 2):
        images = images[:, list(image_format.channels)]
    return v2.functional.normalize(images, image_format.mean, image_format.std, inplace=True)


def cut(image: torch.Tensor, box: tuple[int, int, int, int], size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """Return a box (top, left, height, width) of an RGB image `(3, height, width)` uint8, resized to `size`."""
    if interpolation in OF_PILLOW:
        picture = to_pil_image(image)
        return pil_to_tensor(v2.functional.resized_crop(picture, *box, list(size), InterpolationMode(interpolation)))
    return v2.functional.resized_crop(image, *box, list(size), InterpolationMode(interpolation))


class EvalImages(torch.utils.data.Dataset):
    """Images processed by the checkpoint's image processor, so that a pipeline reproduces the measured accuracy."""

    def __init__(self, images: datasets.Dataset, image_processor):
        self.images = images
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        row = self.images[index]  # IndexError at the end stops iteration
        return {"pixel_values": process(self.image_processor, to_rgb(row["image"])), "labels": row["label"]}


def check_image_processor(image_processor, name: str) -> None:
    """Check that a checkpoint's image processor returns `(3, height, width)`, of the same size for any image.

    Raises:
        UserError: it does not.
    """
    made = [_describe_result(image_processor, size) for size in (LANDSCAPE, PORTRAIT)]
    if made[0] != made[1] or not made[0].startswith("pixel_values 1 x 3 x"):
        raise UserError(
            f"--model_name_or_path {name}: its image processor returns {' or '.join(dict.fromkeys(made))} for an "
            "image; must be pixel_values 1 x 3 x height x width, of a fixed size."
        )


def _describe_result(image_processor, size: tuple[int, int]) -> str:
    try:
        features = image_processor(Image.fromarray(_noise(size)), return_tensors="pt")
    except (ValueError, TypeError, KeyError, RuntimeError) as error:  # its settings are inconsistent
        return f"nothing ({error})"
    name = "pixel_values" if "pixel_values" in features else next(iter(features))
    return " ".join([name, " x ".join(map(str, np.shape(features[name])))])


@functools.lru_cache(maxsize=8)
def read_image_format(image_processor) -> ImageFormat:
    """Return the format with which training repeats an image processor, checked on an image of noise.

    If the pixels differ, the format contains the processor itself, and a warning says so.
    """
    size = tuple(process(image_processor, Image.fromarray(_noise(LANDSCAPE))).shape[1:])
    image_format = _measure(image_processor, size)
    if image_format is None:
        logger.warning(
            f"{type(image_processor).__name__} does more than crop, resize and normalise (perhaps padding); training "
            "calls it for every image, which is slower."
        )
        return ImageFormat(size, processor=image_processor)
    return image_format


def _measure(image_processor, size: tuple[int, int]) -> ImageFormat | None:
    plain = _measure_values(image_processor, size)
    if plain is None:
        return None
    picture_size = tuple(SCALE * edge for edge in size)
    shown = [_measure_range(image_processor, plain, picture_size, axis) for axis in (0, 1)]
    if not all(edge / 8 < extent < edge + 2 for edge, (_, extent) in zip(picture_size, shown)):
        return None  # turned, or warped
    # at exactly this scale, the edges of the crop fall between pixels
    picture_size = tuple(
        SCALE * round(edge * whole / extent) for edge, whole, (_, extent) in zip(size, picture_size, shown)
    )
    middles = [_measure_range(image_processor, plain, picture_size, axis)[0] for axis in (0, 1)]
    top, left = (max(0, round(middle - SCALE * edge / 2)) for middle, edge in zip(middles, size))
    box = (top, left, SCALE * size[0], SCALE * size[1])
    return _find_interpolation(image_processor, plain, picture_size, box)


def _measure_values(image_processor, size: tuple[int, int]) -> ImageFormat | None:
    """Return the format from images of one colour, or None if the pixels of an output are not all equal."""
    pictures = [Image.fromarray(np.full((*LANDSCAPE, 3), colour)) for colour in COLOURS]
    made = torch.stack([process(image_processor, picture) for picture in pictures]).double()
    black, white, *primaries = made.mean((2, 3))
    channels = (torch.stack(primaries) - black).abs().argmax(0)
    scale = white - black
    expected = black + scale * (torch.from_numpy(COLOURS)[:, channels] / 255)
    errors = (made - expected[:, :, None, None]).abs() / scale.abs()[:, None, None]
    if not errors.max() < 1e-4:  # also if one is NaN
        return None
    mean, std = -black / scale, 1 / scale
    return ImageFormat(size, tuple(mean.tolist()), tuple(std.tolist()), channels=tuple(channels.tolist()))


def _measure_range(image_processor, plain: ImageFormat, size: tuple[int, int], axis: int) -> tuple[float, float]:
    """Return middle and extent of the crop on one axis of an image, in its pixels, measured by a ramp of grey."""
    # greys are integers before and after; with noise, their means take all values in between
    noise = np.random.default_rng(0).random((size[axis], size[1 - axis]), dtype=np.float32)
    first, last = RAMP_NOISE, 255 - RAMP_NOISE
    ramp = np.linspace(first, last, size[axis], dtype=np.float32)[:, None] + RAMP_NOISE * (noise - 0.5)
    ramp = np.rint(ramp).astype(np.uint8)
    picture = Image.fromarray(ramp if axis == 0 else ramp.T.copy()).convert("RGB")
    mean, std = (torch.tensor(values)[:, None, None] for values in (plain.mean, plain.std))
    greys = 255 * (process(image_processor, picture) * std + mean).mean((0, 2 - axis)).double().numpy()
    places = (greys - first) / (last - first) * (size[axis] - 1)
    inner = slice(len(places) // 8, len(places) - len(places) // 8)
    slope, start = np.polyfit(np.arange(len(places))[inner], places[inner], 1)
    return start + (slope * (len(places) - 1) + 1) / 2, slope * len(places)


def _find_interpolation(
    image_processor, plain: ImageFormat, size: tuple[int, int], box: tuple[int, int, int, int]
) -> ImageFormat | None:
    """Return the format with the interpolation that gives the processor's pixels for a box of noise, or None."""
    picture = Image.fromarray(_noise(size))
    wanted, pixels = process(image_processor, picture), pil_to_tensor(picture)
    errors = {}
    for interpolation in INTERPOLATIONS:
        image_format = dataclasses.replace(plain, interpolation=interpolation)
        made = normalise(cut(pixels, box, plain.size, interpolation)[None] / 255, image_format)[0]
        errors[image_format] = _largest_error(made, wanted, plain)
    best = min(errors, key=errors.get)
    return best if errors[best] <= TOLERANCE else None


def _largest_error(made: torch.Tensor, wanted: torch.Tensor, image_format: ImageFormat) -> float:
    """Return the largest difference away from the edges, in levels of 255."""
    levels = (made - wanted).abs() * torch.tensor(image_format.std).abs()[:, None, None] * 255
    rows, columns = (min(EDGE, (edge - 1) // 2) for edge in image_format.size)
    levels = levels[:, rows : levels.shape[1] - rows, columns : levels.shape[2] - columns]
    return float(levels.max().nan_to_num(nan=torch.inf))


def _noise(size: tuple[int, int]) -> np.ndarray:
    """Return coloured noise `(height, width, 3)`, the same at every call."""
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
