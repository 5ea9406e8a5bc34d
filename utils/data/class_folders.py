"""Images in class folders, and the check that one real image set is given."""

import logging
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image

from utils.cli.arguments import RealDataArguments
from utils.cli.errors import UserError
from utils.cli.ranges import check_ranges

if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)

OF_DATA_SETS = ("dataset_config_name", "dataset_revision", "train_split")


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
        return
    for option in fields(RealDataArguments):
        value = getattr(real_data, option.name)
        if option.name in OF_DATA_SETS and value != option.default:
            raise UserError(f"--{option.name} {value}: goes with --dataset_name, not with --train_dir.")
    find_class_folders(real_data.train_dir, real_data.validation_dir)


def find_class_folders(train_dir: str, validation_dir: str | None = None) -> dict[str, dict[str, list[str]]]:
    """Return split -> class -> paths of its images, all sorted by name; a folder without images has an empty list.

    Hidden files, and those whose suffix is no image's, are left out.

    Raises:
        UserError: a folder is not there, has no images, or some that are not directly in a class folder; a class of
            `validation_dir` is none of `train_dir`.
    """
    splits = {"train": _list_images(train_dir, "--train_dir")}
    if validation_dir is not None:
        splits["validation"] = _list_images(validation_dir, "--validation_dir")
        unknown = [name for name, paths in splits["validation"].items() if paths and not splits["train"].get(name)]
        if unknown:
            raise UserError(
                f"--validation_dir {validation_dir}: --train_dir {train_dir} has no images of {', '.join(unknown)}."
            )
    return splits


def load_class_folders(train_dir: str, validation_dir: str | None = None) -> "DatasetDict":
    """Return what `load_dataset("imagefolder", drop_labels=False)` makes of tidy class folders.

    That one stops at a stray metadata.csv, takes photo.jpg.txt for an image and an archive for a folder, and leaves out
    linked folders. Rows hold paths.

    Raises:
        UserError: what `find_class_folders` raises.
    """
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image  # takes a second, and the check needs none

    splits = find_class_folders(train_dir, validation_dir)
    empty = [name for name, paths in splits["train"].items() if not paths]
    if empty:
        logger.warning(f"--train_dir {train_dir}: no images in {', '.join(empty)}; not a class.")
    class_names = [name for name, paths in splits["train"].items() if paths]
    features = Features({"image": Image(), "label": ClassLabel(names=class_names)})
    loaded = DatasetDict()
    for split, classes in splits.items():
        rows = [(path, label) for label, name in enumerate(class_names) for path in classes.get(name, [])]
        images, labels = zip(*rows)
        loaded[split] = Dataset.from_dict({"image": images, "label": labels}, features=features)
    return loaded


def _list_images(folder: str, flag: str) -> dict[str, list[str]]:
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{flag} {folder}: is no folder.")
    suffixes = {
        suffix for suffix, image_format in PIL.Image.registered_extensions().items() if image_format in PIL.Image.OPEN
    }
    found = {}
    for path, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        images = sorted(name for name in files if Path(name).suffix.lower() in suffixes and not _is_hidden(name))
        parts = Path(path).relative_to(root).parts
        if len(parts) == 1:
            found[parts[0]] = [os.path.join(path, name) for name in images]
        elif images:
            raise UserError(
                f"{flag} {folder}: {Path(*parts, images[0])} is not directly in a class folder; right is "
                f"{root / 'class name' / images[0]}."
            )
    if not any(found.values()):
        raise UserError(f"{flag} {folder}: has no class folders with images.")
    return found


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))  # as for `datasets`: .DS_Store, ._photo.jpg, __MACOSX
