import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Image, load_dataset

from tests.conftest import CLASS_NAMES, save_image_set
from tests.data.builders import CLASSES, labelled_images, load, pixels_of, sizes
from utils.cli.errors import UserError
from utils.cli.records import image_set_name
from utils.data.image_set import PARTS, RealImagesRecord
from utils.data.opened_images import open_all
from utils.data.real_images import check_held_out, is_same_image_set, limit_held_out, load_labelled_splits


def test_validation_is_carved_from_train_where_the_set_has_none(real_images_dir):
    real = load(real_images_dir)
    assert len(real.train) + len(real.validation) == 60
    assert 3 <= len(real.validation) <= 15  # a tenth of them by chance, one of each class at least
    assert np.bincount(real.validation["label"]).min() > 0
    assert len(real.test) == 30
    assert real.class_names == CLASS_NAMES
    assert [real.parts[part].is_carved for part in PARTS] == [False, True, False]
    assert (real.record.image_column_name, real.record.label_column_name) == ("image", "label")
    shots = load(real_images_dir, num_shots=1, few_shot_seed=5, max_train_samples=2)
    assert pixels_of(shots.validation) == pixels_of(real.validation)
    assert not set(pixels_of(real.validation)) & set(pixels_of(real.train))
    assert real.parts["validation"].rows.tolist() == np.setdiff1d(np.arange(60), real.train_indices).tolist()


def test_the_split_validation_is_the_test_part_without_another(tmp_path):
    save_image_set(tmp_path, {"train": 10, "validation": 3})
    real = load(tmp_path)
    assert len(real.train) + len(real.validation) == 30
    expected = Dataset.from_parquet(str(tmp_path / "data" / "validation-00000.parquet"))
    assert pixels_of(real.test) == pixels_of(expected)
    save_image_set(tmp_path, {"test": 2})
    assert sizes(load(tmp_path)) == [30, 9, 6]


def test_a_train_split_alone_gives_all_three_parts(tmp_path):
    save_image_set(tmp_path, {"train": 100})
    real = load(tmp_path)
    train, validation, test = sizes(real)
    assert train + validation + test == 300
    assert 15 < validation < 45  # binomial: 30, give or take three standard deviations
    assert 15 < test < 45
    assert sorted(np.concatenate([real.parts[part].rows for part in PARTS]).tolist()) == list(range(300))
    whole = Dataset.from_parquet(str(tmp_path / "data" / "train-00000.parquet"))
    for part in PARTS:
        assert pixels_of(getattr(real, part)) == pixels_of(whole.select(real.parts[part].rows))


def test_removing_an_image_moves_no_other(tmp_path):
    save_image_set(tmp_path, {"train": 20})
    path = tmp_path / "data" / "train-00000.parquet"

    def parts() -> dict[bytes, str]:
        real = load(tmp_path)
        return {pixels: part for part in PARTS for pixels in pixels_of(getattr(real, part))}

    before = parts()
    whole = Dataset.from_parquet(str(path))
    for row in (0, 17, 59):
        left = [other for other in range(60) if other != row]
        whole.select(left[::-1]).to_parquet(path)  # in another order as well
        removed = pixels_of(whole.select([row]))[0]
        moved = {pixels for pixels, part in parts().items() if before[pixels] != part}
        # unless it was its class's only image in a part, which must not be empty
        of_class = [
            pixels for pixels in pixels_of(whole.select(range(row % 3, 60, 3))) if before[pixels] == before[removed]
        ]
        assert len(moved) == (1 if len(of_class) == 1 and before[removed] != "train" else 0)


def test_a_large_train_val_split_is_respected(tmp_path):
    save_image_set(tmp_path, {"train": 100, "test": 1})
    for share, low, high in ((0.5, 100, 200), (0.85, 220, 270)):
        assert low < len(load(tmp_path, train_val_split=share).validation) < high
    (tmp_path / "data" / "test-00000.parquet").unlink()
    with pytest.raises(UserError, match="--train_val_split 0.99: with the test part's tenth .* must be below 0.9"):
        load(tmp_path, train_val_split=0.99)


def test_held_out_parts_are_limited_to_evenly_spaced_images(real_images_dir):
    real = load(real_images_dir)
    few = limit_held_out(real, 4)
    assert few.parts["test"].rows.tolist() == [0, 9, 19, 29]
    assert sizes(few) == [len(real.train), min(4, len(real.validation)), 4]
    assert sizes(limit_held_out(real, None)) == sizes(real)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_column_name": "colour"}, "--label_column_name colour: not in .* columns are image, label"),
        ({"image_column_name": "label"}, "must be two different columns of image, label"),
        ({"train_split": "training"}, "--train_split training: .* has train .60 images., test .30 images."),
        ({"num_shots": 20}, "--num_shots 20: class 'red_square' of .* has 1. training images"),
        ({"dataset_name": "./no-such-folder"}, "--dataset_name ./no-such-folder: neither an existing folder nor"),
    ],
)
def test_bad_settings_are_one_line_that_names_them(real_images_dir, settings, message):
    with pytest.raises(UserError, match=message):
        load(settings.pop("dataset_name", real_images_dir), **settings)


@pytest.mark.parametrize("num_samples", [1, 7, 1000])
def test_max_train_samples_are_balanced_and_among_those_of_more(real_images_dir, num_samples):
    fewer = load(real_images_dir, max_train_samples=num_samples)
    more = load(real_images_dir, max_train_samples=num_samples + 1)
    assert len(fewer.train) == len(fewer.train_indices) == min(num_samples, len(load(real_images_dir).train))
    assert set(fewer.train_indices) <= set(more.train_indices)
    if num_samples < 30:
        assert np.ptp(np.bincount(fewer.train["label"], minlength=3)) <= 1
    assert fewer.validation["label"] == more.validation["label"]


def test_shots_are_training_images_and_max_train_samples_begin_with_fewer_shots(real_images_dir):
    whole = load(real_images_dir)
    two_shots = load(real_images_dir, num_shots=2, few_shot_seed=5)
    assert np.bincount(two_shots.train["label"]).tolist() == [2, 2, 2]
    labels = np.asarray(whole.train["label"])
    classes = [np.random.default_rng([5, label]).permutation(np.flatnonzero(labels == label)) for label in range(3)]
    expected = sorted(whole.train_indices[np.concatenate([rows[:2] for rows in classes])].tolist())
    three = {"num_shots": 3, "few_shot_seed": 5}
    some, three_shots = (load(real_images_dir, max_train_samples=number, **three) for number in (6, 100))
    assert two_shots.train_indices.tolist() == some.train_indices.tolist() == expected
    assert set(some.train_indices) < set(three_shots.train_indices) < set(whole.train_indices)
    assert len(three_shots.train) == 9


def test_a_record_from_before_train_dir_is_read_and_has_a_name():
    old = {"dataset_name": "user/cars", "dataset_revision": None, "num_shots": 2, "few_shot_seed": 0}
    assert RealImagesRecord(**old).name == image_set_name(old) == "user/cars"
    record = RealImagesRecord(train_dir="photos")
    assert RealImagesRecord(**record.to_dict()) == record
    assert record.name == image_set_name(record.to_dict()) == "photos"


def test_image_sets_are_the_same_by_name_or_by_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "train").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    folders = ["photos/train", "./photos/train/", "photos/../photos/train", "link/train", f"{tmp_path}/photos/train"]
    for theirs in folders:
        for ours in folders:
            assert is_same_image_set(RealImagesRecord(train_dir=theirs).to_dict(), None, ours)
            assert is_same_image_set({"dataset_name": theirs}, ours, None)
        assert not is_same_image_set({"train_dir": theirs}, None, "photos")
        assert not is_same_image_set({"train_dir": theirs}, theirs, None)
    assert is_same_image_set({"dataset_name": "user/cars"}, "user/cars", None)
    assert not is_same_image_set({"dataset_name": "user/cars"}, "user/vans", None)
    assert not is_same_image_set({"dataset_name": "user/cars"}, None, "photos")
    assert not is_same_image_set({}, "user/cars", None)


def test_a_set_in_another_format_is_read_as_it_is_stored(tmp_path):
    save_image_set(tmp_path / "set", {"train": 10, "test": 2})
    for kind in ("numpy", "torch"):
        load_dataset(str(tmp_path / "set")).with_format(kind).save_to_disk(tmp_path / kind)
        assert open_all(load(tmp_path / kind)).images.train[0]["image"].size == (32, 32)


def test_splits_of_different_features_can_be_one_part(tmp_path):
    train = labelled_images([0, 1, 0, 1], CLASSES)
    extra = labelled_images(["green circle", "red_square"]).cast_column("image", Image(mode="L"))
    DatasetDict(train=train, extra=extra).save_to_disk(tmp_path / "set")
    found = load_labelled_splits(RealImagesRecord(str(tmp_path / "set"), train_split="train+extra"))
    assert found.images["train"]["label"] == [0, 1, 0, 1, 1, 0]
    assert found.class_names == CLASS_NAMES


@pytest.mark.parametrize("name", ["nan", "None"])
def test_possible_missing_labels_are_reported(tmp_path, name):
    labelled_images(["a", name] * 6).to_parquet(tmp_path / "train.parquet")
    assert any(f"the class '{name}' may stand for missing labels" in line for line in load(tmp_path).remarks)


def test_a_class_without_images_is_reported_and_a_single_class_is_an_error(tmp_path):
    save_image_set(tmp_path, {"train": 10})
    path = tmp_path / "data" / "train-00000.parquet"
    whole = Dataset.from_parquet(str(path))
    whole.filter(lambda row: row["label"] != 1).to_parquet(path)
    real = load(tmp_path)
    assert any("no split has images of 'green circle'" in remark for remark in real.remarks)
    check_held_out(real)
    whole.filter(lambda row: row["label"] == 1).to_parquet(path)
    with pytest.raises(UserError, match="all training images are of one class .green circle.; a classifier needs two"):
        check_held_out(load(tmp_path))
    check_held_out(load(tmp_path), ("test",))  # a finished classifier can be tested on it
