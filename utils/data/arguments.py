"""The flags for the labelled real images, and their checks. Opens no image."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from utils.cli.errors import UserError
from utils.cli.options import Need, option
from utils.cli.parsing import check_ranges
from utils.data.class_folders import read_local_set, read_train_dirs

# a synthetic dataset's record may have real images that are shots
SHOT_FLAGS = ("num_shots", "max_train_samples", "synthetic_dataset")
WITH_SHOTS = Need(
    "without --num_shots or --max_train_samples",
    lambda values: any(values.get(name) for name in SHOT_FLAGS),
    "add one or ",
)

WITH_FOLD = Need(
    "without --fold", lambda values: bool(values.get("fold") or values.get("synthetic_dataset")), "add it or "
)
NO_FOLD = Need("with --fold, which tests on training images", lambda values: not values.get("fold"))


@dataclass
class RealDataArguments:
    """The labelled real images."""

    _argument_group_name = "real images"

    dataset_name: str | None = option(
        None,
        "Real image dataset: an id on the Hub, or a local folder with class folders (also inside folders named train, "
        "valid, test), with data files, or from save_to_disk.",
    )
    train_dir: str | None = option(
        None, "Folder with a subfolder of training images per class, instead of --dataset_name."
    )
    validation_dir: str | None = option(
        None, "Folder with a subfolder of held-out images per class, for testing; needs --train_dir."
    )
    dataset_config_name: str | None = option(None, "Configuration of the dataset.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of the dataset on the Hub.")
    image_column_name: str | None = option(None, "Column with the images (default: found by type).")
    label_column_name: str | None = option(None, "Column with the labels (default: found by type).")
    train_split: str = option("train", "Split with the training images, or a slice such as 'train[:80%%]'.")
    validation_split: str | None = option(
        None,
        "Split or slice for validation (default: one named validation, valid, dev or val, else carved off for it).",
    )
    test_split: str | None = option(
        None,
        "Split or slice for testing, such as 'train[80%%:]' (default: one named test, testing, eval or evaluation, "
        "else the validation split, else a tenth of the training images).",
        needs=[NO_FOLD],
    )
    train_val_split: float = option(
        0.1, "Share of the training images for validation, above 0 and below 1, unless a split is for it."
    )
    num_shots: int | None = option(None, "Number of training images per class (default: all).")
    few_shot_seed: int = option(
        0, "Seed of the subset of training images; K shots are among the K+1 shots.", needs=[WITH_SHOTS]
    )
    max_train_samples: int | None = option(
        None, "Maximum number of training images, balanced over the classes (default: all)."
    )
    random_flip: bool = option(
        True, "Also train on mirrored images; turn off if left and right matter (text, signs, arrows)."
    )
    skip_bad_images: bool = option(False, "Leave out and count damaged images, which are an error otherwise.")
    fold: str | None = option(
        None,
        "K/N, such as 1/5: test on the K-th of N stratified folds of the training images and train on the others, as "
        "in compare_transfer.py --num_folds N; the dataset's own test split is not used.",
    )
    fold_seed: int = option(0, "Seed of the division into folds.", needs=[WITH_FOLD])


def parse_fold(text: str) -> tuple[int, int]:
    """Return (2, 5) for `2/5`, the second of five folds.

    Raises:
        UserError: it has another form, or there is no such fold.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, num_folds = map(int, match.groups()) if match else (0, 0)
    if num_folds < 2 or not 1 <= number <= num_folds:
        raise UserError(f"--fold {text}: must be K/N, the K-th of N folds, such as 1/5; N is 2 or above.")
    return number, num_folds


def check_real_images_given(real_data: RealDataArguments) -> None:
    """Check that one image dataset is given and that the other flags fit it. Opens no image.

    Raises:
        UserError: none or two are given, class folders are malformed, or a value is out of range.
    """
    if real_data.dataset_name is None and real_data.train_dir is None:
        raise UserError(
            "--dataset_name is missing: give a dataset id on the Hub or a local folder, or give --train_dir, a folder "
            "with a subfolder of images per class."
        )
    if real_data.dataset_name is not None and real_data.train_dir is not None:
        raise UserError(
            f"--train_dir {real_data.train_dir}: not together with --dataset_name {real_data.dataset_name}; "
            "give one of them."
        )
    check_ranges(vars(real_data))
    if real_data.fold is not None:
        parse_fold(real_data.fold)
    if real_data.train_dir is not None:
        for name in ("dataset_config_name", "dataset_revision", "train_split", "validation_split", "test_split"):
            value = getattr(real_data, name)
            if value != getattr(RealDataArguments, name):
                raise UserError(f"--{name} {value}: goes with --dataset_name, not with --train_dir.")
        read_train_dirs(real_data.train_dir, real_data.validation_dir)
        return
    if real_data.validation_dir is not None:
        raise UserError(f"--validation_dir {real_data.validation_dir}: needs --train_dir.")
    name, config_name = real_data.dataset_name, real_data.dataset_config_name
    if os.path.isfile(name):
        raise UserError(f"--dataset_name {name}: is a file; give the folder that holds it.")
    if os.path.isdir(name) and read_local_set(name) is not None and config_name is not None:
        raise UserError(
            f"--dataset_config_name {config_name}: --dataset_name {name} is a folder of class folders, which has no "
            "configurations."
        )


@contextmanager
def explain_recorded_name(real_data: RealDataArguments, recorded_in: str | None) -> Iterator[None]:
    """Add to errors about the real images that the record of `recorded_in` names them (None: a flag does)."""
    try:
        yield
    except UserError as error:
        if recorded_in is None:
            raise
        named = {f"--{name}": getattr(real_data, name) for name in ("train_dir", "validation_dir", "dataset_name")}
        missing = next((path for path in named.values() if path is not None and not os.path.isdir(path)), None)
        where = "" if missing is None else ", relative to where that run was started"
        if missing is not None and os.path.isabs(missing):
            where = ", a folder on the machine of that run"
        elif missing is not None and missing == real_data.dataset_name:  # or a repository
            where = ", if it is a folder relative to where that run was started"
        message = str(error).removesuffix(".")
        message = message.removeprefix("--") if message.startswith(tuple(named)) else message  # no flag was given
        raise UserError(
            f"{message} (named in the record of {recorded_in}{where}; give --dataset_name or --train_dir)."
        ) from None


def check_output_outside(output_dir: str | Path, real_data: RealDataArguments) -> None:
    """Check that results are not written among the images, where the next run would read them as images.

    Raises:
        UserError: the output folder is inside an image folder, or is a file.
    """
    output = Path(output_dir).resolve()
    if file := next((path for path in (output, *output.parents) if path.is_file()), None):
        raise UserError(f"--output_dir {output_dir}: {file} is a file; choose a folder.")
    for flag in ("dataset_name", "train_dir", "validation_dir"):
        folder = getattr(real_data, flag)
        if folder is not None and os.path.isdir(folder) and output.is_relative_to(Path(folder).resolve()):
            raise UserError(
                f"--output_dir {output_dir}: is inside --{flag} {folder}, the folder of images; choose a folder "
                "outside it."
            )
