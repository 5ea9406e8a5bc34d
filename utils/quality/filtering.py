"""What filter_synthetic.py scores, and how it shows what was left out."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoImageProcessor

from utils.cli.errors import UserError
from utils.cli.tables import print_table
from utils.data.arguments import RealDataArguments
from utils.data.class_names import match_labels
from utils.data.image_set import RealImagesRecord
from utils.data.images import to_rgb
from utils.data.real_images import load_real_images
from utils.hub.image_datasets import load_image_dataset
from utils.hub.repositories import Source
from utils.quality.features import FeatureModel, extract_features
from utils.quality.scores import ScoredSet, score_by_classifier, score_by_distance, score_by_probe, score_by_words
from utils.quality.vectors import UnitFeatures

MAX_SHOWN_CLASSES, NUM_SHOWN = 10, 5


@dataclass(frozen=True)
class ImagesToScore:
    """The images of a synthetic set, and the real training images; `labels` are places in `class_names`, the set's."""

    synthetic: Dataset
    labels: np.ndarray
    class_indices: np.ndarray
    class_names: list[str]
    real: Dataset
    real_labels: np.ndarray


def load_scored_images(source: Source, real_args: RealDataArguments, token: str | None) -> ImagesToScore:
    """Load a set with its `class_index`, and the real images that training takes.

    Raises:
        UserError: the set has no `class_index`; the real images cannot be read, or lack a class of it.
    """
    images = load_image_dataset(source, split="train")
    if "class_index" not in images.column_names:
        raise UserError(
            f"{source.flag} {source.name}: has no column 'class_index', by which images are named; it was made by an "
            "old version."
        )
    class_names = images.features["label"].names
    labels, class_indices = (np.asarray(images.data.column(name).to_numpy()) for name in ("label", "class_index"))
    real = load_real_images(RealImagesRecord.from_arguments(real_args), token)
    places = match_labels(real.class_names, class_names, f"{real.record.name}:", "the real set", allow_missing=True)
    real_labels = np.array([places.get(name, -1) for name in real.class_names])[np.asarray(real.train["label"])]
    lacking = np.setdiff1d(labels, real_labels)
    if lacking.size:
        names = ", ".join(class_names[label] for label in lacking)
        raise UserError(f"--dataset_name {real.record.name}: has no training images of {names}.")
    rows = np.flatnonzero(real_labels >= 0)
    return ImagesToScore(
        images.select_columns("image"), labels, class_indices, class_names, real.train.select(rows), real_labels[rows]
    )


def score_images(
    images: ImagesToScore, names: list[str], model: Source | None, words: Source | None, classifier: Source | None,
    batch_size: int, work_dir: Path,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return each score `(n,)` by its name; more is better."""
    device, scores = "cuda" if torch.cuda.is_available() else "cpu", {}
    if model is not None:
        feature_model = FeatureModel(model, device)
        sets = (("synthetic images", images.synthetic), ("real images", images.real))
        raw = [extract_features(feature_model, of, what, work_dir / what, batch_size)[0] for what, of in sets]
        centre = raw[1].mean(0, dtype=np.float64).astype(np.float32) if len(raw[1]) > 1 else 0.0
        units = [UnitFeatures(features, centre) for features in raw]
    for name in names:
        if name == "words":
            nouns = [class_name.replace("_", " ") for class_name in images.class_names]
            scores[name] = score_by_words(images.synthetic, images.labels, nouns, words, batch_size, device)
        elif name == "classifier":
            processor = AutoImageProcessor.from_pretrained(classifier.name, **classifier.load_options())
            scores[name] = score_by_classifier(
                images.synthetic, images.labels, images.class_names, classifier, processor, batch_size, device
            )
        else:
            score = {"probe": score_by_probe, "distance": score_by_distance}[name]
            scores[name] = score(units[0], images.labels, units[1], images.real_labels)
    return scores


def print_filter(scored: ScoredSet, drop_by: str) -> None:
    """Print the classes with the lowest scores: what is left out, and their mean scores."""
    table = Table("class", *(f"mean {name}" for name in scored.scores), "images", "left out")
    means = {label: scored.scores[drop_by][scored.labels == label].mean() for label in np.unique(scored.labels)}
    for label in sorted(means, key=means.get)[:MAX_SHOWN_CLASSES]:
        rows = scored.labels == label
        table.add_row(
            escape(scored.class_names[label]), *(f"{values[rows].mean():.3f}" for values in scored.scores.values()),
            f"{rows.sum():,}", f"{scored.is_left_out[rows].sum():,}",
        )  # fmt: skip
    if len(means) > MAX_SHOWN_CLASSES:
        table.caption = f"the {MAX_SHOWN_CLASSES} classes of {len(means)} with the lowest mean {drop_by}"
    print_table(table, Console())


@rc_context({"text.parse_math": False})
def draw_filter(path: Path, images: ImagesToScore, scored: ScoredSet, drop_by: str) -> None:
    """Draw the worst that are kept and the best that are left out, a row per class, of those with the lowest scores.

    If none is left out, draw the best instead of those.
    """
    values = scored.scores[drop_by]
    means = {label: values[scored.labels == label].mean() for label in np.unique(scored.labels)}
    shown = sorted(means, key=means.get)[:MAX_SHOWN_CLASSES]
    figure = Figure(figsize=(1.1 * 2 * NUM_SHOWN + 2, 1.35 * len(shown) + 0.6), layout="constrained")
    axes = figure.subplots(len(shown), 2 * NUM_SHOWN, squeeze=False)
    for row_axes, label in zip(axes, shown):
        rows = np.flatnonzero(scored.labels == label)
        rows = rows[np.argsort(values[rows], kind="stable")]
        kept, dropped = rows[~scored.is_left_out[rows]], rows[scored.is_left_out[rows]]
        for axis in row_axes:
            axis.axis("off")
        first, colour = (dropped, "tab:red") if scored.is_left_out.any() else (kept, "black")
        for axis, row in zip(row_axes, first[-NUM_SHOWN:]):
            _show(axis, images.synthetic[int(row)]["image"], values[row], colour)
        for axis, row in zip(row_axes[NUM_SHOWN:], kept[:NUM_SHOWN]):
            _show(axis, images.synthetic[int(row)]["image"], values[row], "black")
        row_axes[0].text(
            -0.15, 0.5, scored.class_names[label][:22], transform=row_axes[0].transAxes, ha="right", va="center"
        )
    left = "the best that are left out" if scored.is_left_out.any() else "the best"
    figure.suptitle(f"by {drop_by}: left, {left}; right, the worst that are kept")
    figure.savefig(path, dpi=100)


def _show(axis, image, score: float, colour: str) -> None:
    axis.imshow(to_rgb(image))
    axis.set_title(f"{score:.2f}", fontsize=8, color=colour)
