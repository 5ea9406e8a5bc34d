import re

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageCms

from tests.data.builders import load
from utils.data.audit import audit_images, list_findings, print_audit


def draw(seed: int, size=(48, 64)) -> PILImage.Image:
    """Return an image of soft random spots and a sharp frame, different for every seed."""
    spots = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    pixels = np.array(PILImage.fromarray(spots).resize(size[::-1], PILImage.Resampling.BICUBIC))
    pixels[::47], pixels[:, ::63] = 255, 0
    return PILImage.fromarray(pixels)


@pytest.fixture
def photos(tmp_path):
    """Class folders with ten images of two classes to train on, and three of each to test on."""
    for split, count in (("train", 10), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                draw(1000 * label + number + 100 * (split == "test")).save(tmp_path / split / name / f"{number}.png")
    return tmp_path


def audit(folder):
    return audit_images(load(train_dir=str(folder / "train"), validation_dir=str(folder / "test")))


def test_good_images_are_counted_without_findings(photos, capsys):
    found = audit(photos)
    assert (found.counts["train"] + found.counts["validation"]).tolist() == [10, 10]
    assert found.counts["validation"].min() > 0
    assert found.counts["test"].tolist() == [3, 3]
    assert found.sizes.tolist() == [[64, 48]] * 26
    assert list_findings(found) == []
    print_audit(found, "photos")
    printed = capsys.readouterr().out
    assert "No problems were found." in printed
    assert "median 64 x 48" in printed


def test_each_copy_is_reported_by_its_place(photos):
    """A copy in another format is still a copy; it is a leak in another split, and harmless within class and split."""

    def copy(source, target, **options):
        PILImage.open(photos / source).save(photos / target, **options)

    copy("train/cat/0.png", "test/cat/leak.webp", lossless=True)
    copy("train/dog/3.png", "test/dog/compressed.jpg", quality=95)
    copy("train/cat/5.png", "train/dog/labelled.png")
    copy("test/cat/0.png", "test/cat/within.png")
    found = audit(photos)
    told = {finding.what: (finding.number, *finding.examples) for finding in list_findings(found)}
    expected = {  # some of the training images are carved off for validation
        "copies in more than one split": "(train|validation) cat/0.png = test cat/leak.webp",
        "copies with different labels": r"(\w+) cat/5.png \(cat\) = \1 dog/labelled.png \(dog\)",
        "copies within a split": "test cat/0.png = test cat/within.png",
        "look-alikes in more than one split": "(train|validation) dog/3.png = test dog/compressed.jpg",
    }
    assert list(told) == list(expected)
    assert all(number == 1 and re.fullmatch(expected[what], example) for what, (number, example) in told.items())


def test_altered_copies_look_alike_and_images_that_have_the_same_hash_by_chance_do_not(photos):
    """Plain images of all colours have the same hash, which also loses small details."""
    photo, folder = draw(4), photos / "train" / "cat"
    photo.resize((32, 24)).save(folder / "smaller.png")
    photo.resize((160, 120)).save(folder / "larger.png")
    PILImage.eval(photo, lambda level: min(255, level * 1.1)).save(folder / "brighter.png")
    for number, colour in enumerate(("black", "white", "red", "blue", "#fefefe")):
        PILImage.new("RGB", (48, 64), colour).save(folder / f"plain{number}.png")
    assert sorted(sorted(place.file for place in group) for group in audit(photos).look_alikes) == [
        ["cat/4.png", "cat/brighter.png", "cat/larger.png", "cat/smaller.png"], ["cat/plain1.png", "cat/plain4.png"],
    ]  # fmt: skip


def test_a_copy_of_a_look_alike_is_reported_once(photos):
    """A hash that copies share with another image by chance makes no look-alikes; clear pixels appear white."""
    for name, colour in (("white", "white"), ("black", "black")):
        PILImage.new("RGB", (48, 64), colour).save(photos / "train" / "cat" / f"{name}.png")
    PILImage.new("RGBA", (48, 64), (0, 0, 0, 0)).save(photos / "train" / "cat" / "clear.png")
    found = audit(photos)
    assert [{place.file for place in group} for group in found.copies] == [{"cat/clear.png", "cat/white.png"}]
    assert found.look_alikes == []


def save_of_mode(path, mode: str) -> None:
    """Save a picture of greys from black to white, nearly the same in every mode."""
    levels = np.asarray(draw(99).convert("L"), np.float32) / 255
    pictures = {
        "I;16": PILImage.fromarray((levels * 65_535).astype(np.uint16)),
        "12 bits": PILImage.fromarray((levels * 4095).astype(np.uint16)),
        "F": PILImage.fromarray(levels),
        "F from -1": PILImage.fromarray(levels * 2 - 1),
        "L": PILImage.fromarray((levels * 255).astype(np.uint8)),
    }
    image = pictures.get(mode) or pictures["L"].convert("RGB" if mode == "LAB" else mode)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    image.save(path)


def test_images_of_every_mode_are_audited_as_training_reads_them(photos):
    modes = ("I;16", "12 bits", "F", "F from -1", "L", "LA", "P", "1", "CMYK", "LAB", "YCbCr", "RGBA")
    for number, mode in enumerate(modes):
        suffix = "png" if mode in ("LA", "P", "RGBA", "1", "I;16") else "tif"
        save_of_mode(photos / "train" / "cat" / f"mode{number}.{suffix}", mode)
    found = audit(photos)
    assert found.damaged == {}
    assert not any(found.oddities.values())
    assert sorted(found.readings) == [
        "of more than 8 bits a channel, read with -1 as black and 1 as white",
        "of more than 8 bits a channel, read with 0 as black and 1 as white",
        "of more than 8 bits a channel, read with 0 as black and 4,095 as white",
    ]
    same = {place.file for group in (*found.copies, *found.look_alikes) for place in group}
    assert len(same) >= len(modes) - 1  # only black and white may differ
    (finding,) = [finding for finding in list_findings(found) if "4,095" in finding.what]
    assert finding.examples == ["train cat/mode1.tif"]


@pytest.mark.filterwarnings("ignore:Image size")
def test_damaged_and_large_images_are_named_and_the_others_still_checked(photos, monkeypatch):
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 48 * 64)
    draw(1, (96, 65)).save(photos / "train" / "cat" / "large.png")
    (photos / "train" / "cat" / "1.png").write_bytes(b"no image")
    PILImage.fromarray(np.zeros((48, 64, 3), np.uint8)).save(photos / "test" / "dog" / "black.png")
    exif = PILImage.Exif()
    exif[0x0112] = 6
    draw(1, (20, 80)).save(photos / "test" / "cat" / "turned.jpg", exif=exif)
    whole = audit(photos)
    found = {finding.what: finding.examples for finding in list_findings(whole)}
    (damaged,), (large,) = found["images that do not open"], found["images too large to open"]
    assert "cat/1.png: no known image format" in damaged
    assert "cat/large.png: too large: 6,240 pixels" in large
    assert found["very dark images"] == ["test dog/black.png"]
    assert [20, 80] in whole.sizes.tolist()  # upright


def test_brackets_in_names_are_printed_as_they_are(photos, capsys, monkeypatch):
    (photos / "train" / "dog").rename(photos / "train" / "[red]dog")
    (photos / "test" / "dog").rename(photos / "test" / "[red]dog")
    (photos / "train" / "[red]dog" / "1.png").write_bytes(b"no image")
    monkeypatch.setenv("COLUMNS", "300")
    print_audit(audit(photos), "[bold]photos")
    printed = capsys.readouterr().out
    assert "[bold]photos" in printed
    assert "[red]dog " in printed
    assert "[red]dog/1.png" in printed


def test_images_that_are_all_damaged_are_counted_and_a_class_without_test_images_is_named(photos):
    for path in (photos / "test" / "dog").iterdir():
        path.unlink()
    (found,) = list_findings(audit(photos))
    assert (found.what, found.examples) == ("classes without images", ["dog in test"])
    for path in photos.glob("*/*/*.png"):
        path.write_bytes(b"no image")
    found, _ = list_findings(audit(photos))
    assert (found.what, found.number) == ("images that do not open", 23)


def test_a_single_image_of_each_class_leaves_validation_and_test_empty(photos, capsys):
    for path in (photos / "train").glob("*/[1-9].png"):
        path.unlink()
    found = audit_images(load(train_dir=str(photos / "train")))
    assert {finding.what: finding.number for finding in list_findings(found)} == {"classes without images": 4}
    print_audit(found, "photos [a]/[/b]:cat:")
    printed = capsys.readouterr().out
    assert "0 of 2" in printed and "images of photos [a]/[/b]:cat:" in printed
