"""Loads, splits and checks the labelled real images: the same ones for every script and method."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict

from utils.cli.contents import content_digest
from utils.cli.errors import UserError
from utils.data.class_folders import CARD, has_card_with_data, load_folder_set, read_local_set, read_train_dirs
from utils.data.class_names import find_similar_names, list_names
from utils.data.columns import find_columns, is_labelled, standardise, unify_labels
from utils.data.folds import Folds, split_fold
from utils.data.image_set import PARTS, PLACES, Part, RealImages, RealImagesRecord
from utils.data.opened_images import content_positions
from utils.data.splits import TEST_SHARE, assign_splits, balanced_indices, carve, evenly_spaced, select
from utils.hub.image_datasets import list_data_files, load_image_dataset
from utils.hub.repositories import open_source

MISSING_VALUES = ("nan", "none", "null", "n/a", "na", "<na>")  # what programs write for a missing label


@dataclass(frozen=True)
class LabelledSplits:
    """The splits used as parts, before anything is carved off; `unused` maps the others to their sizes."""

    images: dict[str, Dataset]
    parts: dict[str, Part]
    class_names: list[str]
    record: RealImagesRecord
    unused: dict[str, int]


def load_labelled_splits(record: RealImagesRecord, token: str | None = None) -> LabelledSplits:
    """Load the splits of a labelled image dataset that `assign_splits` chooses; reads no image.

    Raises:
        UserError: the dataset, a split or a column does not exist, or labels are missing or unusable.
    """
    splits, record = _load_splits(record, token)
    train_split = select(splits, "train", record.train_split, record.name).splits[0]
    image_column, label_column = find_columns(splits[train_split].features, record)
    record = replace(record, image_column_name=image_column, label_column_name=label_column)
    given = {part: getattr(record, f"{part}_split") for part in PARTS}
    chosen = assign_splits(splits, given, record.name, lambda split: is_labelled(splits[split], label_column))
    used = dict.fromkeys(split for selection in chosen.values() for split in selection.splits)
    standard = {split: standardise(splits[split], split, record) for split in used}
    standard, class_names = unify_labels(standard, label_column)
    return LabelledSplits(
        {part: selection.read(standard) for part, selection in chosen.items()},
        {part: Part(selection.spec, selection.rows) for part, selection in chosen.items()},
        class_names,
        replace(record, train_split=chosen["train"].spec),
        {split: len(rows) for split, rows in splits.items() if split not in used},
    )


def load_real_images(record: RealImagesRecord, token: str | None = None) -> RealImages:
    """Load a labelled image dataset and split it.

    Without a split for it, a part is carved off the training images, class by class, before shots are drawn: a tenth
    for testing, `train_val_split` for validation. With the record's `fold`, the test part is that fold of the training
    images, even if the dataset has a test split.

    Raises:
        UserError: from `load_labelled_splits`; too few images for the shots, or none left to train on.
    """
    found = load_labelled_splits(record, token)
    record, images, parts = found.record, dict(found.images), dict(found.parts)
    whole, rows = images["train"], parts["train"].rows
    labels, kept = np.asarray(whole["label"]), np.arange(len(whole))
    if record.fold is not None:
        kept, tested = split_fold(labels, record.fold, record.fold_seed, found.class_names)
        images["test"], parts["test"] = whole.select(tested), Part(parts["train"].split, rows[tested], is_carved=True)
    carved = [part for part in ("test", "validation") if part not in images]
    places, end = content_positions(whole) if carved else None, 0.0
    for part in carved:
        end += TEST_SHARE if part == "test" else record.train_val_split
        if end >= 1:
            raise UserError(
                f"--train_val_split {record.train_val_split}: with the test part's tenth nothing is left to train on; "
                "must be below 0.9."
            )
        kept, held_out = carve(labels, places, kept, end)
        images[part], parts[part] = whole.select(held_out), Part(parts["train"].split, rows[held_out], is_carved=True)
    kept = kept[_training_subset(labels[kept], found.class_names, record)]
    images["train"], parts["train"] = whole.select(kept), replace(parts["train"], rows=rows[kept])
    real = RealImages(**images, class_names=found.class_names, record=record, parts=parts)
    unused = found.unused | ({} if record.fold is None else count_images(found, "test"))
    return replace(real, remarks=(_describe_parts(real, unused), *_list_warnings(real)))


def load_for_folds(record: RealImagesRecord, num_folds: int, token: str | None = None) -> Folds:
    """Load the whole training split as folds; nothing is carved off, and other splits are not used.

    Raises:
        UserError: from `load_labelled_splits`; a class has fewer images than there are folds.
    """
    found = load_labelled_splits(record, token)
    whole, part = found.images["train"], found.parts["train"]
    none, nothing = whole.select([]), replace(part, rows=part.rows[:0], is_carved=True)
    parts = {"train": part, "validation": nothing, "test": nothing}
    real = RealImages(whole, none, none, found.class_names, found.record, parts)
    folds = Folds(real, num_folds, part.rows, np.asarray(whole["label"]))
    folds.split(folds.names[0], 0)
    unused = found.unused | count_images(found, "validation", "test")
    remark = f"{record.name}: {len(whole):,} images (split '{part.split}') in {num_folds} folds{_list_unused(unused)}."
    return replace(folds, images=replace(real, remarks=(remark, *_list_warnings(real))))


def count_images(found: LabelledSplits, *parts: str) -> dict[str, int]:
    """Return split -> number of images of the given parts, as far as they come from splits."""
    return {found.parts[part].split: len(found.parts[part].rows) for part in parts if part in found.parts}


def identify_real_images(record: RealImagesRecord, token: str | None = None) -> tuple[RealImagesRecord, dict[str, str]]:
    """Return the record with its commit pinned, and the identity of the contents of each of its `PLACES`.

    Raises:
        UserError: a place is neither a folder nor an accessible repository.
    """
    identities = {}
    for place in PLACES:
        name = getattr(record, place)
        if name is None:
            continue
        revision = record.dataset_revision if place == "dataset_name" else None
        source = open_source(name, f"--{place}", "dataset", revision, token)
        identities[place] = source.identity(list_data_files)
        if source.is_local and has_card_with_data(name):  # which names the data files
            identities[place] += f", card {content_digest(name, [CARD])}"
        if place == "dataset_name":
            record = replace(record, dataset_revision=source.revision)
    return record, identities


def is_same_image_set(record: dict, dataset_name: str | None, train_dir: str | None) -> bool:
    """Return whether a record's real images (`real_images`) have the folder or id of the two flags."""

    def place(name: str | None) -> str | Path | None:
        return Path(name).resolve() if name is not None and Path(name).is_dir() else name

    recorded = place(record.get("dataset_name")), place(record.get("train_dir"))
    return recorded == (place(dataset_name), place(train_dir))


def _training_subset(labels: np.ndarray, class_names: list[str], record: RealImagesRecord) -> np.ndarray:
    num_samples = len(labels) if record.max_train_samples is None else record.max_train_samples
    if record.num_shots is not None:
        counts = np.bincount(labels, minlength=len(class_names))
        fewest = np.argmin(np.where(counts, counts, len(labels) + 1))
        if counts[fewest] < record.num_shots:
            raise UserError(
                f"--num_shots {record.num_shots}: class '{class_names[fewest]}' of '{record.name}' has "
                f"{counts[fewest]} training images; lower --num_shots, add images, or remove the class."
            )
        # shots come first in the balanced order
        num_samples = min(num_samples, record.num_shots * np.count_nonzero(counts))
    return balanced_indices(labels, num_samples, record.few_shot_seed)


def _load_splits(record: RealImagesRecord, token: str | None) -> tuple[DatasetDict, RealImagesRecord]:
    if record.train_dir is not None:
        return load_folder_set(read_train_dirs(record.train_dir, record.validation_dir)), record
    source = open_source(record.dataset_name, "--dataset_name", "dataset", record.dataset_revision, token)
    found = read_local_set(source.name) if source.is_local else None
    splits = load_image_dataset(source, record.dataset_config_name) if found is None else load_folder_set(found)
    return splits, replace(record, dataset_revision=source.revision)


def _describe_parts(real: RealImages, unused: dict[str, int]) -> str:
    """Return a line on the role of each split; `unused` maps the other splits to their sizes."""
    listed = []
    for part in PARTS:
        source = real.parts[part]
        how = f"carved off '{source.split}'" if source.is_carved else f"split '{source.split}'"
        if part == "test" and real.record.fold is not None:
            how = f"fold {real.record.fold} of '{source.split}'"
        listed.append(f"{part} {len(source.rows):,} images ({how})")
    return f"{real.record.name}: {', '.join(listed)}{_list_unused(unused)}."


def _list_unused(unused: dict[str, int]) -> str:
    left = ", ".join(f"'{split}' ({number:,} images)" for split, number in unused.items())
    return f"; not used: {left}" if left else ""


def _list_warnings(real: RealImages) -> list[str]:
    """Return warnings about classes that look alike, are tested but not trained, or are not tested."""

    def named(is_meant: np.ndarray) -> str:
        return list_names([real.class_names[label] for label in np.flatnonzero(is_meant)])

    doubts = [
        # ascii: two Unicode forms of a letter look the same
        f"Warning: the classes {', '.join(map(ascii, names))} differ in case, spaces or Unicode form only; they stay "
        "separate classes, and train_dsi.py refuses two that are the same in a prompt: merge or rename them."
        for names in find_similar_names(real.class_names)
    ]
    counts = {
        part: np.bincount(np.asarray(getattr(real, part)["label"], int), minlength=len(real.class_names))
        for part in real.parts
    }
    absent = sum(counts.values()) == 0
    if absent.any():
        doubts.append(f"Warning: no split has images of {named(absent)}; the classifier still has an output for each.")
    missing_values = [name for name in real.class_names if name.casefold() in MISSING_VALUES]
    if missing_values:
        doubts.append(
            f"Warning: the class {list_names(missing_values)} may stand for missing labels; it is used as a class."
        )
    for part in ("validation", "test"):
        tested, trained = counts[part] > 0, counts["train"] > 0
        if (tested & ~trained).any():
            doubts.append(
                f"Warning: {part} images of classes without training images: {counts[part][~trained].sum():,} "
                f"({named(tested & ~trained)}); all of them count as wrong."
            )
        if tested.any() and (trained & ~tested).any():
            doubts.append(
                f"Warning: the {part} part has images of {tested.sum()} of {len(real.class_names)} classes (none of "
                f"{named(trained & ~tested)}); per-class means cover only these."
            )
    return doubts


def describe_small_parts(real_images: RealImages, fewest: int = 5) -> str | None:
    """Return a warning about validation and test parts with fewer than `fewest` images of some class, or None.

    Classes without images are in `remarks`.
    """
    small = []
    for part in ("validation", "test"):
        counts = np.bincount(np.asarray(getattr(real_images, part)["label"], int))
        smallest = int(min(counts[counts > 0], default=fewest))
        if smallest < fewest:
            small.append(f"the {part} part has {smallest} image{'s' * (smallest > 1)} of its smallest class")
    if not small:
        return None
    return (
        f"Warning: {' and '.join(small)}, too few to judge by; `compare_transfer.py --num_folds 5` tests on every "
        "training image once."
    )


def limit_held_out(real_images: RealImages, max_images: int | None) -> RealImages:
    """Return the images with at most `max_images`, evenly spaced, in each of the validation and test parts."""
    return real_images.select(
        {part: evenly_spaced(len(getattr(real_images, part)), max_images) for part in ("validation", "test")}
    )


def check_held_out(real_images: RealImages, parts: tuple[str, ...] = PARTS) -> None:
    """Check that, of the parts used, the training part has two classes and the others have images.

    Raises:
        UserError: they have not, for example if every class has a single image.
    """
    classes = {real_images.class_names[label] for label in set(real_images.train["label"])}
    if "train" in parts and len(classes) < 2:
        raise UserError(
            f"{real_images.record.name}: all training images are of one class ({', '.join(classes)}); a classifier "
            "needs two or more."
        )
    for split in ("validation", "test"):
        if split in parts and not len(getattr(real_images, split)):
            raise UserError(
                f"{real_images.record.name}: no images are left for the {split} part; give at least three per class, "
                "or separate test images (a split 'test', or --validation_dir)."
            )
