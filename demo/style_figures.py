"""How close are the synthetic images to the style of the real ones? Print a table and draw a picture.

    python demo/style_figures.py --real demo/fashion-mnist --with_token demo/runs/synthetic-0 \
        --without_token demo/runs/plain-0 --classifier demo/classifier --output_dir demo/runs

Border brightness and saturation are in [0, 1] (both are 0 in the real images). The Frechet distance is
measured in the penultimate features of the ImageNet classifier; between two sets of real images it gives the floor.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from matplotlib.figure import Figure
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import AutoImageProcessor, AutoModel

COLUMNS = ["border brightness", "saturation", "Frechet distance"]


class Features(torch.nn.Module):
    """Pooled features `(batch, num_features)` of a classifier, for normalised images `(batch, 3, height, width)`."""

    def __init__(self, classifier_dir: str):
        super().__init__()
        self.model = AutoModel.from_pretrained(classifier_dir).eval()
        self.num_features = self.model.timm_model.num_features

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values.float()).pooler_output


def border_brightness(images: np.ndarray) -> float:
    """Return the mean brightness of the outermost pixels of images `(n, height, width, 3)` in [0, 255]."""
    borders = [images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]]
    return float(np.concatenate([border.reshape(-1, 3) for border in borders]).mean() / 255)


def saturation(images: np.ndarray) -> float:
    """Return the mean HSV saturation, weighted by brightness: the mean of (largest - smallest channel)."""
    return float((images.max(-1).astype(int) - images.min(-1)).mean() / 255)


def as_array(images: Dataset) -> np.ndarray:
    return np.stack([np.asarray(image.convert("RGB")) for image in images["image"]])


def update(metric: FrechetInceptionDistance, processor, images: Dataset, is_real: bool) -> None:
    """Add the features of a set to the real or the synthetic side of the distance."""
    for start in range(0, len(images), 100):
        batch = [image.convert("RGB") for image in images[start : start + 100]["image"]]
        metric.update(processor(batch, return_tensors="pt")["pixel_values"], real=is_real)


def draw_rows(path: Path, rows: dict[str, Dataset], class_names: list[str], per_class: int = 2) -> None:
    """Write a picture with a row of images for each set, `per_class` images of each class."""
    figure = Figure(
        figsize=(1.0 * len(class_names) * per_class / 1.6 + 1.6, 0.75 * len(rows) + 0.4), layout="constrained"
    )
    axes = figure.subplots(len(rows), len(class_names) * per_class)
    for row_axes, (name, images) in zip(axes, rows.items()):
        labels = np.asarray(images["label"])
        chosen = [index for label in range(len(class_names)) for index in np.flatnonzero(labels == label)[:per_class]]
        for axis, index in zip(row_axes, chosen):
            axis.imshow(images[int(index)]["image"].convert("RGB"))
            axis.set(xticks=[], yticks=[])
        row_axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for axis, name in zip(axes[0][::per_class], class_names):
        axis.set_title(name, fontsize=8, loc="left")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("real", "with_token", "without_token", "classifier"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    real = load_dataset(args.real)
    class_names = real["train"].features["label"].names
    sets = {
        "real": real["train"],
        "without token": load_dataset(args.without_token, split="train"),
        "with token": load_dataset(args.with_token, split="train"),
    }
    processor = AutoImageProcessor.from_pretrained(args.classifier)
    metric = FrechetInceptionDistance(Features(args.classifier), reset_real_features=False, normalize=True)
    update(metric, processor, real["validation"], is_real=True)
    table, smallest = {}, min(len(images) for images in sets.values())
    lines = [f"{'':16s}" + "".join(f"{column:>20s}" for column in COLUMNS)]
    for name, images in sets.items():
        metric.reset()
        count = min(len(images), smallest)  # equal sizes, as the distance falls with the number of images
        update(metric, processor, images.shuffle(seed=0).select(range(count)), is_real=False)
        distance = metric.compute().item()
        pixels = as_array(images)
        table[name] = dict(zip(COLUMNS, (border_brightness(pixels), saturation(pixels), distance)), images=count)
        values = "".join(f"{table[name][column]:20.3f}" for column in COLUMNS)
        lines.append(f"{name:16s}{values}  ({count} images)")
    text = "\n".join(lines) + "\n"
    print(text, end="")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "style.json").write_text(json.dumps(table, indent=2) + "\n")
    (args.output_dir / "style.txt").write_text(text)
    draw_rows(args.output_dir / "style.png", sets, class_names)
    print(f"picture: {args.output_dir / 'style.png'}")


if __name__ == "__main__":
    main()
