"""Images in class folders, and the check that one real image set is given."""

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli.errors import UserError
from utils.cli.parsing import check_ranges
from utils.cli.processes import warn_once
from utils.data.arguments import RealDataArguments
from utils.data.class_names import sort_class_names
from utils.data.folder_layouts import FolderSet, read_local_set, read_train_dirs

if TYPE_CHECKING:
    from datasets import DatasetDict

OF_DATA_SETS = ("dataset_config_name", "dataset_revision", "train_split", "validation_split", "test_split")


def check_real_images_given(real_data: RealDataArguments) -> None:
    """Check that one image set is given, and that the other flags go with it. Opens no image.

    Raises:
        UserError: none or two are given, class folders are not as they should be, a value is out of range.
    """
    if real_data.dataset_name is None and real_data.train_dir is None:
        raise UserError(
            "--dataset_name is missing: a data set id on the Hub, or a local folder; or give --train_dir, a folder "
            "with a subfolder of images for each class."
        )
    if real_data.dataset_name is not None and real_data.train_dir is not None:
        raise UserError(
            f"--train_dir {real_data.train_dir}: not together with --dataset_name {real_data.dataset_name}; "
            "give one of them."
        )
    check_ranges(vars(real_data))
    if real_data.train_dir is None:
        if real_data.validation_dir is not None:
            raise UserError(f"--validation_dir {real_data.validation_dir}: needs --train_dir.")
        _check_local_set(real_data.dataset_name, real_data.dataset_config_name)
        return
    for option in fields(RealDataArguments):
        value = getattr(real_data, option.name)
        if option.name in OF_DATA_SETS and value != option.default:
            raise UserError(f"--{option.name} {value}: goes with --dataset_name, not with --train_dir.")
    read_train_dirs(real_data.train_dir, real_data.validation_dir)


def check_output_outside(output_dir: str | Path, real_data: RealDataArguments) -> None:
    """Check that results are not written among the images, where the next run would take them for images.

    Raises:
        UserError: the output folder is in one of the image folders.
    """
    output = Path(output_dir).resolve()
    for flag in ("dataset_name", "train_dir", "validation_dir"):
        folder = getattr(real_data, flag)
        if folder is not None and os.path.isdir(folder) and output.is_relative_to(Path(folder).resolve()):
            raise UserError(
                f"--output_dir {output_dir}: is inside --{flag} {folder}, whose files are the images; name a folder "
                "outside of it."
            )


def _check_local_set(name: str, config_name: str | None) -> None:
    if os.path.isfile(name):
        raise UserError(f"--dataset_name {name}: is a file; give the folder that holds it.")
    if os.path.isdir(name) and read_local_set(name) is not None and config_name is not None:
        raise UserError(
            f"--dataset_config_name {config_name}: --dataset_name {name} is a folder of class folders, which has no "
            "configurations."
        )


def load_class_folders(train_dir: str, validation_dir: str | None = None) -> "DatasetDict":
    """Return what `load_dataset("imagefolder", drop_labels=False)` makes of tidy class folders, as `train` and
    `validation`.

    That one stops at a stray metadata.csv, takes photo.jpg.txt for an image and an archive for a folder, and leaves out
    linked folders. Rows hold absolute paths. What is left out is told.

    Raises:
        UserError: what `read_train_dirs` raises.
    """
    return _load(read_train_dirs(train_dir, validation_dir))


def load_local_set(folder: str) -> "DatasetDict | None":
    """Return the splits of a local folder of class folders, under the names of its split folders; `train` without any.

    None for a folder of other files, which `load_dataset` reads. It would also read class folders, but leave out the
    images whose names have a word like train or test where others have none.

    Raises:
        UserError: what `read_local_set` raises.
    """
    found = read_local_set(folder)
    return None if found is None else _load(found)


def _load(found: FolderSet) -> "DatasetDict":
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image  # takes a second, and the check needs none

    for note in found.notes:
        warn_once(note)
    loaded = DatasetDict()
    for split, classes in found.splits.items():
        # each split has its own classes: which are the same, `unify_labels` finds out for those that are used
        class_names = sort_class_names(name for name, paths in classes.items() if paths)
        rows = [(path, label) for label, name in enumerate(class_names) for path in classes[name]]
        images, labels = zip(*rows)
        features = Features({"image": Image(), "label": ClassLabel(names=class_names)})
        loaded[split] = Dataset.from_dict({"image": images, "label": labels}, features=features)
    return loaded
