"""Images of any mode into RGB, and into the tensors that diffusion models take."""

import numpy as np
from PIL import Image, ImageOps


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an upright RGB image; 16-bit grey is scaled, transparency is laid on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
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
