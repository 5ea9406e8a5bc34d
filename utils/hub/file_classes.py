"""Class names of a set's parquet files, compared file by file: `datasets` reads all with the names of the first."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features

HUGGINGFACE = b"huggingface"  # the key of a schema's metadata with the features


def unify_class_names(loaded: DatasetDict, files: Mapping[str, Sequence[str | Path]]) -> DatasetDict:
    """Return the splits with labels that mean the same class in every row, found by name; names they lack come last.

    `files` are the local parquet files of each split, in the order in which their rows were read. Files that say
    nothing of classes are read with the names that the splits have.

    Raises:
        ValueError: the files name their classes differently, and their rows are not those of the splits.
    """
    for column, feature in next(iter(loaded.values())).features.items():
        if not isinstance(feature, ClassLabel):
            continue
        found = {split: [_read_names(path, column) for path in paths] for split, paths in files.items()}
        names = [feature.names, *(names for of_split in found.values() for names, _ in of_split if names)]
        if all(other == feature.names for other in names):
            continue
        every_name = list(dict.fromkeys(name for some in names for name in some))
        for split in loaded:
            loaded[split] = _renumber(loaded[split], column, found[split], every_name)
    return loaded


def reordered_names(features: Features, paths: Iterable[str | Path]) -> str | None:
    """Return a column whose classes a file has in another order than `features`, None where there is none.

    Files with other classes are passed over: they may be of another configuration.
    """
    columns = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    for path, column in product(paths, columns):
        names, _ = _read_names(path, column)
        if names and names != features[column].names and sorted(names) == sorted(features[column].names):
            return column
    return None


def _read_names(path: str | Path, column: str) -> tuple[list[str] | None, int]:
    """Return the class names that a file gives a column, None where it gives none, and how many rows it has."""
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        has_features = HUGGINGFACE in (schema.metadata or {})
        feature = Features.from_arrow_schema(schema).get(column) if has_features else None
        return feature.names if isinstance(feature, ClassLabel) else None, file.metadata.num_rows


def _renumber(
    images: Dataset, column: str, found: list[tuple[list[str] | None, int]], every_name: list[str]
) -> Dataset:
    if sum(num_rows for _, num_rows in found) != len(images):
        raise ValueError(
            f"its files order the class names of '{column}' differently, and have other rows than are read"
        )
    places = {name: place for place, name in enumerate(every_name)}
    stored = images.select_columns(column).with_format("arrow")[:][column]
    labels = stored.fill_null(-1).to_numpy()  # which is no label either
    renumbered, start = np.array(labels), 0
    for names, num_rows in found:
        rows = slice(start, start + num_rows)
        own = np.array([places[name] for name in names or images.features[column].names])
        known = (labels[rows] >= 0) & (labels[rows] < len(own))  # others are told where labels are checked
        renumbered[rows][known] = own[labels[rows][known]]
        start += num_rows
    feature = ClassLabel(names=every_name)
    order = images.column_names
    others = images.rename_column(column, f"{column} before")
    return others.add_column(column, renumbered, feature=feature).select_columns(order)
