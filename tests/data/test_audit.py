import numpy as np
import pytest
from PIL import Image as PILImage

from utils.data.audit import across_splits, audit_images, list_findings, print_audit
from utils.data.real_images import RealImagesRecord, load_real_images


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
    assert {split: counts.tolist() for split, counts in found.counts.items()} == {
        "train": [9, 9], "validation": [1, 1], "test": [3, 3],
    }  # fmt: skip
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
