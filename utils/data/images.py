"""Converts images of any mode to RGB, and to the arrays for diffusion models."""

import re
import warnings
from collections.abc import Mapping

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

try:
    import pillow_heif
except ImportError:
    pass  # HEIC files in class folders are then left out and reported
else:
    pillow_heif.register_heif_opener()  # here, as every process that reads images imports this module

# Pillow warns of each image between this limit and its double, which is an error; `describe_reading` reports it once
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

TOO_LARGE = "too large"
# Grey of more than 8 bits does not define white: the maximum of 8, 10, 12 or 16 bits. Not of 14: many 16-bit photos are
# no brighter, and a 14-bit photo is still visible when read as 16 bits
POSSIBLE_WHITES = (255, 1_023, 4_095, 65_535)
BELOW_ZERO = -0.1  # less negative values in a floating-point image come from resizing, not from a range [-1, 1]

# TIFF tags
BITS_PER_SAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLE_FORMAT = 258, 262, 339
LOWEST_TAGS, HIGHEST_TAGS = (340, 280), (341, 281)  # (S)MinSampleValue, (S)MaxSampleValue


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an upright RGB image: grey of more than 8 bits is scaled, transparency is blended with white.

    White is what a TIFF file declares (MaxSampleValue, or fewer than 16 bits), else the first of `POSSIBLE_WHITES` (for
    floating point, 1 comes first) that no pixel exceeds, else the brightest pixel. Floating point from -1 to 1 is
    scaled from -1; other negative, infinite and NaN values are black. Pillow reads the upper 8 of 16 bits of colour; of
    several frames the first is used. Unreadable EXIF is ignored.
    """
    image.load()  # otherwise the next lines would take a truncated file for unreadable EXIF
    grey_range = _grey_range(image) if _is_deep_grey(image) else None
    # Pillow inverts 8-bit images itself
    is_inverted = grey_range and getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == 0
    image = _upright(image)
    if grey_range:
        image = _scale_grey(image, *grey_range[:2])
        image = ImageOps.invert(image) if is_inverted else image
    if image.mode == "La":  # the only conversion that Pillow has
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        image = canvas
    return image.convert("RGB")


def describe_reading(image: Image.Image) -> str | None:
    """Return a note on how `to_rgb` reads an image (opened, not loaded), None for most.

    Images of a kind get the same note, to be counted: "12 images " and the note.
    """
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or np.inf):
        return f"of more than {Image.MAX_IMAGE_PIXELS:,} pixels, which take much time and memory"
    is_deep_colour = any(";16" in str(tile.args) for tile in image.tile)  # gone once it is loaded
    if _is_deep_grey(image):
        image.load()
        return _grey_range(image)[2]
    if is_deep_colour and max(high for _, high in image.convert("RGB").getextrema()) < 64:
        return "in colour of 16 bits a channel, of which the upper 2 or more are unused: they are read as nearly black"
    return None


def describe_error(error: Exception) -> str:
    """Return in a few words why an image cannot be opened, from Pillow's exception."""
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    if isinstance(error, Image.DecompressionBombError):
        size, limit = map(int, re.findall(r"\d+", str(error))[:2])
        return f"{TOO_LARGE}: {size:,} pixels, more than the {limit:,} that Pillow opens, the decompression bomb limit"
    return str(error) or type(error).__name__


def orientation(image: Image.Image) -> int:
    """Return EXIF's orientation of an opened image, 1 (upright) to 8; only its header is read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as in `_upright`
        return 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of an opened image after `to_rgb`; reads only its header."""
    width, height = image.size
    is_turned = image.format != "TIFF" and orientation(image) in (5, 6, 7, 8)  # the size of a TIFF is the upright one
    return (height, width) if is_turned else (width, height)


def centre_square(image: Image.Image, resolution: int) -> Image.Image:
    """Return the image's central square, resized to `resolution` pixels a side."""
    return ImageOps.fit(to_rgb(image), (resolution, resolution), method=Image.Resampling.LANCZOS)


def to_model_range(images: list[Image.Image]) -> np.ndarray:
    """Return square RGB images as `(batch, 3, height, width)` float32 in [-1, 1]."""
    stacked = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return stacked.transpose(0, 3, 1, 2) / 127.5 - 1


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises almost any exception for malformed EXIF; the image itself is loaded
        return image


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _grey_range(image: Image.Image) -> tuple[float, float, str | None]:
    """Return the black and white values of a loaded grey image, and a note if they are a guess."""
    values = np.asarray(image)
    values = values[np.isfinite(values)]
    darkest, brightest = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    tags = getattr(image, "tag_v2", {})
    declared = _declared_range(tags, image.mode)
    if declared and brightest <= declared[1]:
        return *declared, None
    what = "of more than 8 bits a channel, read with"
    if image.mode == "F" and -1 <= darkest < BELOW_ZERO and brightest <= 1:
        return -1, 1, f"{what} -1 as black and 1 as white"
    is_signed = tags.get(SAMPLE_FORMAT) == (2,) and tags.get(BITS_PER_SAMPLE) == (16,)
    full = 32_767 if is_signed else POSSIBLE_WHITES[-1]
    whites = (*((1,) if image.mode == "F" else ()), *POSSIBLE_WHITES[:-1], full)
    white = next((white for white in whites if brightest <= white), None)
    what = f"{what} 0 as black and {'the brightest pixel' if white is None else f'{white:,}'} as white"
    if white == full and darkest >= 0:
        return 0, white, f"{what}, though no pixel is a quarter as bright" if brightest < white / 4 else None
    return 0, white or brightest, what


def _declared_range(tags: Mapping[int, object], mode: str) -> tuple[float, float] | None:
    """Return the black and white values that a TIFF file's tags declare.

    MaxSampleValue is often just the image's brightest value: for integers it counts if it is the maximum of a number of
    bits, for floating point if there is a MinSampleValue too.
    """
    low, high = (
        next((_number(tags[tag]) for tag in names if tag in tags), None) for names in (LOWEST_TAGS, HIGHEST_TAGS)
    )
    bits = _number(tags.get(BITS_PER_SAMPLE))
    if mode == "F":
        return (low, high) if low is not None and high is not None and low < high else None
    if bits and bits < 16:
        return 0, 2**bits - 1
    return (0, high) if high is not None and high >= 255 and np.log2(high + 1) % 1 == 0 else None


def _number(value: object) -> float | None:
    try:
        number = float(np.max(value))
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


def _scale_grey(image: Image.Image, black: float, white: float) -> Image.Image:
    """Return 8-bit grey."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=black, posinf=black, neginf=black)
    return Image.fromarray(np.rint(((values - black) / (white - black)).clip(0, 1) * 255).astype(np.uint8))
