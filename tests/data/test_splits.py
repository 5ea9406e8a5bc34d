import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from tests.conftest import save_image_set
from tests.data.builders import CLASSES, labelled_images, load, sizes
from utils.cli.errors import UserError
from utils.data.splits import assign_splits, balanced_indices, carve, evenly_spaced, select

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
        ({"test": "test[99:]"}, r"--test_split test\[99:\]: must not be empty"),
        ({"test": "test[9:3]"}, r"--test_split test\[9:3\]: must not be empty"),
        ({"test": ""}, "--test_split : 'cars' has"),
        ({"test": "train[80%:]"}, r"test_split train\[80%:\]: 20 of its images are in --train_split train too; .*:80%"),
        ({"test": "train"}, "--test_split train: 100 of its images are in --train_split train too"),
        ({"train": "train+train"}, "--train_split train.train: takes some images twice; its slices must not overlap"),
        ({"train": "train[:9]+train[5:12]"}, "takes some images twice"),
        ({"train": "train[5:9]+train[:5]"}, None),
        ({"validation": "test"}, None),
        ({"validation": "test[:9]", "test": "test"}, "--test_split test: 9 of its images are in --validation_split"),
        ({"train": "train+test"}, None),
        ({"train": "train+test", "test": "test"}, "test_split test: 30 of its images are in --train_split train.test"),
    ],
)
def test_invalid_splits_are_one_line(given, message):
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


def test_the_parts_are_described_in_one_line(tmp_path):
    save_image_set(tmp_path, {"train": 20, "valid": 3, "extra": 2})
    real = load(tmp_path)
    train, validation, _ = sizes(real)
    assert real.remarks == (
        f"{tmp_path}: train {train} images (split 'train'), validation {validation} images (carved off 'train'), "
        "test 9 images (split 'validation').",
    )


def test_an_unused_split_may_be_without_labels(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    labels = {"train": [0, 1, 2] * 5, "test": [-1] * 4, "unlabeled": [-1] * 6}
    splits = "".join(f"  - split: {split}\n    path: data/{split}.parquet\n" for split in labels)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n")
    for split, of_split in labels.items():
        labelled_images(of_split, CLASSES).to_parquet(folder / f"{split}.parquet")
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
    train, test = labelled_images(["a", "b", "a"]), labelled_images(["a"], label_name="kind")
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match="--label_column_name label: not in split 'test' of"):
        load(tmp_path / "set", label_column_name="label", test_split="test")


LABELS = np.repeat([0, 1, 2], [30, 50, 20])


def test_carve_takes_about_the_share_of_every_class_and_one_of_two():
    labels = np.repeat([0, 1], [3000, 1000])
    rest, part = carve(labels, np.random.default_rng(0).random(4000), np.arange(4000), 0.1)
    assert np.abs(np.bincount(labels[part]) - [300, 100]).max() < 50
    assert sorted([*rest, *part]) == list(range(4000))
    labels = np.array([0, 1, 1, 2, 2])
    for places in (np.full(5, 0.9), np.zeros(5)):
        rest, part = carve(labels, places, np.arange(5), 0.5)
        assert (labels[rest].tolist(), labels[part].tolist()) == ([0, 1, 2], [1, 2])


def test_a_second_part_is_carved_from_what_is_left():
    labels, places = np.zeros(10, int), np.arange(10) / 10
    rest, test = carve(labels, places, np.arange(10), 0.2)
    rest, validation = carve(labels, places, rest, 0.4)
    assert (rest.tolist(), validation.tolist(), test.tolist()) == ([4, 5, 6, 7, 8, 9], [2, 3], [0, 1])


def test_evenly_spaced_rows_begin_and_end_with_the_set():
    assert evenly_spaced(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spaced(3, 4).tolist() == evenly_spaced(3, None).tolist() == [0, 1, 2]
    assert evenly_spaced(0, 4).tolist() == []


def test_balanced_indices_are_nested_and_balanced():
    chosen = [set(balanced_indices(LABELS, number, 1)) for number in range(1, 101)]
    for smaller, larger in zip(chosen, chosen[1:]):
        assert smaller < larger
    for number, indices in enumerate(chosen[:60], 1):
        counts = np.bincount(LABELS[sorted(indices)], minlength=3)
        assert counts.sum() == number
        assert counts.max() - counts.min() <= 1
    assert np.bincount(LABELS[sorted(chosen[74])]).tolist() == [28, 27, 20]  # the last class has no more
    for everything in (1000, None):  # no more than there are, in order
        assert balanced_indices(LABELS, everything, 0).tolist() == list(range(100))
    assert balanced_indices(LABELS, 12, 0).tolist() != balanced_indices(LABELS, 12, 1).tolist()
