"""Finds a dataset's image and label columns, and converts common kinds of them to images and classes."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Image, LargeList, List, Value

from utils.cli.errors import UserError
from utils.data.class_names import match_class_names, sort_class_names
from utils.data.image_set import RealImagesRecord

USUAL_LABEL_NAMES = ("label", "labels")
NO_LABEL = -1  # for integers and ClassLabel, as in `datasets`


def find_columns(features: Features, record: RealImagesRecord) -> tuple[str, str]:
    """Return the names of the image and the label column, as given or else by type.

    Without a column of type Image, one with encoded files is used; without one of type ClassLabel, one with a common
    name.

    Raises:
        UserError: a given column does not exist, or not exactly one column has that type.
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
            f"--image_column_name {image}, --label_column_name {label}: must be two different columns of {columns}."
        )
    return image, label


def _holds_files(feature: object) -> bool:
    """Return whether a column holds encoded files, with or without a path, as written by pandas, pyarrow and duckdb."""
    content = feature.get("bytes") if isinstance(feature, dict) else feature
    return isinstance(content, Value) and content.dtype in ("binary", "large_binary")


def standardise(images: Dataset, split: str, record: RealImagesRecord) -> Dataset:
    """Return a split with two columns: `image` (decoded, in its own mode) and `label`."""
    columns = [record.image_column_name, record.label_column_name]
    for flag, name in zip(("image", "label"), columns):
        if name not in images.features:
            raise UserError(f"--{flag}_column_name {name}: not in split '{split}' of '{record.name}'.")
    images = images.with_format(None).select_columns(columns).rename_columns(dict(zip(columns, ("image", "label"))))
    kind = images.features["image"]
    # datasets would convert an Image with a mode on decoding, before `to_rgb`
    if _holds_files(kind) or (isinstance(kind, Image) and (kind.mode or not kind.decode)):
        return images.cast_column("image", Image())
    if not isinstance(kind, Image):
        kind = kind.dtype if isinstance(kind, Value) else type(kind).__name__
        cure = "; store the images at these paths by datasets' `cast_column`, `to_parquet`" if "str" in kind else ""
        raise UserError(f"--image_column_name {record.image_column_name}: must hold images, got type {kind}{cure}.")
    return images


def _label_column(images: Dataset, column: str) -> pa.ChunkedArray:
    """Return the labels as stored."""
    return images.select_columns(column).with_format("arrow")[:][column]


def _find_unlabelled(column: pa.ChunkedArray) -> np.ndarray:
    """Return the rows without a label: null, NaN, -1 or blank text."""
    missing = pc.is_null(column, nan_is_null=True)
    if pa.types.is_signed_integer(column.type):
        missing = pc.or_(missing, pc.equal(column, NO_LABEL).fill_null(False))
    elif _is_text(column):
        missing = pc.or_(missing, pc.equal(pc.utf8_trim_whitespace(column), "").fill_null(False))
    return np.flatnonzero(missing.to_numpy())


def _is_text(column: pa.ChunkedArray) -> bool:
    return pa.types.is_string(column.type) or pa.types.is_large_string(column.type)


def is_labelled(images: Dataset, column: str) -> bool:
    """Return whether at least one image has a label."""
    return column in images.features and len(_find_unlabelled(_label_column(images, column))) < len(images)


def unify_labels(splits: dict[str, Dataset], column_name: str) -> tuple[dict[str, Dataset], list[str]]:
    """Return the splits with a common ClassLabel column `label`, and the class names.

    Integers, text and booleans become classes in their natural order. Classes are matched by name, with
    `match_class_names`: labels with another numbering are changed, and classes missing in the first split come last.
    `column_name` is the column's original name.

    Raises:
        UserError: the column is of another kind or of different kinds in different splits, an image has no label, or a
            number is not a class id.
    """
    flag = f"--label_column_name {column_name}:"
    kinds, names_of, codes_of = {}, {}, {}
    for split, images in splits.items():
        feature, column = images.features["label"], _label_column(images, "label")
        kinds[split] = _check_kind(flag, feature, column)
        missing = _find_unlabelled(column)
        if missing.size:
            hint = f" ({NO_LABEL} is not a class)" if pa.types.is_integer(column.type) else ""
            raise UserError(
                f"{flag} {len(missing)} of {len(images)} images of split '{split}' have no label, the first in row "
                f"{missing[0]}{hint}."
            )
        names_of[split], codes_of[split] = _encode(flag, split, feature, column)
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{kind} in split '{split}'" for split, kind in kinds.items())
        raise UserError(f"{flag} has labels of different kinds ({listed}); make them all integers, or all text.")
    class_names = list(next(iter(names_of.values())))
    for split, names in names_of.items():
        matched = match_class_names(names, class_names, f"{flag} split '{split}':")
        names_of[split] = [matched.get(name, name) for name in names]
        class_names += [name for name in names if name not in matched]
    if not any(isinstance(images.features["label"], ClassLabel) for images in splits.values()):
        class_names = sort_class_names(class_names)
    unified, classes = {}, ClassLabel(names=class_names)
    places = {name: place for place, name in enumerate(class_names)}
    for split, images in splits.items():
        if images.features["label"] != classes:
            labels = np.array([places[name] for name in names_of[split]])[codes_of[split]]
            images = images.rename_column("label", "before").add_column("label", labels, feature=classes)
            images = images.remove_columns("before")
        unified[split] = images
    return unified, class_names


def _check_kind(flag: str, feature: object, column: pa.ChunkedArray) -> str:
    """Return the kind of labels: integers, booleans or names."""
    if isinstance(feature, ClassLabel):
        return "names"
    if isinstance(feature, Value):
        if pa.types.is_integer(column.type):
            return "integers"
        if pa.types.is_boolean(column.type):
            return "booleans"
        if _is_text(column):
            return "names"
    right = "must have one class per image: an integer, text, boolean or ClassLabel"
    if isinstance(feature, List | LargeList):
        raise UserError(f"{flag} holds {_describe_lists(column)}; {right}.")
    what = feature.dtype if isinstance(feature, Value) else type(feature).__name__
    raise UserError(f"{flag} is of type {what}; {right}.")


def _describe_lists(column: pa.ChunkedArray) -> str:
    """Return a description of list labels: one-hot vectors, or several labels per image."""
    rows = column.slice(0, 1000).drop_null().to_pylist()
    lengths = {len(row) for row in rows}
    if lengths == {1}:
        return "lists of one label each (their only item is the class)"
    if len(lengths) == 1 and max(lengths) > 1 and all(set(row) == {0, 1} and sum(row) == 1 for row in rows):
        return f"one-hot vectors of {max(lengths)} numbers (the place of the 1 is the class)"
    return "lists, several labels per image (multi-label)"


def _encode(flag: str, split: str, feature: object, column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """Return the class names of a split and each image's index in them; checks ClassLabel ids."""
    if not isinstance(feature, ClassLabel):
        values = pc.unique(column)
        return [str(value) for value in values.to_pylist()], pc.index_in(column, value_set=values).to_numpy()
    labels = column.to_numpy()
    strange = np.flatnonzero((labels < 0) | (labels >= feature.num_classes))
    if strange.size:
        raise UserError(
            f"{flag} {labels[strange[0]]} in row {strange[0]} of split '{split}' is not a class id; "
            f"{feature.num_classes} classes are numbered 0 to {feature.num_classes - 1}."
        )
    return feature.names, labels
