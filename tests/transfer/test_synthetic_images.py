from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, Image, IterableDataset

from tests.conftest import CLASS_NAMES
from utils.cli.errors import UserError
from utils.cli.records import GENERATION_CONFIG, write_record
from utils.data.left_out import REVIEW
from utils.synthesis.shards import shard_name, synthetic_features
from utils.transfer.synthetic_images import (
    SyntheticSource,
    count_leaked_images,
    describe_limit,
    describe_seeing,
    identify_synthetic,
    load_synthetic,
    num_images,
    open_synthetic,
)

pytest_plugins = ["tests.transfer.fixtures"]

COUNTS = {"num_images": 18, "num_images_per_class": 6, "num_redraws": {}}
NAMED = list(enumerate(CLASS_NAMES))
KINDS = pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])


def draw(name: str, class_index: int) -> bytes:
    """Return an image that differs from all other images of all classes."""
    buffer = BytesIO()
    PIL.Image.new("RGB", (4, 4), (sum(name.encode()) % 256, class_index, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def rows_of(class_names, num_per_class: int) -> list[dict]:
    """Return rows in the order of generate_synthetic.py: all classes in turn, then the next image of each."""
    return [
        {
            "image": {"bytes": draw(name, index), "path": None}, "label": label, "class_index": index, "seed": 0,
            "prompt": "", "guidance_scale": 3.0,
        }
        for index in range(num_per_class)
        for label, name in enumerate(class_names)
    ]  # fmt: skip


def save_set(folder: Path, class_names, rows: list[dict], **record) -> str:
    """Write rows as a synthetic set with four images per shard."""
    features = synthetic_features(class_names, has_init_images=True)
    schema = Features({name: features[name] for name in features if name in rows[0]}).arrow_schema
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(rows), 4)):
        table = pa.Table.from_pylist(rows[start : start + 4], schema=schema)
        pq.write_table(table, folder / shard_name(number), row_group_size=3)
    write_record(folder / GENERATION_CONFIG, {"real_images": {}, **record})
    return str(folder)


@pytest.fixture
def whole_set(tmp_path) -> str:
    """A finished set of six images per class in five shards."""
    return save_set(tmp_path / "whole", CLASS_NAMES, rows_of(CLASS_NAMES, 6), **COUNTS)


def load(folder: str, limit: int | None = None, class_names=tuple(CLASS_NAMES), **options):
    return load_synthetic(open_synthetic(folder), list(class_names), limit, **options)


def pairs_of(images) -> list[tuple[bytes, int]]:
    """Return the stored bytes and the label of each image, in order."""
    return [(row["image"]["bytes"], row["label"]) for row in images.cast_column("image", Image(decode=False))]


@KINDS
@pytest.mark.parametrize("limit", [None, 1, 4])
def test_labels_do_not_depend_on_the_order_of_a_sets_classes(whole_set, tmp_path, streaming, limit):
    order = [CLASS_NAMES[index] for index in (2, 0, 1)]
    permuted = save_set(tmp_path / "permuted", order, rows_of(order, 6), **COUNTS)
    images, unpermuted = load(permuted, limit, streaming=streaming), load(whole_set, limit)
    assert isinstance(images, IterableDataset) == streaming
    assert images.features == unpermuted.features and list(images.features) == ["image", "label"]
    assert images.features["label"].names == CLASS_NAMES
    assert sorted(pairs_of(images)) == sorted(pairs_of(unpermuted))
    assert all(image == draw(CLASS_NAMES[label], row // 3) for row, (image, label) in enumerate(pairs_of(images)))
    assert num_images(open_synthetic(permuted), limit) == len(unpermuted)


@KINDS
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["red_square", "green circle", "yellow"], "missing: blue-stripe; extra: yellow; --allow_missing_"),
        (
            ["Red Square", "Green circle", "Blue Stripe"],
            "renamed: 'blue-stripe' is 'Blue Stripe' in .* set, 'red_square' is 'Red Square' in the synthetic set[.]",
        ),
        (["red_squares", "blue-stripe"], "renamed: 'red_square' is 'red_squares' .*; missing: green circle; --allow"),
        ([*CLASS_NAMES, "owl", "cat"], "real set; extra: cat, owl[.]"),
        (CLASS_NAMES[:2], "real set; missing: blue-stripe; --allow_missing_classes accepts"),
        ([f"kind {i}" for i in range(13)], "extra: kind 0, kind 1, kind 10, kind 11, .*, kind 6 and 3 more; --allow"),
        ([*CLASS_NAMES[::2], "Green Circle", "green  circle"], "'Green Circle', 'green  circle': ambiguous"),
    ],
)
def test_other_classes_are_a_one_line_error_that_lists_them(tmp_path, names, message, streaming):
    folder = save_set(tmp_path / "other", names, rows_of(names, 1))
    with pytest.raises(UserError, match=f"--synthetic_dataset .*/other: .*{message}"):
        load(folder, streaming=streaming)


@KINDS
def test_names_in_another_case_or_unicode_form_are_the_real_classes(tmp_path, streaming, caplog):
    names, real = ["BLUE CAF\u00c9", "Red  Square"], ["red square", "green circle", "Blue cafe\u0301"]
    folder = save_set(tmp_path / "set", names, rows_of(names, 2), settings={"classes": names})
    images = load(folder, class_names=real, allow_missing_classes=True, streaming=streaming)
    assert images.features["label"].names == real
    assert pairs_of(images) == [(draw(names[row % 2], row // 2), [2, 0][row % 2]) for row in range(4)]
    assert f"{folder}: 2 class names matched ignoring case" in caplog.text
    assert "'Red  Square' is 'red square'" in caplog.text or "'BLUE CAF\u00c9' is 'Blue cafe\u0301'" in caplog.text
    with pytest.raises(
        UserError, match="its classes differ from those of the real set; missing: green circle; --allow"
    ):
        load(folder, class_names=real, streaming=streaming)


@KINDS
@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("unnamed", r"has no 'image' and 'label' \(ClassLabel\) columns"),
        ("set*", "datasets cannot read folders with [*] in"),  # else images of all folders that fit it were read
    ],
)
def test_a_folder_that_is_not_a_set_is_a_one_line_error(tmp_path, folder, message, streaming):
    folder = save_set(tmp_path / folder, CLASS_NAMES, rows_of(CLASS_NAMES, 1))
    for path in Path(folder).glob("data/*"):
        pq.write_table(pq.read_table(path).replace_schema_metadata(), path)
    with pytest.raises(UserError, match=f"--synthetic_dataset .*: {message}"):
        load(folder, streaming=streaming)


@KINDS
def test_a_set_of_some_classes_loads_when_that_is_allowed(tmp_path, streaming):
    names = CLASS_NAMES[2:0:-1]
    some = save_set(tmp_path / "some", names, rows_of(names, 2))
    assert [label for _, label in pairs_of(load(some, allow_missing_classes=True, streaming=streaming))] == [2, 1, 2, 1]
    extra = save_set(tmp_path / "extra", ["owl"], rows_of(["owl"], 1))
    with pytest.raises(UserError, match="differ from those of the real set; extra: owl[.]"):
        load(extra, allow_missing_classes=True, streaming=streaming)


@KINDS
def test_classes_without_images_are_named_unless_allowed(tmp_path, streaming):
    rows = [row for row in rows_of(CLASS_NAMES, 2) if row["label"] == 1]
    folder = save_set(tmp_path / "set", CLASS_NAMES, rows, settings={"classes": ["green circle"]})
    with pytest.raises(UserError, match="has no images of red_square, blue-stripe; --allow_missing_classes accepts"):
        load(folder, streaming=streaming)
    assert [label for _, label in pairs_of(load(folder, allow_missing_classes=True, streaming=streaming))] == [1, 1]


@pytest.mark.parametrize("content", [None, b"PAR1 torn"])
def test_an_incomplete_set_is_refused_when_opened(whole_set, content):
    shard = Path(whole_set) / shard_name(1)
    shard.unlink() if content is None else shard.write_bytes(content)
    with pytest.raises(UserError, match="incomplete, with 14 of 18 images; wait until .* or run the command"):
        open_synthetic(whole_set)


def test_a_set_with_missing_images_is_refused_when_loaded_from_a_cache(whole_set):
    with pytest.raises(UserError, match="incomplete, with 18 of 1,900 images"):
        load_synthetic(SyntheticSource(whole_set, None, {"num_images": 1900}), CLASS_NAMES)


def test_a_set_that_grew_and_a_record_without_counts_load(whole_set, tmp_path):
    grown = save_set(Path(whole_set), CLASS_NAMES, rows_of(CLASS_NAMES, 8), num_images=24, num_images_per_class=8)
    assert len(load(grown)) == num_images(open_synthetic(grown)) == 24
    old = save_set(tmp_path / "old", CLASS_NAMES, rows_of(CLASS_NAMES, 1))
    assert len(load(old)) == 3 and num_images(open_synthetic(old)) is None


@KINDS
def test_limits_keep_the_first_of_each_class_by_number_and_are_nested(tmp_path, streaming):
    rows = rows_of(CLASS_NAMES, 6)
    np.random.default_rng(0).shuffle(rows)
    folder = save_set(tmp_path / "shuffled", CLASS_NAMES, rows)
    for limit in range(1, 7):
        kept = pairs_of(load(folder, limit, streaming=streaming))
        expected = [(row["image"]["bytes"], row["label"]) for row in rows if row["class_index"] < limit]
        assert kept == expected  # in the order of the set
        assert len(kept) == 3 * limit


def test_limits_of_a_set_without_numbers_keep_the_first_in_its_order(tmp_path):
    rows = [{"image": row["image"], "label": row["label"]} for row in rows_of(CLASS_NAMES, 4)]
    np.random.default_rng(0).shuffle(rows)
    folder = save_set(tmp_path / "unnumbered", CLASS_NAMES, rows)
    before = []
    for limit in range(1, 5):
        kept = pairs_of(load(folder, limit))
        first = [[row["image"]["bytes"] for row in rows if row["label"] == label][:limit] for label in range(3)]
        assert sorted(image for image, _ in kept) == sorted(sum(first, []))
        assert set(before) < set(kept)
        before = kept
    with pytest.raises(UserError, match="--max_synthetic_samples_per_class 2: .* has no column 'class_index'"):
        load(folder, 2, streaming=True)
    assert pairs_of(load(folder, streaming=True)) == before


@KINDS
def test_images_are_decoded_only_when_requested(whole_set, streaming, monkeypatch):
    decoded = []
    decode = Image.decode_example
    monkeypatch.setattr(Image, "decode_example", lambda *args, **options: decoded.append(1) or decode(*args, **options))
    images = load(whole_set, 4, streaming=streaming)
    assert decoded == []
    pixels = [(*row["image"].getpixel((0, 0)), row["label"]) for row in images]
    assert len(decoded) == 12
    assert pixels == [(sum(name.encode()) % 256, row, 0, label) for row in range(4) for label, name in NAMED]


def files_of(folder: str) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in Path(folder).rglob("*") if path.is_file()}


def test_a_set_on_the_hub_is_streamed_at_its_commit(whole_set, local_hub_server):
    repo = local_hub_server.create_repo("ada/streamed", "dataset")
    commit = repo.commit(files_of(whole_set))
    source = open_synthetic("ada/streamed")
    repo.commit({shard_name(9): Path(whole_set) / shard_name(0)})
    assert source.revision == commit
    for limit in (None, 2):
        stream = load_synthetic(source, CLASS_NAMES, limit, streaming=True)
        assert pairs_of(stream) == pairs_of(load(whole_set, limit))


def test_an_unreachable_stream_is_a_one_line_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--streaming: ada/cars cannot be streamed, .* to use the cache"):
        load_synthetic(SyntheticSource("ada/cars", "0" * 40, {}), CLASS_NAMES, streaming=True)


def test_a_set_that_is_being_uploaded_is_refused_until_all_shards_are_there(whole_set, local_hub_server):
    write_record(Path(whole_set) / GENERATION_CONFIG, {"num_images": 18})  # redraws are counted at the end
    files = files_of(whole_set)
    last = {path: files.pop(path) for path in (shard_name(0), shard_name(4))}
    repo = local_hub_server.create_repo("ada/growing", "dataset")
    repo.commit(files)
    with pytest.raises(UserError, match="--synthetic_dataset ada/growing: incomplete, with 12 of 18 images;"):
        open_synthetic("ada/growing")
    repo.commit(last)
    source = open_synthetic("ada/growing")
    assert pairs_of(load_synthetic(source, CLASS_NAMES, streaming=True)) == pairs_of(load(whole_set))


def test_leak_counts_images_outside_the_subset():
    assert count_leaked_images({"train_indices": [1, 2, 9]}, np.array([1, 2, 3])) == 1
    assert count_leaked_images({"train_indices": None}, np.array([1])) == 0
    from_images = {"train_indices": [1, 2], "init_image_rows": [2, 8, 9]}
    assert count_leaked_images(from_images, np.array([1, 2, 3])) == 2
    assert describe_seeing(from_images, "syn") == "the style token and image-to-image of syn have seen"
    assert describe_seeing(from_images | {"train_indices": None}) == "image-to-image has seen"


@KINDS
def test_a_set_with_more_images_of_rare_classes_loads_with_and_without_a_limit(tmp_path, streaming):
    counts = dict(zip(CLASS_NAMES, (2, 6, 4)))
    rows = [row for row in rows_of(CLASS_NAMES, 6) if row["class_index"] < list(counts.values())[row["label"]]]
    rows = [row | {"strength": 0.5, "init_image": 7} for row in rows]  # further columns do no harm
    record = {"num_images": 12, "num_images_per_class": 2, "num_images_of_class": counts, "num_redraws": {}}
    folder = save_set(tmp_path / "balanced", CLASS_NAMES, rows, **record)
    source = open_synthetic(folder)
    for limit, expected in ((None, [2, 6, 4]), (5, [2, 5, 4]), (2, [2, 2, 2])):
        images = pairs_of(load(folder, limit, streaming=streaming))
        assert [sum(label == own for _, own in images) for label in range(3)] == expected
        assert num_images(source, limit) == sum(expected)
    assert describe_limit(source, None) is None and describe_limit(source, 6) is None
    assert "at most 5 per class leaves 2 to 5, so" in describe_limit(source, 5)
    assert "at most 2 per class leaves 2, so" in describe_limit(source, 2)


@KINDS
@pytest.mark.parametrize("limit", [None, 4])
def test_rejected_images_are_left_out_whatever_the_order_of_the_classes(whole_set, tmp_path, streaming, limit):
    order = [CLASS_NAMES[index] for index in (2, 0, 1)]
    record = {**COUNTS, "fingerprint": "abc"}
    folder = save_set(tmp_path / "reviewed", order, rows_of(order, 6), **record)
    before = identify_synthetic(open_synthetic(folder), limit)
    rejected = {CLASS_NAMES[0]: {index: {"ada": {"verdict": "reject"}} for index in ("1", "5")}}
    write_record(Path(folder, REVIEW), {"fingerprint": "abc", "verdicts": rejected})
    left_out = {draw(CLASS_NAMES[0], index) for index in (1, 5)}
    images, every = (pairs_of(load(name, limit, streaming=streaming)) for name in (folder, whole_set))
    assert sorted(images) == sorted(pair for pair in every if pair[0] not in left_out)
    source, all_images = open_synthetic(folder), open_synthetic(folder, use_rejected=True)
    assert num_images(source, limit) == len(images) < num_images(all_images, limit) == len(every)
    assert identify_synthetic(all_images, limit) == before != identify_synthetic(source, limit)
