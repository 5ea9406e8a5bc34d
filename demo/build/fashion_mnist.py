"""Read Fashion-MNIST's IDX files (Debian package `dataset-fashion-mnist`), and name the parts that the demo uses."""

import gzip
from pathlib import Path

import numpy as np

CLASS_NAMES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip

DEFAULT_IDX_DIR = "/usr/share/datasets/fashion-mnist"
GENERATOR_PART = slice(0, 30_000)  # shapes on which the generator is trained
STYLE_PART = slice(30_000, 40_000)  # on which the target style is measured and recipes are chosen
FEW_SHOT_PART = slice(40_000, 60_000)


def read_idx(idx_dir: str, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images `(n, 28, 28)` and labels `(n,)`, both uint8, of the part `train` or `t10k`."""
    with gzip.open(Path(idx_dir) / f"{prefix}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(Path(idx_dir) / f"{prefix}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images, labels
