import dataclasses

import pytest

import train_bridged
from tests.conftest import save_class_folders
from utils.cli.errors import UserError
from utils.cli.records import GENERATION_CONFIG, write_record
from utils.data.arguments import RealDataArguments, check_output_outside, check_real_images_given
from utils.data.image_set import RealImagesRecord


@pytest.fixture
def train_dir(tmp_path):
    return save_class_folders(tmp_path / "set" / "train", {"owl": 1, "cat": 1, "10": 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--dataset_name is missing: .* or give --train_dir"),
        ({"dataset_name": "user/cars", "train_dir": "{set}"}, "--train_dir .*: not together with --dataset_name user"),
        ({"dataset_name": "user/cars", "validation_dir": "{set}"}, "--validation_dir .*: needs --train_dir"),
        ({"train_dir": "nowhere"}, "--train_dir nowhere: not a directory"),
        ({"train_dir": "{set}", "validation_dir": "nowhere"}, "--validation_dir nowhere: not a directory"),
        ({"train_dir": "{empty}"}, "--train_dir .*: has no class folders with images"),
        ({"train_dir": "{set}/owl"}, "0.png is not directly in a class folder; expected .*/owl/class name/0.png"),
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
    for flag, value in settings.items():
        for placeholder, folder in folders.items():
            value = value.replace(placeholder, str(folder)) if isinstance(value, str) else value
        settings = settings | {flag: value}
    with pytest.raises(UserError, match=message):
        check_real_images_given(RealDataArguments(**settings))


def test_check_real_images_given_takes_either_kind(train_dir):
    check_real_images_given(RealDataArguments(dataset_name="user/cars", train_split="training", dataset_revision="v1"))
    check_real_images_given(RealDataArguments(train_dir=str(train_dir), validation_dir=str(train_dir), num_shots=1))


def test_train_bridged_takes_class_folders_from_the_record_or_with_an_older_record(train_dir, tmp_path):
    record = RealImagesRecord(train_dir=str(train_dir), num_shots=2, max_train_samples=5)

    def real_arguments(recorded: dict, *argv):
        write_record(tmp_path / "synthetic" / GENERATION_CONFIG, {"real_images": recorded})
        return train_bridged.parse_arguments(["--synthetic_dataset", str(tmp_path / "synthetic"), *argv])[0].real

    for argv in ([], ["--train_dir", str(train_dir)]):
        assert RealImagesRecord(**dataclasses.asdict(real_arguments(record.to_dict(), *argv))) == record
    other = real_arguments(record.to_dict(), "--dataset_name", "user/cars")
    assert (other.dataset_name, other.train_dir, other.num_shots) == ("user/cars", None, None)
    assert real_arguments(record.to_dict(), "--num_shots", "1").num_shots == 1
    before = {"dataset_name": "user/cars", "num_shots": 2}
    assert real_arguments(before).num_shots == 2
    other = real_arguments(before, "--train_dir", str(train_dir))
    assert (other.dataset_name, other.train_dir, other.num_shots) == (None, str(train_dir), None)


def test_an_output_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "notes").write_text("")
    for folder in (tmp_path / "notes", tmp_path / "notes" / "out"):
        with pytest.raises(UserError, match="--output_dir .*: .*notes is a file; choose a folder"):
            check_output_outside(folder, RealDataArguments())
