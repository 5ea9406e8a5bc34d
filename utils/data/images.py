"""Images of any mode into RGB, and into the tensors that diffusion models take."""

import numpy as np
from PIL import Image, ImageOps

try:
    import pillow_heif
except ImportError:
    pass  # HEIC is left out of class folders, and named
else:
    pillow_heif.register_heif_opener()  # here, as every process that reads images imports this module

# `I` and `F` do not say how bright white is
POSSIBLE_WHITES = {"I": (255, 65_535), "F": (1, 255, 65_535)}


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an upright RGB image: grey of more than 8 bits is scaled, transparency is laid on white.

    EXIF that cannot be read is ignored.
    """
    image.load()  # or the next line would take a truncated file for unreadable EXIF
    image = _upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _scale_grey(image)
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        image = canvas
    return image.convert("RGB")


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


def _scale_grey(image: Image.Image) -> Image.Image:
    """Return 8-bit grey. White is 65,535 in 16-bit modes.

    In `I` and `F` it is the first of `POSSIBLE_WHITES` that no pixel exceeds, else the brightest pixel. What is below
    0, infinite or not a number is black.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    brightest = float(values.max())
    white = next((white for white in POSSIBLE_WHITES.get(image.mode, (65_535,)) if brightest <= white), brightest)
    return Image.fromarray(np.rint(values.clip(0) * (255 / white)).astype(np.uint8))
