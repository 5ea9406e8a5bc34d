"""A labelled image dataset: its record, its parts, and the rows of the splits that they consist of."""

from dataclasses import asdict, dataclass, fields, replace

import numpy as np
from datasets import Dataset

from utils.cli.options import absolute_if_local
from utils.cli.records import image_set_name
from utils.data.arguments import RealDataArguments

PARTS = ("train", "validation", "test")
PLACES = ("dataset_name", "train_dir", "validation_dir")


@dataclass
class RealImagesRecord(RealDataArguments):
    """The flags' values that load the same images again; part of every step's record."""

    @property
    def name(self) -> str:
        return image_set_name(asdict(self))

    @classmethod
    def from_arguments(cls, arguments: RealDataArguments) -> "RealImagesRecord":
        """Return the record of a script's flags, with absolute folders."""
        values = {field.name: getattr(arguments, field.name) for field in fields(cls)}
        return cls(**values | {name: absolute_if_local(values[name]) for name in PLACES})

    def to_dict(self) -> dict:
        """Return the record as JSON values, without the keys of folds if there are none."""
        record = asdict(self)
        if self.fold is None:
            del record["fold"], record["fold_seed"]
        return record


@dataclass(frozen=True)
class Part:
    """Where images come from: the split as a flag names it, their rows there, and whether they were carved off."""

    split: str
    rows: np.ndarray
    is_carved: bool = False


@dataclass(frozen=True)
class RealImages:
    """Train, validation and test images with the columns `image` and `label`; `train` may be a subset.

    `record` is resolved (columns found, commit pinned). `parts` gives the rows of each part. `remarks` are lines for
    the user: the role of each split, and warnings.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    class_names: list[str]
    record: RealImagesRecord
    parts: dict[str, Part]
    remarks: tuple[str, ...] = ()

    @property
    def train_indices(self) -> np.ndarray:
        """The rows of the train split that are in `train`, which a token or classifier has seen."""
        return self.parts["train"].rows

    def select(self, rows: dict[str, np.ndarray]) -> "RealImages":
        """Return a subset of each part, by indices in it; parts that are not named stay whole."""
        parts = {part: replace(self.parts[part], rows=self.parts[part].rows[kept]) for part, kept in rows.items()}
        images = {part: getattr(self, part).select(kept) for part, kept in rows.items()}
        return replace(self, **images, parts=self.parts | parts)
