import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from tests.conftest import CLASS_NAMES, draw_image, save_image_set
from utils.cli.errors import UserError
from utils.data.image_set import RealImagesRecord
from utils.data.real_images import load_real_images
from utils.data.splits import assign_splits, select

SIZES = {"train": 100, "valid": 20, "test": 30, "extra": 5}


def splits(**sizes: int) -> DatasetDict:
    return DatasetDict({name: Dataset.from_dict({"row": range(size)}) for name, size in sizes.items()})


def assign(sizes: dict, unlabelled: tuple = (), **given) -> dict[str, str]:
    given = {"train": "train", "validation": None, "test": None} | given
    chosen = assign_splits(splits(**sizes), given, "cars", lambda split: split not in unlabelled)
    return {part: selection.spec for part, selection in chosen.items()}


@pytest.mark.parametrize(
    ("sizes", "given", "expected"),
    [
        ({"train": 9}, {}, {}),
        ({"train": 9, "test": 3}, {}, {"test": "test"}),
        ({"train": 9, "valid": 3}, {}, {"test": "valid"}),
        ({"train": 9, "val": 3}, {}, {"test": "val"}),
        ({"train": 9, "dev": 3}, {}, {"test": "dev"}),
        ({"train": 9, "Validation": 3}, {}, {"test": "Validation"}),
        ({"train": 9, "dev": 3, "testing": 3}, {}, {"validation": "dev", "test": "testing"}),
        ({"train": 9, "eval": 3, "test": 3}, {}, {"test": "test"}),
        ({"train": 9, "validation": 3, "val": 2, "test": 3}, {}, {"validation": "validation", "test": "test"}),
        ({"train": 9, "validation": 3, "dev": 2}, {}, {"validation": "dev", "test": "validation"}),
        ({"training": 9, "test": 3}, {}, {"train": "training", "test": "test"}),
        ({"train": 9, "test": 0, "valid": 3}, {}, {"test": "valid"}),
        ({"train": 9, "holdout": 3}, {}, {}),
        ({"seg_train": 9, "seg_test": 3}, {}, {"train": "seg_train", "test": "seg_test"}),
        ({"training_set": 9, "test_set": 3}, {}, {"train": "training_set", "test": "test_set"}),
        ({"train": 9, "test_hard": 2, "test": 3}, {}, {"test": "test"}),
        ({"train": 9, "testimony": 3, "contest": 3}, {}, {}),
        ({"train": 9, "holdout": 3}, {"test": "holdout"}, {"test": "holdout"}),
        ({"train": 9, "valid": 3}, {"validation": "valid"}, {"validation": "valid"}),
        ({"train": 9, "valid": 3, "test": 3}, {"test": "valid"}, {"test": "valid", "validation": None}),
        ({"train": 9, "test": 3}, {"validation": "test"}, {"validation": "test"}),
        ({"train": 9}, {"train": "train[:5]", "test": "train[5:]"}, {"train": "train[:5]", "test": "train[5:]"}),
        ({"train": 9, "extra": 3, "test": 2}, {"train": "train+extra"}, {"train": "train+extra", "test": "test"}),
        ({"train": 9, "test": 8}, {"validation": "test[:4]", "test": "test[4:]"},
         {"validation": "test[:4]", "test": "test[4:]"}),
    ],
)  # fmt: skip
def test_splits_serve_as_their_names_and_the_flags_say(sizes, given, expected):
    expected = {part: spec for part, spec in ({"train": "train"} | expected).items() if spec}
    assert assign(sizes, **given) == expected


def test_a_split_without_labels_is_passed_over_unless_it_is_named():
    sizes = {"train": 9, "validation": 3, "test": 5, "unlabeled": 7}
    assert assign(sizes, unlabelled=("test",)) == {"train": "train", "test": "validation"}
    assert assign(sizes, unlabelled=("test",), test="test")["test"] == "test"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"test": "tset"}, "--test_split tset: 'cars' has train .100 images., valid .20 images., .*'train.80%:.'"),
        ({"validation": "valid["}, r"--validation_split valid\[: 'cars' has"),
        ({"test": "test[99:]"}, r"--test_split test\[99:\]: no images are in it"),
        ({"test": "test[9:3]"}, r"--test_split test\[9:3\]: no images are in it"),
        ({"test": ""}, "--test_split : 'cars' has"),
        (
            {"test": "train[80%:]"},
            r"--test_split train\[80%:\]: 20 of its images are in --train_split train too; .*:80%",
        ),
        ({"test": "train"}, "--test_split train: 100 of its images are in --train_split train too"),
        ({"train": "train+train"}, "--train_split train.train: takes some images twice; its slices must not overlap"),
        ({"train": "train[:9]+train[5:12]"}, "takes some images twice"),
        ({"train": "train[5:9]+train[:5]"}, None),
        ({"validation": "test"}, None),
        ({"validation": "test[:9]", "test": "test"}, "--test_split test: 9 of its images are in --validation_split"),
        ({"train": "train+test"}, None),
        (
            {"train": "train+test", "test": "test"},
            "--test_split test: 30 of its images are in --train_split train.test",
        ),
    ],
)
def test_splits_that_cannot_be_meant_are_one_line(given, message):
    if message is None:
        assign(SIZES, **given)
        return
    with pytest.raises(UserError, match=message):
        assign(SIZES, **given)


def test_a_selection_knows_its_rows_in_the_split():
    sets = splits(train=10, extra=3)
    assert select(sets, "test", "train[80%:]", "cars").rows.tolist() == [8, 9]
    both = select(sets, "train", "train[:2]+extra", "cars")
    assert both.read(sets)["row"][:] == [0, 1, 0, 1, 2]
    assert both.rows.tolist() == [0, 1, 2, 3, 4]  # of the whole, as rows of two splits would be ambiguous
    assert select(sets, "train", "train[8:]+train[:2]", "cars").rows.tolist() == [8, 9, 0, 1]


def load(folder, **settings):
    return load_real_images(RealImagesRecord(str(folder), **settings))


def test_the_parts_are_told_in_one_line(tmp_path):
    save_image_set(tmp_path, {"train": 20, "valid": 3, "extra": 2})
    real = load(tmp_path)
    train, validation = len(real.train), len(real.validation)
    assert real.remarks == (
        f"{tmp_path}: train {train} images (split 'train'), validation {validation} images (carved off 'train'), "
        "test 9 images (split 'validation').",
    )


def save_parquet(path, labels: list, feature, name="label"):
    rng = np.random.default_rng(0)
    rows = {"image": [draw_image(label or 0, rng) for label in labels], name: labels}
    Dataset.from_dict(rows, features=Features({"image": Image(), name: feature})).to_parquet(path)


def test_an_unused_split_may_be_without_labels(tmp_path):
    classes = ClassLabel(names=CLASS_NAMES)
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: data/{split}.parquet\n" for split in ("train", "test", "unlabeled"))
        + "---\n"
    )
    save_parquet(folder / "train.parquet", [0, 1, 2] * 5, classes)
    save_parquet(folder / "test.parquet", [-1] * 4, classes)
    save_parquet(folder / "unlabeled.parquet", [-1] * 6, classes)
    real = load(tmp_path)
    assert real.parts["test"].is_carved
    assert real.remarks[0].endswith("; not used: 'test' (4 images), 'unlabeled' (6 images).")
    with pytest.raises(UserError, match="4 of 4 images of split 'test' have no label, the first in row 0"):
        load(tmp_path, test_split="test")
    assert len(load(tmp_path, train_split="train[:9]", test_split="train[9:]").test) == 6


def test_rows_of_a_sliced_train_split_are_those_of_the_split(tmp_path):
    save_image_set(tmp_path, {"train": 10, "test": 2})
    real = load(tmp_path, train_split="train[50%:]")
    assert set(real.train_indices) | set(real.parts["validation"].rows) == set(range(15, 30))


def test_a_part_of_other_columns_is_an_error(tmp_path):
    rng = np.random.default_rng(0)
    train = Dataset.from_dict({"image": [draw_image(0, rng)] * 3, "label": ["a", "b", "a"]})
    test = Dataset.from_dict({"image": [draw_image(0, rng)], "kind": ["a"]})
    DatasetDict(train=train.cast_column("image", Image()), test=test).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match="--label_column_name label: not in split 'test' of"):
        load(tmp_path / "set", label_column_name="label", test_split="test")
