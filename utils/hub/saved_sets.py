"""Folders that `save_to_disk` of datasets has written. What tells them from others imports no datasets."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import DatasetDict

SAVED_SPLITS, SAVED_SPLIT = ["dataset_dict.json"], ["state.json", "dataset_info.json"]


def is_saved_to_disk(folder: str) -> bool:
    """Return whether a folder is what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` writes."""
    return any(all(os.path.isfile(os.path.join(folder, name)) for name in names)
               for names in (SAVED_SPLITS, SAVED_SPLIT))  # fmt: skip


def load_saved(folder: str) -> "DatasetDict":
    """Return the splits; a single `Dataset` is the split `train`."""
    from datasets import Dataset, DatasetDict, load_from_disk

    loaded = load_from_disk(os.path.abspath(folder))
    return (DatasetDict({"train": loaded}) if isinstance(loaded, Dataset) else loaded).with_format(None)
