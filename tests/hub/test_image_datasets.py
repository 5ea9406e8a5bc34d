"""Local datasets that `datasets` reads: saved ones, complete or still being extended, and one-line errors."""

import shutil
from io import BytesIO
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from PIL import Image

from tests.conftest import save_image_set
from tests.local_hub import Fault
from utils.cli.errors import UserError
from utils.hub.file_classes import unify_class_names
from utils.hub.image_datasets import load_image_dataset
from utils.hub.repositories import open_source

pytest_plugins = ["tests.local_hub.fixtures"]


@pytest.fixture(scope="module")
def image_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "images"
    save_image_set(folder, {"train": 3, "test": 2})
    return folder


def load(folder, *args, **kwargs):
    return load_image_dataset(open_source(str(folder), "--dataset_name", "dataset"), *args, **kwargs)


def pixels_of(images) -> list[bytes]:
    return [image.tobytes() for image in images["image"]]


def write_card(folder, **counts) -> None:
    """Write a card with the numbers of images of splits."""
    splits = "".join(
        f"  - name: {split}\n    num_examples: {count}\n    num_bytes: 1\n" for split, count in counts.items()
    )
    (folder / "README.md").write_text(f"---\ndataset_info:\n  splits:\n{splits}---\n")


def test_a_saved_dataset_is_read(image_set, tmp_path):
    splits = load_dataset(str(image_set))
    splits.save_to_disk(str(tmp_path / "my [set]"))
    loaded = load(tmp_path / "my [set]")
    assert {name: pixels_of(images) for name, images in loaded.items()} == {
        name: pixels_of(images) for name, images in splits.items()
    }
    assert loaded["train"].features == splits["train"].features
    assert pixels_of(load(tmp_path / "my [set]", split="test")) == pixels_of(splits["test"])


def test_a_single_saved_split_is_the_split_train(image_set, tmp_path):
    images = load_dataset(str(image_set), split="test")
    images.save_to_disk(str(tmp_path / "saved"))
    loaded = load(tmp_path / "saved")
    assert isinstance(loaded, DatasetDict) and list(loaded) == ["train"]
    assert pixels_of(loaded["train"]) == pixels_of(images)


def test_a_damaged_saved_set_is_one_line(tmp_path):
    DatasetDict({"train": Dataset.from_dict({"label": [0]})}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="--dataset_name .*: has no split 'test'; it has train."):
        load(tmp_path / "saved", split="test")
    with pytest.raises(UserError, match="was written by save_to_disk, which has no configurations"):
        load(tmp_path / "saved", "fine")
    [data] = (tmp_path / "saved" / "train").glob("*.arrow")
    whole = data.read_bytes()
    for content in (whole[:100], b""):
        data.write_bytes(content)
        with pytest.raises(UserError, match="was written by save_to_disk and cannot be loaded"):
            load(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / "train")
    with pytest.raises(UserError, match="was written by save_to_disk and cannot be loaded"):
        load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (
            {"train": 27, "test": 6},
            "9 in its files and 27 in its card for split 'train'; wait until the dataset is complete, or",
        ),
        ({"train": 6, "test": 4}, "'train'; 6 in its files and 4 in its card for split 'test'; wait until"),
        ({"train": 9, "test": 6, "dev": 3}, "its card lists splits without files: dev; wait until"),
        ({"train": 9}, "its files have splits that its card does not list: test; wait until"),
    ],
)
def test_a_dataset_that_is_being_extended_is_one_line(image_set, tmp_path, counts, message):
    shutil.copytree(image_set, tmp_path / "set")
    write_card(tmp_path / "set", **counts)
    with pytest.raises(UserError) as error:
        load(tmp_path / "set")
    assert str(error.value).startswith(f"--dataset_name {tmp_path / 'set'}: ")
    assert message in str(error.value)
    assert "SplitInfo" not in str(error.value) and "\n" not in str(error.value)
    write_card(tmp_path / "set", train=9, test=6)
    assert {name: len(images) for name, images in load(tmp_path / "set").items()} == {"train": 9, "test": 6}


@pytest.mark.parametrize("name", ["my set [a]", "a::b", "what?", "all*"])
def test_a_folder_whose_path_is_a_pattern_to_datasets_is_one_line(image_set, tmp_path, name):
    shutil.copytree(image_set, tmp_path / name)
    with pytest.raises(UserError, match="datasets cannot read folders with .* in their path .*; rename or move"):
        load(tmp_path / name)


@pytest.mark.parametrize("name", ["my set", "50%20 #1", "{a,b}", "~", "it's (1)", "a:b", "é", "a[b"])
def test_a_folder_of_any_other_name_is_read(image_set, tmp_path, name):
    shutil.copytree(image_set, tmp_path / name)
    assert len(load(tmp_path / name)["train"]) == 9


@pytest.mark.parametrize(("odd_name", "num_read"), [("bird test 1.png", 1), ("bird.png", 7)])
def test_images_of_a_repository_that_file_name_patterns_leave_out_are_counted(
    local_hub_server, caplog, odd_name, num_read
):
    buffer = BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    names = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(3)]
    names += [f"cat/{odd_name}", ".thumbnails/1.png"]
    repo_id = f"ada/photos-{num_read}"
    local_hub_server.create_repo(repo_id, "dataset").commit(dict.fromkeys(names, buffer.getvalue()))
    loaded = load(repo_id)
    assert sum(map(len, loaded.values())) == num_read
    told = [message for message in caplog.messages if message.startswith("--dataset_name")]
    line = f"--dataset_name {repo_id}: only 1 of its 7 images are read: datasets selects them by words such as train"
    assert [text[: len(line)] for text in told] == ([] if num_read == 7 else [line])


# the same classes, and one more, in a different order in each file
ORDERS = {"train-0": ["cat", "dog", "owl"], "train-1": ["owl", "cat", "dog"], "test-0": ["dog", "emu", "cat"]}


def label_features(names: list[str]) -> Features:
    return Features({"id": Value("int64"), "label": ClassLabel(names=names)})


def write_labels(folder, files: dict[str, tuple[list[str] | None, list]]):
    """Write parquet files of labels, with or without class names for their numbers."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, (names, labels) in files.items():
        schema = label_features(names or ["?"]).arrow_schema
        table = pa.table({"id": range(len(labels)), "label": labels}, schema if names else schema.remove_metadata())
        pq.write_table(table, folder / "data" / f"{name}.parquet")
    return folder


def by_name(loaded: DatasetDict) -> dict[str, list[str | int]]:
    return {
        split: [images.features["label"].names[label] if label >= 0 else label for label in images["label"]]
        for split, images in loaded.items()
    }


@pytest.fixture
def mixed_set(tmp_path):
    return write_labels(tmp_path / "mixed", {name: (names, [0, 1, 2, 0]) for name, names in ORDERS.items()})


MIXED = {"train": ["cat", "dog", "owl", "cat", "owl", "cat", "dog", "owl"], "test": ["dog", "emu", "cat", "dog"]}


def test_files_with_classes_in_another_order_are_read_by_name(mixed_set):
    loaded = load(mixed_set)
    assert by_name(loaded) == MIXED
    assert [images.features["label"].names for images in loaded.values()] == [["cat", "dog", "owl", "emu"]] * 2
    assert loaded["train"].column_names == ["id", "label"]
    assert load(mixed_set, split="test")["label"] == loaded["test"]["label"]
    with pytest.raises(UserError, match="--dataset_name .*: has no split 'valid'; it has train, test."):
        load(mixed_set, split="valid")


def test_arrow_files_with_classes_in_another_order_are_read_by_name(tmp_path):
    (tmp_path / "set").mkdir()
    for split, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        images = Dataset.from_dict({"id": [0, 1, 2], "label": [0, 0, 1]}, features=label_features(names))
        images.save_to_disk(tmp_path / split)
        shutil.copy(next((tmp_path / split).glob("*.arrow")), tmp_path / "set" / f"{split}.arrow")
    assert by_name(load(tmp_path / "set")) == {"train": ["cat", "cat", "dog"], "test": ["dog", "dog", "cat"]}


@pytest.mark.parametrize(
    ("train", "unnamed", "test_names", "test", "expected"),
    [
        ([0, 1], [1, 1], ["cat", "dog"], [1], {"train": ["cat", "dog", "dog", "dog"], "test": ["dog"]}),
        ([0, 1], [1, 1], ["dog", "cat"], [1], {"train": ["cat", "dog", "dog", "dog"], "test": ["cat"]}),
        ([0, -1], [1], ["dog", "cat"], [-1, 0], {"train": ["cat", -1, "dog"], "test": [-1, "dog"]}),
        ([0, None], [1], ["dog", "cat"], [None, 0], {"train": ["cat", -1, "dog"], "test": [-1, "dog"]}),
    ],
)
def test_numbers_without_names_are_those_of_the_set_and_missing_ones_stay_missing(
    train, unnamed, test_names, test, expected, tmp_path
):
    files = {"train-0": (["cat", "dog"], train), "train-1": (None, unnamed), "test-0": (test_names, test)}
    assert by_name(load(write_labels(tmp_path / "set", files))) == expected


def test_rows_that_differ_from_the_files_are_an_error(tmp_path):
    folder = write_labels(tmp_path / "set", {"train-0": (["x", "y"], [0, 1]), "train-1": (["y", "x"], [0, 1])})
    paths = {"train": [str(path) for path in sorted((folder / "data").iterdir())]}
    loaded = load_dataset("parquet", data_files={"train": paths["train"][:1]}, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="classes of 'label' in different orders, and other rows"):
        unify_class_names(loaded, paths, "set")


@pytest.mark.parametrize("names", [("train-0", "train-1"), ("train-1", "train-0")])
def test_files_of_text_and_of_class_names_are_an_error(names, tmp_path):
    folder = write_labels(tmp_path / "set", {names[0]: (["cat", "dog"], [0, 1])})
    pq.write_table(pa.table({"id": [0], "label": ["cat"]}), folder / "data" / f"{names[1]}.parquet")
    with pytest.raises(UserError, match="its files disagree on column 'label'"):
        load(folder)


@pytest.mark.parametrize(
    ("in_file", "labels", "line"),
    [
        (["0", "1"], ["cat", "dog"], "its card names the classes of 'label' cat, dog, ..., its files 0, 1, ...; "),
        (["dog", "cat"], ["dog", "cat"], ""),
    ],
    ids=["renamed", "in another order"],
)
def test_a_card_that_renames_classes_is_used_and_reported_and_other_orders_are_mapped(
    in_file, labels, line, tmp_path, caplog
):
    folder = write_labels(tmp_path / "set", {"train-0": (in_file, [0, 1])})
    (folder / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: id\n    dtype: int64\n  - name: label\n    dtype:\n"
        "      class_label:\n        names: {'0': cat, '1': dog}\n---\n"
    )
    loaded = load(folder)
    assert (by_name(loaded)["train"], loaded["train"].features["label"].names) == (labels, ["cat", "dog"])
    assert [
        text.partition("set: ")[2].partition("the card's")[0] for text in caplog.messages if "its card" in text
    ] == ([line] if line else [])


def test_files_of_a_repository_with_classes_in_another_order_are_read_by_name(mixed_set, local_hub, monkeypatch):
    files = {path.relative_to(mixed_set).as_posix(): path for path in mixed_set.rglob("*.parquet")}
    local_hub.add_user("ann", "hf_ann")
    local_hub.create_repo("ann/mixed", "dataset").commit(files)
    source = open_source("ann/mixed", "--dataset_name", "dataset", token="hf_ann")
    assert by_name(load_image_dataset(source)) == MIXED
    assert by_name(load_image_dataset(source)) == MIXED  # from the datasets cache
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the classes of 'label' in different orders, and HF_HUB_OFFLINE is set"):
        load_image_dataset(source)


def test_images_of_another_commit_are_not_taken_where_the_hub_fails_in_between(mixed_set, local_hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    repo = local_hub.create_repo("ann/changed", "dataset")
    first = repo.commit({"data/train-0.parquet": mixed_set / "data" / "train-0.parquet"})
    assert len(load("ann/changed")["train"]) == 4
    repo.commit({"data/train-1.parquet": mixed_set / "data" / "train-1.parquet"})
    source = open_source("ann/changed", "--dataset_name", "dataset")
    local_hub.inject(Fault("status", path="/resolve/", times=None))
    with pytest.raises(UserError, match=f"the cache last stored commit {first}, not {source.revision}"):
        load_image_dataset(source)
