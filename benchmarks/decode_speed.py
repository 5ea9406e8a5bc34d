"""Speed of one loader worker of train_bridged.py: decode, crop and resize, in images/s of one thread.

    python -m benchmarks.decode_speed

The images are scikit-learn's two photographs at the sizes of datasets and phones, as JPEG and PNG.
"""

import io
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from sklearn.datasets import load_sample_images
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from benchmarks.commands import make_parser
from benchmarks.report import format_table, publish_section
from utils.transfer.augmentation import ROBUST_SCALE, CropAndFlip, undecoded
from utils.transfer.decoding import decode, open_image
from utils.transfer.image_cache import cache_images
from utils.transfer.image_format import ImageFormat

EDGE = 224
SIZES = ((500, 375), (1024, 683), (4032, 3024))
QUALITY = 90


def encode_photos(size: tuple[int, int], format: str) -> list[dict]:
    """Return the photographs, resized and encoded, as rows of an undecoded column."""
    rows = []
    for pixels in load_sample_images().images:
        file = io.BytesIO()
        PILImage.fromarray(pixels).resize(size, PILImage.Resampling.BICUBIC).save(file, format, quality=QUALITY)
        rows.append({"bytes": file.getvalue(), "path": None})
    return rows


def with_pillow(row: dict, crop: v2.RandomResizedCrop) -> torch.Tensor:
    """Read an image like the examples of transformers."""
    return v2.functional.pil_to_tensor(crop(open_image(row).convert("RGB")))


def with_torchvision(row: dict, crop: v2.RandomResizedCrop) -> torch.Tensor:
    encoded = torch.frombuffer(bytearray(row["bytes"]), dtype=torch.uint8)
    return crop(decode_image(encoded, ImageReadMode.RGB))


def with_training(row: dict, crop_and_flip: CropAndFlip) -> torch.Tensor:
    return crop_and_flip(open_image(row), np.random.default_rng(0))


def images_per_second(read: Callable[[dict], torch.Tensor], rows: list[dict], seconds: float) -> float:
    """Return the best of three rounds, as other load on the machine can only slow it down."""
    rates = []
    for _ in range(3):
        started, number = time.perf_counter(), 0
        while (taken := time.perf_counter() - started) < seconds / 3 or number < len(rows):
            read(rows[number % len(rows)])
            number += 1
        rates.append(number / taken)
    return max(rates)


def measure(size: tuple[int, int], format: str, seconds: float) -> dict[str, str]:
    """Return the table row of an image size and format."""
    rows = encode_photos(size, format)
    features = Features({"image": Image(decode=False), "label": Value("int64")})
    images = Dataset.from_dict({"image": rows, "label": [0] * len(rows)}, features=features)
    crop = v2.RandomResizedCrop(EDGE, scale=ROBUST_SCALE)
    train = partial(with_training, crop_and_flip=CropAndFlip(ImageFormat((EDGE, EDGE))))
    decoded = list(undecoded(cache_images(images, (EDGE, EDGE)))["image"])
    rates = {
        "Pillow": images_per_second(partial(with_pillow, crop=crop), rows, seconds),
        "torchvision's decoders": images_per_second(partial(with_torchvision, crop=crop), rows, seconds),
        "`train_bridged.py`": images_per_second(train, rows, seconds),
        "`--cache_images`": images_per_second(train, decoded, seconds),
    }
    small = [v2.functional.resize(decode(open_image(row), (EDGE, EDGE)), [EDGE, EDGE]).float() for row in rows]
    whole = [v2.functional.resize(decode(open_image(row), None), [EDGE, EDGE]).float() for row in rows]
    error = np.mean([(one - other).abs().mean() for one, other in zip(small, whole)])
    return {
        "image": f"{size[0]} x {size[1]} {format}",
        **{name: f"{rate:,.0f}" for name, rate in rates.items()},
        "`train_bridged.py` / Pillow": f"{rates['`train_bridged.py`'] / rates['Pillow']:.2f}",
        "difference, levels of 255": f"{error:.2f}",
        "KiB decoded": f"{np.mean([len(row['bytes']) for row in decoded]) / 1024:,.0f}",
    }


def main(argv=None) -> None:
    args = make_parser(__doc__).parse_args(argv)
    torch.set_num_threads(1)
    sizes = SIZES[:1] if args.small else SIZES
    table = [measure(size, format, 0.1 if args.small else 3.0) for size in sizes for format in ("JPEG", "PNG")]
    body = (
        f"Images/s of one thread, from encoded bytes to a random crop `(3, {EDGE}, {EDGE})` uint8 (60 % of the area "
        "or more): Pillow and torchvision's crop, as in transformers' example; torchvision's decoders; our training; "
        "and our training from decoded images. The difference is the mean over pixels between the image decoded at "
        "full size and as in training, both resized: training decodes a large JPEG at a smaller size.\n\n"
        + format_table(table)
    )
    publish_section("train_bridged", "Reading images", body, is_trial=args.small)


if __name__ == "__main__":
    main()
