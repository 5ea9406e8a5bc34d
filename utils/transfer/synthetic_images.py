"""A synthetic set for fine-tuning: its record, its labels in the real set's order, and what its token has seen."""

from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset

from utils.cli.errors import UserError
from utils.cli.records import GENERATION_CONFIG, read_record
from utils.hub.data_sets import load_data_set
from utils.hub.repositories import Source, open_source


@dataclass(frozen=True)
class SyntheticSource:
    """A synthetic set before its images are opened: name, pinned commit, and its `generation_config.json`."""

    name: str
    revision: str | None
    record: dict


def open_synthetic(name: str, revision: str | None = None, token: str | None = None) -> SyntheticSource:
    """Read the record of a synthetic set, a local folder or a data set id.

    Raises:
        UserError: there is no such set, or it has no record.
    """
    source = open_source(name, "--synthetic_dataset", "dataset", revision, token)
    record = read_record(source.file(GENERATION_CONFIG, "a synthetic set of generate_synthetic.py"))
    return SyntheticSource(name, source.revision, record)


def load_synthetic(
    source: SyntheticSource, class_names: list[str], max_samples_per_class: int | None = None, token: str | None = None
) -> Dataset:
    """Return the images with the columns `image` and `label`, labels in the order of `class_names`.

    `max_samples_per_class` keeps the first images of each class, in the order of the set.

    Raises:
        UserError: the set cannot be loaded; its classes are not `class_names`; the message lists which.
    """
    repository = Source(source.name, "--synthetic_dataset", "dataset", source.revision, token or None)
    images = load_data_set(repository, split="train")
    if not isinstance(images.features.get("label"), ClassLabel) or "image" not in images.features:
        raise UserError(f"--synthetic_dataset {source.name}: has no 'image' and 'label' (ClassLabel) columns.")
    names = images.features["label"].names
    missing = sorted(set(class_names) - set(names))
    extra = sorted(set(names) - set(class_names))
    if missing or extra:
        problems = [f"{what}: {', '.join(found)}" for what, found in (("missing", missing), ("extra", extra)) if found]
        raise UserError(
            f"--synthetic_dataset {source.name}: its classes are not those of the real set; {'; '.join(problems)}."
        )
    labels = np.array([class_names.index(name) for name in names])[np.asarray(images["label"])]
    empty = sorted(set(class_names) - {class_names[label] for label in np.unique(labels)})
    if empty:
        raise UserError(f"--synthetic_dataset {source.name}: has no images of {', '.join(empty)}.")
    images = images.select_columns("image").add_column("label", labels, feature=ClassLabel(names=class_names))
    return images if max_samples_per_class is None else first_per_class(images, max_samples_per_class)


def first_per_class(images: Dataset, limit: int) -> Dataset:
    """Return the first `limit` images of each class, in their order."""
    labels = np.asarray(images["label"])
    kept = np.concatenate([np.flatnonzero(labels == label)[:limit] for label in np.unique(labels)])
    return images.select(np.sort(kept))


def count_leaked_images(record: dict, train_indices: np.ndarray) -> int:
    """Return how many rows of the real train split the style token saw outside `train_indices`."""
    seen = record.get("train_indices") or []
    return len(set(seen) - set(train_indices.tolist()))
