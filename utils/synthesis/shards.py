"""Parquet shards that `load_dataset` understands, written whole or not at all, and verified on a restart."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image, Value
from PIL import Image as PILImage

from utils.synthesis.output_folder import DATA_DIR
from utils.synthesis.plan import GenerationPlan, PlannedImage

ROW_GROUP_SIZE = 100


def synthetic_features(class_names: list[str]) -> Features:
    """Return the columns of a synthetic set; the label has the real set's names in the real set's order."""
    return Features(
        {
            "image": Image(),
            "label": ClassLabel(names=list(class_names)),
            "prompt": Value("string"),
            "seed": Value("int64"),
            "guidance_scale": Value("float32"),
            "class_index": Value("int64"),
        }
    )


def shard_path(output_dir: str | Path, number: int) -> Path:
    return Path(output_dir) / DATA_DIR / f"train-{number:05d}.parquet"


def encode_image(pixels: np.ndarray, image_format: str, jpeg_quality: int) -> bytes:
    """Return `(height, width, 3)` float32 pixels in [0, 1] as the bytes of a JPEG or PNG file."""
    buffer = io.BytesIO()
    image = PILImage.fromarray(np.rint(pixels * 255).astype(np.uint8))
    options = {"quality": jpeg_quality} if image_format == "jpeg" else {}
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def make_row(image: PlannedImage, image_bytes: bytes, guidance_scale: float) -> dict:
    """Return a row of the set."""
    return {
        "image": {"bytes": image_bytes, "path": None},
        "label": image.label,
        "prompt": image.prompt,
        "seed": image.seed,
        "guidance_scale": guidance_scale,
        "class_index": image.class_index,
    }


def write_shard(path: Path, rows: list[dict], features: Features) -> None:
    """Write a shard under a temporary name, flush it to disk and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    # arrow_schema carries the features in its metadata; without it load_dataset gives dicts and plain integers
    table = pa.Table.from_pylist(rows, schema=features.arrow_schema)
    with open(temporary, "wb") as file:
        pq.write_table(table, file, row_group_size=ROW_GROUP_SIZE)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def remove_leftovers(output_dir: str | Path) -> None:
    """Remove the temporary files of an interrupted run."""
    for path in (Path(output_dir) / DATA_DIR).glob(".*.tmp"):
        path.unlink()


def count_redraws(path: Path, plan: GenerationPlan, number: int, max_redraws: int) -> list[int] | None:
    """Return how often each image of a finished shard was redrawn.

    None when the file is missing, torn, or does not hold exactly the plan's images, so that the shard must be made.
    """
    indices = plan.shard(number)
    try:
        seeds = pq.read_table(path, columns=["seed"]).column("seed").to_pylist()
    except (OSError, pa.ArrowException):
        return None
    if len(seeds) != len(indices):
        return None
    redraws = [plan.find_redraw(index, seed, max_redraws) for index, seed in zip(indices, seeds)]
    return None if None in redraws else redraws


def count_class_redraws(output_dir: str | Path, plan: GenerationPlan, max_redraws: int) -> dict[str, int]:
    """Return how often images of each class were redrawn, over all shards and all runs that made them."""
    counts = dict.fromkeys(plan.class_names, 0)
    for number in range(plan.num_shards):
        redraws = count_redraws(shard_path(output_dir, number), plan, number, max_redraws)
        for index, count in zip(plan.shard(number), redraws):
            counts[plan.class_names[plan.image(index).label]] += count
    return counts
