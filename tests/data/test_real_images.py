import hashlib
import re
from io import BytesIO

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image

from tests.conftest import CLASS_NAMES, draw_image, save_image_set
from utils.cli.errors import UserError
from utils.cli.records import image_set_name
from utils.data.real_images import (
    NUM_THREADS,
    RealImagesRecord,
    check_images,
    drop_damaged,
    inspect_images,
    load_real_images,
    refuse_damaged,
    same_image_set,
)
from utils.data.splits import few_shot_indices


def load(folder, **settings):
    return load_real_images(RealImagesRecord(str(folder), **settings))


def pixels_of(images) -> list[bytes]:
    return [image.tobytes() for image in images["image"]]


def test_validation_is_carved_from_train_where_the_set_has_none(real_images_dir):
    real_images = load(real_images_dir)
    assert [len(real_images.train), len(real_images.validation), len(real_images.test)] == [54, 6, 30]
    assert np.bincount(real_images.validation["label"]).tolist() == [2, 2, 2]
    assert real_images.class_names == CLASS_NAMES


def test_validation_is_the_sets_own_beside_a_test_split(tmp_path):
    save_image_set(tmp_path, {"train": 5, "validation": 3, "test": 2})
    real_images = load(tmp_path)
    assert [len(real_images.train), len(real_images.validation), len(real_images.test)] == [15, 9, 6]


def test_the_split_validation_is_the_test_where_there_is_no_other(tmp_path):
    save_image_set(tmp_path, {"train": 10, "validation": 3})
    real_images = load(tmp_path)
    assert [len(real_images.train), len(real_images.validation), len(real_images.test)] == [27, 3, 9]
    expected = Dataset.from_parquet(str(tmp_path / "data" / "validation-00000.parquet"))
    assert pixels_of(real_images.test) == pixels_of(expected)


def test_the_carved_validation_images_are_the_same_for_any_shots(real_images_dir):
    whole, shots = load(real_images_dir), load(real_images_dir, num_shots=1, few_shot_seed=5, max_train_samples=2)
    assert pixels_of(shots.validation) == pixels_of(whole.validation)
    assert not set(pixels_of(whole.validation)) & set(pixels_of(whole.train))
    # in every run and on every machine: records name the seed, not the rows
    assert np.setdiff1d(np.arange(60), whole.train_indices).tolist() == [1, 12, 26, 31, 47, 57]


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


@pytest.mark.parametrize("num_samples", [1, 7, 1000])
def test_max_train_samples_are_balanced_and_among_those_of_more(real_images_dir, num_samples):
    fewer = load(real_images_dir, max_train_samples=num_samples)
    more = load(real_images_dir, max_train_samples=num_samples + 1)
    assert len(fewer.train) == len(fewer.train_indices) == min(num_samples, 54)
    assert set(fewer.train_indices) <= set(more.train_indices)
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


def encode(image, image_format="PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def image_column(encoded: list) -> Dataset:
    """Return a data set of encoded images: bytes, a path, or None."""
    rows = [{"bytes": item if isinstance(item, bytes) else None, "path": None} if item else None for item in encoded]
    for row, item in zip(rows, encoded):
        if isinstance(item, str):
            row["path"] = item
    return Dataset.from_dict({"image": rows}, features=Features({"image": Image()}))


PHOTO = PIL.Image.effect_noise((160, 120), 60).convert("RGB")
PNG, JPEG, PROGRESSIVE = encode(PHOTO), encode(PHOTO, "JPEG"), encode(PHOTO, "JPEG", progressive=True)


def test_inspect_images_hashes_the_bytes_as_stored(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(JPEG)
    hashes, problems = inspect_images(image_column([PNG, str(tmp_path / "photo.jpg"), PROGRESSIVE]), "photos")
    assert problems == {}
    assert hashes == {row: hashlib.sha256(data).hexdigest() for row, data in enumerate([PNG, JPEG, PROGRESSIVE])}


def test_inspect_images_of_parts_are_those_of_the_whole():
    count = 8 * NUM_THREADS + 3  # more than one piece
    images = image_column([PNG[:-40] if row % 5 == 0 else PNG for row in range(3 * count)])
    parts = [inspect_images(images, "photos", rank, 3, show_progress=False) for rank in range(3)]
    assert [sorted({**hashes, **problems}) for hashes, problems in parts] == [
        list(range(rank, 3 * count, 3)) for rank in range(3)
    ]
    hashes, problems = inspect_images(images, "photos", show_progress=False)
    assert hashes == {row: text for part in parts for row, text in part[0].items()}
    assert problems == {row: text for part in parts for row, text in part[1].items()}
    assert sorted(problems) == list(range(0, 3 * count, 5))


def decodes(data: bytes) -> bool:
    try:
        PIL.Image.open(BytesIO(data)).load()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("photo", [JPEG, PROGRESSIVE], ids=["baseline", "progressive"])
def test_inspect_images_finds_what_decoding_a_jpeg_at_full_size_finds(photo):
    rng = np.random.default_rng(0)
    broken = [photo[: len(photo) * share // 100] for share in (1, 30, 60, 95)] + [photo[:-2]]
    for length in rng.integers(2, len(photo) // 4, 20):
        middle = len(photo) // 2
        broken.append(photo[:middle] + rng.bytes(length) + photo[middle + length :])
        broken.append(photo[:middle] + bytes(length) + photo[middle + length :])
    _, problems = inspect_images(image_column(broken), "photos", show_progress=False)
    assert set(range(4)) < set(problems)
    assert {row for row, data in enumerate(broken) if not decodes(data)} == set(problems)


def exif_that_datasets_cannot_read() -> bytes:
    entries = bytes.fromhex("1201 0300 01000000 06000000 0101 0200 04000000 61626300")
    return b"Exif\0\0II*\0\x08\0\0\0\2\0" + entries + bytes(4)


def test_inspect_images_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 160 * 120)
    bomb = encode(PIL.Image.new("1", (1600, 120)))
    text = tmp_path / "notes.jpg"
    text.write_text("no image")
    unreadable_exif = encode(PHOTO, "JPEG", exif=exif_that_datasets_cannot_read())
    broken = [None, bomb, str(text), str(tmp_path / "gone.jpg"), PNG[:-60], b"", unreadable_exif]
    images = image_column([*broken, PNG])
    hashes, problems = inspect_images(images, "photos", show_progress=False)
    assert list(hashes) == [len(broken)]
    for row, message in enumerate(
        ["no image", "decompression bomb", "no known image format, file .*notes.jpg", "No such file .*gone.jpg"]
    ):
        assert re.search(message, problems[row]), problems[row]
    assert "0x" not in "".join(problems.values())
    for row in problems.keys() - {0}:
        with pytest.raises(Exception):  # noqa: B017 (it stops training whatever it is)
            images[row]["image"].load()


def test_inspect_images_names_an_error_without_words(monkeypatch):
    monkeypatch.setattr("utils.data.real_images.to_rgb", lambda image: next(iter(())))
    assert inspect_images(image_column([PNG]), "photos")[1] == {0: "StopIteration"}


def test_inspect_images_reads_a_bounded_number_of_images_at_a_time(monkeypatch):
    images = image_column([PNG] * (20 * NUM_THREADS))
    read = []
    getitem = Dataset.__getitem__
    monkeypatch.setattr(Dataset, "__getitem__", lambda self, rows: read.append(len(rows)) or getitem(self, rows))
    hashes, _ = inspect_images(images, "photos", show_progress=False)
    assert len(hashes) == sum(read) == 20 * NUM_THREADS
    assert max(read) <= 8 * NUM_THREADS


@pytest.fixture
def damaged_set(tmp_path):
    """A set with damaged images in the rows 7 and 10 of its train split, in a column 'photo'; 3 classes in turn."""
    save_image_set(tmp_path, {"train": 5, "test": 1})
    for split in ("train", "test"):
        path = tmp_path / "data" / f"{split}-00000.parquet"
        table = pq.read_table(path).to_pydict()
        for row in (7, 10) if split == "train" else ():
            table["image"][row]["bytes"] = table["image"][row]["bytes"][:60]
        features = Features({"photo": Image(), "label": ClassLabel(names=CLASS_NAMES)})
        Dataset.from_dict({"photo": table["image"], "label": table["label"]}, features=features).to_parquet(path)
    return load(tmp_path, train_val_split=0.2)


def test_damaged_images_are_counted_and_the_first_is_named_as_the_user_knows_it(damaged_set):
    column, rows = damaged_set.record.image_column_name, damaged_set.train_indices
    lost = [row for row in (7, 10) if row in rows]
    with pytest.raises(UserError) as error:
        check_images(damaged_set.train, "training images", column, rows)
    assert f"training images: row {lost[0]}, column 'photo': damaged (" in str(error.value)
    assert f"); damaged in all: {len(lost)}; " in str(error.value)
    assert "--skip_bad_images" not in str(error.value)
    problems = {3: "torn", 1: "gone"}
    with pytest.raises(UserError, match=r"row 1, column 'image': damaged \(gone\); .* in all: 2; .* --skip_bad_images"):
        refuse_damaged(problems, "training images", can_skip=True)
    refuse_damaged({}, "training images")


def test_drop_damaged_removes_rows_and_their_indices(damaged_set):
    digests, problems = inspect_images(damaged_set.train, "training images")
    kept = drop_damaged(damaged_set, problems)
    assert kept.train_indices.tolist() == [row for row in damaged_set.train_indices if row not in (7, 10)]
    assert [hashlib.sha256(row["bytes"]).hexdigest() for row in kept.train.cast_column("image", Image(decode=False))[
        "image"
    ]] == [digests[row] for row in sorted(digests)]  # fmt: skip
    assert drop_damaged(damaged_set, {}).train_indices.tolist() == damaged_set.train_indices.tolist()


def test_drop_damaged_of_a_whole_class_is_an_error_that_names_it(damaged_set):
    problems = {row: "torn" for row, label in enumerate(damaged_set.train["label"]) if label == 1}
    with pytest.raises(UserError, match="--skip_bad_images: all training images of green circle are damaged"):
        drop_damaged(damaged_set, problems)
