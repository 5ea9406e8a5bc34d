"""Build the demo's real dataset: a few thousand Fashion-MNIST images as a folder of parquet files.

    python demo/build/data.py --idx_dir /usr/share/datasets/fashion-mnist --output_dir demo/fashion-mnist

train: 200 images per class, from which the shots (and the style token's images) are drawn. validation: 200 per class,
on which recipes are chosen and the target style is measured. test: 200 per class of the test file. None of these images
is among the 30,000 that the generator was trained on.
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from fashion_mnist import CLASS_NAMES, DEFAULT_IDX_DIR, FEW_SHOT_PART, STYLE_PART, read_idx
from PIL import Image as PILImage

IMAGES_PER_CLASS = 200


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idx_dir", default=DEFAULT_IDX_DIR)
    parser.add_argument("--output_dir", type=Path, default=Path("demo/fashion-mnist"))
    args = parser.parse_args()
    features = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES)})
    images, labels = read_idx(args.idx_dir, "train")
    test_images, test_labels = read_idx(args.idx_dir, "t10k")
    parts = {
        "train": (images[FEW_SHOT_PART], labels[FEW_SHOT_PART]),
        "validation": (images[STYLE_PART], labels[STYLE_PART]),
        "test": (test_images, test_labels),
    }
    for split, (part_images, part_labels) in parts.items():
        rows = np.sort(np.concatenate([np.flatnonzero(part_labels == c)[:IMAGES_PER_CLASS] for c in range(10)]))
        # 2 black pixels on each side: 32 x 32 pixels, a size that latent diffusion takes
        framed = [PILImage.fromarray(np.pad(part_images[row], 2)) for row in rows]
        split_set = Dataset.from_dict({"image": framed, "label": part_labels[rows].tolist()}, features=features)
        path = args.output_dir / "data" / f"{split}-00000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        split_set.to_parquet(path)
        print(f"{path}: {len(split_set)} images, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
