"""The labelled real images: load, find columns, split and check. The same images for every script and method."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from tqdm.auto import tqdm

from utils.cli.errors import UserError
from utils.cli.records import image_set_name
from utils.data.class_folders import load_class_folders, load_local_set
from utils.data.image_files import read_file
from utils.data.images import to_rgb
from utils.data.splits import balanced_indices, few_shot_indices, stratified_split
from utils.hub.data_sets import load_data_set
from utils.hub.repositories import open_source

NUM_THREADS = min(16, os.cpu_count() or 1)


@dataclass(frozen=True)
class RealImagesRecord:
    """What one needs to load the same images again; part of every step's record."""

    dataset_name: str | None = None
    train_dir: str | None = None
    validation_dir: str | None = None
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    image_column_name: str | None = None
    label_column_name: str | None = None
    train_split: str = "train"
    train_val_split: float = 0.1
    num_shots: int | None = None
    few_shot_seed: int = 0
    max_train_samples: int | None = None
    random_flip: bool = True
    skip_bad_images: bool = False

    @property
    def name(self) -> str:
        return image_set_name(asdict(self))

    @classmethod
    def from_arguments(cls, arguments) -> "RealImagesRecord":
        """Return the record of a script's `RealDataArguments` (the fields have the same names)."""
        return cls(**{field.name: getattr(arguments, field.name) for field in fields(cls)})

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class RealImages:
    """Splits with the columns `image` and `label`. `train` is a subset where one is asked for.

    `record` is resolved (columns found, commit pinned). `train_indices` are the rows of the train split that `train`
    holds: what a token or a classifier has seen.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    class_names: list[str]
    record: RealImagesRecord
    train_indices: np.ndarray


def load_real_images(record: RealImagesRecord, token: str | None = None) -> RealImages:
    """Load a labelled image set and split it.

    Test is the split `test`, else `validation`, so the images of `validation_dir` are the test part; a set with train
    only is split 80/10/10. The validation part is the split `validation` where there is a `test` too, else
    `train_val_split` of every class is carved off train, with a fixed seed, before shots are drawn.

    Raises:
        UserError: the set, a split or a column is not there; labels are missing; too few images for the shots.
    """
    splits, record = _load_splits(record, token)
    image_column, label_column = find_columns(splits[record.train_split].features, record)
    record = replace(record, image_column_name=image_column, label_column_name=label_column)
    splits, class_names = _standardise(splits, record)

    train = splits.pop(record.train_split)
    indices = np.arange(len(train))
    labels = np.asarray(train["label"])
    if "test" in splits or "validation" in splits:
        test = splits.get("test", splits.get("validation"))
    else:
        indices, held_out = stratified_split(labels, 0.1)
        test = train.select(held_out)
    if "test" in splits and "validation" in splits:
        validation = splits["validation"]
    else:
        # of the whole set: 80/10/10 where test was carved off too
        kept, held_out = stratified_split(labels[indices], min(record.train_val_split * len(train) / len(indices), 0.5))
        validation = train.select(indices[held_out])
        indices = indices[kept]
    indices = indices[_training_subset(labels[indices], record)]
    return RealImages(train.select(indices), validation, test, class_names, record, indices)


def same_image_set(record: dict, dataset_name: str | None, train_dir: str | None) -> bool:
    """Say whether a record's real images (`real_images`) are those of the two flags: the same folder or id."""

    def place(name: str | None) -> str | Path | None:
        return Path(name).resolve() if name is not None and Path(name).is_dir() else name

    recorded = place(record.get("dataset_name")), place(record.get("train_dir"))
    return recorded == (place(dataset_name), place(train_dir))


def _training_subset(labels: np.ndarray, record: RealImagesRecord) -> np.ndarray:
    num_samples = len(labels) if record.max_train_samples is None else record.max_train_samples
    if record.num_shots is not None:
        try:
            shots = few_shot_indices(labels, record.num_shots, record.few_shot_seed)
        except ValueError as error:
            raise UserError(f"--num_shots {record.num_shots}: {error} in '{record.name}'.") from None
        num_samples = min(num_samples, len(shots))  # the shots are the first of the balanced order
    return balanced_indices(labels, num_samples, record.few_shot_seed)


def _load_splits(record: RealImagesRecord, token: str | None) -> tuple[DatasetDict, RealImagesRecord]:
    if record.train_dir is not None:
        return load_class_folders(record.train_dir, record.validation_dir), record
    source = open_source(record.dataset_name, "--dataset_name", "dataset", record.dataset_revision, token)
    splits = load_local_set(source.name) if source.is_local else None
    if splits is None:
        splits = load_data_set(source, record.dataset_config_name)
    if record.train_split not in splits:
        raise UserError(f"--train_split {record.train_split}: '{record.name}' has {', '.join(splits)}.")
    return splits, replace(record, dataset_revision=source.revision)


def find_columns(features: Features, record: RealImagesRecord) -> tuple[str, str]:
    """Return the names of the image and of the label column: as given, else by type.

    Raises:
        UserError: a given column is not there, or there is not exactly one of that type.
    """
    columns = ", ".join(features)
    for flag, name in (("image", record.image_column_name), ("label", record.label_column_name)):
        if name is not None and name not in features:
            raise UserError(f"--{flag}_column_name {name}: not in '{record.name}'; columns are {columns}.")

    def only(kind: type, flag: str) -> str:
        found = [name for name, feature in features.items() if isinstance(feature, kind)]
        if len(found) != 1:
            what = "no" if not found else "more than one"
            raise UserError(
                f"--{flag}_column_name: '{record.name}' has {what} column of type {kind.__name__}; "
                f"name it, columns are {columns}."
            )
        return found[0]

    return record.image_column_name or only(Image, "image"), record.label_column_name or only(ClassLabel, "label")


def _standardise(splits: DatasetDict, record: RealImagesRecord) -> tuple[DatasetDict, list[str]]:
    """Keep the two columns, as `image` and `label` (a ClassLabel), and check that every image has a label."""
    columns = [record.image_column_name, record.label_column_name]
    splits = splits.select_columns(columns).rename_columns(
        {old: new for old, new in zip(columns, ("image", "label")) if old != new}
    )
    train = splits[record.train_split]
    if not isinstance(train.features["image"], Image):
        raise UserError(f"--image_column_name {columns[0]}: is {train.features['image']}, no image column.")
    for name, split in splits.items():
        values = split.data.column("label").to_pylist()
        missing = [row for row, label in enumerate(values) if label is None or label in (-1, "")]
        if missing:
            raise UserError(
                f"--label_column_name {columns[1]}: {len(missing)} of {len(values)} images of split '{name}' of "
                f"'{record.name}' have no label, the first in row {missing[0]}."
            )
    if not isinstance(train.features["label"], ClassLabel):
        names = sorted({str(label) for split in splits.values() for label in split["label"]})
        label = ClassLabel(names=names)
        splits = splits.map(lambda row: {"label": names.index(str(row["label"]))}, desc="labels").cast_column(
            "label", label
        )
    return splits, splits[record.train_split].features["label"].names


def inspect_images(
    images: Dataset, what: str, rank: int = 0, num_parts: int = 1, show_progress: bool = True
) -> tuple[dict[int, str], dict[int, str]]:
    """Decode the images of the rows `rank`, `rank + num_parts`, ... once, in threads.

    Returns row -> SHA-256 of the encoded bytes for the good ones, and row -> what is wrong for the damaged ones.
    """
    encoded = images.select_columns("image").cast_column("image", Image(decode=False))
    rows = range(rank, len(images), num_parts)
    hashes, problems = {}, {}
    with (
        ThreadPoolExecutor(NUM_THREADS) as threads,
        tqdm(
            total=len(rows), desc=f"checking {what}", unit="image", leave=False, disable=not show_progress
        ) as progress,
    ):
        # a piece at a time: `map` takes all that it is given, and these are the bytes of whole files
        for start in range(0, len(rows), 8 * NUM_THREADS):
            piece = rows[start : start + 8 * NUM_THREADS]
            for row, (digest, problem) in zip(piece, threads.map(_inspect_image, encoded[piece]["image"])):
                if problem is None:
                    hashes[row] = digest
                else:
                    problems[row] = problem
            progress.update(len(piece))
    return hashes, problems


def _inspect_image(encoded: dict | None) -> tuple[str | None, str | None]:
    """Return the hash of an image's bytes, and what is wrong with the image."""
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        return None, "no image"
    path, content = encoded["path"], encoded["bytes"]
    try:
        if content is None:
            content = read_file(path)
        image = PIL.Image.open(BytesIO(content))
        image.draft("RGB", (1, 1))  # a JPEG is decoded to an eighth of its size, which still reads all of its bytes
        image.load()
        if image.getexif().get(PIL.ExifTags.Base.Orientation) is not None:
            PIL.ImageOps.exif_transpose(image)  # as `datasets` does, which stops at EXIF that `to_rgb` ignores
        to_rgb(image)
    except Exception as error:  # on damaged files Pillow raises nearly anything
        reason = "no known image format" if isinstance(error, PIL.UnidentifiedImageError) else str(error)
        return None, f"{reason or type(error).__name__}{f', file {path}' if path else ''}"
    return hashlib.sha256(content).hexdigest(), None


def refuse_damaged(
    problems: dict[int, str], what: str, column: str = "image", rows: np.ndarray | None = None, can_skip: bool = False
) -> None:
    """Raise where `inspect_images` found damaged images among `what`.

    `column` is the user's name of it, `rows` maps inspected rows to those of the user's split, `can_skip` says whether
    the script has the flag --skip_bad_images.

    Raises:
        UserError: there are damaged images; the message counts them and names the first.
    """
    if not problems:
        return
    first = min(problems)
    row = first if rows is None else rows[first]
    raise UserError(
        f"{what}: row {row}, column '{column}': damaged ({problems[first]}); damaged in all: {len(problems)}; repair "
        f"or remove what is damaged{', or give --skip_bad_images' if can_skip else ''}."
    )


def check_images(images: Dataset, what: str, column: str = "image", rows: np.ndarray | None = None) -> None:
    """Decode every image once, before any model loads; `column` and `rows` as in `refuse_damaged`.

    Raises:
        UserError: an image is damaged.
    """
    _, problems = inspect_images(images, what)
    refuse_damaged(problems, what, column, rows)


def check_held_out(real_images: RealImages) -> None:
    """Check that there are images to validate and to test on.

    Raises:
        UserError: there are none, as where every class has a single image.
    """
    for split in ("validation", "test"):
        if not len(getattr(real_images, split)):
            raise UserError(
                f"{real_images.record.name}: no images are left for the {split} part; give three or more of a class, "
                "or test images of their own (a split 'test', or --validation_dir)."
            )


def drop_damaged(real_images: RealImages, problems: dict[int, str]) -> RealImages:
    """Return the images without the rows of `train` that are in `problems`.

    Raises:
        UserError: a class has no other images.
    """
    train = real_images.train
    kept = np.setdiff1d(np.arange(len(train)), list(problems))
    labels = np.asarray(train["label"])
    lost = np.setdiff1d(labels, labels[kept])
    if lost.size:
        names = ", ".join(real_images.class_names[label] for label in lost)
        raise UserError(f"--skip_bad_images: all training images of {names} are damaged.")
    return replace(real_images, train=train.select(kept), train_indices=real_images.train_indices[kept])
