import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset

from tests.conftest import CLASS_NAMES, draw_image, save_image_set
from utils.cli.errors import UserError
from utils.cli.records import image_set_name
from utils.data.image_set import RealImagesRecord
from utils.data.opened_images import open_all
from utils.data.real_images import (
    check_held_out,
    limit_held_out,
    load_labelled_splits,
    load_real_images,
    same_image_set,
)
from utils.data.splits import few_shot_indices


def load(folder, **settings):
    return load_real_images(RealImagesRecord(str(folder), **settings))


def pixels_of(images) -> list[bytes]:
    return [image.tobytes() for image in images["image"]]


def sizes(real_images) -> list[int]:
    return [len(real_images.train), len(real_images.validation), len(real_images.test)]


def test_validation_is_carved_from_train_where_the_set_has_none(real_images_dir):
    real_images = load(real_images_dir)
    assert len(real_images.train) + len(real_images.validation) == 60
    assert 3 <= len(real_images.validation) <= 15  # a tenth of them by chance, one of each class at least
    assert np.bincount(real_images.validation["label"]).min() > 0
    assert len(real_images.test) == 30
    assert real_images.class_names == CLASS_NAMES
    assert real_images.parts["validation"].is_carved
    assert not real_images.parts["test"].is_carved


def test_validation_is_the_sets_own_beside_a_test_split(tmp_path):
    save_image_set(tmp_path, {"train": 5, "validation": 3, "test": 2})
    real_images = load(tmp_path)
    assert sizes(real_images) == [15, 9, 6]


def test_the_split_validation_is_the_test_where_there_is_no_other(tmp_path):
    save_image_set(tmp_path, {"train": 10, "validation": 3})
    real_images = load(tmp_path)
    assert len(real_images.train) + len(real_images.validation) == 30
    assert len(real_images.test) == 9
    expected = Dataset.from_parquet(str(tmp_path / "data" / "validation-00000.parquet"))
    assert pixels_of(real_images.test) == pixels_of(expected)


def test_the_carved_validation_images_are_the_same_for_any_shots(real_images_dir):
    whole, shots = load(real_images_dir), load(real_images_dir, num_shots=1, few_shot_seed=5, max_train_samples=2)
    assert pixels_of(shots.validation) == pixels_of(whole.validation)
    assert not set(pixels_of(whole.validation)) & set(pixels_of(whole.train))
    assert whole.parts["validation"].rows.tolist() == np.setdiff1d(np.arange(60), whole.train_indices).tolist()


def test_a_train_split_alone_gives_all_three_parts(tmp_path):
    save_image_set(tmp_path, {"train": 100})
    real_images = load(tmp_path)
    train, validation, test = sizes(real_images)
    assert train + validation + test == 300
    assert 15 < validation < 45  # binomial: 30, give or take three standard deviations
    assert 15 < test < 45
    rows = np.concatenate([real_images.parts[part].rows for part in ("train", "validation", "test")])
    assert sorted(rows.tolist()) == list(range(300))
    whole = Dataset.from_parquet(str(tmp_path / "data" / "train-00000.parquet"))
    for part in ("train", "validation", "test"):
        assert pixels_of(getattr(real_images, part)) == pixels_of(whole.select(real_images.parts[part].rows))


def test_an_image_that_is_removed_moves_no_other(tmp_path):
    save_image_set(tmp_path, {"train": 20})
    path = tmp_path / "data" / "train-00000.parquet"

    def parts() -> dict[bytes, str]:
        real_images = load(tmp_path)
        return {
            pixels: part for part in ("train", "validation", "test") for pixels in pixels_of(getattr(real_images, part))
        }

    before = parts()
    whole = Dataset.from_parquet(str(path))
    for row in (0, 17, 59):
        left = [other for other in range(60) if other != row]
        whole.select(left[::-1]).to_parquet(path)  # in another order as well
        removed = pixels_of(whole.select([row]))[0]
        moved = {pixels for pixels, part in parts().items() if before[pixels] != part}
        # but where it was a class's only one in its part, which must not be empty
        of_class = [
            pixels for pixels in pixels_of(whole.select(range(row % 3, 60, 3))) if before[pixels] == before[removed]
        ]
        assert len(moved) == (1 if len(of_class) == 1 and before[removed] != "train" else 0)


@pytest.mark.parametrize(("share", "low", "high"), [(0.5, 100, 200), (0.85, 220, 270)])
def test_train_val_split_is_kept_however_large(tmp_path, share, low, high):
    save_image_set(tmp_path, {"train": 100, "test": 1})
    assert low < len(load(tmp_path, train_val_split=share).validation) < high


def test_a_share_that_leaves_nothing_to_train_on_is_an_error(tmp_path):
    save_image_set(tmp_path, {"train": 5})
    with pytest.raises(UserError, match="--train_val_split 0.99: with the test part's tenth .* must be below 0.9"):
        load(tmp_path, train_val_split=0.99)


def test_held_out_parts_are_limited_to_evenly_spaced_images(real_images_dir):
    few = limit_held_out(load(real_images_dir), 4)
    assert few.parts["test"].rows.tolist() == [0, 9, 19, 29]
    assert len(few.validation) == min(4, len(load(real_images_dir).validation))
    assert len(limit_held_out(load(real_images_dir), None).test) == 30


def test_shots_are_never_validation_images_and_record_names_them(real_images_dir):
    whole, shots = load(real_images_dir), load(real_images_dir, num_shots=2, few_shot_seed=3)
    assert np.bincount(shots.train["label"]).tolist() == [2, 2, 2]
    assert set(shots.train_indices) < set(whole.train_indices)
    assert (shots.record.image_column_name, shots.record.label_column_name) == ("image", "label")


def test_labels_of_strings_become_class_names(tmp_path):
    rng = np.random.default_rng(0)
    rows = {"img": [draw_image(i % 2, rng) for i in range(20)], "kind": [("owl", "cat")[i % 2] for i in range(20)]}
    Dataset.from_dict(rows, features=None).cast_column("img", Image()).to_parquet(tmp_path / "train.parquet")
    real_images = load(tmp_path, label_column_name="kind")
    assert real_images.class_names == ["cat", "owl"]
    assert np.asarray(real_images.train[0]["image"])[..., 1 - real_images.train[0]["label"]].max() == 230


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_column_name": "colour"}, "--label_column_name colour: not in .* columns are image, label"),
        ({"image_column_name": "label"}, "one column cannot be both of image, label"),
        ({"train_split": "training"}, "--train_split training: .* has train .60 images., test .30 images."),
        ({"num_shots": 20}, "--num_shots 20: class 'red_square' of .* has 1. training images"),
    ],
)
def test_bad_settings_are_one_line_that_names_them(real_images_dir, settings, message):
    with pytest.raises(UserError, match=message):
        load(real_images_dir, **settings)


def test_a_name_that_is_neither_folder_nor_repository_is_an_error():
    with pytest.raises(UserError, match="--dataset_name ./no-such-folder: neither an existing folder nor a repository"):
        load("./no-such-folder")


def test_missing_labels_are_counted_and_the_first_is_named(tmp_path):
    rng = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES)})
    rows = {"image": [draw_image(0, rng) for _ in range(4)], "label": [0, None, 1, None]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="2 of 4 images of split 'train' have no label, the first in row 1"):
        load(tmp_path)


@pytest.mark.parametrize("num_samples", [1, 7, 1000])
def test_max_train_samples_are_balanced_and_among_those_of_more(real_images_dir, num_samples):
    fewer = load(real_images_dir, max_train_samples=num_samples)
    more = load(real_images_dir, max_train_samples=num_samples + 1)
    assert len(fewer.train) == len(fewer.train_indices) == min(num_samples, len(load(real_images_dir).train))
    assert set(fewer.train_indices) <= set(more.train_indices)
    if num_samples < 30:
        assert np.ptp(np.bincount(fewer.train["label"], minlength=3)) <= 1
    assert fewer.validation["label"] == more.validation["label"]


def test_max_train_samples_are_among_the_shots_and_begin_with_fewer_shots(real_images_dir):
    shots = {"num_shots": 3, "few_shot_seed": 5}
    some = load(real_images_dir, max_train_samples=6, **shots)
    whole = load(real_images_dir)
    two_shots = whole.train_indices[few_shot_indices(np.asarray(whole.train["label"]), 2, 5)].tolist()
    assert some.train_indices.tolist() == two_shots
    assert load(real_images_dir, num_shots=2, few_shot_seed=5).train_indices.tolist() == two_shots
    assert set(some.train_indices) < set(load(real_images_dir, max_train_samples=100, **shots).train_indices)
    assert len(load(real_images_dir, max_train_samples=100, **shots).train) == 9


def test_a_record_of_before_train_dir_is_read_and_has_a_name():
    old = {"dataset_name": "user/cars", "dataset_revision": None, "num_shots": 2, "few_shot_seed": 0}
    assert RealImagesRecord(**old).name == image_set_name(old) == "user/cars"
    record = RealImagesRecord(train_dir="photos")
    assert RealImagesRecord(**record.to_dict()) == record
    assert record.name == image_set_name(record.to_dict()) == "photos"


def test_image_sets_are_the_same_by_name_or_by_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "train").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    folders = [
        "photos/train",
        "./photos/train/",
        "photos/../photos/train",
        "link/train",
        str(tmp_path / "photos/train"),
    ]
    for theirs in folders:
        for ours in folders:
            assert same_image_set(RealImagesRecord(train_dir=theirs).to_dict(), None, ours)
            assert same_image_set({"dataset_name": theirs}, ours, None)
        assert not same_image_set({"train_dir": theirs}, None, "photos")
        assert not same_image_set({"train_dir": theirs}, theirs, None)
    assert same_image_set({"dataset_name": "user/cars"}, "user/cars", None)
    assert not same_image_set({"dataset_name": "user/cars"}, "user/vans", None)
    assert not same_image_set({"dataset_name": "user/cars"}, None, "photos")
    assert not same_image_set({}, "user/cars", None)


def test_a_text_column_of_the_usual_name_is_found_without_a_flag(tmp_path):
    rng = np.random.default_rng(0)
    rows = {"image": [draw_image(i % 2, rng) for i in range(20)], "label": [("owl", "cat")[i % 2] for i in range(20)]}
    Dataset.from_dict(rows).cast_column("image", Image()).to_parquet(tmp_path / "train.parquet")
    assert load(tmp_path).class_names == ["cat", "owl"]


def test_a_set_in_another_format_is_read_as_it_is_stored(tmp_path):
    save_image_set(tmp_path / "set", {"train": 10, "test": 2})
    for kind in ("numpy", "torch"):
        load_dataset(str(tmp_path / "set")).with_format(kind).save_to_disk(tmp_path / kind)
        real = load(tmp_path / kind)
        assert open_all(real).images.train[0]["image"].size == (32, 32)


def test_splits_of_different_features_can_be_one_part(tmp_path):
    rng = np.random.default_rng(0)
    train = {"image": [draw_image(0, rng)] * 4, "label": [0, 1, 0, 1]}
    extra = {"image": [draw_image(0, rng)] * 2, "label": ["b", "a"]}
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    sets = DatasetDict(
        train=Dataset.from_dict(train, features=features),
        extra=Dataset.from_dict(extra).cast_column("image", Image(mode="L")),
    )
    sets.save_to_disk(tmp_path / "set")
    found = load_labelled_splits(RealImagesRecord(str(tmp_path / "set"), train_split="train+extra"))
    assert [found.class_names[label] for label in found.images["train"]["label"]] == ["a", "b", "a", "b", "b", "a"]


@pytest.mark.parametrize(
    ("labels", "remark"),
    [
        (["a", "nan"], "the class 'nan' may stand for images without a label"),
        (["a", "None"], "the class 'None' may stand for images without a label"),
    ],
)
def test_what_may_be_a_missing_label_is_told(tmp_path, labels, remark):
    rng = np.random.default_rng(0)
    rows = {"image": [draw_image(0, rng) for _ in range(12)], "label": labels * 6}
    Dataset.from_dict(rows).cast_column("image", Image()).to_parquet(tmp_path / "train.parquet")
    assert any(remark in line for line in load(tmp_path).remarks)


def test_a_class_without_images_is_told_and_a_single_class_is_an_error(tmp_path):
    save_image_set(tmp_path, {"train": 10})
    path = tmp_path / "data" / "train-00000.parquet"
    whole = Dataset.from_parquet(str(path))
    whole.filter(lambda row: row["label"] != 1).to_parquet(path)
    real = load(tmp_path)
    assert any("no part has images of 'green circle'" in remark for remark in real.remarks)
    check_held_out(real)
    whole.filter(lambda row: row["label"] == 1).to_parquet(path)
    with pytest.raises(UserError, match="all training images are of one class .green circle.; a classifier needs two"):
        check_held_out(load(tmp_path))
    check_held_out(load(tmp_path), ("test",))  # a finished classifier can be tested on it
