import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image

from tests.conftest import CLASS_NAMES, draw_image, save_image_set
from utils.cli.errors import UserError
from utils.data.real_images import RealImagesRecord, check_images, load_real_images


def load(folder, **settings):
    return load_real_images(RealImagesRecord(str(folder), **settings))


def test_validation_is_carved_from_train_where_the_set_has_none(real_images_dir):
    real_images = load(real_images_dir)
    assert [len(real_images.train), len(real_images.validation), len(real_images.test)] == [54, 6, 30]
    assert np.bincount(real_images.validation["label"]).tolist() == [2, 2, 2]
    assert real_images.class_names == CLASS_NAMES


def test_validation_is_the_sets_own_beside_a_test_split(tmp_path):
    save_image_set(tmp_path, {"train": 5, "validation": 3, "test": 2})
    real_images = load(tmp_path)
    assert [len(real_images.train), len(real_images.validation), len(real_images.test)] == [15, 9, 6]


def test_a_train_split_alone_is_cut_80_10_10(tmp_path):
    save_image_set(tmp_path, {"train": 20})
    real_images = load(tmp_path)
    assert [len(real_images.train), len(real_images.validation), len(real_images.test)] == [48, 6, 6]
    pixels = [
        image.tobytes() for part in ("train", "validation", "test") for image in getattr(real_images, part)["image"]
    ]
    assert len(set(pixels)) == 60


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
        ({"image_column_name": "label"}, "no image column"),
        ({"train_split": "training"}, "--train_split training: .* has train, test"),
        ({"num_shots": 19}, "--num_shots 19: label 0 has 18 images"),
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
    with pytest.raises(UserError, match="2 of 4 images of split 'train' .* have no label, the first in row 1"):
        load(tmp_path)


def test_a_damaged_image_is_named_by_row_and_column(tmp_path):
    save_image_set(tmp_path, {"train": 5, "test": 1})
    path = tmp_path / "data" / "train-00000.parquet"
    table = pq.read_table(path).to_pydict()
    table["image"][7]["bytes"] = table["image"][7]["bytes"][:60]
    schema = pq.read_schema(path)
    import pyarrow as pa

    pq.write_table(pa.table(table, schema=schema), path)
    real_images = load(tmp_path, train_val_split=0.2)
    row = real_images.train_indices.tolist().index(7)
    with pytest.raises(UserError, match=f"row {row}, column 'image': damaged image"):
        check_images(real_images.train, "train")
