"""Look-alikes and copies compared with values computed another way, and on images with known copies."""

import io

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from tests.quality.test_distances import gaussian
from utils.quality import duplicates
from utils.quality.duplicates import (
    UNCALIBRATED_THRESHOLD,
    Nearest,
    closest_pairs,
    count_similar,
    find_copies,
    find_nearest,
    similarity_threshold,
)
from utils.quality.vectors import Thumbnails, UnitFeatures, make_thumbnail


@pytest.mark.parametrize("same", [True, False])
def test_nearest_is_that_of_the_whole_table_across_chunks(monkeypatch, same):
    monkeypatch.setattr(duplicates, "QUERY_CHUNK", 7)
    monkeypatch.setattr(duplicates, "TARGET_CHUNK", 11)
    queries = UnitFeatures(gaussian(50), np.zeros(6, np.float32))
    targets = queries if same else UnitFeatures(gaussian(40, 0, 1), np.zeros(6, np.float32))
    table = (queries.take(slice(None)) @ targets.take(slice(None)).T).numpy()
    if same:
        np.fill_diagonal(table, -1)
    found = find_nearest(queries, targets, "nearest", "cpu")
    assert found.rows.tolist() == table.argmax(1).tolist()
    np.testing.assert_allclose(found.similarities, table.max(1), rtol=1e-5)
    some = find_nearest(queries, targets, "nearest", "cpu", np.array([3, 30]))
    assert some.rows.tolist() == table.argmax(1)[[3, 30]].tolist()


def test_threshold_is_above_99_percent_of_the_similarities():
    assert similarity_threshold(np.linspace(0, 0.9, 1001)) == pytest.approx(0.891)
    assert similarity_threshold(np.linspace(0.99, 1, 1001)) == pytest.approx(0.9999)  # a weak one
    assert similarity_threshold(np.zeros(0)) == UNCALIBRATED_THRESHOLD


def test_closest_pairs_are_copies_then_the_most_similar_and_once_within_a_set():
    nearest = Nearest(np.array([1, 0, 1, 0]), np.array([0.9, 0.9, 0.95, 0.1], np.float32))
    none = np.full(4, -1)
    assert closest_pairs(nearest, none, 3, within=True) == [(2, 1), (0, 1), (3, 0)]
    assert closest_pairs(nearest, none, 3, within=False) == [(2, 1), (0, 1), (1, 0)]
    copies = np.array([-1, -1, -1, 2])  # not of the most similar image
    assert closest_pairs(nearest, copies, 2, within=False) == [(3, 2), (2, 1)]


def test_copies_and_look_alikes_are_counted():
    nearest = Nearest(np.zeros(5, int), np.array([1.0, 0.995, 0.9, 0.5, 0.4], np.float32))
    counts = count_similar(nearest, np.array([0, -1, -1, 7, -1]), 0.9 - 1e-6)
    assert counts == {"num_images": 5, "num_similar": 4, "share_similar": 0.8, "num_copies": 2}


def pictures(count: int, seed: int) -> list[Image.Image]:
    """Return images of soft spots in soft colors, 64 pixels wide."""
    spots = np.random.default_rng(seed).integers(60, 200, (count, 6, 8, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC) for pixels in spots]


def thumbnails(images) -> Thumbnails:
    return Thumbnails(np.stack([make_thumbnail(image) for image in images]))


def compress(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=75)
    return Image.open(buffer)


ALTERATIONS = {
    "exact": lambda image: image,
    "jpeg": compress,
    "smaller": lambda image: image.resize((58, 43)),
    "larger": lambda image: image.resize((70, 53)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.05),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.95),
    "mirrored": ImageOps.mirror,
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_an_altered_copy_is_one_of_its_own_image(monkeypatch, alteration):
    monkeypatch.setattr(duplicates, "QUERY_CHUNK", 7)
    originals = pictures(40, 0)
    queries = [*map(ALTERATIONS[alteration], originals[:20]), *pictures(20, 1)]
    found = find_copies(thumbnails(queries), thumbnails(originals), "copies", "cpu")
    assert found.tolist() == [*range(20), *[-1] * 20]
    some = find_copies(thumbnails(queries), thumbnails(originals), "copies", "cpu", np.array([3, 30]))
    assert some.tolist() == [3, -1]


def test_within_a_set_an_image_is_not_a_copy_of_itself_even_if_symmetric():
    symmetric = [Image.fromarray(np.hstack([half, half[:, ::-1]])) for half in map(np.asarray, pictures(20, 0))]
    images = thumbnails([*symmetric, *pictures(5, 1), symmetric[4]])
    assert np.flatnonzero(find_copies(images, images, "copies", "cpu") >= 0).tolist() == [4, 25]


def test_other_colors_shades_and_plain_images_are_not_copies():
    def gradient(low: int, high: int) -> Image.Image:
        return Image.fromarray(np.tile(np.linspace(low, high, 48).astype(np.uint8)[:, None], (1, 64)))

    def disc(colour: tuple[int, int, int]) -> Image.Image:
        image = Image.new("RGB", (64, 48), (76, 76, 76))
        ImageDraw.Draw(image).ellipse((20, 10, 44, 34), fill=colour)
        return image

    plain = [Image.new("RGB", (64, 48), colour) for colour in ("black", "white", "red")]
    queries, targets = (
        [gradient(0, 100), disc((230, 40, 60)), *plain],
        [gradient(50, 250), disc((40, 112, 230)), *plain],
    )
    assert find_copies(thumbnails(queries), thumbnails(targets), "copies", "cpu").tolist() == [-1] * 5


def test_images_of_the_demo_have_no_copies_and_their_altered_ones_are_found():
    images = load_dataset("parquet", data_files="demo/fashion-mnist/data/*.parquet", split="train")["image"]
    originals = thumbnails(images)
    assert (find_copies(originals, originals, "copies", "cpu") == -1).all()
    for name, alter in ALTERATIONS.items():
        found = find_copies(thumbnails(map(alter, images[:300])), originals, "copies", "cpu")
        assert (found == np.arange(300)).mean() > 0.98, name
