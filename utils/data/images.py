"""Images of any mode into RGB, and into the tensors that diffusion models take."""

import re
import warnings
from collections.abc import Mapping

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

try:
    import pillow_heif
except ImportError:
    pass  # HEIC is left out of class folders, and named
else:
    pillow_heif.register_heif_opener()  # here, as every process that reads images imports this module

# between this limit and its double, where it stops, Pillow warns of each image: `describe_reading` says it once
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

TOO_LARGE = "too large"
# Grey of more than 8 bits does not say how bright white is: all of 8, 10, 12 or 16 bits. Not of 14: many a photo of 16
# bits is no brighter, and one of 14 can still be seen when it is read as of 16
POSSIBLE_WHITES = (255, 1_023, 4_095, 65_535)
BELOW_ZERO = -0.1  # what is less negative in a floating-point image comes from resizing it, not from a range [-1, 1]

# of TIFF
BITS_PER_SAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLE_FORMAT = 258, 262, 339
LOWEST_TAGS, HIGHEST_TAGS = (340, 280), (341, 281)  # (S)MinSampleValue, (S)MaxSampleValue


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an upright RGB image: more than 8 bits of grey are scaled, transparency is laid on white.

    White of such grey is what a TIFF file says (MaxSampleValue, or fewer than 16 bits), else the first of
    `POSSIBLE_WHITES` (in floating point 1 before them) that no pixel exceeds, else the brightest pixel. Floating point
    from -1 to 1 is scaled from -1; other values below 0, infinite ones and those that are not a number are black. Of
    colour of 16 bits a channel Pillow reads the upper 8, of several frames the first is taken. EXIF that cannot be read
    is ignored.
    """
    image.load()  # or the next lines would take a truncated file for unreadable EXIF
    grey_range = _grey_range(image) if _is_deep_grey(image) else None
    # Pillow inverts 8 bits itself
    is_inverted = grey_range and getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == 0
    image = _upright(image)
    if grey_range:
        image = _scale_grey(image, *grey_range[:2])
        image = ImageOps.invert(image) if is_inverted else image
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        image = canvas
    return image.convert("RGB")


def describe_reading(image: Image.Image) -> str | None:
    """Return what is to be said of how `to_rgb` reads an opened image that is not loaded yet, None for most.

    The words are the same for all images of a kind, so that these can be counted: "12 images " and the words.
    """
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or np.inf):
        return f"of more than {Image.MAX_IMAGE_PIXELS:,} pixels, which take much time and memory"
    is_deep_colour = any(";16" in str(tile.args) for tile in image.tile)  # gone once it is loaded
    if _is_deep_grey(image):
        image.load()
        return _grey_range(image)[2]
    if is_deep_colour and max(high for _, high in image.convert("RGB").getextrema()) < 64:
        return (
            "in colour of 16 bits a channel, of which the upper 2 or more are not used: they are read as nearly black"
        )
    return None


def describe_error(error: Exception) -> str:
    """Return in a few words why an image does not open, for what Pillow raised."""
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
    """Return width and height of an opened image as `to_rgb` turns it; only its header is read."""
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
    except Exception:  # on malformed EXIF Pillow raises nearly anything; the image itself is loaded
        return image


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _grey_range(image: Image.Image) -> tuple[float, float, str | None]:
    """Return the values of black and of white of a loaded grey image, and what is to be said where they are a guess."""
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
    """Return the values of black and of white as the tags of a TIFF file say them.

    MaxSampleValue is often the brightest value of this one image: it is taken for integers where it is all of some
    number of bits, for floating point where there is a MinSampleValue too.
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
