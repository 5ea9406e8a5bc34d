"""The labelled real images: load, find columns, split and check. The same images for every script and method."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from utils.cli.errors import UserError
from utils.data.class_folders import load_class_folders, load_local_set
from utils.data.image_set import Part, RealImages, RealImagesRecord
from utils.data.labels import is_labelled, unify_labels
from utils.data.opened_images import PARTS, content_places
from utils.data.remarks import describe_parts, list_doubts
from utils.data.split_roles import assign_splits, select
from utils.data.splits import TEST_SHARE, balanced_indices, carve, evenly_spaced, few_shot_indices
from utils.hub.data_sets import load_data_set
from utils.hub.repositories import open_source

USUAL_LABEL_NAMES = ("label", "labels")


@dataclass(frozen=True)
class LabelledSplits:
    """The splits that serve as parts, before anything is carved off; `unused` maps the others to their numbers."""

    images: dict[str, Dataset]
    parts: dict[str, Part]
    class_names: list[str]
    record: RealImagesRecord
    unused: dict[str, int]


def load_labelled_splits(record: RealImagesRecord, token: str | None = None) -> LabelledSplits:
    """Load the splits of a labelled image set that `assign_splits` chooses; no image is read.

    Raises:
        UserError: the set, a split or a column is not there; labels are missing or of no use.
    """
    splits, record = _load_splits(record, token)
    train_split = select(splits, "train", record.train_split, record.name).slices[0].split
    image_column, label_column = find_columns(splits[train_split].features, record)
    record = replace(record, image_column_name=image_column, label_column_name=label_column)
    given = {part: getattr(record, f"{part}_split") for part in PARTS}
    chosen = assign_splits(splits, given, record.name, lambda split: is_labelled(splits[split], label_column))
    used = dict.fromkeys(split for selection in chosen.values() for split in selection.splits)
    standard = {split: _standardise(splits[split], split, record) for split in used}
    standard, class_names = unify_labels(standard, label_column)
    return LabelledSplits(
        {part: selection.read(standard) for part, selection in chosen.items()},
        {part: Part(selection.spec, selection.rows) for part, selection in chosen.items()},
        class_names,
        replace(record, train_split=chosen["train"].spec),
        {split: len(rows) for split, rows in splits.items() if split not in used},
    )


def load_real_images(record: RealImagesRecord, token: str | None = None) -> RealImages:
    """Load a labelled image set and split it.

    A part that no split serves for is carved off the training images, class by class, before shots are drawn: test a
    tenth of the whole, validation `train_val_split`.

    Raises:
        UserError: what `load_labelled_splits` raises; too few images for the shots, or none left to train on.
    """
    found = load_labelled_splits(record, token)
    record, images, parts = found.record, dict(found.images), dict(found.parts)
    whole, rows = images["train"], parts["train"].rows
    labels, kept = np.asarray(whole["label"]), np.arange(len(whole))
    carved = [part for part in ("test", "validation") if part not in images]
    places, end = content_places(whole) if carved else None, 0.0
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
    return replace(real, remarks=(describe_parts(real, found.unused), *list_doubts(real)))


def same_image_set(record: dict, dataset_name: str | None, train_dir: str | None) -> bool:
    """Say whether a record's real images (`real_images`) are those of the two flags: the same folder or id."""

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
        shots = few_shot_indices(labels, record.num_shots, record.few_shot_seed)
        num_samples = min(num_samples, len(shots))  # the shots are the first of the balanced order
    return balanced_indices(labels, num_samples, record.few_shot_seed)


def _load_splits(record: RealImagesRecord, token: str | None) -> tuple[DatasetDict, RealImagesRecord]:
    if record.train_dir is not None:
        return load_class_folders(record.train_dir, record.validation_dir), record
    source = open_source(record.dataset_name, "--dataset_name", "dataset", record.dataset_revision, token)
    splits = load_local_set(source.name) if source.is_local else None
    if splits is None:
        splits = load_data_set(source, record.dataset_config_name)
    return splits, replace(record, dataset_revision=source.revision)


def find_columns(features: Features, record: RealImagesRecord) -> tuple[str, str]:
    """Return the names of the image and of the label column: as given, else by type.

    Where no column is of type Image, the one that holds the bytes of files is taken; where none is of type ClassLabel,
    the one with a usual name.

    Raises:
        UserError: a given column is not there, or there is not exactly one of that type.
    """
    columns = ", ".join(features)
    for flag, name in (("image", record.image_column_name), ("label", record.label_column_name)):
        if name is not None and name not in features:
            raise UserError(f"--{flag}_column_name {name}: not in '{record.name}'; columns are {columns}.")

    def only(kind: type, flag: str) -> str:
        found = [name for name, feature in features.items() if isinstance(feature, kind)]
        if kind is Image and not found:
            found = [name for name, feature in features.items() if _holds_files(feature)]
        if kind is ClassLabel and not found:
            found = [name for name in features if name in USUAL_LABEL_NAMES]
        if len(found) != 1:
            what = "no" if not found else "more than one"
            raise UserError(
                f"--{flag}_column_name: '{record.name}' has {what} column of type {kind.__name__}; "
                f"name it, columns are {columns}."
            )
        return found[0]

    image = record.image_column_name or only(Image, "image")
    label = record.label_column_name or only(ClassLabel, "label")
    if image == label:
        raise UserError(
            f"--image_column_name {image}, --label_column_name {label}: one column cannot be both of {columns}."
        )
    return image, label


def _holds_files(feature: object) -> bool:
    """Say whether a column holds the bytes of files, alone or beside a path, as pandas, pyarrow and duckdb write it."""
    content = feature.get("bytes") if isinstance(feature, dict) else feature
    return isinstance(content, Value) and content.dtype in ("binary", "large_binary")


def _standardise(images: Dataset, split: str, record: RealImagesRecord) -> Dataset:
    """Return the images of a split with the two columns, as `image` (decoded, in its own mode) and `label`."""
    columns = [record.image_column_name, record.label_column_name]
    for flag, name in zip(("image", "label"), columns):
        if name not in images.features:
            raise UserError(f"--{flag}_column_name {name}: not in split '{split}' of '{record.name}'.")
    images = (
        images.with_format(None)
        .select_columns(columns)
        .rename_columns({old: new for old, new in zip(columns, ("image", "label")) if old != new})
    )
    kind = images.features["image"]
    # an Image with a mode would be converted by datasets, where that decodes it, and not by `to_rgb`
    if _holds_files(kind) or (isinstance(kind, Image) and (kind.mode or not kind.decode)):
        return images.cast_column("image", Image())
    if not isinstance(kind, Image):
        kind = kind.dtype if isinstance(kind, Value) else type(kind).__name__
        cure = "; store the images that it names by `cast_column` and `to_parquet` of datasets" if "str" in kind else ""
        raise UserError(f"--image_column_name {record.image_column_name}: is of type {kind}, no image column{cure}.")
    return images


def limit_held_out(real_images: RealImages, max_images: int | None) -> RealImages:
    """Return the images with at most `max_images` in the validation and in the test part, evenly spread over it."""
    return real_images.select(
        {part: evenly_spaced(len(getattr(real_images, part)), max_images) for part in ("validation", "test")}
    )


def check_held_out(real_images: RealImages, parts: tuple[str, ...] = PARTS) -> None:
    """Check of the parts that are used that training has two classes to tell apart, and the others have images.

    Raises:
        UserError: there are not, as where every class has a single image.
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
                f"{real_images.record.name}: no images are left for the {split} part; give three or more of a class, "
                "or test images of their own (a split 'test', or --validation_dir)."
            )
