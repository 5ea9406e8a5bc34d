import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value, load_dataset

from utils.hub.file_classes import unify_class_names

NAMES = {"train-0": ["cat", "dog", "owl"], "train-1": ["owl", "cat", "dog"], "test-0": ["dog", "emu", "cat"]}


def write(path, names: list[str] | None, labels: list) -> None:
    features = Features({"id": Value("int64"), "label": ClassLabel(names=names or ["?"])})
    schema = features.arrow_schema if names else features.arrow_schema.remove_metadata()
    pq.write_table(pa.table({"id": range(len(labels)), "label": labels}, schema=schema), path)


@pytest.fixture
def unify(tmp_path):
    def unify(files: dict[str, tuple]):
        for name, (names, labels) in files.items():
            write(tmp_path / f"{name}.parquet", names, labels)
        paths = {
            split: [str(tmp_path / f"{name}.parquet") for name in files if name.startswith(split)]
            for split in dict.fromkeys(name.split("-")[0] for name in files)
        }
        loaded = load_dataset("parquet", data_files=paths, cache_dir=str(tmp_path / "cache"))
        return unify_class_names(loaded, paths, "--dataset_name set")

    return unify


def by_name(images) -> list[str | int]:
    names = images.features["label"].names
    return [names[label] if label >= 0 else label for label in images["label"]]


def test_files_that_number_classes_differently_are_read_by_name(unify):
    loaded = unify({name: (names, [0, 1, 2, 0]) for name, names in NAMES.items()})
    assert by_name(loaded["train"]) == ["cat", "dog", "owl", "cat", "owl", "cat", "dog", "owl"]
    assert by_name(loaded["test"]) == ["dog", "emu", "cat", "dog"]
    for images in loaded.values():
        assert images.features["label"].names == ["cat", "dog", "owl", "emu"]
        assert images.column_names == ["id", "label"]


def test_files_that_agree_or_say_nothing_are_read_as_they_are(unify):
    names = NAMES["train-0"]
    loaded = unify({"train-0": (names, [0, 1]), "train-1": (None, [2, 2]), "test-0": (names, [1])})
    assert by_name(loaded["train"]) == ["cat", "dog", "owl", "owl"]
    assert by_name(loaded["test"]) == ["dog"]
    loaded = unify({"train-0": (names, [0, 1]), "train-1": (None, [2, 2]), "test-0": (["owl", "cat", "dog"], [0])})
    assert by_name(loaded["train"]) == ["cat", "dog", "owl", "owl"]
    assert by_name(loaded["test"]) == ["owl"]


def test_missing_labels_stay_missing(unify):
    loaded = unify({"train-0": (["a", "b"], [0, -1]), "test-0": (["b", "a"], [-1, 0])})
    assert by_name(loaded["train"]) == ["a", -1]
    assert by_name(loaded["test"]) == [-1, "b"]
    loaded = unify({"train-0": (["a", "b"], [0, None]), "test-0": (["b", "a"], [None, 0])})
    assert by_name(loaded["train"]) == ["a", -1]
    assert by_name(loaded["test"]) == [-1, "b"]


def test_rows_that_are_not_those_of_the_files_are_an_error(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", ["x", "y"] if name == "a" else ["y", "x"], [0, 1])
    paths = {"train": [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]}
    loaded = load_dataset("parquet", data_files={"train": str(tmp_path / "a.parquet")}, cache_dir=str(tmp_path / "c"))
    with pytest.raises(ValueError, match="classes of 'label' in different orders, and other rows"):
        unify_class_names(loaded, paths, "set")
    assert np.array_equal(loaded["train"]["label"], [0, 1])


def test_files_of_text_and_of_class_names_are_an_error(tmp_path, unify):
    write(tmp_path / "named.parquet", ["cat", "dog"], [0, 1])
    pq.write_table(pa.table({"id": [0], "label": ["cat"]}), tmp_path / "text.parquet")
    for first, second in (("named", "text"), ("text", "named")):
        paths = {"train": [str(tmp_path / f"{name}.parquet") for name in (first, second)]}
        loaded = load_dataset("parquet", data_files=paths, cache_dir=str(tmp_path / first))
        with pytest.raises(ValueError, match="its files disagree on column 'label'"):
            unify_class_names(loaded, paths, "set")


def test_a_card_that_renames_classes_is_taken_and_told(tmp_path, caplog):
    write(tmp_path / "a.parquet", ["0", "1"], [0, 1])
    features = Features({"id": Value("int64"), "label": ClassLabel(names=["cat", "dog"])})
    paths = {"train": [str(tmp_path / "a.parquet")]}
    loaded = load_dataset("parquet", data_files=paths, features=features, cache_dir=str(tmp_path / "cache"))
    loaded = unify_class_names(loaded, paths, "--dataset_name set")
    assert by_name(loaded["train"]) == ["cat", "dog"]
    assert "--dataset_name set: its card names the classes of 'label' cat, dog, ..., its files 0, 1" in caplog.text


def test_a_card_with_the_classes_in_another_order_is_mapped_by_name(tmp_path):
    write(tmp_path / "a.parquet", ["dog", "cat"], [0, 1])
    features = Features({"id": Value("int64"), "label": ClassLabel(names=["cat", "dog"])})
    paths = {"train": [str(tmp_path / "a.parquet")]}
    loaded = load_dataset("parquet", data_files=paths, features=features, cache_dir=str(tmp_path / "cache"))
    loaded = unify_class_names(loaded, paths, "set")
    assert (by_name(loaded["train"]), loaded["train"].features["label"].names) == (["dog", "cat"], ["cat", "dog"])


def test_arrow_files_that_number_classes_differently_are_read_by_name(tmp_path):
    paths = {}
    for split, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        features = Features({"id": Value("int64"), "label": ClassLabel(names=names)})
        images = Dataset.from_dict({"id": [0, 1, 2], "label": [0, 0, 1]}, features=features)
        images.save_to_disk(tmp_path / split)
        paths[split] = [str(next((tmp_path / split).glob("*.arrow")))]
    loaded = load_dataset("arrow", data_files=paths, cache_dir=str(tmp_path / "cache"))
    assert by_name(unify_class_names(loaded, paths, "set")["test"]) == ["dog", "dog", "cat"]
