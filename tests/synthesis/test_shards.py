"""Shards on disk: finished ones are found, and all others are detected."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, load_dataset

from tests.synthesis.test_plan import make_plan
from utils.synthesis import shards as shards_module
from utils.synthesis.output_folder import STATE_DIR, make_folders
from utils.synthesis.runner import encode_image, make_row
from utils.synthesis.shards import Shards

NAMES = ["a", "b", "c"]


def write_all(folder: Path, fingerprint="f", **changes) -> Shards:
    """Write all shards of a plan of 21 images, 8 per shard; image 1 was redrawn twice."""
    shards = Shards(folder, make_plan(**changes), fingerprint, NAMES)
    make_folders(folder)
    for number in range(shards.plan.num_shards):
        write_one(shards, number)
    return shards


def write_one(shards: Shards, number: int) -> None:
    images = [shards.plan.image(index) for index in shards.plan.shard(number)]
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    rows = [make_row(image, encode_image(pixels, "png", 95)) for image in images]
    shards.write(number, rows, {"b": 2} if number == 0 else {}, images_at_a_time=3)


def test_written_shards_are_finished_and_load_with_features(tmp_path):
    shards = write_all(tmp_path)
    assert shards.find_missing() == []
    images = load_dataset(str(tmp_path), split="train")
    assert images.features["label"] == ClassLabel(names=NAMES)
    assert images["seed"] == [shards.plan.image(index).seed for index in range(21)]
    assert shards.summarise() == {"num_redraws": {"a": 0, "b": 2, "c": 0}, "images_at_a_time": 3}


def test_the_same_rows_give_the_same_bytes_in_row_groups_for_streaming(tmp_path):
    one, two = (write_all(tmp_path / name, num_images_per_class=100, images_per_shard=300) for name in ("one", "two"))
    assert one.path(0).read_bytes() == two.path(0).read_bytes()
    metadata = pq.read_metadata(one.path(0))
    assert [metadata.row_group(group).num_rows for group in range(3)] == [100, 100, 100]


@pytest.mark.parametrize("damage", ["missing", "truncated", "torn", "empty", "one bit"])
def test_a_damaged_shard_is_missing_and_no_other(tmp_path, damage):
    shards = write_all(tmp_path)
    path = shards.path(1)
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-20])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        # the footer, with fingerprint and number of rows, is intact
        middle = slice(100, 200) if damage == "torn" else slice(150, 151)
        content[middle] = bytes(byte ^ 1 for byte in content[middle])
        path.write_bytes(content)
    assert shards.find_missing() == [1]
    write_one(shards, 1)
    assert shards.find_missing() == []


def swap(tmp_path, first, second) -> None:
    os.replace(first, tmp_path / "moved")
    os.replace(second, first)
    os.replace(tmp_path / "moved", second)


def test_a_shard_of_other_settings_or_another_place_is_missing(tmp_path):
    shards, other = write_all(tmp_path / "ours"), write_all(tmp_path / "other", fingerprint="g")
    for folder in ("data", STATE_DIR):  # with its notes, its bytes are unchanged
        swap(tmp_path, shards.output_dir / folder, other.output_dir / folder)
    assert shards.find_missing() == [0, 1, 2]
    shards, other = write_all(tmp_path / "swapped"), write_all(tmp_path / "seeded", seed=1)
    shards.path(2).write_bytes(other.path(2).read_bytes())  # without its note
    assert shards.find_missing() == [2]
    for end in (f"{STATE_DIR}/0000{{}}.json", "data/train-0000{}.parquet"):
        swap(tmp_path, *(shards.output_dir / end.format(number) for number in (0, 1)))
    assert shards.find_missing() == [0, 1, 2]


def test_finished_shards_are_not_read_again_where_size_and_time_are_as_noted(tmp_path, monkeypatch):
    shards = write_all(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "_sha256", lambda _: pytest.fail("was read"))
        assert shards.find_missing() == []
    for number in range(3):  # a copied folder is read once
        os.utime(shards.path(number))
    assert shards.find_missing() == []
    monkeypatch.setattr(shards_module, "_sha256", lambda _: pytest.fail("was read again"))
    assert shards.find_missing() == []
    note = json.loads((tmp_path / STATE_DIR / "00001.json").read_text())
    assert set(note) == {"sha256", "num_bytes", "mtime_ns"}  # only what a restart needs


def test_without_hidden_files_the_checksum_list_tells(tmp_path):
    shards = write_all(tmp_path)
    shards.write_checksums()
    for path in (tmp_path / STATE_DIR).iterdir():
        path.unlink()
    torn = bytearray(shards.path(1).read_bytes())
    torn[100] ^= 1
    shards.path(1).write_bytes(torn)
    again = Shards(tmp_path, shards.plan, "f", NAMES)
    assert again.find_missing() == [1]


def test_without_any_checksum_a_shard_is_finished_if_all_of_it_can_be_read(tmp_path, caplog):
    shards = write_all(tmp_path)
    sha256 = json.loads((tmp_path / STATE_DIR / "00000.json").read_text())["sha256"]
    torn = bytearray(shards.path(1).read_bytes())
    torn[100] ^= 1  # in an image
    shards.path(1).write_bytes(torn)
    other = Shards(tmp_path, shards.plan, "g", NAMES)
    for path in (tmp_path / STATE_DIR).iterdir():
        path.unlink()
    assert other.find_missing() == [0, 1, 2]
    assert shards.find_missing() == [1]
    assert caplog.messages == ["2 shard(s) without a checksum are intact and are kept."]
    assert json.loads((tmp_path / STATE_DIR / "00000.json").read_text())["sha256"] == sha256
    grown = Shards(tmp_path, make_plan(num_images_per_class=9), "f", NAMES)
    (tmp_path / STATE_DIR / "00002.json").unlink()
    assert grown.find_missing() == [1, 2, 3]


def test_checksum_list_is_read_by_sha256sum(tmp_path):
    shards = write_all(tmp_path)
    shards.write_checksums()
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.count(": OK") == 3
    shards.path(0).write_bytes(b"")
    assert subprocess.run(check, cwd=tmp_path, capture_output=True, check=False).returncode != 0


def test_a_short_last_shard_is_missing_when_the_set_grows(tmp_path):
    shards = write_all(tmp_path)
    grown = Shards(tmp_path, make_plan(num_images_per_class=9), "f", NAMES)
    assert shards.plan.num_shards == 3
    assert grown.find_missing() == [2, 3]


def test_a_write_that_fails_leaves_the_old_shard_and_no_temporary_file(tmp_path, monkeypatch):
    shards = write_all(tmp_path)
    before = shards.path(0).read_bytes()

    def no_room(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="No space left"):
        write_one(Shards(tmp_path, make_plan(seed=1), "g", NAMES), 0)
    assert shards.path(0).read_bytes() == before
    assert shards.find_missing() == []
    assert not list((tmp_path / "data").glob(".*"))


def test_a_crash_between_note_and_rename_leaves_the_shard_to_be_made(tmp_path, monkeypatch):
    write_all(tmp_path)
    replace = os.replace

    def killed(source, target):
        if str(target).endswith(".parquet"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_one(Shards(tmp_path, make_plan(num_images_per_class=9), "f", NAMES), 2)
    monkeypatch.undo()
    assert Shards(tmp_path, make_plan(num_images_per_class=9), "f", NAMES).find_missing() == [2, 3]
