"""A synthetic set as generate_synthetic.py writes it, whose images tell by their colour which they are."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from utils.cli.records import GENERATION_CONFIG, write_record
from utils.synthesis.shards import synthetic_features

CLASS_NAMES = ["red_square", "green circle", "blue-stripe"]
FINGERPRINT = "f" * 64


def colour(label: int, class_index: int) -> tuple[int, int, int]:
    return 40 * label + 20, class_index % 256, 77


def encode(label: int, class_index: int, side: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour(label, class_index)).save(buffer, "png")
    return buffer.getvalue()


def save_set(
    folder: Path, num_per_class: int = 10, real_dir: Path | None = None, images_per_shard: int = 12,
    rows_per_group: int = 5, side: int = 32, class_names: list[str] = CLASS_NAMES,
) -> Path:  # fmt: skip
    """Write a set in the generator's order: the first image of each class, then the second of each."""
    schema = synthetic_features(class_names).arrow_schema
    keys = [(label, index) for index in range(num_per_class) for label in range(len(class_names))]
    (folder / "data").mkdir(parents=True)
    encoded = {key: encode(*key, side) for key in {(label, index % 256) for label, index in keys}}
    for shard, start in enumerate(range(0, len(keys), images_per_shard)):
        with pq.ParquetWriter(folder / "data" / f"train-{shard:05d}.parquet", schema) as writer:
            some = keys[start : start + images_per_shard]
            for first in range(0, len(some), rows_per_group):
                rows = [
                    {
                        "image": {"bytes": encoded[label, index % 256], "path": None}, "label": label, "prompt": "",
                        "seed": 0, "guidance_scale": 1.0, "class_index": index,
                    }
                    for label, index in some[first : first + rows_per_group]
                ]  # fmt: skip
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    real = None if real_dir is None else {"dataset_name": str(real_dir), "num_shots": 2}
    write_record(
        folder / GENERATION_CONFIG, {"fingerprint": FINGERPRINT, "class_names": class_names, "real_images": real}
    )
    return folder


def save_scores(folder: Path, values: dict[tuple[str, int], float], fingerprint: str = FINGERPRINT) -> None:
    """Write scores.parquet as filter_synthetic.py does, by its own function."""
    from utils.quality.scores import ScoredSet

    names = [name for name, _ in values]
    scored = ScoredSet(
        CLASS_NAMES, np.array([CLASS_NAMES.index(name) for name in names]), np.array([index for _, index in values]),
        {"probe": np.array(list(values.values()))}, np.zeros(len(values), bool),
    )  # fmt: skip
    scored.save(folder, {"fingerprint": fingerprint, "drop_by": "probe"})
