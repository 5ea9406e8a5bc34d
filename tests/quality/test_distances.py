"""Distances compared with values computed another way."""

import numpy as np
import pytest
import scipy.linalg
import torch

from utils.quality.distances import (
    ClassSums,
    class_shifts,
    frechet_distances,
    kernel_distances,
    list_confusions,
    matched_rows,
    nearest_class_shares,
)
from utils.quality.vectors import UnitFeatures


def gaussian(num_images, mean=0.0, seed=0, num_features=6):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num_images, num_features)) + mean).astype(np.float16)


def rows_of(raw):
    return raw, np.arange(len(raw))


def classes(shift=0.0, num_images=200, seed=0, spread=0.3):
    """Return features of three classes around the unit vectors, the last class moved towards the first by `shift`."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(3), num_images)
    means = np.eye(3)
    means[2] = (1 - shift) * means[2] + shift * means[0]
    raw = means[labels] + spread * rng.normal(size=(len(labels), 3))
    return UnitFeatures(raw.astype(np.float16), np.zeros(3, np.float32)), labels


def sums(features, labels, num_classes=3):
    return ClassSums.of(features, labels, num_classes)


def test_frechet_distance_is_that_of_the_formula_and_zero_to_itself_after_another_one():
    train, other = gaussian(300), gaussian(200, 0.5, 1)
    first, second = train.astype(float), other[:150].astype(float)
    covariances = np.cov(first.T), np.cov(second.T)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    found = frechet_distances(rows_of(train), {"other": (other, np.arange(150)), "same": rows_of(train)})
    assert found["other"] == pytest.approx(expected, rel=1e-5)
    assert found["same"] == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_the_same_every_time_and_does_not_depend_on_the_number_of_images():
    train, same = rows_of(gaussian(3000)), rows_of(gaussian(100, 0, 1))
    others = {"same": same, "again": same, "far": rows_of(gaussian(100, 1, 1))}
    found, size = kernel_distances(train, others)
    torch.manual_seed(1)
    assert (found, size) == kernel_distances(train, others)
    assert size == 50
    assert found["same"] == found["again"]
    assert abs(found["same"][0]) < found["same"][1] < found["far"][0]
    assert found["far"][0] > 10 * abs(found["same"][0])


def test_matched_rows_have_as_many_of_each_class():
    first = np.array([0] * 5 + [1] * 2 + [3])
    second = np.array([1] * 4 + [0] * 3 + [2])
    rows, others = matched_rows(first, second)
    assert np.bincount(first[rows]).tolist() == np.bincount(second[others]).tolist() == [3, 2]
    assert len(set(rows)) == len(rows)
    assert [part.tolist() for part in matched_rows(np.zeros(2, int), np.ones(2, int))] == [[], []]


def test_diversity_is_the_mean_over_all_pairs():
    features, labels = classes()
    unit = features.take(slice(None)).numpy()
    for label in range(3):
        cosines = unit[labels == label] @ unit[labels == label].T
        expected = 1 - cosines[~np.eye(len(cosines), dtype=bool)].mean()
        assert sums(features, labels).diversity[label] == pytest.approx(expected, rel=1e-4)
    assert np.isnan(sums(features, labels * 0, 2).diversity).tolist() == [False, True]


def test_shift_is_zero_for_other_images_of_the_classes_however_few():
    train = sums(*classes(num_images=500))
    squares = [np.diagonal(sums(*classes(num_images=4, seed=seed)).squared_distances(train)) for seed in range(300)]
    biased = [((sums(*classes(num_images=4, seed=seed)).means - train.means) ** 2).sum(1) for seed in range(300)]
    assert np.abs(np.mean(squares, 0)).max() < 0.15 * np.mean(biased)
    assert class_shifts(train, train) == pytest.approx([0, 0, 0])


def test_shift_is_one_for_a_class_like_the_nearest_other_and_unknown_for_a_single_class_or_image():
    train = sums(*classes(num_images=500))
    shifts = class_shifts(sums(*classes(1.0, num_images=500, seed=1)), train)
    assert shifts[2] == pytest.approx(1, abs=0.05) and shifts[:2].max() < 0.1
    assert 0.2 < class_shifts(sums(*classes(0.4, num_images=500, seed=1)), train)[2] < 0.7
    features, labels = classes(num_images=3)
    assert np.isnan(class_shifts(sums(features, labels * 0, 1), sums(features, labels * 0, 1))).all()
    one = sums(UnitFeatures(features.raw[:3], features.centre), np.arange(3))
    assert np.isnan(class_shifts(one, sums(features, labels))).all()


def test_shares_give_the_nearest_real_class_of_images():
    train, train_labels = classes(num_images=100)
    shares = nearest_class_shares(*classes(1.0, num_images=100, seed=1), sums(train, train_labels))
    assert shares.sum(1) == pytest.approx([1, 1, 1])
    assert shares[2, 0] > 0.9 and shares[0, 0] > 0.9 and shares[1, 1] > 0.9
    without = nearest_class_shares(UnitFeatures(train.raw[:1], train.centre), np.array([0]), sums(train, train_labels))
    assert np.isnan(without[1]).all()
    only_first = sums(UnitFeatures(train.raw[:1], train.centre), np.array([0]))
    assert nearest_class_shares(train, train_labels, only_first)[:, 0].tolist() == [1, 1, 1]


def test_confusions_are_those_beyond_the_real_images():
    shares = np.array([[0.5, 0.5, 0.0], [0.3, 0.6, 0.1], [0.0, 0.2, 0.8]])
    real = np.array([[0.5, 0.5, 0.0], [0.1, 0.9, 0.0], [np.nan] * 3])
    found = list_confusions(shares, real, ["car", "bus", "van"])
    assert [(entry["class"], entry["nearest"]) for entry in found] == [("van", "bus"), ("bus", "car"), ("bus", "van")]
    assert [(entry["share"], entry["real_share"]) for entry in found] == [(0.2, None), (0.3, 0.1), (0.1, 0.0)]
