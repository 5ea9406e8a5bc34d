"""Verdicts and caveats of a report, and its section of the card."""

import copy

import pytest

from utils.hub.cards import MAX_LENGTH
from utils.quality.verdicts import judge, list_caveats
from utils.synthesis.finishing import quality_section


def entry(name, shift=0.1, diversity=0.5, real_diversity=0.5):
    return {
        "class": name, "num_images": 1000, "num_train": 1000, "shift": shift, "shift_floor": 0.0,
        "diversity": diversity, "real_diversity": real_diversity, "own_share": 0.9, "real_own_share": 0.9,
    }  # fmt: skip


def duplicates(num_similar=10, num_copies=0, num_images=1000, num_copies_of_real=0):
    return {
        "threshold": 0.9, "num_calibration_images": 1000, "largest_of_real": 0.95,
        "num_copies_of_real": num_copies_of_real, "num_images": num_images,
        "num_similar": num_similar, "share_similar": num_similar / num_images, "num_copies": num_copies, "pairs": [],
    }  # fmt: skip


def good_record():
    return {
        "synthetic": {"id": "cars-syn", "revision": None},
        "model": {"id": "timm/resnet18", "revision": "abc", "num_features": 512},
        "max_images_per_class": 1000,
        "num_images": {name: {"used": 2000, "all": 2000} for name in ("synthetic", "train", "held_out", "test")},
        "distance": {
            "num_images": 2000, "num_train": 2000, "frechet": {"synthetic": 12.0, "floor": 10.0},
            "kernel": {"synthetic": 0.02, "floor": 0.01, "synthetic_std": 0.01, "floor_std": 0.005},
        },
        "classes": [entry("car"), entry("bus", 0.05)],
        "diversity": {"synthetic": 0.5, "real": 0.5},
        "nearest_class": {"own_share": {"synthetic": 0.9, "held_out": 0.9}, "confusions": []},
        "duplicates": {kind: duplicates() for kind in ("test", "train", "synthetic")},
    }  # fmt: skip


def levels(record):
    return {verdict["subject"]: verdict["level"] for verdict in judge(record)}


def text_of(record, subject):
    return next(verdict["text"] for verdict in judge(record) if verdict["subject"] == subject)


def changed(path, value):
    record = copy.deepcopy(good_record())
    *parents, last = path
    inner = record
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return record


def test_a_set_like_the_real_images_is_good_throughout():
    assert set(levels(good_record()).values()) == {"good"}


@pytest.mark.parametrize(
    ("path", "value", "subject", "level"),
    [
        (("distance", "frechet", "synthetic"), 50.0, "whole set", "look"),
        (("distance", "frechet", "synthetic"), 500.0, "whole set", "bad"),
        (("distance", "frechet"), {"synthetic": None, "floor": None}, "whole set", "unknown"),
        (("distance", "kernel", "synthetic"), -0.01, "whole set", "good"),
        (("distance", "kernel", "synthetic"), 0.05, "whole set", "look"),
        (("distance", "kernel", "synthetic"), 0.5, "whole set", "bad"),
        (("classes",), [entry("car", 0.7)], "classes", "look"),
        (("classes",), [entry("car", 1.2), entry("bus")], "classes", "bad"),
        (("classes",), [entry("car", None)], "classes", "unknown"),
        (("classes",), [entry("car", 0.1, None)], "diversity", "unknown"),
        (("classes",), [entry("car", 0.1, 0.2), entry("bus")], "diversity", "look"),
        (("diversity", "synthetic"), 0.3, "diversity", "look"),
        (("diversity", "synthetic"), 0.1, "diversity", "bad"),
        (("nearest_class", "own_share", "synthetic"), 0.7, "labels", "look"),
        (("nearest_class", "own_share", "synthetic"), 0.4, "labels", "bad"),
        (("nearest_class", "own_share", "held_out"), None, "labels", "unknown"),
        (("duplicates", "test"), duplicates(0, 0), "copies of test images", "good"),
        (("duplicates", "test"), duplicates(30), "copies of test images", "look"),
        (("duplicates", "test"), duplicates(2, 0, 10), "copies of test images", "look"),
        (("duplicates", "test"), duplicates(2, 0, 50), "copies of test images", "good"),  # chance
        (("duplicates", "test"), duplicates(1, 1), "copies of test images", "bad"),
        (("duplicates", "test"), duplicates(20, 10, 1000, 8), "copies of test images", "look"),  # as of real ones
        (("duplicates", "train"), duplicates(1, 1), "copies of training images", "bad"),
        (("duplicates",), {}, "copies of test images", "unknown"),
        (("duplicates", "synthetic"), duplicates(3, 3), "repetitions", "look"),
        (("duplicates", "synthetic"), duplicates(50), "repetitions", "look"),
        (("duplicates", "synthetic"), duplicates(50, 20), "repetitions", "bad"),
        (("duplicates", "synthetic"), duplicates(20, 20, 1000, 20), "repetitions", "good"),
    ],
)
def test_a_flaw_changes_its_verdict_and_no_other(path, value, subject, level):
    before, after = levels(good_record()), levels(changed(path, value))
    assert after[subject] == level
    if path != ("duplicates",):
        assert {name for name in after if after[name] != before[name]} <= {subject}


def test_verdicts_name_the_figures_and_the_worst_class():
    assert "1.2 times the floor" in text_of(good_record(), "whole set")
    assert "by the" not in text_of(good_record(), "whole set")
    assert "by the kernel one, the" in text_of(changed(("distance", "kernel", "synthetic"), 0.05), "whole set")
    assert "by the Frechet one, the" in text_of(changed(("distance", "frechet", "synthetic"), 50.0), "whole set")
    assert "car (1.20)" in text_of(changed(("classes",), [entry("car", 1.2), entry("bus")]), "classes")
    confused = [{"class": "bus", "nearest": "car", "share": 0.4, "real_share": None}]
    assert "bus near car (40%, real 0%)" in text_of(changed(("nearest_class", "confusions"), confused), "labels")
    copies = text_of(changed(("duplicates", "test"), duplicates(3, 3)), "copies of test images")
    assert "3 of 1,000" in copies and "held-out real images, 0 of 1,000" in copies and "cannot be trusted" in copies
    assert "trusted" not in text_of(changed(("duplicates", "train"), duplicates(3, 3)), "copies of training images")


def test_more_variety_than_the_real_images_is_not_praised():
    assert "that real images lack" in text_of(changed(("diversity", "synthetic"), 0.7), "diversity")
    assert "counts too" not in text_of(good_record(), "diversity")


def test_caveats_name_few_images_and_limits():
    assert len(list_caveats(good_record())) == 2
    few = list_caveats(changed(("distance", "num_images"), 300))
    assert any("biased upwards" in caveat and "300 per side" in caveat for caveat in few)
    assert any("With only 40" in caveat for caveat in list_caveats(changed(("num_images", "held_out", "used"), 40)))
    cut = list_caveats(changed(("num_images", "synthetic", "all"), 6000))
    assert any("synthetic images per class were compared (2,000 of 6,000)" in caveat for caveat in cut)


def test_the_section_has_figures_verdicts_and_pictures():
    record = changed(("classes",), [entry("car|van", 1.2), entry("bus", None)])
    record |= {"verdicts": judge(record), "caveats": list_caveats(record)}
    section = quality_section(record)
    assert section.startswith("## Quality\n") and section.endswith("\n")
    for words in (
        "| whole set | good | Frechet distance 12, 1.2 times the floor of 10",
        "| classes | **bad** |",
        "| Frechet | 12 | 10 |",
        "| car\\|van | 1.20 (0.00) | 0.50 (0.50) | 90% (90%) |",
        "| bus | - (0.00) |",
        "`timm/resnet18` (commit `abc`)",
        "](quality.png)",
        "`duplicates.png` shows the most similar pairs",
        record["caveats"][-1],
    ):
        assert words in section
    assert "](duplicates.png)" not in section  # it shows real images, and is not published


def test_the_longest_verdicts_and_caveats_fit_into_the_card():
    record = changed(("distance", "frechet"), {"synthetic": 12345.6, "floor": 9876.5})
    record["distance"]["kernel"] |= {"synthetic": -0.000123 + 1, "floor": -0.000123, "floor_std": 0.000123}
    record["distance"]["num_images"] = 2000
    record["model"]["num_features"] = 3072
    found = duplicates(600_000, 6_000, 600_000, 100) | {"num_calibration_images": 10_000}
    record["duplicates"] = {"test": found, "train": duplicates(600_000, 6_000, 600_000, 10), "synthetic": found}
    record |= {"verdicts": judge(record), "caveats": list_caveats(record)}
    assert "by the kernel one" in record["verdicts"][0]["text"] and "overlap" in record["verdicts"][4]["text"]
    texts = [verdict["text"] for verdict in record["verdicts"]] + record["caveats"]
    assert max(map(len, texts)) <= MAX_LENGTH


def test_the_section_is_empty_without_a_report_and_short_for_many_classes():
    assert quality_section(None) == quality_section({}) == ""
    record = changed(("classes",), [entry(f"class {number}") for number in range(200)])
    record |= {"verdicts": judge(record), "caveats": []}
    section = quality_section(record)
    assert "10 of 200" in section and "class 9 " in section and "class 10 " not in section


def test_the_section_has_no_distances_if_none_are_known():
    record = changed(("distance", "frechet"), {"synthetic": None, "floor": None})
    record |= {"verdicts": judge(record), "caveats": list_caveats(record)}
    assert "| Frechet |" not in quality_section(record)
