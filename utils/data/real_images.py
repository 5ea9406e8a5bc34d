"""The labelled real images: load, find columns, check, and split. The same images for every script and method."""

from dataclasses import asdict, dataclass, fields, replace

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from tqdm.auto import tqdm

from utils.cli.errors import UserError
from utils.data.splits import few_shot_indices, stratified_split
from utils.hub.data_sets import load_data_set
from utils.hub.repositories import open_source


@dataclass(frozen=True)
class RealImagesRecord:
    """What one needs to load the same images again; part of every step's record."""

    dataset_name: str
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    image_column_name: str | None = None
    label_column_name: str | None = None
    train_split: str = "train"
    train_val_split: float = 0.1
    num_shots: int | None = None
    few_shot_seed: int = 0

    @classmethod
    def from_arguments(cls, arguments) -> "RealImagesRecord":
        """Return the record of a script's `RealDataArguments` (the fields have the same names)."""
        return cls(**{field.name: getattr(arguments, field.name) for field in fields(cls)})

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class RealImages:
    """Splits with the columns `image` and `label`. `train` is the few-shot subset where shots were asked for.

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

    Test is the split `test`, else `validation`; a set with train only is split 80/10/10. The validation part is the
    split `validation` where there is a `test` too, else `train_val_split` of every class is carved off train, with a
    fixed seed, before shots are drawn.

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
    if record.num_shots is not None:
        try:
            indices = indices[few_shot_indices(labels[indices], record.num_shots, record.few_shot_seed)]
        except ValueError as error:
            raise UserError(f"--num_shots {record.num_shots}: {error} in '{record.dataset_name}'.") from None
    return RealImages(train.select(indices), validation, test, class_names, record, indices)


def _load_splits(record: RealImagesRecord, token: str | None) -> tuple[DatasetDict, RealImagesRecord]:
    source = open_source(record.dataset_name, "--dataset_name", "dataset", record.dataset_revision, token)
    splits = load_data_set(source, record.dataset_config_name)
    if record.train_split not in splits:
        raise UserError(f"--train_split {record.train_split}: '{record.dataset_name}' has {', '.join(splits)}.")
    return splits, replace(record, dataset_revision=source.revision)


def find_columns(features: Features, record: RealImagesRecord) -> tuple[str, str]:
    """Return the names of the image and of the label column: as given, else by type.

    Raises:
        UserError: a given column is not there, or there is not exactly one of that type.
    """
    columns = ", ".join(features)
    for flag, name in (("image", record.image_column_name), ("label", record.label_column_name)):
        if name is not None and name not in features:
            raise UserError(f"--{flag}_column_name {name}: not in '{record.dataset_name}'; columns are {columns}.")

    def only(kind: type, flag: str) -> str:
        found = [name for name, feature in features.items() if isinstance(feature, kind)]
        if len(found) != 1:
            what = "no" if not found else "more than one"
            raise UserError(
                f"--{flag}_column_name: '{record.dataset_name}' has {what} column of type {kind.__name__}; "
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
                f"'{record.dataset_name}' have no label, the first in row {missing[0]}."
            )
    if not isinstance(train.features["label"], ClassLabel):
        names = sorted({str(label) for split in splits.values() for label in split["label"]})
        label = ClassLabel(names=names)
        splits = splits.map(lambda row: {"label": names.index(str(row["label"]))}, desc="labels").cast_column(
            "label", label
        )
    return splits, splits[record.train_split].features["label"].names


def check_images(images: Dataset, what: str) -> None:
    """Decode every image once, before any model loads.

    Raises:
        UserError: an image is damaged; the message names its row and column.
    """
    undecoded = images.cast_column("image", Image(decode=False))
    for row in tqdm(range(len(undecoded)), desc=f"checking {what}", unit="image", leave=False):
        try:
            Image().decode_example(undecoded[row]["image"])
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{what}: row {row}, column 'image': damaged image ({error}).") from None
