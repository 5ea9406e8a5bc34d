"""Finding image and label columns, including encoded files in plain columns, and labels of any kind."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from tests.data.builders import encode, labelled_images, load
from utils.cli.errors import UserError
from utils.data.columns import is_labelled, unify_labels
from utils.data.images import to_rgb
from utils.data.opened_images import open_all

NUM_IMAGES = 30
LABELS = ["cat", "dog"] * (NUM_IMAGES // 2)
FILES = [encode(PILImage.new("RGB", (4, 4), (level, 0, 255 - level))) for level in range(NUM_IMAGES)]
NAMES = [f"{number}.png" for number in range(NUM_IMAGES)]


def struct(binary, string) -> pa.Array:
    rows = [{"bytes": content, "path": name} for content, name in zip(FILES, NAMES)]
    return pa.array(rows, pa.struct([("bytes", binary), ("path", string)]))


def load_table(tmp_path, column_name=None, **columns):
    (tmp_path / "set").mkdir()
    table = pa.table({**columns, "label": LABELS})
    pq.write_table(table, tmp_path / "set" / "train.parquet")
    return load(tmp_path / "set", image_column_name=column_name)


@pytest.mark.parametrize(
    "column",
    [
        struct(pa.binary(), pa.string()),
        struct(pa.large_binary(), pa.large_string()),
        pa.array([{"bytes": content} for content in FILES]),
        pa.array([{"path": name, "bytes": content, "size": 4} for content, name in zip(FILES, NAMES)]),
        pa.array(FILES, pa.binary()),
        pa.array(FILES, pa.large_binary()),
    ],
    ids=["struct", "large struct", "bytes alone", "other fields", "binary", "large binary"],
)
def test_a_column_of_the_bytes_of_files_is_read_as_images(column, tmp_path):
    real = load_table(tmp_path, photo=column, caption=pa.array(NAMES))
    assert real.record.image_column_name == "photo"
    found = set()
    open_all(real)
    for part in (real.train, real.validation, real.test):
        assert isinstance(part.features["image"], Image)
        for row in part:
            level = row["image"].getpixel((0, 0))[0]
            assert real.class_names[row["label"]] == LABELS[level]
            found.add(level)
    assert found == set(range(NUM_IMAGES))


def test_of_two_columns_of_bytes_one_must_be_named(tmp_path):
    columns = {"photo": pa.array(FILES, pa.binary()), "thumbnail": struct(pa.binary(), pa.string())}
    with pytest.raises(UserError, match="--image_column_name: .* more than one column .*photo, thumbnail, label"):
        load_table(tmp_path, **columns)
    (tmp_path / "named").mkdir()
    real = load_table(tmp_path / "named", "thumbnail", **columns)
    assert np.asarray(real.train[0]["image"]).shape == (4, 4, 3)


def test_columns_are_found_by_type_and_the_labels_by_a_usual_name_too(tmp_path):
    images = labelled_images(["owl", "cat"] * 6).add_column("mask", FILES[:12])
    images.to_parquet(tmp_path / "train.parquet")
    real = load(tmp_path)
    assert real.record.image_column_name == "image"  # type Image wins over bytes
    assert real.class_names == ["cat", "owl"]
    named = images.remove_columns("mask").rename_columns({"image": "img", "label": "kind"})
    named.to_parquet(tmp_path / "train.parquet")
    real = load(tmp_path, label_column_name="kind")
    assert real.class_names == ["cat", "owl"]
    assert np.asarray(real.train[0]["image"])[..., 1 - real.train[0]["label"]].max() == 230  # the colour of its class


def test_an_image_column_with_a_mode_is_read_without_it(tmp_path):
    """Training reads files, evaluation what datasets decodes: with a mode, the pixels would differ."""
    clear = encode(PILImage.new("RGBA", (4, 4), (0, 0, 0, 0)))
    for feature in (Image(mode="RGB"), Image(decode=False)):
        features = Features({"image": feature, "label": ClassLabel(names=["cat", "dog"])})
        rows = {"image": [{"bytes": clear, "path": None}] * NUM_IMAGES, "label": [0, 1] * (NUM_IMAGES // 2)}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
        assert to_rgb(load(tmp_path).test[0]["image"]).getpixel((0, 0)) == (255, 255, 255)


def test_a_column_of_paths_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match="--image_column_name url: must hold images, got type string; .*cast_column"):
        load_table(tmp_path, "url", url=pa.array([f"https://example.com/{name}" for name in NAMES]))


def labelled(labels: list, feature=None) -> Dataset:
    features = Features({"label": feature}) if feature else None
    return Dataset.from_dict({"label": labels}, features=features)


def unify(**parts: Dataset) -> tuple[dict[str, list[str]], list[str]]:
    """Return each part's labels as names, and the class names."""
    unified, names = unify_labels(parts, "kind")
    assert all(images.features["label"] == ClassLabel(names=names) for images in unified.values())
    return {part: [names[label] for label in images["label"]] for part, images in unified.items()}, names


@pytest.mark.parametrize(
    ("labels", "feature", "names"),
    [
        ([10, 2, 1, 2], None, ["1", "2", "10"]), ([3, 2], Value("uint8"), ["2", "3"]),
        (["10", "9", "2"], None, ["2", "9", "10"]), (["b", "a10", "a9"], None, ["a10", "a9", "b"]),
        (["x", "y"], Value("large_string"), ["x", "y"]), ([True, False], None, ["False", "True"]),
        ([2, 0], ClassLabel(names=["c", "a", "b"]), ["c", "a", "b"]), ([0, 1], Value("int8"), ["0", "1"]),
    ],
)  # fmt: skip
def test_classes_are_in_their_natural_order(labels, feature, names):
    by_name, found = unify(train=labelled(labels, feature))
    assert found == names
    expected = [feature.names[label] for label in labels] if isinstance(feature, ClassLabel) else list(map(str, labels))
    assert by_name["train"] == expected


def test_classes_are_matched_by_name_if_splits_number_them_differently():
    train, test = ClassLabel(names=["cat", "dog", "owl"]), ClassLabel(names=["owl", "cat", "dog", "emu"])
    by_name, names = unify(train=labelled([0, 1, 2], train), test=labelled([0, 1, 2, 3], test))
    assert names == ["cat", "dog", "owl", "emu"]  # new ones last: the others keep their numbers
    assert by_name == {"train": ["cat", "dog", "owl"], "test": ["owl", "cat", "dog", "emu"]}
    by_name, names = unify(train=labelled([0, 2], train), test=labelled(["owl", "cat"]))
    assert by_name["test"] == ["owl", "cat"]
    assert names == train.names


def test_names_in_another_split_match_ignoring_case(caplog):
    by_name, names = unify(train=labelled(["cat", "dog"]), test=labelled(["Dog ", "CAT", "emu"]))
    assert names == ["cat", "dog", "emu"]
    assert by_name["test"] == ["dog", "cat", "emu"]
    assert "--label_column_name kind: split 'test': 2 class names matched ignoring case" in caplog.text
    with pytest.raises(UserError, match="CAT"):
        unify(train=labelled(["cat", "Cat"]), test=labelled(["CAT"]))


def test_labels_of_a_selection_are_those_of_its_rows():
    assert unify(train=labelled(["a", "b", "c", "b"]).select([3, 2]))[0]["train"] == ["b", "c"]
    assert unify(train=labelled([5, 7, 9]).select([2, 0]))[0]["train"] == ["9", "5"]


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0.5, 1.5], None, "--label_column_name kind: is of type float64; must have one class per image"),
        ([0.006], Value("float32"), "is of type float32"),
        ([float("nan"), 1.0], None, "is of type float64"),
        ([[1, 2], [3]], None, r"holds lists, several labels per image \(multi-label\); must have one class"),
        ([["a", "b"], ["b"]], None, "multi-label"),
        ([[1, 0, 0], [0, 0, 1]], None, "holds one-hot vectors of 3 numbers"),
        ([[1.0, 0.0], [0.0, 1.0]], None, "holds one-hot vectors of 2 numbers"),
        ([[True, False], [False, True]], None, "holds one-hot vectors of 2 numbers"),
        ([[1, 1, 0], [0, 0, 1]], None, "multi-label"),
        ([[], [1]], None, "multi-label"),
        ([[0, 1], [1]], List(ClassLabel(names=["a", "b"])), "multi-label"),
        ([[0], [1]], None, "holds lists of one label each"),
        ([b"a", b"b"], None, "is of type binary"),
        ([{"id": 1}, {"id": 2}], None, "is of type dict"),
        ([0, None, 1, -1], None, "2 of 4 images of split 'train' have no label, .* in row 1 .-1 is not a class."),
        (["a", "", " ", None], None, "3 of 4 images of split 'train' have no label, the first in row 1"),
        ([True, None], None, "1 of 2 images .* row 1"),
        ([0, -1], ClassLabel(names=["a", "b"]), "1 of 2 images .* row 1"),
        ([0, None, 1, None], ClassLabel(names=["a", "b"]), "2 of 4 images of split 'train' have no label.* row 1"),
        ([0, 1, 7], "tampered", "7 in row 2 of split 'train' is not a class id; 2 classes are numbered 0 to 1"),
        ([0, 1, -5], "tampered", "-5 in row 2 of split 'train' is not a class id"),
    ],
)  # fmt: skip
def test_labels_that_are_not_classes_are_one_line(labels, feature, message):
    if feature == "tampered":  # as in a parquet file: `datasets` itself does not write such labels
        features = Features({"label": ClassLabel(names=["a", "b"])})
        images = Dataset(pa.table({"label": labels}, schema=features.arrow_schema))
    else:
        images = labelled(labels, feature)
    with pytest.raises(UserError, match=message):
        unify(train=images)


def test_labels_of_two_kinds_are_one_line():
    with pytest.raises(UserError, match="different kinds .integers in split 'train', names in split 'test'."):
        unify(train=labelled([0, 1]), test=labelled(["a", "b"]))


def test_a_split_is_labelled_if_one_image_is():
    assert is_labelled(labelled([-1, 0]), "label")
    assert not is_labelled(labelled([-1, -1]), "label")
    assert not is_labelled(labelled([None, None], Value("string")), "label")
    assert not is_labelled(labelled([0]), "kind")
