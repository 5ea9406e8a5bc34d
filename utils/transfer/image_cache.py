"""Images decoded once for all epochs and runs: uncompressed, in memory-mapped files in the cache of `datasets`.

Training gets the same pixels as without the cache. Evaluation and probes use the original images.
"""

import hashlib
import io
import json
import os
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

DECODED = "decoded"  # name of the column
NUM_AT_ONCE = 64  # images in memory while a file is written
WORTH_CACHING = 2**26  # bytes; less is decoded in a moment
GIB = 2**30

Size = tuple[int, int] | None  # `ImageFormat.crop_size`: the size to which training resizes its crops


def describe_cache(sets: Sequence[datasets.Dataset], size: Size, is_asked_for: bool) -> str | None:
    """Return a line on the size of the decoded sets, or None if caching is not worth it or they do not fit.

    They fit if they take at most half of the free disk and memory. If the user asked for it, they only need to fit on
    the disk.

    Raises:
        UserError: the user asked for it, and the sets do not fit on the disk.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [images for images in sets if not cache_path(images, size).exists()]
    num_bytes, free = sum(_decoded_bytes(images, size) for images in missing), shutil.disk_usage(folder).free
    if is_asked_for and num_bytes > free:
        raise UserError(
            f"--cache_images: needs {num_bytes / GIB:,.1f} GiB in {folder}, which has {free / GIB:,.1f} GiB free; "
            "leave the flag out, or set HF_DATASETS_CACHE to a folder on a larger disk."
        )
    if not missing:
        return f"Training images are already decoded: {sum(map(len, sets)):,} images in {folder}."
    if not is_asked_for and not WORTH_CACHING <= num_bytes <= min(free, psutil.virtual_memory().available) / 2:
        return None
    return (
        f"Training images are decoded once: {sum(map(len, missing)):,} images, {num_bytes / GIB:,.2f} GiB are written "
        f"to {folder}, which has {free / GIB:,.1f} GiB free."
    )


def cache_images(images: datasets.Dataset, size: Size) -> datasets.Dataset:
    """Return the images with a memory-mapped column `DECODED`: the output of `decode` as uncompressed files."""
    path = cache_path(images, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = images.cast_column("image", datasets.Image(decode=False))
    # other processes find the file; for a single process, a PartialState would occupy a GPU
    with PartialState().local_main_process_first() if num_launched() > 1 else nullcontext():
        decoded = encoded.map(
            partial(_decode_batch, size=size), batched=True, batch_size=NUM_AT_ONCE, writer_batch_size=NUM_AT_ONCE,
            features=datasets.Features({**encoded.features, DECODED: datasets.Image(decode=False)}),
            cache_file_name=str(path), load_from_cache_file=True, desc="decoding images",
        )  # fmt: skip
    return decoded.cast_column("image", images.features["image"])


def cache_path(images: datasets.Dataset, size: Size) -> Path:
    """Return the file of a set's decoded images, named by the fingerprint of `datasets` and by the Arrow files.

    The fingerprint alone stays the same for a file that was replaced and kept its time; its Arrow copy is another one.
    """
    files = [
        (path := file["filename"], os.path.getsize(path), os.stat(path).st_mtime_ns) for file in images.cache_files
    ]
    digest = hashlib.sha256(json.dumps([images._fingerprint, files]).encode()).hexdigest()[:32]
    edges = "whole" if size is None else "x".join(map(str, size))
    return Path(datasets.config.HF_DATASETS_CACHE) / "bridged_transfer" / f"{digest}-{edges}.arrow"


def _decoded_bytes(images: datasets.Dataset, size: Size) -> int:
    """Return the size of the decoded images; only their headers are read."""

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

    with ThreadPoolExecutor(num_cores()) as threads:  # decoding releases Python's lock
        return {DECODED: list(threads.map(decode_one, batch["image"]))}
