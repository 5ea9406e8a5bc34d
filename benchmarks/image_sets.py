"""Labelled image sets for the benchmarks."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, disable_progress_bars
from PIL import Image as PILImage
from pyarrow.parquet import read_table

DEMO_SET = Path(__file__).parents[1] / "demo" / "fashion-mnist"
CLASS_NAMES = ["dress", "sandal", "coat", "bag"]
NUM_HELD_OUT = 8  # images in the validation and in the test part
SHARD_SIZE = 1_000

disable_progress_bars()  # for writing; only the bars of the measured scripts are shown


def draw_jpegs(number: int, size: int, seed: int) -> Iterator[bytes]:
    """Yield JPEG files of textures with coarse and fine structure, with two bits per pixel, like photographs."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        coarse, middle, fine = (
            rng.normal(size=(size // scale, size // scale, 3)).repeat(scale, 0).repeat(scale, 1) for scale in (16, 4, 1)
        )
        pixels = np.clip(128 + 40 * coarse + 20 * middle + 8 * fine, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        PILImage.fromarray(pixels).save(file, "jpeg", quality=90)
        yield file.getvalue()


def write_textures(folder: Path, num_images: int, size: int) -> Path:
    """Write a labelled parquet set of textures, one shard at a time."""
    splits = {"train": num_images, "validation": NUM_HELD_OUT, "test": NUM_HELD_OUT}
    for seed, (split, number) in enumerate(splits.items()):
        jpegs = draw_jpegs(number, size, seed)
        for shard, start in enumerate(range(0, number, SHARD_SIZE)):
            rows = [(next(jpegs), index % len(CLASS_NAMES)) for index in range(start, min(start + SHARD_SIZE, number))]
            write_shard(folder, f"{split}-{shard:05d}", rows, CLASS_NAMES)
    return folder


def write_demo_images(folder: Path, num_images: int) -> Path:
    """Write the first images of the demo's set as a parquet set."""
    for split, number in {"train": num_images, "validation": NUM_HELD_OUT, "test": NUM_HELD_OUT}.items():
        table = read_table(DEMO_SET / "data" / f"{split}-00000.parquet").slice(0, number)
        rows = [(row["image"]["bytes"], row["label"]) for row in table.to_pylist()]
        write_shard(folder, f"{split}-00000", rows, Features.from_arrow_schema(table.schema)["label"].names)
    return folder


def write_shard(folder: Path, name: str, rows: list[tuple[bytes, int]], class_names: list[str]) -> None:
    """Write (image file, label) rows as one parquet file."""
    features = Features({"image": Image(), "label": ClassLabel(names=class_names)})
    columns = {"image": [{"bytes": file, "path": None} for file, _ in rows], "label": [label for _, label in rows]}
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")


def write_flat_folder(parquet_dir: Path, folder: Path) -> Path:
    """Write the training images of a parquet set as files of one folder, byte for byte."""
    folder.mkdir(parents=True)
    for path in sorted(parquet_dir.glob("train-*.parquet")):
        for number, image in enumerate(read_table(path)["image"].to_pylist()):
            (folder / f"{path.stem}-{number:05d}").write_bytes(image["bytes"])
    return folder
