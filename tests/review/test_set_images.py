"""Images of a set are found by class and read by row group; the order of review and the sample."""

import base64
import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.review.builders import CLASS_NAMES, colour, save_scores, save_set
from utils.cli.errors import UserError
from utils.review.set_images import THUMBNAIL_SIZE, Thumbnails, choose_shown, open_set_images, read_scores


@pytest.fixture(scope="module")
def set_dir(tmp_path_factory):
    return save_set(tmp_path_factory.mktemp("sets") / "syn")


def decode(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_every_image_is_found_by_class_and_class_index(set_dir):
    images = open_set_images(set_dir)
    assert [images.key(number) for number in images.numbers_by_class[1]] == [("green circle", n) for n in range(10)]
    pictures = Thumbnails(images).get(list(range(len(images))))
    seen = [decode(picture).getpixel((0, 0)) for picture in pictures]
    assert seen == [colour(CLASS_NAMES.index(name), index) for name, index in map(images.key, range(len(images)))]


def test_only_the_row_groups_of_a_page_are_read_and_each_once(set_dir, monkeypatch):
    images, read = open_set_images(set_dir), []
    original = pq.ParquetFile.read_row_group

    def read_row_group(file, group, columns=None, **options):
        read.append((group, columns))
        return original(file, group, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("a whole file was read"))
    thumbnails = Thumbnails(images)
    pictures = thumbnails.get([0, 4, 5])
    assert sorted(read) == [(0, ["image.bytes"]), (1, ["image.bytes"])]
    assert thumbnails.get([5, 0]) == [pictures[2], pictures[0]]
    assert len(read) == 2


def test_no_more_thumbnails_than_the_limit_stay_in_memory(set_dir, monkeypatch):
    monkeypatch.setattr("utils.review.set_images.MAX_THUMBNAILS", 4)
    thumbnails = Thumbnails(open_set_images(set_dir))
    thumbnails.get(list(range(10)))
    assert list(thumbnails._kept) == [6, 7, 8, 9]


def test_a_large_image_becomes_a_thumbnail_and_a_damaged_one_none(tmp_path):
    folder = save_set(tmp_path / "syn", num_per_class=1, side=500)
    path = folder / "data" / "train-00000.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:60]
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)
    whole, damaged, _ = Thumbnails(open_set_images(folder)).get([0, 1, 2])
    assert decode(whole).size == (THUMBNAIL_SIZE, THUMBNAIL_SIZE)
    assert damaged is None


def test_images_with_the_lowest_score_come_first_and_those_without_last(set_dir, tmp_path):
    folder = save_set(tmp_path / "syn", num_per_class=4)
    save_scores(folder, {("green circle", 2): 0.1, ("green circle", 0): 0.5, ("red_square", 3): 0.9})
    images = open_set_images(folder)
    name, scores = read_scores(folder, images, "f" * 64)
    shown = choose_shown(images, scores, None, 0)
    assert name == "probe"
    assert images.class_indices[shown[1]].tolist() == [2, 0, 1, 3]
    assert images.class_indices[shown[0]].tolist() == [3, 0, 1, 2]
    assert images.class_indices[choose_shown(images, None, None, 0)[1]].tolist() == [0, 1, 2, 3]


def test_scores_of_other_images_are_refused(tmp_path):
    folder = save_set(tmp_path / "syn", num_per_class=2)
    save_scores(folder, {("red_square", 0): 0.1}, fingerprint="other")
    with pytest.raises(UserError, match=r"scores.parquet is about other images"):
        read_scores(folder, open_set_images(folder), "f" * 64)


def test_a_sample_is_evenly_spaced_repeats_with_its_seed_and_takes_every_image_equally_often(set_dir):
    images = open_set_images(set_dir)
    drawn = [images.class_indices[choose_shown(images, None, 5, seed)[0]] for seed in range(400)]
    assert all(np.diff(indices).tolist() == [2, 2, 2, 2] for indices in drawn)
    assert np.array_equal(drawn[3], images.class_indices[choose_shown(images, None, 5, 3)[0]])
    counts = np.bincount(np.concatenate(drawn), minlength=10)
    assert counts.min() > 150 and counts.max() < 250  # 200 expected, standard deviation 10
    assert len(choose_shown(images, None, 99, 0)[0]) == 10


@pytest.mark.parametrize("missing", ["class_index", "label"])
def test_a_file_without_a_needed_column_is_refused(tmp_path, missing):
    folder = save_set(tmp_path / "syn", num_per_class=2)
    path = folder / "data" / "train-00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns([missing]), path)
    with pytest.raises(UserError, match=r"train-00000.parquet is not a file of generate_synthetic.py"):
        open_set_images(folder)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no images"):
        open_set_images(tmp_path)
