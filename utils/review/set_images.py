"""The images of a synthetic set by class, read from its parquet files one row group at a time."""

import base64
import io
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Features
from PIL import Image as PILImage
from PIL import ImageOps

from utils.cli.errors import UserError
from utils.data.images import to_rgb
from utils.data.left_out import SCORES, SCORES_KEY, Key

THUMBNAIL_SIZE = 192  # pixels of the longer side
MAX_THUMBNAILS = 4096  # kept in memory, about 6 KB each
NUM_THREADS = 4
WEB_FORMATS = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}


@dataclass(frozen=True)
class SetImages:
    """Where each image of a set is, and what it is; arrays are `(n,)`, and an image's number is its place in them.

    `labels` are places in `class_names`. `files`, `groups` and `rows` are the parquet file in `paths`, the row group of
    that file, and the row of that group.
    """

    paths: list[Path]
    class_names: list[str]
    labels: np.ndarray
    class_indices: np.ndarray
    files: np.ndarray
    groups: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, number: int) -> Key:
        """Return the class name and `class_index` of an image."""
        return self.class_names[self.labels[number]], int(self.class_indices[number])

    @cached_property
    def numbers_by_class(self) -> dict[int, np.ndarray]:
        """The numbers of each class's images in the order of `class_index`, by label; classes without images are left
        out.
        """
        order = np.lexsort((self.class_indices, self.labels))
        labels, starts = np.unique(self.labels[order], return_index=True)
        return dict(zip(labels.tolist(), np.split(order, starts[1:])))

    def read_encoded(self, numbers: Iterable[int]) -> Iterator[tuple[int, bytes | None]]:
        """Yield each number with the image's encoded bytes, in any order; every row group is read once."""
        groups: dict[tuple[int, int], list[int]] = {}
        for number in numbers:
            groups.setdefault((int(self.files[number]), int(self.groups[number])), []).append(number)

        def read_group(item: tuple[tuple[int, int], list[int]]) -> list[tuple[int, bytes | None]]:
            (file, group), members = item
            with pq.ParquetFile(self.paths[file], memory_map=True) as opened:
                column = opened.read_row_group(group, columns=["image.bytes"], use_threads=False)["image"]
            return [(number, column[int(self.rows[number])].as_py()["bytes"]) for number in members]

        with ThreadPoolExecutor(NUM_THREADS) as threads:
            for read in threads.map(read_group, groups.items()):
                yield from read


def open_set_images(folder: Path) -> SetImages:
    """Return where the images of a set are. Only the columns `label` and `class_index` are read.

    Raises:
        UserError: a file cannot be read, has no `class_index`, or there are no images.
    """
    paths = sorted((folder / "data").glob("train-*.parquet"))
    if not paths:
        raise UserError(f"--synthetic_dataset {folder}: has no images (data/train-*.parquet).")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("label", "class_index", "file", "group", "row")}
    class_names: list[str] = []
    for number, path in enumerate(paths):
        try:
            with pq.ParquetFile(path) as file:
                class_names = Features.from_arrow_schema(file.schema_arrow)["label"].names
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                table = file.read(columns=["label", "class_index"])
            for name in ("label", "class_index"):
                columns[name].append(table[name].to_numpy())
        except (pa.ArrowInvalid, OSError, KeyError, AttributeError) as error:
            raise UserError(
                f"--synthetic_dataset {folder}: {path.name} is not a file of generate_synthetic.py with the columns "
                f"label and class_index ({error})."
            ) from None
        columns["file"].append(np.full(sum(sizes), number))
        columns["group"].append(np.repeat(np.arange(len(sizes)), sizes))
        columns["row"].append(np.concatenate([np.arange(size) for size in sizes]))
    return SetImages(paths, class_names, *(np.concatenate(parts) for parts in columns.values()))


def read_scores(folder: Path, images: SetImages, fingerprint: str) -> tuple[str, np.ndarray] | None:
    """Return the name and the values `(n,)` of the score that decided in scores.parquet; None without that file.

    Images without a score have NaN.

    Raises:
        UserError: the file cannot be read, or is about other images.
    """
    path = folder / SCORES
    if not path.is_file():
        return None
    try:
        about = json.loads((pq.read_schema(path).metadata or {}).get(SCORES_KEY, b"{}"))
        if about.get("fingerprint") != fingerprint:
            raise UserError(f"--synthetic_dataset {folder}: {SCORES} is about other images; remove it.")
        name = about["drop_by"]
        table = pq.read_table(path, columns=["class", "class_index", name])
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read ({error}); run filter_synthetic.py again.") from None
    labels = pc.index_in(table["class"], pa.array(images.class_names)).fill_null(-1).to_numpy()
    indices, values = table["class_index"].to_numpy(), table[name].to_numpy()
    scores = np.full(len(images), np.nan)
    for label, numbers in images.numbers_by_class.items():
        rows = np.flatnonzero(labels == label)
        places = {int(index): float(value) for index, value in zip(indices[rows], values[rows])}
        scores[numbers] = [places.get(int(index), np.nan) for index in images.class_indices[numbers]]
    return name, scores


def choose_shown(
    images: SetImages, scores: np.ndarray | None, num_per_class: int | None, seed: int
) -> dict[int, np.ndarray]:
    """Return the numbers of the images to review, by label: those with the lowest score first, else in order.

    `num_per_class` takes that many, at equal distances from a start that `seed` draws (systematic sampling).
    """
    shown = {}
    for label, numbers in images.numbers_by_class.items():
        if num_per_class is not None and num_per_class < len(numbers):
            start = np.random.default_rng([seed, label]).random()
            numbers = numbers[((np.arange(num_per_class) + start) * len(numbers) / num_per_class).astype(int)]
        if scores is not None:
            numbers = numbers[np.argsort(scores[numbers], kind="stable")]  # NaN last
        shown[label] = numbers
    return shown


@dataclass
class Thumbnails:
    """Small pictures of a set's images as data URLs; the latest `MAX_THUMBNAILS` stay in memory."""

    images: SetImages
    size: int = THUMBNAIL_SIZE
    _kept: OrderedDict = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, numbers: list[int]) -> list[str | None]:
        """Return the pictures in the order of `numbers`; None for an image that cannot be opened."""
        with self._lock:
            found = {number: self._kept[number] for number in numbers if number in self._kept}
        missing = [number for number in numbers if number not in found]
        for number, encoded in self.images.read_encoded(missing):
            found[number] = draw_thumbnail(encoded, self.size)
        with self._lock:
            for number in numbers:
                self._kept[number] = found[number]
                self._kept.move_to_end(number)
            while len(self._kept) > MAX_THUMBNAILS:
                self._kept.popitem(last=False)
        return [found[number] for number in numbers]


def draw_thumbnail(encoded: bytes | None, size: int) -> str | None:
    """Return an image as a data URL, at most `size` pixels wide and high; None if it cannot be opened."""
    try:
        image = PILImage.open(io.BytesIO(encoded or b""))
        if max(image.size) <= size and image.format in WEB_FORMATS:
            return data_url(encoded, WEB_FORMATS[image.format])
        image.draft("RGB", (size, size))  # decodes a large JPEG at a fraction of its size
        image = to_rgb(image)
    except Exception:  # on damaged files Pillow raises nearly anything
        return None
    image.thumbnail((size, size))
    return _encode(image)


def draw_square(image: PILImage.Image, side: int) -> str:
    """Return the middle square of an image as a data URL of `side` pixels: real and synthetic images look alike."""
    return _encode(ImageOps.fit(to_rgb(image), (side, side)))


def data_url(encoded: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def _encode(image: PILImage.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=90)
    return data_url(buffer.getvalue(), "jpeg")
