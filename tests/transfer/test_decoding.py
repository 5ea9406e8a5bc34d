"""Decoding of training images: the same pixels, or a smaller version of the image; and the cache of decoded images."""

import io
import os
from collections import namedtuple

import datasets
import numpy as np
import psutil
import pytest
from PIL import Image
from torchvision.transforms import v2

from tests.transfer.test_augmentation import random_photo
from utils.cli.errors import UserError
from utils.data.images import to_rgb
from utils.hub.image_datasets import load_image_dataset
from utils.hub.repositories import Source
from utils.transfer import image_cache
from utils.transfer.augmentation import ROBUST_SCALE, TrainImages, TrainItems, undecoded
from utils.transfer.classifiers import load_image_processor
from utils.transfer.decoding import MIN_EDGE, decode, shrink_factor
from utils.transfer.image_cache import DECODED, cache_images, describe_cache
from utils.transfer.image_format import read_image_format

pytest_plugins = ["tests.transfer.fixtures"]


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(("orientation", "size"), [(1, (640, 400)), (6, (400, 640))])
def test_a_large_jpeg_is_decoded_small_and_shows_the_same(orientation, size):
    whole, small, blown_up = (
        decode(random_photo(640, 400, exif=turned(orientation)), wanted) for wanted in (None, (60, 40), (140, 200))
    )
    assert whole.shape == blown_up.shape == (3, *size[::-1])
    assert small.shape == (3, size[1] // 4, size[0] // 4)
    pictures = [v2.functional.resize(image, [50, 50]).float() for image in (whole, small)]
    assert (pictures[0] - pictures[1]).abs().mean() < 2


def test_the_smallest_robust_crop_of_what_is_decoded_small_is_no_smaller_than_the_input():
    for width, height in ((672, 672), (4000, 3000), (900, 3000), (1_200, 700)):
        image = Image.new("RGB", (width, height))
        image.format = "JPEG"
        factor = shrink_factor(image, (224, 200))
        edges = width / factor, height / factor
        assert factor in (2, 4, 8) or min(width, height) < 2 * 224 * MIN_EDGE
        assert min(np.sqrt(ROBUST_SCALE[0] * np.prod(edges) * 3 / 4), *edges) >= 224
        assert factor == 8 or min(edges) < 2 * 224 * MIN_EDGE
    image.format = "PNG"
    assert shrink_factor(image, (224, 224)) == 1


@pytest.mark.parametrize(
    ("format", "modes"), [("jpeg", ("RGB", "L", "CMYK")), ("png", ("RGB", "L", "P", "RGBA", "I;16"))]
)
@pytest.mark.parametrize("exif", [b"", b"Exif\0\0broken", turned(3).tobytes()])
def test_an_image_has_the_pixels_that_pillow_makes_of_it(format, modes, exif):
    files = [io.BytesIO() for _ in range(len(modes) + 2)]
    photo = random_photo(120, 90).convert("RGB")
    for mode, file in zip(modes, files):
        picture = photo.convert("L").convert(mode) if mode == "I;16" else photo.convert(mode)
        picture.save(file, format, exif=exif)
    photo.save(files[-1], "png", transparency=(200, 100, 0))
    photo.save(files[-2], "png", save_all=True, append_images=[photo.rotate(180)], default_image=False)
    for file in files:
        pixels = decode(Image.open(file), (90, 90)).int()
        expected = v2.functional.pil_to_tensor(to_rgb(Image.open(file))).int()
        assert pixels.shape == expected.shape == (3, 90, 120)
        assert (pixels - expected).abs().max() <= 1  # two builds of one library


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A large, a turned, a grey and a small JPEG, and a PNG: with bytes, or as files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = [
        random_photo(640, 400), random_photo(400, 260, exif=turned(6)), random_photo(200, 120).convert("L"),
        random_photo(60, 40), random_photo(640, 400, "png"),
    ]  # fmt: skip
    encoded = []
    for number, image in enumerate(images):
        file = io.BytesIO()
        image.save(file, image.format or "jpeg", exif=image.getexif())
        path = tmp_path / f"{number}.{(image.format or 'jpeg').lower()}"
        path.write_bytes(file.getvalue())
        encoded.append({"bytes": None if number % 2 else file.getvalue(), "path": str(path)})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": encoded, "label": [*range(5)]}, features=features)


@pytest.mark.parametrize("augmentation", ["robust", "trivialaugment"])
def test_training_takes_the_same_pixels_from_decoded_images(photos, classifiers, augmentation, monkeypatch):
    processor = load_image_processor(classifiers["vit"])
    size = read_image_format(processor).crop_size
    decoded = cache_images(photos, size)
    sizes = [Image.open(io.BytesIO(value["bytes"])).size for value in decoded[DECODED]]
    assert sizes == [(80, 50), (65, 100), (100, 60), (60, 40), (640, 400)]
    assert all(np.array_equal(*pair) for pair in zip(photos["image"], decoded["image"]))  # as evaluation takes them
    (cached,) = image_cache.cache_path(photos, size).parent.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "decode", lambda *_: pytest.fail("decoded again"))
        decoded = cache_images(photos, size).select([4, 3, 2, 1, 0]).select([4, 3, 2, 1, 0])
    assert {Image.open(io.BytesIO(value["bytes"])).format for value in undecoded(decoded)["image"]} == {"PPM"}
    plain, from_cache = (
        TrainImages(images, TrainItems(processor, augmentation, mixup_alpha=0.2), seed=3)
        for images in (photos, decoded)
    )
    for epoch in range(3):
        plain.set_epoch(epoch), from_cache.set_epoch(epoch)
        for index in range(5):
            ours, theirs = from_cache[index], plain[index]
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert cached.exists()


def test_decoded_images_are_measured_first_and_must_fit(photos, monkeypatch):
    num_bytes = 3 * (80 * 50 + 65 * 100 + 100 * 60 + 60 * 40 + 640 * 400)
    size = (32, 32)
    assert describe_cache([photos], size, is_asked_for=False) is None  # a moment's work
    assert "5 images, 0.00 GiB are written" in describe_cache([photos], size, is_asked_for=True)
    monkeypatch.setattr(image_cache, "WORTH_CACHING", num_bytes)
    room = namedtuple("Room", ["free", "available"])

    def have(disk: float, memory: float) -> None:
        monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda _: room(disk * num_bytes, 0))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: room(0, memory * num_bytes))

    for disk, memory, fits in ((2, 2, True), (1.9, 2, False), (2, 1.9, False)):
        have(disk, memory)
        assert (describe_cache([photos], size, is_asked_for=False) is not None) is fits
    have(1, 0)
    assert describe_cache([photos], size, is_asked_for=True) is not None
    have(0.9, 9)
    with pytest.raises(UserError, match=r"--cache_images: needs 0.0 GiB in .*cache, which has 0.0 GiB free; leave the"):
        describe_cache([photos], size, is_asked_for=True)
    have(1, 0)
    cache_images(photos, size)
    have(0, 0)
    assert "already decoded: 5 images in " in describe_cache([photos], size, is_asked_for=False)  # is there already


def test_images_that_were_replaced_and_kept_their_time_are_decoded_again(tmp_path, photos):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    shard = folder / "data" / "train-00000.parquet"
    photos.to_parquet(shard)
    status, source = os.stat(shard), Source(str(folder), "--dataset_name", "dataset")
    before = cache_images(load_image_dataset(source, split="train"), (32, 32))
    photos.select([4, 3, 2, 1, 0]).to_parquet(shard)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = cache_images(load_image_dataset(source, split="train"), (32, 32))
    assert [value["bytes"] for value in after[DECODED]] == [value["bytes"] for value in before[DECODED]][::-1]
