"""Local image folders: which are classes, which are splits of classes, and the images in them."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli.errors import UserError
from utils.cli.processes import warn_once
from utils.data.class_names import match_class_names, sort_class_names
from utils.data.image_files import NOT_IMAGE, ImageFiles, escape_name, find_image_files, name_some
from utils.hub.repositories import is_saved_to_disk

if TYPE_CHECKING:
    from datasets import DatasetDict

# as in `datasets` (data_files.SPLIT_KEYWORDS), which takes a second to import
SPLIT_WORDS = {"train", "training", "validation", "valid", "dev", "val", "test", "testing", "eval", "evaluation"}
TRAIN_WORDS = {"train", "training"}
TABLES_OF_IMAGES = (".parquet", ".arrow")
METADATA_FILES = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}  # read by imagefolder
OTHER_DATA_FILES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".tar", ".tgz", ".gz", ".zip", ".h5", ".hdf5", ".xml",
                    ".lance")  # fmt: skip

CARD = "README.md"

Classes = dict[str, list[str]]


@dataclass
class FolderSet:
    """A dataset of class folders: split -> class -> absolute paths of its images, sorted by name.

    A folder without images is a class with an empty list. `notes` are lines for the user.
    """

    splits: dict[str, Classes]
    notes: list[str] = field(default_factory=list)


def read_train_dirs(train_dir: str, validation_dir: str | None = None) -> FolderSet:
    """Return the class folders of --train_dir, and of --validation_dir.

    Raises:
        UserError: a folder does not exist, has no images, or has images outside class folders; a class of
            `validation_dir` is not in `train_dir`.
    """
    found = FolderSet({})
    folders = {"train": ("--train_dir", train_dir), "validation": ("--validation_dir", validation_dir)}
    for split, (flag, folder) in folders.items():
        if folder is not None:
            files = find_image_files(folder, flag)
            if not any(files.images.values()):
                raise _no_images(files, "class folders with images")
            found.splits[split] = _classes_below(files, ())
            found.notes += _count(files, [found.splits[split]])
    if validation_dir is not None:
        train, validation = found.splits.values()
        with_images = [[name for name, paths in classes.items() if paths] for classes in (validation, train)]
        matched = match_class_names(*with_images, f"--validation_dir {validation_dir}:")
        unknown = [name for name in with_images[0] if name not in matched]
        if unknown:
            names = ", ".join(escape_name(name) for name in unknown)
            raise UserError(f"--validation_dir {validation_dir}: --train_dir {train_dir} has no images of {names}.")
    return found


def read_local_set(folder: str) -> FolderSet | None:
    """Return the class folders of a local dataset; None for other files, which `datasets` reads.

    It is a folder of class folders, or of split folders (train, valid, test, ...) that contain class folders. A split
    folder with images but no class folders, such as Kaggle's test, is not used, with a note.

    Raises:
        UserError: there are neither images nor other data, or the folders are ambiguous.
    """
    if is_saved_to_disk(folder) or has_card_with_data(folder):
        return None
    files = find_image_files(folder, "--dataset_name")
    others = files.left_out.get(NOT_IMAGE, [])
    if any(Path(path).suffix.lower() in TABLES_OF_IMAGES or _is_metadata(path) for path in others):
        return None
    if not any(files.images.values()):
        if any(Path(path).suffix.lower() in OTHER_DATA_FILES for path in others):
            return None
        raise _no_images(files, "images")
    return _read_layout(files, ())


def load_folder_set(found: FolderSet) -> "DatasetDict":
    """Return the splits of class folders, as `load_dataset("imagefolder", drop_labels=False)` reads tidy folders.

    imagefolder itself stops at a stray metadata.csv, takes photo.jpg.txt for an image and an archive for a folder, and
    skips linked folders and images selected by words such as train or test in their names. Rows have absolute paths.
    Skipped files are reported.
    """
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image  # takes a second, and checks do not need it

    for note in found.notes:
        warn_once(note)
    loaded = DatasetDict()
    for split, classes in found.splits.items():
        # each split has its own classes; `unify_labels` matches those of the used splits
        class_names = sort_class_names(name for name, paths in classes.items() if paths)
        rows = [(path, label) for label, name in enumerate(class_names) for path in classes[name]]
        images, labels = zip(*rows)
        features = Features({"image": Image(), "label": ClassLabel(names=class_names)})
        loaded[split] = Dataset.from_dict({"image": images, "label": labels}, features=features)
    return loaded


def is_split_name(name: str, words: set[str] = SPLIT_WORDS) -> bool:
    """Return whether a folder has a split's name, or contains one as a word, such as 'seg_train' and 'Test-2'."""
    return not words.isdisjoint(split_words(name))


def _training_first(name: str) -> tuple[bool, str]:
    return not is_split_name(name, TRAIN_WORDS), name


def split_words(name: str) -> list[str]:
    """Return the words of a split's name in lower case; 'seg_train' and 'Test-2' contain their purpose."""
    return re.split(r"[-._ 0-9]+", name.casefold())


def _read_layout(files: ImageFiles, prefix: tuple[str, ...]) -> FolderSet:
    """Return the splits below the folder `prefix` of a local dataset."""
    depth = len(prefix)
    with_images = [parts for parts, names in files.images.items() if names and parts[:depth] == prefix]
    if prefix in with_images:
        raise _not_in_class_folder(files, prefix, prefix)
    flat = [parts[depth] for parts in with_images if len(parts) == depth + 1]
    nested = list(dict.fromkeys(parts[depth] for parts in with_images if len(parts) > depth + 1))
    both = [name for name in flat if name in nested]
    if both:
        raise _not_in_class_folder(files, prefix, (*prefix, both[0]))
    if not nested:
        _check_classes(files, prefix, flat)
        found = FolderSet({"train": _classes_below(files, prefix)})
        found.notes += _count(files, found.splits.values())
        found.notes += [
            f"{files.place}: treating {name} as a class (it holds images, not class folders)."
            for name in filter(is_split_name, flat)
        ]
        return found
    splits = sorted(nested, key=_training_first)
    if not any(is_split_name(name) for name in nested):
        if len(nested) == 1 and not flat:
            return _read_layout(files, (*prefix, nested[0]))  # archives often have one folder around everything
        raise _not_in_class_folder(files, prefix, max(with_images, key=len))
    stray = [name for name in flat if not is_split_name(name)]
    if stray:
        raise UserError(
            f"{files.place}: {name_some(splits)} hold class folders, but {name_some(stray)} images; "
            f"give --train_dir {files.path(*prefix, splits[0])} for those class folders only, or move the others away."
        )
    found = FolderSet({name: _classes_below(files, (*prefix, name)) for name in splits})
    unlabelled = [f"{len(files.images[(*prefix, name)]):,} of {name}, which has no class folders" for name in flat]
    empty = [
        parts[depth] for parts in files.images
        if len(parts) == depth + 1 and parts[:depth] == prefix and parts[depth] not in (*nested, *flat)
    ]  # fmt: skip
    found.notes += _count(files, found.splits.values(), unlabelled)
    if empty:
        found.notes.append(f"{files.place}: no images in {name_some(empty)}; not used.")
    return found


def _check_classes(files: ImageFiles, prefix: tuple[str, ...], names: list[str]) -> None:
    """Check that folders with images are classes, and not splits without labels or a single folder of images."""
    if len(names) > 1 and sum(map(is_split_name, names)) < 2:
        return
    many = len(names) > 1
    raise UserError(
        f"{files.place}: only {name_some(names)} {'hold' if many else 'holds'} images, so there are no "
        f"labels; expected a folder per class, optionally inside train and test folders. If "
        f"{'they are classes' if many else 'it is a class'}, give --train_dir {files.path(*prefix)}."
    )


def _classes_below(files: ImageFiles, prefix: tuple[str, ...]) -> Classes:
    """Return the classes below the folder `prefix`, which must contain only class folders.

    Raises:
        UserError: there are images elsewhere below it.
    """
    depth, classes = len(prefix), {}
    for parts, names in files.images.items():
        if parts[:depth] != prefix:
            continue
        if len(parts) == depth + 1:
            folder = os.path.join(os.path.abspath(files.root), *parts)
            classes[parts[depth]] = [os.path.join(folder, name) for name in names]
        elif names:
            raise _not_in_class_folder(files, prefix, parts)
    return classes


def _count(files: ImageFiles, splits: Iterable[Classes], unlabelled: Sequence[str] = ()) -> list[str]:
    """Return lines on what is used and left out; none if every file is used."""
    numbers = Counter()
    for classes in splits:
        numbers.update({name: len(paths) for name, paths in classes.items()})
    notes, empty = [], sorted(name for name, number in numbers.items() if not number)
    if empty:
        notes.append(f"{files.place}: skipping empty class folders: {', '.join(map(escape_name, empty))}.")
    told = [files.describe_left_out()]
    if files.by_content:
        told.append(f"recognised as images by their content: {len(files.by_content):,} ({name_some(files.by_content)})")
    if unlabelled:
        told.append(f"not used: {', '.join(unlabelled)}")
    told = "; ".join(filter(None, told))
    if told:
        num_classes = len(numbers) - len(empty)
        notes.append(f"{files.place}: {numbers.total():,} images of {num_classes:,} classes; {told}.")
    return notes


def has_card_with_data(folder: str) -> bool:
    """Return whether a card names the data files, which `datasets` then reads."""
    try:
        text = (Path(folder) / CARD).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    header = text[3:].partition("\n---")[0] if text.startswith("---") else ""
    return re.search(r"^configs\s*:", header, re.MULTILINE) is not None


def _is_metadata(path: str) -> bool:
    *folders, name = Path(path).parts
    return name in METADATA_FILES and (not folders or len(folders) == 1 and is_split_name(folders[0]))


def _no_images(files: ImageFiles, what: str) -> UserError:
    left_out = files.describe_left_out()
    return UserError(f"{files.place}: has no {what}{f'; {left_out}' if left_out else ''}.")


def _not_in_class_folder(files: ImageFiles, prefix: tuple[str, ...], folder: tuple[str, ...]) -> UserError:
    """Return the error for an image in `folder`, where `prefix` is the folder that should hold class folders."""
    name = files.images[folder][0]
    place = f"{files.place}: {escape_name(os.path.join(*folder, name))}"
    nested = {parts[0] for parts, names in files.images.items() if names and len(parts) == 2}
    splits = sorted(filter(is_split_name, nested), key=_training_first)
    if files.flag == "--train_dir" and len(folder) == 2 and folder[0] in splits:
        others = f" --validation_dir {files.path(splits[1])}" if len(splits) > 1 else ""
        return UserError(
            f"{place} is not directly in a class folder; try --train_dir {files.path(splits[0])}{others}, or "
            f"--dataset_name {escape_name(files.root)}, which takes {name_some(splits)} as splits."
        )
    right = files.path(*prefix, "class name", name)
    others = f", or {files.flag} {files.path(*folder[:-1])}" if len(folder) > len(prefix) + 1 else ""
    return UserError(f"{place} is not directly in a class folder; expected {right}{others}.")
