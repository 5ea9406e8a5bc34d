import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from utils.cli.errors import UserError
from utils.data.class_names import near_equal_names, sort_class_names
from utils.data.columns import is_labelled, unify_labels


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
        ([10, 2, 1, 2], None, ["1", "2", "10"]),
        ([3, 2], Value("uint8"), ["2", "3"]),
        (["10", "9", "2"], None, ["2", "9", "10"]),
        (["b", "a10", "a9"], None, ["a10", "a9", "b"]),
        (["x", "y"], Value("large_string"), ["x", "y"]),
        ([True, False], None, ["False", "True"]),
        ([2, 0], ClassLabel(names=["c", "a", "b"]), ["c", "a", "b"]),
        ([0, 1], Value("int8"), ["0", "1"]),
    ],
)
def test_classes_are_in_their_natural_order(labels, feature, names):
    by_name, found = unify(train=labelled(labels, feature))
    assert found == names
    expected = [feature.names[label] for label in labels] if isinstance(feature, ClassLabel) else list(map(str, labels))
    assert by_name["train"] == expected


def test_classes_are_known_by_name_where_parts_number_them_otherwise():
    train, test = ClassLabel(names=["cat", "dog", "owl"]), ClassLabel(names=["owl", "cat", "dog", "emu"])
    by_name, names = unify(train=labelled([0, 1, 2], train), test=labelled([0, 1, 2, 3], test))
    assert names == ["cat", "dog", "owl", "emu"]  # new ones last: the others keep their numbers
    assert by_name == {"train": ["cat", "dog", "owl"], "test": ["owl", "cat", "dog", "emu"]}
    by_name, names = unify(train=labelled([0, 2], train), test=labelled(["owl", "cat"]))
    assert by_name["test"] == ["owl", "cat"]
    assert names == train.names


def test_names_of_another_part_match_in_spite_of_case(caplog):
    by_name, names = unify(train=labelled(["cat", "dog"]), test=labelled(["Dog ", "CAT", "emu"]))
    assert names == ["cat", "dog", "emu"]
    assert by_name["test"] == ["dog", "cat", "emu"]
    assert "--label_column_name kind: split 'test': 2 class names matched in spite of case" in caplog.text
    with pytest.raises(UserError, match="CAT"):
        unify(train=labelled(["cat", "Cat"]), test=labelled(["CAT"]))


def test_labels_of_a_selection_are_those_of_its_rows():
    images = labelled(["a", "b", "c", "b"]).select([3, 2])
    assert unify(train=images)[0]["train"] == ["b", "c"]
    images = labelled([5, 7, 9]).select([2, 0])
    assert unify(train=images)[0]["train"] == ["9", "5"]


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0.5, 1.5], None, "--label_column_name kind: is of type float64; one class per image is wanted"),
        ([0.006], Value("float32"), "is of type float32"),
        ([float("nan"), 1.0], None, "is of type float64"),
        ([[1, 2], [3]], None, r"holds lists, several labels per image \(multi-label\); one class"),
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
        ([0, None, 1, -1], None, "2 of 4 images of split 'train' have no label, the first in row 1 .-1 is no class."),
        (["a", "", " ", None], None, "3 of 4 images of split 'train' have no label, the first in row 1"),
        ([True, None], None, "1 of 2 images .* row 1"),
        ([0, -1], ClassLabel(names=["a", "b"]), "1 of 2 images .* row 1"),
        ([0, 1, 7], "tampered", "7 in row 2 of split 'train' is not a class id; 2 classes are numbered 0 to 1"),
        ([0, 1, -5], "tampered", "-5 in row 2 of split 'train' is not a class id"),
    ],
)  # fmt: skip
def test_what_is_no_class_is_one_line(labels, feature, message):
    if feature == "tampered":  # as in a parquet file: `datasets` itself does not write such labels
        features = Features({"label": ClassLabel(names=["a", "b"])})
        images = Dataset(pa.table({"label": labels}, schema=features.arrow_schema))
    else:
        images = labelled(labels, feature)
    with pytest.raises(UserError, match=message):
        unify(train=images)


def test_labels_of_two_kinds_are_one_line():
    with pytest.raises(UserError, match="not of one kind .integers in split 'train', names in split 'test'."):
        unify(train=labelled([0, 1]), test=labelled(["a", "b"]))


def test_a_split_is_labelled_where_one_image_is():
    assert is_labelled(labelled([-1, 0]), "label")
    assert not is_labelled(labelled([-1, -1]), "label")
    assert not is_labelled(labelled([None, None], Value("string")), "label")
    assert not is_labelled(labelled([0]), "kind")


def test_class_names_that_are_integers_are_in_numeric_order():
    assert sort_class_names(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert sort_class_names(["10", "9", "b"]) == ["10", "9", "b"]
    assert sort_class_names(["²", "1"]) == ["1", "²"]


def test_names_that_differ_in_case_blanks_or_accents_are_found():
    names = ["Cat", "cat ", "CAT", "dog", "caf\u00e9", "cafe\u0301", "cafe", "St. Bernard", "St.  bernard"]
    assert near_equal_names(names) == [
        ["Cat", "cat ", "CAT"], ["caf\u00e9", "cafe\u0301"], ["St. Bernard", "St.  bernard"],
    ]  # fmt: skip
