"""Images and image sets for the tests of `utils/data`."""

import io

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from tests.conftest import CLASS_NAMES, draw_image
from utils.data.image_set import RealImages, RealImagesRecord
from utils.data.real_images import load_real_images

CLASSES = ClassLabel(names=CLASS_NAMES)


def load(folder=None, **settings) -> RealImages:
    return load_real_images(RealImagesRecord(folder and str(folder), **settings))


def encode(image: PILImage.Image, image_format: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, image_format, **options)
    return content.getvalue()


def image_column(encoded: list[bytes | str | None]) -> Dataset:
    """Return a dataset of encoded images: bytes, a path, or None."""
    rows = [
        {"bytes": item, "path": None} if isinstance(item, bytes) else item and {"bytes": None, "path": item}
        for item in encoded
    ]
    return Dataset.from_dict({"image": rows}, features=Features({"image": Image()}))


def labelled_images(labels: list, feature=None, image_name: str = "image", label_name: str = "label") -> Dataset:
    """Return drawn images with these labels, one colour per class; `feature` is the labels' type."""
    rng = np.random.default_rng(0)
    colours = {label: number % 3 for number, label in enumerate(dict.fromkeys(labels))}
    rows = {image_name: [draw_image(colours[label], rng) for label in labels], label_name: labels}
    features = Features({image_name: Image(), label_name: feature}) if feature else None
    return Dataset.from_dict(rows, features=features).cast_column(image_name, Image())


def sizes(real: RealImages) -> list[int]:
    return [len(real.train), len(real.validation), len(real.test)]


def pixels_of(images: Dataset) -> list[bytes]:
    return [image.tobytes() for image in images["image"]]
