import os
import re

import numpy as np
import pytest
import torch
from datasets import Image, load_dataset
from PIL import Image as PILImage

from tests.conftest import save_class_folders
from tests.data.builders import load
from utils.cli.errors import UserError
from utils.data.arguments import RealDataArguments, check_real_images_given
from utils.data.class_folders import is_split_name, load_folder_set, read_local_set, read_train_dirs
from utils.data.opened_images import inspect_images
from utils.style.latents import _load_batches
from utils.transfer.augmentation import open_image
from utils.transfer.image_format import EvalImages


@pytest.fixture
def train_dir(tmp_path):
    return save_class_folders(tmp_path / "set [a]*" / "train", {"owl": 12, "cat": 11, "10": 10})


def classes_of(folder) -> list[str]:
    return load_folder_set(read_train_dirs(str(folder)))["train"].features["label"].names


def names_of(images, class_names) -> list[str]:
    """Return the class that each image shows, by its colour, to compare with its label."""
    colours = [int(np.asarray(image).reshape(-1, 3).max(0).argmax()) for image in images["image"]]
    assert [("owl", "cat", "10")[colour] for colour in colours] == [class_names[label] for label in images["label"]]
    return sorted({class_names[label] for label in images["label"]})


def test_class_folders_are_what_imagefolder_makes_of_them(tmp_path):
    train_dir = save_class_folders(tmp_path / "train", {"owl": 12, "cat": 11, "10": 10})
    expected = load_dataset(
        "imagefolder", data_files={"train": str(train_dir / "**")}, drop_labels=False, split="train"
    )
    real = load(train_dir=str(train_dir))
    parts = [real.train, real.validation, real.test]
    assert real.class_names == expected.features["label"].names == ["10", "cat", "owl"]
    found = [(image.tobytes(), label) for part in parts for image, label in zip(part["image"], part["label"])]
    assert sorted(found) == sorted(
        (image.tobytes(), label) for image, label in zip(expected["image"], expected["label"])
    )
    row = int(real.train_indices[5])
    assert real.train[5]["image"].tobytes() == expected[row]["image"].tobytes()


def test_a_single_class_folder_is_a_class_and_numbers_are_in_their_order(tmp_path):
    real = load(train_dir=str(save_class_folders(tmp_path / "train", {"owl": 10})))
    assert (real.class_names, set(real.train["label"])) == (["owl"], {0})
    assert classes_of(save_class_folders(tmp_path / "numbers", {"10": 1, "9": 1, "0": 1})) == ["0", "9", "10"]


def test_skipped_files_are_reported_once_by_the_main_process(train_dir, caplog, monkeypatch):
    (train_dir / "notes.txt").write_text("no image")
    check_real_images_given(RealDataArguments(train_dir=str(train_dir)))
    load(train_dir=str(train_dir))
    line = f"--train_dir {train_dir}: 33 images of 3 classes; left out: 1 that is not an image (notes.txt)."
    load(train_dir=str(train_dir))
    assert caplog.messages == [line]
    (train_dir / "more.txt").write_text("no image")
    monkeypatch.setenv("RANK", "1")
    load(train_dir=str(train_dir))
    assert caplog.messages == [line]


def test_a_local_folder_of_class_folders_loses_no_image_by_its_name(tmp_path, caplog):
    """33 of these 40 images are dropped by the file name patterns of `load_dataset`."""
    folder = save_class_folders(tmp_path / "set", {"owl": 20, "cat": 20})
    for number in range(7):
        (folder / "owl" / f"{number}.png").rename(folder / "owl" / f"bird test {number}.png")
    real = load(folder)
    assert len(real.train) + len(real.validation) + len(real.test) == 40
    assert real.class_names == ["cat", "owl"]
    assert len(load_dataset(str(folder), split="test")) == 7
    assert caplog.messages == []


def test_the_classes_of_split_folders_are_matched_by_name(tmp_path, caplog):
    counts = {"train": {"owl": 10, "cat": 10}, "test": {"Owl": 2, "cat": 3, "ant": 1}, "extra": {"fox": 1}}
    for split, classes in counts.items():
        save_class_folders(tmp_path / "set" / split, classes)
    splits = load_folder_set(read_local_set(str(tmp_path / "set")))
    assert {name: len(images) for name, images in splits.items()} == {"train": 20, "test": 6, "extra": 1}
    real = load(tmp_path / "set")
    assert real.class_names == ["cat", "owl", "ant"]  # classes of unused splits do not count
    assert np.bincount(real.test["label"]).tolist() == [3, 2, 1]
    assert "1 class name matched ignoring case, spaces and Unicode form: 'Owl' is 'owl'" in caplog.text
    assert any("test images of classes without training images: 1 ('ant')" in remark for remark in real.remarks)


ODD_NAMES = ["a::b", "[x]", "*", "a?b#c%20d", "zip:", "http:", "50% off", "~", "$HOME", "{a,b}", "-x", "a\tb", "é"]


def test_folders_and_files_of_any_name_are_read_by_every_reader(tmp_path, monkeypatch):
    folder = tmp_path / "my [set]::*? #%"
    colours = {}
    for number, name in enumerate(ODD_NAMES):
        (folder / name).mkdir(parents=True)
        for image in range(3):
            colours[name] = (number * 10, 100, 200)
            PILImage.new("RGB", (32, 32), colours[name]).save(folder / name / f"{name} {image}.png")
    monkeypatch.chdir(tmp_path)
    real = load(folder.name)
    assert real.class_names == sorted(ODD_NAMES)
    assert inspect_images(real.train, "training images")[1] == {}
    monkeypatch.chdir("/")  # paths in rows are absolute
    labels = real.train["label"]
    expected = [colours[real.class_names[label]] for label in labels]
    assert [image.getpixel((0, 0)) for image in real.train["image"]] == expected
    encoded = real.train.cast_column("image", Image(decode=False))
    assert [open_image(row["image"]).getpixel((0, 0)) for row in encoded] == expected
    latents = torch.cat(list(_load_batches(encoded, range(len(encoded)), 32)))
    assert ((latents[:, :, 0, 0] + 1) * 127.5).round().int().tolist() == [list(colour) for colour in expected]

    def processor(image, return_tensors):
        return {"pixel_values": [torch.tensor(image.getpixel((0, 0)))]}

    items = [EvalImages(real.train, processor)[row] for row in range(len(real.train))]
    assert [tuple(item["pixel_values"].tolist()) for item in items] == expected


def test_validation_folders_have_the_labels_of_the_training_folders_by_name_whatever_its_case(train_dir, tmp_path):
    validation_dir = save_class_folders(tmp_path / "validation", {"OWL": 2, "cat": 0, "10": 1})
    real = load(train_dir=str(train_dir), validation_dir=str(validation_dir), num_shots=2)
    assert real.class_names == ["10", "cat", "owl"]
    assert np.bincount(real.test["label"]).tolist() == [1, 0, 2]  # without a split 'test' they are the test part
    assert names_of(real.test, real.class_names) == ["10", "owl"]
    assert np.bincount(real.train["label"]).tolist() == [2, 2, 2]


@pytest.fixture
def tree(tmp_path):
    """Return a function that writes image or text files, by suffix, below a folder 'set' and returns the folder."""

    def write(*files):
        for file in files:
            path = tmp_path / "set" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".png", ".jpg"):
                PILImage.new("RGB", (8, 8)).save(path)
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
    assert list(found.splits) == list(expected)  # training images first, for the order of the classes
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
        (["train", "valid", "sample"], "so there are no labels"),
        (["images"], "only images holds images, so there are no labels; .* If it is a class, give --train_dir"),
        (["train/cat", "samples"], "train hold class folders, but samples images; give --train_dir .*set/train for"),
        (["train/cat", "train"], "train/1.png is not directly in a class folder"),
        (["cat", "dog", "."], "1.png is not directly in a class folder; expected .*set/class name/1.png[.]"),
        (["cats/tabby", "dogs/pug"], "cats/tabby/1.png is not directly .*; expected .* or --dataset_name .*/cats"),
        (["train/cats/tabby", "test/cats/tabby"], "train/cats/tabby/1.png is not .* expected .*train/class name/1.png"),
    ],
)  # fmt: skip
def test_ambiguous_folders_are_one_line(tree, folders, message):
    with pytest.raises(UserError, match=message):
        read_local_set(tree(*two_of(*folders)))


def test_a_train_dir_of_splits_says_how_to_give_them(tree):
    folder = tree(*two_of("test/cat", "train/cat", "train/dog"))
    right = f"try --train_dir {folder}/train --validation_dir {folder}/test, or --dataset_name {folder}"
    with pytest.raises(UserError, match=re.escape(right)):
        read_train_dirs(folder)


def test_a_train_dir_takes_folders_with_split_names_for_classes(tree):
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
        ["dataset_dict.json", "cat/1.png", "dog/1.png"],  # files of save_to_disk
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


def test_tables_and_archives_next_to_class_folders_are_named(tree):
    found = read_local_set(tree(*two_of("cat", "dog"), "labels.csv", "all.zip", "dog/metadata.csv"))
    assert counts(found) == {"train": {"cat": 2, "dog": 2}}
    told = "4 images of 2 classes; left out: 3 that are not images (all.zip, labels.csv, dog/metadata.csv)"
    assert told in found.notes[0]


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


def test_a_class_without_any_readable_file_is_dropped_and_reported(tree):
    found = read_train_dirs(tree(*two_of("cat", "dog"), "owl/1.cr2"))
    assert load_folder_set(found)["train"].features["label"].names == ["cat", "dog"]
    assert "skipping empty class folders: owl" in found.notes[0]
    assert "4 images of 2 classes; left out: 1 camera raw (develop them to JPEG or PNG)" in found.notes[1]


def test_split_names_are_those_of_datasets():
    from datasets.data_files import SPLIT_KEYWORDS

    assert all(is_split_name(word) for words in SPLIT_KEYWORDS.values() for word in words)
    assert all(map(is_split_name, ["Train", "test-2", "my.dev.images", "seg_pred_test"]))
    assert not any(map(is_split_name, ["trains", "latest", "contest", "devil"]))
