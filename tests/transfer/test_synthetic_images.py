import numpy as np
import pytest

from tests.conftest import CLASS_NAMES
from utils.cli.errors import UserError
from utils.transfer.synthetic_images import count_leaked_images, load_synthetic, open_synthetic

pytest_plugins = ["tests.transfer.fixtures"]


def test_labels_follow_names_when_the_class_order_differs(make_synthetic_dir):
    order = [CLASS_NAMES[index] for index in (2, 0, 1)]
    images = load_synthetic(open_synthetic(str(make_synthetic_dir("permuted", order))), CLASS_NAMES)
    assert images.features["label"].names == CLASS_NAMES
    assert images["label"][:3] == [2, 0, 1]


def test_other_classes_are_an_error_that_lists_them(make_synthetic_dir):
    folder = make_synthetic_dir("other", ["red_square", "green circle", "yellow"])
    with pytest.raises(UserError, match="missing: blue-stripe; extra: yellow"):
        load_synthetic(open_synthetic(str(folder)), CLASS_NAMES)


def test_first_of_each_class_are_kept(synthetic_dir):
    images = load_synthetic(open_synthetic(str(synthetic_dir)), CLASS_NAMES, max_samples_per_class=2)
    assert images["label"][:] == [0, 1, 2, 0, 1, 2]


def test_leak_counts_images_outside_the_subset():
    assert count_leaked_images({"train_indices": [1, 2, 9]}, np.array([1, 2, 3])) == 1
    assert count_leaked_images({"train_indices": None}, np.array([1])) == 0
