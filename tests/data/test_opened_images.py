import hashlib
import re
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image

from tests.conftest import save_image_set
from tests.data.builders import CLASSES, encode, image_column, load
from utils.cli.errors import UserError
from utils.data.opened_images import NUM_THREADS, content_positions, inspect_images, open_all, open_synthetic

PHOTO = PIL.Image.effect_noise((160, 120), 60).convert("RGB")
PNG, JPEG, PROGRESSIVE = encode(PHOTO), encode(PHOTO, "JPEG"), encode(PHOTO, "JPEG", progressive=True)


def test_inspect_images_hashes_the_bytes_as_stored_and_processes_share_the_rows(tmp_path, monkeypatch):
    (tmp_path / "photo.jpg").write_bytes(JPEG)
    contents = [PNG, JPEG, PROGRESSIVE, PNG[:-40]] * (2 * NUM_THREADS + 1)  # more than one piece per process
    images = image_column([str(tmp_path / "photo.jpg") if content is JPEG else content for content in contents])
    whole = inspect_images(images, "photos", with_digests=True)
    expected = [hashlib.sha256(content).hexdigest() for content in contents]
    assert whole.digests == {row: digest for row, digest in enumerate(expected) if row % 4 < 3}
    assert list(whole.problems) == list(range(3, len(contents), 4))
    places = content_positions(images)
    assert (np.unique(places).size, places.min() >= 0, places.max() < 1) == (4, True, True)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: own)
    for rank in range(3):
        state = SimpleNamespace(process_index=rank, num_processes=3, is_local_main_process=rank == 0)
        monkeypatch.setattr("accelerate.PartialState", lambda state=state: state)
        own = inspect_images(images, "photos", with_digests=True)
        of_whole = [{row: text for row, text in by_row.items() if row % 3 == rank} for by_row in whole]
        assert list(own) == of_whole
        assert content_positions(images)[rank::3].tolist() == places[rank::3].tolist()


def decodes(data: bytes) -> bool:
    try:
        PIL.Image.open(BytesIO(data)).load()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("photo", [JPEG, PROGRESSIVE], ids=["baseline", "progressive"])
def test_inspect_images_finds_the_same_problems_as_full_jpeg_decoding(photo):
    rng = np.random.default_rng(0)
    broken = [photo[: len(photo) * share // 100] for share in (1, 30, 60, 95)] + [photo[:-2]]
    for length in rng.integers(2, len(photo) // 4, 20):
        middle = len(photo) // 2
        broken.append(photo[:middle] + rng.bytes(length) + photo[middle + length :])
        broken.append(photo[:middle] + bytes(length) + photo[middle + length :])
    _, problems, _ = inspect_images(image_column(broken), "photos", with_digests=True)
    assert set(range(4)) < set(problems)
    assert {row for row, data in enumerate(broken) if not decodes(data)} == set(problems)


def unreadable_exif() -> bytes:
    entries = bytes.fromhex("1201 0300 01000000 06000000 0101 0200 04000000 61626300")
    return b"Exif\0\0II*\0\x08\0\0\0\2\0" + entries + bytes(4)


def test_inspect_images_names_the_problems(tmp_path, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 160 * 120)
    bomb = encode(PIL.Image.new("1", (1600, 120)))
    text = tmp_path / "notes.jpg"
    text.write_text("no image")
    exif = encode(PHOTO, "JPEG", exif=unreadable_exif())
    broken = [None, bomb, str(text), str(tmp_path / "gone.jpg"), PNG[:-60], b"", exif]
    images = image_column([*broken, PNG])
    hashes, problems, _ = inspect_images(images, "photos", with_digests=True)
    assert list(hashes) == [len(broken)]
    for row, message in enumerate(
        ["no image", "too large: 192,000 pixels", "no known image format, file .*notes.jpg", "No such file .*gone.jpg"]
    ):
        assert re.search(message, problems[row]), problems[row]
    assert "0x" not in "".join(problems.values())
    for row in problems.keys() - {0}:
        with pytest.raises(Exception):  # noqa: B017 (any exception stops training)
            images[row]["image"].load()


def test_inspect_images_names_unreadable_kinds_and_errors_without_a_message(monkeypatch):
    heic, jxl = b"\0\0\0\x18ftypheic" + bytes(40), b"\xff\x0a" + bytes(40)
    monkeypatch.setattr("utils.data.opened_images.to_rgb", lambda image: next(iter(())))
    _, problems, _ = inspect_images(image_column([heic, jxl, PNG]), "photos")
    assert problems[0] == "HEIC, which is not read: pip install pillow-heif"
    assert problems[1].startswith("JPEG XL, which is not read")
    assert problems[2] == "StopIteration"


def test_inspect_images_reads_a_bounded_number_of_images_at_a_time(monkeypatch):
    images = image_column([PNG] * (20 * NUM_THREADS))
    read = []
    getitem = Dataset.__getitem__
    monkeypatch.setattr(Dataset, "__getitem__", lambda self, rows: read.append(len(rows)) or getitem(self, rows))
    hashes, _, _ = inspect_images(images, "photos", with_digests=True)
    assert len(hashes) == sum(read) == 20 * NUM_THREADS
    assert max(read) <= 8 * NUM_THREADS


@pytest.fixture
def damaged_dir(tmp_path):
    """A set with damaged images: rows 7 and 10 of train, row 2 of test, in a column 'photo'; 3 classes in turn."""
    save_image_set(tmp_path, {"train": 20, "test": 3})
    for split, rows in (("train", (7, 10)), ("test", (2,))):
        path = tmp_path / "data" / f"{split}-00000.parquet"
        table = pq.read_table(path).to_pydict()
        for row in rows:
            table["image"][row]["bytes"] = table["image"][row]["bytes"][:60]
        features = Features({"photo": Image(), "label": CLASSES})
        Dataset.from_dict({"photo": table["image"], "label": table["label"]}, features=features).to_parquet(path)
    return tmp_path


def test_damaged_images_of_all_parts_are_counted_and_the_first_is_named_as_the_user_knows_it(damaged_dir):
    with pytest.raises(UserError) as error:
        open_all(load(damaged_dir))
    assert re.match(r"(train|validation) images: row (7|10), column 'photo': damaged \(", str(error.value))
    assert "damaged in total: 3; repair or remove them, or give --skip_bad_images." in str(error.value)
    with pytest.raises(UserError, match=r"test images: row 2, column 'photo': damaged .*; damaged in total: 1;"):
        open_all(load(damaged_dir), ("test",))


def test_skipped_images_leave_every_other_image_in_its_part(damaged_dir):
    whole = load(damaged_dir, skip_bad_images=True)
    assert open_all(whole).digests == {"train": [], "validation": [], "test": []}
    found = open_all(whole, with_digests=True)
    opened, digests = found.images, found.digests
    assert found.num_skipped == 3
    assert found.remarks[0].startswith("Warning: damaged images left out: 3, the first is ")
    for part in ("train", "validation", "test"):
        damaged = {7, 10} if part != "test" else {2}
        assert opened.parts[part].rows.tolist() == [row for row in whole.parts[part].rows if row not in damaged]
        encoded = getattr(opened, part).cast_column("image", Image(decode=False))["image"]
        assert [hashlib.sha256(item["bytes"]).hexdigest() for item in encoded] == digests[part]
    with pytest.raises(UserError, match="--skip_bad_images: all training images of green circle are damaged"):
        open_all(whole.select({"train": np.flatnonzero(np.isin(whole.train_indices, (7, 10, 0, 2)))}))


def test_a_damaged_synthetic_image_is_named_or_left_out():
    images = image_column([PNG, PNG[:60], PNG])
    with pytest.raises(UserError, match=r"--synthetic_dataset cars-syn: row 1: damaged .* give --skip_bad_images"):
        open_synthetic(images, "cars-syn", skip_bad_images=False)
    kept, remarks = open_synthetic(images, "cars-syn", skip_bad_images=True)
    assert len(kept) == 2
    assert "damaged images left out: 1, the first is --synthetic_dataset cars-syn: row 1" in remarks[0]
