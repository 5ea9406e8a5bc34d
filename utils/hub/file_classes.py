"""The class names in a dataset's files, compared file by file: `datasets` reads all files by the first one's."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features

from utils.cli.processes import warn_once

HUGGINGFACE = b"huggingface"  # the metadata key of a schema that holds the features


@dataclass(frozen=True)
class FileLabels:
    """A file's label column: its class names (None: it has none), whether it is numeric, and its number of rows."""

    names: list[str] | None
    is_numeric: bool
    num_rows: int


def unify_class_names(loaded: DatasetDict, files: Mapping[str, Sequence[str | BinaryIO]], where: str) -> DatasetDict:
    """Return the splits with one numbering of the classes, matched by name; names missing from the splits come last.

    `files` are the parquet or arrow files of each split, in the order of their rows. Numbers in files without class
    names stand for the names in the splits. If all files agree and the card has other names, the card's names are used
    by number, with a warning that begins with `where`.

    Raises:
        ValueError: a column has class names in some files and text in others, or files differ and their rows are not
            those of the splits.
    """
    for column, feature in next(iter(loaded.values())).features.items():
        found = {split: [_read_labels(file, column) for file in of_split] for split, of_split in files.items()}
        of_files = [labels for of_split in found.values() for labels in of_split]
        named = [labels.names for labels in of_files if labels.names]
        if not named:
            continue
        if not isinstance(feature, ClassLabel) or not all(labels.is_numeric for labels in of_files):
            raise ValueError(
                f"its files disagree on column '{column}': class names for numbers in one, text in another"
            )
        if all(names == feature.names for names in named):
            continue
        every_name = list(dict.fromkeys(name for names in named for name in names))
        if named.count(named[0]) == len(named) and set(every_name) != set(feature.names):
            warn_once(
                f"{where}: its card names the classes of '{column}' {', '.join(feature.names[:3])}, ..., its files "
                f"{', '.join(named[0][:3])}, ...; the card's names are used, by number."
            )
            continue
        every_name = list(dict.fromkeys([*(name for name in feature.names if name in every_name), *every_name]))
        for split in loaded:
            loaded[split] = _renumber(loaded[split], column, found[split], every_name)
    return loaded


def reordered_names(features: Features, paths: Iterable[str | Path]) -> str | None:
    """Return a column whose classes are in another order in a file than in `features`; None if there is none.

    Files with other classes are ignored: they may belong to another configuration.
    """
    columns = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    for path, column in product(paths, columns):
        names = _read_labels(str(path), column).names
        if names and names != features[column].names and sorted(names) == sorted(features[column].names):
            return column
    return None


def _read_labels(file: str | BinaryIO, column: str) -> FileLabels:
    """Return a file's labels of a column."""
    schema, num_rows = _read_schema(file)
    names, is_numeric = None, True
    if column in schema.names:
        kind = schema.field(column).type
        is_numeric = pa.types.is_integer(kind) or pa.types.is_null(kind)
        feature = Features.from_arrow_schema(schema)[column] if HUGGINGFACE in (schema.metadata or {}) else None
        names = feature.names if isinstance(feature, ClassLabel) else None
    return FileLabels(names, is_numeric, num_rows)


def _read_schema(file: str | BinaryIO) -> tuple[pa.Schema, int]:
    name = file if isinstance(file, str) else getattr(file, "path", "")
    if not name.endswith(".arrow"):
        with pq.ParquetFile(file) as parquet:
            return parquet.schema_arrow, parquet.metadata.num_rows
    with pa.memory_map(file) if isinstance(file, str) else file as source:
        try:
            table = pa.ipc.open_stream(source).read_all()  # as datasets writes it
        except pa.ArrowInvalid:
            source.seek(0)
            table = pa.ipc.open_file(source).read_all()
        return table.schema, table.num_rows


def _renumber(images: Dataset, column: str, found: list[FileLabels], every_name: list[str]) -> Dataset:
    if sum(labels.num_rows for labels in found) != len(images):
        raise ValueError(f"its files have the classes of '{column}' in different orders, and other rows than were read")
    places = {name: place for place, name in enumerate(every_name)}
    stored = images.select_columns(column).with_format("arrow")[:][column]
    numbers = stored.fill_null(-1).to_numpy()  # also not a label
    renumbered, start = np.array(numbers), 0
    for labels in found:
        rows = slice(start, start + labels.num_rows)
        own = np.array([places.get(name, -1) for name in labels.names or images.features[column].names])
        known = (numbers[rows] >= 0) & (numbers[rows] < len(own))  # others are reported when labels are checked
        renumbered[rows][known] = own[numbers[rows][known]]
        start += labels.num_rows
    others, feature = images.remove_columns(column), ClassLabel(names=every_name)
    return others.add_column(column, renumbered, feature=feature).select_columns(images.column_names)
