import json
import os

import pytest
from PIL import Image

from utils.cli.errors import UserError
from utils.data.class_folders import is_split_name, read_local_set, read_train_dirs


@pytest.fixture
def tree(tmp_path):
    """Return a function that writes files below a folder 'set', images or text by their suffix, and returns it."""

    def write(*files):
        for file in files:
            path = tmp_path / "set" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".png", ".jpg"):
                Image.new("RGB", (8, 8)).save(path)
            else:
                path.write_text("text")
        return str(tmp_path / "set")

    return write


def counts(found) -> dict[str, dict[str, int]]:
    return {split: {name: len(paths) for name, paths in classes.items()} for split, classes in found.splits.items()}


def two_of(*folders) -> list[str]:
    return [f"{folder}/{number}.png" for folder in folders for number in (1, 2)]


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["cat", "dog"], {"train": {"cat": 2, "dog": 2}}),
        (["car", "train", "bus"], {"train": {"bus": 2, "car": 2, "train": 2}}),
        (["test", "rest"], {"train": {"rest": 2, "test": 2}}),
        (["train/cat", "train/dog"], {"train": {"cat": 2, "dog": 2}}),
        (["test/cat", "Train/cat", "valid/cat"], {"Train": {"cat": 2}, "test": {"cat": 2}, "valid": {"cat": 2}}),
        (["seg_train/cat", "seg_test/cat", "extra/cat"], {"seg_train": {"cat": 2}, "extra": {"cat": 2},
                                                          "seg_test": {"cat": 2}}),
        (["train/train", "train/car", "val/train"], {"train": {"car": 2, "train": 2}, "val": {"train": 2}}),
        (["Pets/cat", "Pets/dog"], {"train": {"cat": 2, "dog": 2}}),
        (["all/data/train/cat", "all/data/test/cat"], {"train": {"cat": 2}, "test": {"cat": 2}}),
    ],
)  # fmt: skip
def test_folders_are_classes_or_splits_with_classes(tree, folders, expected):
    found = read_local_set(tree(*two_of(*folders)))
    assert counts(found) == expected
    assert list(found.splits) == list(expected)  # the training images' first, for the order of the classes
    called = {name for name in folders if is_split_name(name) and "/" not in name}
    assert [note.partition("set: ")[2] for note in found.notes] == [
        f"treating {name} as a class (it holds images, not class folders)." for name in called
    ]


def test_an_unlabelled_test_folder_is_counted_and_not_used(tree):
    folder = tree(*two_of("train/cat", "train/dog"), *two_of("test"), "test/3.png", "sample.csv")
    found = read_local_set(folder)
    assert counts(found) == {"train": {"cat": 2, "dog": 2}}
    assert found.notes == [
        f"--dataset_name {folder}: 4 images of 2 classes; left out: 1 that is not an image (sample.csv); not used: "
        "3 of test, which has no class folders."
    ]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train", "test"], "only test, train hold images, .* If they are classes, give --train_dir .*set[.]"),
        (["train", "valid", "sample"], "so no labels are seen"),
        (["images"], "only images holds images, so no labels are seen; .* If it is a class, give --train_dir"),
        (["train/cat", "samples"], "train hold class folders, but samples images; give --train_dir .*set/train for"),
        (["train/cat", "train"], "train/1.png is not directly in a class folder"),
        (["cat", "dog", "."], "1.png is not directly in a class folder; right is .*set/class name/1.png[.]"),
        (["cats/tabby", "dogs/pug"], "cats/tabby/1.png is not directly .*; right is .* or --dataset_name .*/cats"),
        (["train/cats/tabby", "test/cats/tabby"], "train/cats/tabby/1.png is not .* right is .*train/class name/1.png"),
    ],
)  # fmt: skip
def test_folders_that_may_mean_one_thing_or_another_are_one_line(tree, folders, message):
    with pytest.raises(UserError, match=message):
        read_local_set(tree(*two_of(*folders)))


def test_a_train_dir_of_splits_says_how_to_give_them(tree):
    folder = tree(*two_of("test/cat", "train/cat", "train/dog"))
    with pytest.raises(UserError) as error:
        read_train_dirs(folder)
    assert f"right is --train_dir {folder}/train --validation_dir {folder}/test, or --dataset_name {folder}" in str(
        error.value
    )


def test_a_train_dir_takes_folders_called_as_splits_for_classes(tree):
    assert counts(read_train_dirs(tree(*two_of("train", "test")))) == {"train": {"test": 2, "train": 2}}


@pytest.mark.parametrize(
    "files",
    [
        ["data/train-00000.parquet", "assets/1.png"],
        ["cat/1.png", "dog/1.png", "metadata.csv"],
        ["train/cat/1.png", "train/metadata.jsonl"],
        ["train.tar", "notes.txt"],
        ["photos.zip"],
        ["data.jsonl"],
    ],
)
def test_other_data_is_left_to_datasets(tree, files):
    assert read_local_set(tree(*files)) is None


def test_a_card_that_names_data_files_is_left_to_datasets(tree):
    folder = tree(*two_of("cat", "dog"), "README.md")
    assert counts(read_local_set(folder)) == {"train": {"cat": 2, "dog": 2}}
    card = os.path.join(folder, "README.md")
    for header, is_ours in (("license: mit\n---\nconfigs: none", True), ("configs:\n- config_name: a", False)):
        with open(card, "w") as file:
            file.write(f"---\n{header}\n---\n")
        assert (read_local_set(folder) is not None) == is_ours


def test_tables_and_archives_beside_class_folders_are_named(tree):
    found = read_local_set(tree(*two_of("cat", "dog"), "labels.csv", "all.zip", "dog/metadata.csv"))
    assert counts(found) == {"train": {"cat": 2, "dog": 2}}
    assert (
        "4 images of 2 classes; left out: 3 that are not images (all.zip, labels.csv, dog/metadata.csv)"
        in (found.notes[0])
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["notes.txt"], r"has no images; left out: 1 that is not an image \(notes.txt\)"),
        (["cat/1.cr2"], "has no images; left out: 1 camera raw"),
        ([".hidden/1.png"], "has no images; left out: 1 hidden"),
    ],
)
def test_a_folder_without_images_or_data_is_one_line(tree, files, message):
    with pytest.raises(UserError, match=message):
        read_local_set(tree(*files))


def test_a_class_whose_files_are_all_left_out_is_no_class_and_told(tree):
    found = read_train_dirs(tree(*two_of("cat", "dog"), "owl/1.cr2"))
    assert [name for name, paths in found.splits["train"].items() if paths] == ["cat", "dog"]
    assert "skipping empty class folders: owl" in found.notes[0]
    assert "4 images of 2 classes; left out: 1 camera raw (develop them to JPEG or PNG)" in found.notes[1]


def test_split_names_are_those_of_datasets():
    from datasets.data_files import SPLIT_KEYWORDS

    assert all(is_split_name(word) for words in SPLIT_KEYWORDS.values() for word in words)
    assert all(map(is_split_name, ["Train", "test-2", "my.dev.images", "seg_pred_test"]))
    assert not any(map(is_split_name, ["trains", "latest", "contest", "devil"]))


def test_what_save_to_disk_writes_is_left_to_datasets(tree):
    folder = tree("dataset_dict.json", "train/state.json")
    with open(os.path.join(folder, "dataset_dict.json"), "w") as file:
        json.dump({"splits": ["train"]}, file)
    assert read_local_set(folder) is None
