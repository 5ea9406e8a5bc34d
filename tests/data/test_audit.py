import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageCms
from rich.console import Console

from utils.data.audit import _are_alike, _thumbnail, across_splits, audit_images, list_findings, print_audit
from utils.data.image_set import RealImagesRecord
from utils.data.real_images import load_real_images


def draw(seed: int, size=(48, 64)) -> PILImage.Image:
    """Return an image of soft random spots and a sharp frame, unlike that of any other seed."""
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
    record = RealImagesRecord(train_dir=str(folder / "train"), validation_dir=str(folder / "test"))
    return audit_images(load_real_images(record))


def findings(folder) -> dict:
    return {finding.what: finding for finding in list_findings(audit(folder))}


def test_good_images_are_counted_and_nothing_is_found(photos, capsys):
    found = audit(photos)
    assert (found.counts["train"] + found.counts["validation"]).tolist() == [10, 10]
    assert found.counts["validation"].min() > 0
    assert found.counts["test"].tolist() == [3, 3]
    assert found.sizes.tolist() == [[64, 48]] * 26
    assert list_findings(found) == []
    print_audit(found, "photos")
    printed = capsys.readouterr().out
    assert "Nothing wrong was found." in printed
    assert "median 64 x 48" in printed


def test_a_training_image_among_the_test_images_is_a_leak_whatever_its_format(photos):
    PILImage.open(photos / "train" / "cat" / "0.png").save(photos / "test" / "cat" / "copy.webp", lossless=True)
    leak = findings(photos)["copies in more than one split"]
    assert leak.number == 1
    assert "cat/0.png" in leak.examples[0]
    assert "test cat/copy.webp" in leak.examples[0]


def test_a_copy_that_was_compressed_looks_alike(photos):
    PILImage.open(photos / "train" / "dog" / "3.png").save(photos / "test" / "dog" / "copy.jpg", quality=95)
    found = audit(photos)
    assert across_splits(found.copies) == []
    assert [{place.file for place in group} for group in across_splits(found.look_alikes)] == [
        {"dog/3.png", "dog/copy.jpg"}
    ]


@pytest.mark.parametrize(
    "alter",
    [
        lambda photo: photo.resize((32, 24)),
        lambda photo: photo.resize((160, 120)),
        lambda photo: PILImage.eval(photo, lambda level: min(255, level * 1.1)),
        lambda photo: photo.convert("L"),
    ],
    ids=["smaller", "larger", "brighter", "grey"],
)
def test_thumbnails_of_an_altered_copy_are_alike(alter):
    for seed in range(5):
        photo = draw(seed).convert("L").convert("RGB")
        assert _are_alike(_thumbnail(photo), _thumbnail(alter(photo).convert("RGB")))
        assert not _are_alike(_thumbnail(photo), _thumbnail(draw(seed + 5)))


def test_images_that_have_the_same_hash_by_chance_do_not_look_alike(photos):
    """Plain sheets have the same hash, whatever their colour; small details are lost in it."""
    for number, colour in enumerate(("black", "white", "red", "blue", "#fefefe")):
        PILImage.new("RGB", (48, 64), colour).save(photos / "train" / "cat" / f"plain{number}.png")
    (group,) = audit(photos).look_alikes
    assert {place.file for place in group} == {"cat/plain1.png", "cat/plain4.png"}


def test_a_copy_of_a_look_alike_is_told_once(photos):
    """A hash that two copies share with a third image by chance makes them no look-alikes."""
    for name, colour in (("white", "white"), ("copy", "white"), ("black", "black")):
        PILImage.new("RGB", (48, 64), colour).save(photos / "train" / "cat" / f"{name}.png")
    found = audit(photos)
    assert (len(found.copies), found.look_alikes) == (1, [])


def save_of_mode(path, mode: str) -> None:
    """Save a picture, much the same in every mode: greys from black to white."""
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
    assert len(same) >= len(modes) - 1  # black and white alone may differ
    (finding,) = [finding for finding in list_findings(found) if "4,095" in finding.what]
    assert finding.examples == ["train cat/mode1.tif"]


def test_a_transparent_image_is_seen_on_white(photos):
    PILImage.new("RGBA", (48, 64), (0, 0, 0, 0)).save(photos / "train" / "cat" / "clear.png")
    PILImage.new("RGB", (48, 64), "white").save(photos / "train" / "cat" / "white.png")
    (group,) = audit(photos).copies
    assert {place.file for place in group} == {"cat/clear.png", "cat/white.png"}


@pytest.mark.filterwarnings("ignore:Image size")
def test_an_image_above_the_limit_of_pillow_is_too_large_and_not_damaged(photos, monkeypatch):
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 48 * 64)
    draw(1, (96, 65)).save(photos / "train" / "cat" / "large.png")
    found = findings(photos)
    assert "images that do not open" not in found
    assert "cat/large.png: too large: 6,240 pixels" in found["images too large to open"].examples[0]


def test_sizes_are_those_of_upright_images(photos):
    exif = PILImage.Exif()
    exif[0x0112] = 6
    draw(1, (20, 80)).save(photos / "test" / "cat" / "turned.jpg", exif=exif)
    assert [20, 80] in audit(photos).sizes.tolist()


def test_brackets_in_names_are_printed_as_they_are(photos, capsys):
    (photos / "train" / "dog").rename(photos / "train" / "[red]dog")
    (photos / "test" / "dog").rename(photos / "test" / "[red]dog")
    (photos / "train" / "[red]dog" / "1.png").write_bytes(b"no image")
    print_audit(audit(photos), "[bold]photos", Console(width=300))
    printed = capsys.readouterr().out
    assert "[bold]photos" in printed
    assert "[red]dog " in printed
    assert "[red]dog/1.png" in printed


def test_a_copy_with_another_label_is_named_with_both(photos):
    PILImage.open(photos / "train" / "cat" / "5.png").save(photos / "train" / "dog" / "copy.png")
    (found,) = list_findings(audit(photos))
    assert (found.what, found.number) == ("copies with different labels", 1)
    assert "cat/5.png (cat)" in found.examples[0]
    assert "dog/copy.png (dog)" in found.examples[0]


def test_a_copy_among_the_images_of_its_class_and_split_is_no_leak(photos):
    PILImage.open(photos / "test" / "cat" / "0.png").save(photos / "test" / "cat" / "copy.png")
    (found,) = list_findings(audit(photos))
    assert (found.what, found.number) == ("copies within a split", 1)


def test_a_damaged_image_is_named_and_the_others_are_still_looked_at(photos):
    (photos / "train" / "cat" / "1.png").write_bytes(b"no image")
    PILImage.fromarray(np.zeros((48, 64, 3), np.uint8)).save(photos / "test" / "dog" / "black.png")
    found = findings(photos)
    assert found["images that do not open"].number == 1
    assert "cat/1.png: no known image format" in found["images that do not open"].examples[0]
    assert found["very dark images"].examples == ["test dog/black.png"]


def test_images_that_are_all_damaged_are_counted(photos):
    for path in photos.glob("*/*/*.png"):
        path.write_bytes(b"no image")
    (found,) = list_findings(audit(photos))
    assert (found.what, found.number) == ("images that do not open", 26)


def test_a_single_image_of_each_class_leaves_validation_and_test_empty(photos, capsys):
    for path in (photos / "train").glob("*/[1-9].png"):
        path.unlink()
    found = audit_images(load_real_images(RealImagesRecord(train_dir=str(photos / "train"))))
    assert {finding.what: finding.number for finding in list_findings(found)} == {"classes without images": 4}
    print_audit(found, "photos [a]/[/b]:cat:")
    printed = capsys.readouterr().out
    assert "0 of 2" in printed and "images of photos [a]/[/b]:cat:" in printed


def test_a_class_without_test_images_is_named(photos):
    for path in (photos / "test" / "dog").iterdir():
        path.unlink()
    assert findings(photos)["classes without images"].examples == ["dog in test"]
