import dataclasses
import shutil

import numpy as np
import pytest
import torch
from datasets import Image, load_dataset
from PIL import Image as PILImage

import train_bridged
from tests.conftest import draw_image
from utils.cli.errors import UserError
from utils.cli.records import GENERATION_CONFIG, write_record
from utils.data.arguments import RealDataArguments, check_real_images_given
from utils.data.class_folders import load_folder_set, read_local_set, read_train_dirs
from utils.data.image_set import RealImagesRecord
from utils.data.opened_images import inspect_images, open_all
from utils.data.real_images import load_real_images
from utils.style.latents import _load_batches
from utils.transfer.image_datasets import EvalImages
from utils.transfer.image_transforms import open_image


def save_class_folders(folder, counts: dict[str, int]):
    """Write `counts[name]` images of each class; the classes are drawn in the order of `counts`."""
    rng = np.random.default_rng(0)
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            draw_image(label, rng).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def train_dir(tmp_path):
    return save_class_folders(tmp_path / "set [a]*" / "train", {"owl": 12, "cat": 11, "10": 10})


def load(train_dir, **settings):
    return load_real_images(RealImagesRecord(train_dir=str(train_dir), **settings))


def names_of(images, class_names) -> list[str]:
    """Return which class each image was drawn as, by its colour, to compare with its label."""
    colours = [int(np.asarray(image).reshape(-1, 3).max(0).argmax()) for image in images["image"]]
    assert [("owl", "cat", "10")[colour] for colour in colours] == [class_names[label] for label in images["label"]]
    return sorted({class_names[label] for label in images["label"]})


def test_class_folders_are_what_imagefolder_makes_of_them(tmp_path):
    train_dir = save_class_folders(tmp_path / "train", {"owl": 12, "cat": 11, "10": 10})
    expected = load_dataset(
        "imagefolder", data_files={"train": str(train_dir / "**")}, drop_labels=False, split="train"
    )
    real = load(train_dir)
    parts = [real.train, real.validation, real.test]
    assert real.class_names == expected.features["label"].names == ["10", "cat", "owl"]
    assert sum(len(part) for part in parts) == 33
    assert {(image.tobytes(), label) for part in parts for image, label in zip(part["image"], part["label"])} == {
        (image.tobytes(), label) for image, label in zip(expected["image"], expected["label"])
    }
    row = int(real.train_indices[5])
    assert real.train[5]["image"].tobytes() == expected[row]["image"].tobytes()


def test_class_folders_with_stray_files_and_odd_names_are_read_all_the_same(train_dir):
    expected = load(train_dir).train["label"]
    for stray in (".DS_Store", "owl/.DS_Store", "owl/._0.png", "cat/Thumbs.db", "cat/0.png.txt", "notes.txt"):
        (train_dir / stray).write_text("no image")
    (train_dir / "cat" / "metadata.csv").write_text("file_name,label\n")
    for hidden in (".thumbnails", "__MACOSX"):
        shutil.copytree(train_dir / "owl", train_dir / hidden)
        shutil.copytree(train_dir / "owl", train_dir / "cat" / hidden)
    (train_dir / "owl" / "0.png").rename(train_dir / "owl" / "0.PNG")
    (train_dir / "owl").rename(train_dir.parent / "elsewhere")
    (train_dir / "owl").symlink_to(train_dir.parent / "elsewhere")
    real = load(train_dir)
    assert real.class_names == ["10", "cat", "owl"]
    assert sorted(real.train["label"]) == sorted(expected)  # no image has moved
    assert names_of(real.train, real.class_names) == ["10", "cat", "owl"]
    open_all(real)


def test_a_single_class_folder_is_a_class(tmp_path):
    real = load(save_class_folders(tmp_path / "train", {"owl": 10}))
    assert (real.class_names, set(real.train["label"])) == (["owl"], {0})


def test_a_folder_without_images_is_no_class_and_a_warning(train_dir, caplog):
    (train_dir / "aardvark").mkdir()
    assert load(train_dir).class_names == ["10", "cat", "owl"]
    assert "skipping empty class folders: aardvark" in caplog.text


def test_what_is_left_out_is_told_once_by_the_main_process(train_dir, caplog, monkeypatch):
    (train_dir / "notes.txt").write_text("no image")
    check_real_images_given(RealDataArguments(train_dir=str(train_dir)))
    load(train_dir)
    line = f"--train_dir {train_dir}: 33 images of 3 classes; left out: 1 that is not an image (notes.txt)."
    load(train_dir)
    assert caplog.messages == [line]
    (train_dir / "more.txt").write_text("no image")
    monkeypatch.setenv("RANK", "1")
    load(train_dir)
    assert caplog.messages == [line]


def test_a_local_folder_of_class_folders_loses_no_image_by_its_name(tmp_path, caplog):
    """33 of these 40 images are dropped by the file name patterns of `load_dataset`."""
    folder = save_class_folders(tmp_path / "set", {"owl": 20, "cat": 20})
    for number in range(7):
        (folder / "owl" / f"{number}.png").rename(folder / "owl" / f"bird test {number}.png")
    real = load_real_images(RealImagesRecord(dataset_name=str(folder)))
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
    real = load_real_images(RealImagesRecord(str(tmp_path / "set")))
    assert real.class_names == ["cat", "owl", "ant"]  # a class of a split that is not used is none
    assert np.bincount(real.test["label"]).tolist() == [3, 2, 1]
    assert "1 class name matched in spite of case, spaces or Unicode form: 'Owl' is 'owl'" in caplog.text
    assert any("test images of classes without training images: 1 ('ant')" in remark for remark in real.remarks)


def test_validation_folders_match_in_spite_of_case(train_dir, tmp_path):
    validation_dir = save_class_folders(tmp_path / "validation", {"OWL": 2, "cat": 1})
    real = load(train_dir, validation_dir=str(validation_dir))
    assert real.class_names == ["10", "cat", "owl"]
    assert np.bincount(real.test["label"]).tolist() == [0, 1, 2]


def test_classes_called_by_numbers_are_in_the_order_of_the_numbers(tmp_path):
    folder = save_class_folders(tmp_path / "set", {"10": 1, "9": 1, "0": 1})
    assert load_folder_set(read_train_dirs(str(folder)))["train"].features["label"].names == ["0", "9", "10"]


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
    real = load_real_images(RealImagesRecord(dataset_name=folder.name))
    assert real.class_names == sorted(ODD_NAMES)
    assert inspect_images(real.train, "training images", show_progress=False)[1] == {}
    monkeypatch.chdir("/")  # a row's path holds in every directory
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


def test_validation_folders_have_the_labels_of_the_training_folders_by_name(train_dir, tmp_path):
    validation_dir = save_class_folders(tmp_path / "validation", {"owl": 2, "cat": 0, "10": 1})
    real = load(train_dir, validation_dir=str(validation_dir))
    assert real.class_names == ["10", "cat", "owl"]
    assert len(real.test) == 3  # there is no split 'test', so the validation folder is the test
    assert names_of(real.test, real.class_names) == ["10", "owl"]
    assert len(real.train) + len(real.validation) == 33


def test_training_subsets_of_class_folders_are_those_of_the_flags(train_dir):
    assert np.bincount(load(train_dir, num_shots=2).train["label"]).tolist() == [2, 2, 2]
    assert np.bincount(load(train_dir, max_train_samples=5).train["label"]).tolist() == [2, 2, 1]


def test_a_damaged_image_in_a_class_folder_is_named_by_its_file(train_dir):
    for path in (train_dir / "cat").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    real = load(train_dir)
    with pytest.raises(UserError, match=r"train images: row \d+, .* damaged \(.* file .*/cat/\d+.png\)"):
        open_all(real)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--dataset_name is missing: .* or give --train_dir"),
        ({"dataset_name": "user/cars", "train_dir": "{set}"}, "--train_dir .*: not together with --dataset_name user"),
        ({"dataset_name": "user/cars", "validation_dir": "{set}"}, "--validation_dir .*: needs --train_dir"),
        ({"train_dir": "nowhere"}, "--train_dir nowhere: not a directory"),
        ({"train_dir": "{set}", "validation_dir": "nowhere"}, "--validation_dir nowhere: not a directory"),
        ({"train_dir": "{empty}"}, "--train_dir .*: has no class folders with images"),
        ({"train_dir": "{set}/owl"}, "0.png is not directly in a class folder; right is .*/owl/class name/0.png"),
        ({"train_dir": "{set}/.."}, "train/10/0.png is not directly in a class folder"),
        ({"train_dir": "{set}", "validation_dir": "{other}"}, "--validation_dir .* has no images of emu, fox[.]"),
        ({"dataset_name": "{set}/owl/0.png"}, "--dataset_name .*/0.png: is a file; give the folder"),
        ({"dataset_name": "{empty}"}, "--dataset_name .*: has no images"),
        ({"dataset_name": "{set}", "dataset_config_name": "a"}, "--dataset_config_name a: .* has no configurations"),
        ({"train_dir": "{set}", "dataset_config_name": "a"}, "--dataset_config_name a: goes with --dataset_name"),
        ({"train_dir": "{set}", "dataset_revision": "v1"}, "--dataset_revision v1: goes with --dataset_name"),
        ({"train_dir": "{set}", "train_split": "test"}, "--train_split test: goes with --dataset_name"),
        ({"train_dir": "{set}", "max_train_samples": 0}, "--max_train_samples 0: must be above 0"),
        ({"dataset_name": "user/cars", "num_shots": -1}, "--num_shots -1: must be above 0"),
        ({"dataset_name": "user/cars", "train_val_split": 0.0}, "--train_val_split 0.0: must be above 0 and below 1"),
        ({"dataset_name": "user/cars", "train_val_split": 1.0}, "--train_val_split 1.0: must be"),
        ({"dataset_name": "user/cars", "few_shot_seed": -1}, "--few_shot_seed -1: must be 0 or above"),
    ],
)
def test_check_real_images_given_names_the_flag_that_is_wrong(train_dir, tmp_path, settings, message):
    save_class_folders(tmp_path / "other", {"owl": 1, "fox": 1, "emu": 1, "yak": 0})
    (tmp_path / "empty" / "owl").mkdir(parents=True)
    folders = {"{set}": train_dir, "{other}": tmp_path / "other", "{empty}": tmp_path / "empty"}
    for placeholder, folder in folders.items():
        settings = {
            flag: value.replace(placeholder, str(folder)) if isinstance(value, str) else value
            for flag, value in settings.items()
        }
    with pytest.raises(UserError, match=message):
        check_real_images_given(RealDataArguments(**settings))


def test_check_real_images_given_takes_either_kind(train_dir):
    check_real_images_given(RealDataArguments(dataset_name="user/cars", train_split="training", dataset_revision="v1"))
    check_real_images_given(RealDataArguments(train_dir=str(train_dir), validation_dir=str(train_dir), num_shots=1))


def write_synthetic_record(folder, **real_images):
    write_record(folder / GENERATION_CONFIG, {"real_images": real_images})
    return str(folder)


def real_arguments(*argv):
    return train_bridged.parse_arguments(argv)[0].real


def test_train_bridged_takes_the_class_folders_of_the_record(train_dir, tmp_path):
    record = RealImagesRecord(train_dir=str(train_dir), num_shots=2, max_train_samples=5)
    synthetic = write_synthetic_record(tmp_path / "synthetic", **record.to_dict())
    for argv in ([], ["--train_dir", str(train_dir)]):
        arguments = real_arguments("--synthetic_dataset", synthetic, *argv)
        assert RealImagesRecord(**dataclasses.asdict(arguments)) == record
    other = real_arguments("--synthetic_dataset", synthetic, "--dataset_name", "user/cars")
    assert (other.dataset_name, other.train_dir, other.num_shots) == ("user/cars", None, None)
    assert real_arguments("--synthetic_dataset", synthetic, "--num_shots", "1").num_shots == 1


def test_train_bridged_takes_class_folders_beside_a_record_of_before_they_were(train_dir, tmp_path):
    synthetic = write_synthetic_record(tmp_path / "synthetic", dataset_name="user/cars", num_shots=2)
    assert real_arguments("--synthetic_dataset", synthetic).num_shots == 2
    other = real_arguments("--synthetic_dataset", synthetic, "--train_dir", str(train_dir))
    assert (other.dataset_name, other.train_dir, other.num_shots) == (None, str(train_dir), None)
