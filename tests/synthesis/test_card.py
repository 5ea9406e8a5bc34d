"""The card of a synthetic set has the license of its sources if they agree."""

import pytest
from datasets import ClassLabel, Features, Image
from huggingface_hub import DatasetCard

from tests.conftest import CLASS_NAMES
from utils.hub.cards import License, common_license
from utils.synthesis.finishing import write_dataset_card

MIT, UNKNOWN = License("mit"), License()


def write_set_card(folder, licenses, generator="user/sd", names=CLASS_NAMES, **changes):
    """Write the card of a set of three images; `changes` apply to its record."""
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    record = {
        "generator": {"id": generator, "revision": None}, "token": None, "settings": {"seed": 0, "batch_size": 2},
        "num_images": 3, "num_images_per_class": 1, "class_names": names, "images_at_a_time": 2,
        "real_images": {"dataset_name": "user/cars"}, "num_redraws": dict.fromkeys(names, 0), **changes,
    }  # fmt: skip
    write_dataset_card(folder, features, record, {name: f"a {name}" for name in names}, licenses, "the command")
    return DatasetCard.load(folder / "README.md")


@pytest.mark.parametrize(("licenses", "expected"), [
    ([MIT, MIT], {"license": "mit"}),
    ([MIT, License("apache-2.0")], {"license": "unknown"}),
    ([MIT, UNKNOWN], {"license": "unknown"}),
    ([License("other", "Rail", "https://rail")] * 2,
     {"license": "other", "license_name": "Rail", "license_link": "https://rail"}),
    ([License("other", "Rail"), License("other", "Cars")], {"license": "unknown"}),
    ([License("mit, apache-2.0")] * 2, {"license": "unknown"}),
    ([], {"license": "unknown"}),
])  # fmt: skip
def test_a_set_has_the_license_of_its_sources_if_they_agree(licenses, expected, tmp_path):
    assert common_license(licenses).to_metadata() == expected
    card = write_set_card(tmp_path, dict(zip(("user/sd", "user/cars"), licenses)))
    assert {key: value for key, value in card.data.to_dict().items() if key.startswith("license")} == expected
    for name, license in zip(("user/sd", "user/cars"), licenses):
        assert f"- `{name}`: {license}\n" in card.text
