"""Folds: every image is tested once, and every script uses the same folds."""

import numpy as np
import pytest

from tests.conftest import CLASS_NAMES, save_image_set
from utils.cli.errors import UserError
from utils.data.arguments import parse_fold
from utils.data.folds import Folds, split_fold
from utils.data.image_set import RealImagesRecord
from utils.data.real_images import describe_small_parts, load_for_folds, load_real_images

LABELS = np.array([0] * 11 + [1] * 7 + [2] * 5)


@pytest.mark.parametrize("num_folds", [2, 5])
def test_folds_test_every_image_once_and_every_class_evenly(num_folds):
    splits = [split_fold(LABELS, f"{number}/{num_folds}", 3, ["a", "b", "c"]) for number in range(1, num_folds + 1)]
    assert np.array_equal(np.sort(np.concatenate([tested for _, tested in splits])), np.arange(len(LABELS)))
    for trained, tested in splits:
        assert np.array_equal(np.sort(np.concatenate([trained, tested])), np.arange(len(LABELS)))
        for count, total in zip(np.bincount(LABELS[tested], minlength=3), np.bincount(LABELS)):
            assert total // num_folds <= count <= -(-total // num_folds)
    other = split_fold(LABELS, f"1/{num_folds}", 4, ["a", "b", "c"])[1]
    assert not np.array_equal(other, splits[0][1]), "another seed draws others"


@pytest.mark.parametrize("text", ["6/5", "0/5", "1/1", "1", "1/5/2", "a/b", "-1/5"])
def test_a_fold_that_does_not_exist_is_one_line(text):
    with pytest.raises(UserError, match=f"^--fold {text}: must be K/N, the K-th of N folds"):
        parse_fold(text)


def test_a_class_with_fewer_images_than_folds_is_one_line():
    with pytest.raises(UserError, match="^6 folds: class 'c' has 5 images, .*; take 5 folds or fewer, add images"):
        split_fold(LABELS, "1/6", 0, ["a", "b", "c", "none"])
    with pytest.raises(UserError, match="class 'b' has 1 images, a fold needs one of each class; add images"):
        split_fold(np.array([0, 0, 1]), "1/2", 0, ["a", "b"])


def test_a_script_with_fold_tests_on_that_fold_and_trains_and_validates_on_the_others(real_images_dir):
    folds = load_for_folds(RealImagesRecord(str(real_images_dir)), 4)
    for name in folds.names:
        trained, tested = folds.split(name, 2)
        real = load_real_images(RealImagesRecord(str(real_images_dir), fold=name, fold_seed=2))
        assert np.array_equal(real.parts["test"].rows, tested)
        used = np.concatenate([real.train_indices, real.parts["validation"].rows])
        assert np.array_equal(np.sort(used), trained) and len(real.validation)
        assert folds.record(name, 2).to_dict() == real.record.to_dict()
    assert (
        "test 15 images (fold 4/4 of 'train')" in real.remarks[0] and "not used: 'test' (30 images)" in real.remarks[0]
    )
    shots = load_real_images(RealImagesRecord(str(real_images_dir), fold="4/4", fold_seed=2, num_shots=3))
    assert set(shots.train_indices) <= set(trained) and len(shots.train) == 9
    assert "60 images (split 'train') in 4 folds; not used: 'test' (30 images)" in folds.images.remarks[0]


def test_folds_stay_the_same_where_damaged_images_are_left_out(real_images_dir):
    folds = load_for_folds(RealImagesRecord(str(real_images_dir)), 4)
    kept = np.setdiff1d(np.arange(60), [5, 17])
    fewer = Folds(folds.images.select({"train": kept}), 4, folds.rows, folds.labels)
    for name in folds.names:
        for all_of, left in zip(folds.split(name, 0), fewer.split(name, 0)):
            assert np.array_equal(np.setdiff1d(all_of, [5, 17]), kept[left])


def test_a_record_without_folds_has_no_keys_for_them(real_images_dir):
    assert not {"fold", "fold_seed"} & set(RealImagesRecord(str(real_images_dir)).to_dict())


def test_too_few_held_out_images_are_one_line_with_the_smallest_class(tmp_path):
    save_image_set(tmp_path / "few", {"train": 20, "validation": 6, "test": 4}, CLASS_NAMES)
    line = describe_small_parts(load_real_images(RealImagesRecord(str(tmp_path / "few"))))
    assert line.startswith("Warning: the test part has 4 images of its smallest class, too few")
    assert "compare_transfer.py --num_folds" in line and "validation" not in line
    save_image_set(tmp_path / "more", {"train": 20, "validation": 5, "test": 5}, CLASS_NAMES)
    assert describe_small_parts(load_real_images(RealImagesRecord(str(tmp_path / "more")))) is None
