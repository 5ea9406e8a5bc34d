"""The images of a quality report: a synthetic set, and the real ones beside it."""

from dataclasses import dataclass, replace

import numpy as np
from datasets import ClassLabel, Dataset, Image

from utils.cli.errors import UserError
from utils.cli.records import GENERATION_CONFIG, read_record
from utils.data.image_set import RealImages, RealImagesRecord
from utils.data.label_matching import match_labels
from utils.data.opened_images import open_all
from utils.data.real_images import load_real_images
from utils.hub.data_sets import load_data_set
from utils.hub.repositories import Source


@dataclass(frozen=True)
class Part:
    """Images of one kind with their labels `(n,)` in the real set's order; `rows` are those of the whole split."""

    images: Dataset
    labels: np.ndarray
    rows: np.ndarray
    num_all: int


def load_reference_images(real_images: dict, hub_token: str | None = None) -> RealImages:
    """Load the real images of a set's record, without its limit to a few: distances need all that there are.

    Each is opened once; damaged ones are left out where the record allows that.

    That is for measuring: whoever chooses settings of a few-shot experiment by it has used more than the shots.

    Raises:
        UserError: what `load_real_images` and `open_all` raise.
    """
    record = replace(RealImagesRecord(**real_images), num_shots=None, max_train_samples=None)
    opened = open_all(load_real_images(record, hub_token))
    for part in ("train", "test"):
        if opened.num_skipped and not len(getattr(opened.images, part)):
            raise UserError(f"{record.name}: no images are left in the {part} part; all of them are damaged.")
    return replace(opened.images, remarks=(*opened.images.remarks, *opened.remarks))


def collect_parts(synthetic: Source, real: RealImages, max_images_per_class: int) -> dict[str, Part]:
    """Return the synthetic images, the real train, held-out and test ones.

    The first `max_images_per_class` of each class, of the test images all.

    Raises:
        UserError: the synthetic set cannot be loaded, its classes are not the real ones, or a class has no images.
    """
    images, labels = _load_synthetic(synthetic, real.class_names)
    parts = {
        "synthetic": _make_part(images, labels, max_images_per_class),
        "train": _make_part(real.train, _labels(real.train), max_images_per_class, real.train_indices),
        "held_out": _make_part(real.validation, _labels(real.validation), max_images_per_class),
        "test": _make_part(real.test, _labels(real.test)),
    }
    lacking = np.setdiff1d(parts["synthetic"].labels, parts["train"].labels)
    if lacking.size:
        names = ", ".join(real.class_names[label] for label in lacking)
        raise UserError(f"--dataset_name {real.record.name}: has no training images of {names}.")
    return parts


def _load_synthetic(source: Source, class_names: list[str]) -> tuple[Dataset, np.ndarray]:
    """Return the images, and their labels in the order of `class_names`."""
    images = load_data_set(source, split="train")
    columns = [
        [name for name, feature in images.features.items() if isinstance(feature, kind)] for kind in (Image, ClassLabel)
    ]
    if [len(found) for found in columns] != [1, 1]:
        raise UserError(
            f"{source.flag} {source.name}: one image column and one ClassLabel column are needed; columns are "
            f"{', '.join(images.features)}."
        )
    (image_column,), (label_column,) = columns
    prefix = f"{source.flag} {source.name}:"
    places = match_labels(images.features[label_column].names, class_names, prefix, "the synthetic set")
    labels = np.array(list(places.values()))[_labels(images, label_column)]
    empty = np.setdiff1d(_wanted_labels(source, places), labels)
    if empty.size:
        raise UserError(f"{prefix} has no images of {', '.join(class_names[label] for label in empty)}.")
    return images.select_columns(image_column).rename_columns({image_column: "image"}), labels


def _wanted_labels(source: Source, places: dict[str, int]) -> list[int]:
    """Return the classes that a set should have: all, but where its record says that it was made for some only.

    The record has the set's own names; `places` are those of the real set by them.
    """
    record = read_record(source.file(GENERATION_CONFIG)) if source.has_one_of([GENERATION_CONFIG]) else {}
    return [places[name] for name in record.get("settings", {}).get("classes", places) if name in places]


def _labels(images: Dataset, column: str = "label") -> np.ndarray:
    return np.asarray(images[column][:], np.int64)


def _make_part(images: Dataset, labels: np.ndarray, limit: int | None = None, split_rows=None) -> Part:
    """Return the first `limit` images of each class; `split_rows` are the images' rows in a larger split."""
    classes = [np.flatnonzero(labels == label)[:limit] for label in np.unique(labels)]
    rows = np.sort(np.concatenate(classes)) if classes else np.zeros(0, np.int64)
    split_rows = rows if split_rows is None else np.asarray(split_rows)[rows]
    return Part(images.select(rows), labels[rows], split_rows, len(images))
