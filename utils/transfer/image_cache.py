"""Images decoded once for all epochs and runs: uncompressed, in memory-mapped files among those of `datasets`.

Training takes the very same pixels from them. Evaluation and probes see the images as they are.
"""

import io
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import datasets
import psutil
from accelerate import PartialState
from torchvision.transforms.v2.functional import to_pil_image

from utils.cli.errors import UserError
from utils.cli.processes import num_launched
from utils.cli.threads import num_cores
from utils.data.images import upright_size
from utils.data.opened_images import map_encoded
from utils.transfer.decoding import decode, open_image, shrink_factor

DECODED = "decoded"  # the column
NUM_AT_ONCE = 64  # images in memory while a file is written
WORTH_CACHING = 2**26  # bytes; fewer are decoded in a moment
GIB = 2**30

Size = tuple[int, int] | None  # to which training resizes its crops, `ImageFormat.crop_size`


def describe_cache(sets: Sequence[datasets.Dataset], size: Size, is_asked_for: bool) -> str | None:
    """Return a line that says what the decoded sets take, None where they are not worth it, or do not fit.

    They fit in half of what is free on the disk and in memory. What a user asks for needs room on the disk only.

    Raises:
        UserError: what is asked for does not fit on the disk.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [images for images in sets if not cache_path(images, size).exists()]
    num_bytes, free = sum(_decoded_bytes(images, size) for images in missing), shutil.disk_usage(folder).free
    if is_asked_for and num_bytes > free:
        raise UserError(
            f"--cache_images: needs {num_bytes / GIB:,.1f} GiB in {folder}, which has {free / GIB:,.1f} GiB free; "
            "leave it out, or set HF_DATASETS_CACHE to a larger disk."
        )
    if not missing:
        return f"Training images are decoded already: {sum(map(len, sets)):,} images, in {folder}."
    if not is_asked_for and not WORTH_CACHING <= num_bytes <= min(free, psutil.virtual_memory().available) / 2:
        return None
    return (
        f"Training images are decoded once: {sum(map(len, missing)):,} images, {num_bytes / GIB:,.2f} GiB to write in "
        f"{folder}, which has {free / GIB:,.1f} GiB free."
    )


def cache_images(images: datasets.Dataset, size: Size) -> datasets.Dataset:
    """Return the images with a column `DECODED`, memory-mapped: what `decode` makes of each, as uncompressed files."""
    path = cache_path(images, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = images.cast_column("image", datasets.Image(decode=False))
    # the others find the file; a state of accelerate for a single process would take up a GPU
    with PartialState().local_main_process_first() if num_launched() > 1 else nullcontext():
        decoded = encoded.map(
            partial(_decode_batch, size=size), batched=True, batch_size=NUM_AT_ONCE, writer_batch_size=NUM_AT_ONCE,
            features=datasets.Features({**encoded.features, DECODED: datasets.Image(decode=False)}),
            cache_file_name=str(path), load_from_cache_file=True, desc="decoding images",
        )  # fmt: skip
    return decoded.cast_column("image", images.features["image"])


def cache_path(images: datasets.Dataset, size: Size) -> Path:
    """Return the file of a set's decoded images, by what `datasets` tells its contents from others with."""
    edges = "whole" if size is None else "x".join(map(str, size))
    return Path(datasets.config.HF_DATASETS_CACHE) / "bridged_transfer" / f"{images._fingerprint}-{edges}.arrow"


def _decoded_bytes(images: datasets.Dataset, size: Size) -> int:
    """Return what the decoded images take; only their headers are read."""

    def count(row: int, encoded: dict) -> int:
        image = open_image(encoded)
        (width, height), factor = upright_size(image), shrink_factor(image, size)
        return 3 * -(-width // factor) * -(-height // factor)

    return sum(map_encoded(images, count, range(len(images)), "measuring images"))


def _decode_batch(batch: dict, size: Size) -> dict:
    def decode_one(encoded: dict) -> dict:
        file = io.BytesIO()
        to_pil_image(decode(open_image(encoded), size)).save(file, "PPM")
        return {"bytes": file.getvalue(), "path": None}

    with ThreadPoolExecutor(num_cores()) as threads:  # decoding holds no lock of Python
        return {DECODED: list(threads.map(decode_one, batch["image"]))}
