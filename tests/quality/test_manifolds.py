"""Precision and recall of features."""

import numpy as np
import pytest

from utils.quality.manifolds import precision_and_recall


def cloud(num_images, mean=0.0, seed=0):
    return np.random.default_rng(seed).normal(size=(num_images, 2)) + mean


def by_hand(real, synthetic, num_neighbours):
    """The definition, one pair at a time."""

    def share_among(points, others):
        radii = [sorted(np.linalg.norm(others - other, axis=1))[num_neighbours] for other in others]
        among = [
            any(np.linalg.norm(point - other) <= radius for other, radius in zip(others, radii)) for point in points
        ]
        return np.mean(among)

    return share_among(synthetic, real), share_among(real, synthetic)


@pytest.mark.parametrize("num_neighbours", [1, 3])
def test_precision_and_recall_match_their_definition(num_neighbours):
    real, synthetic = cloud(30), cloud(20, mean=3.0, seed=1)
    found = precision_and_recall(real, synthetic, num_neighbours)
    assert found == pytest.approx(by_hand(real, synthetic, num_neighbours))
    assert 0 < found[0] < 1 and 0 < found[1] < 1


def test_the_same_images_are_all_among_the_others_and_far_ones_are_not():
    real = cloud(20).astype(np.float16)
    assert precision_and_recall(real, real) == (1.0, 1.0)
    assert precision_and_recall(real, real + np.float16(50)) == (0.0, 0.0)


def test_similar_images_can_have_high_precision_but_low_recall():
    real = cloud(200)
    precision, recall = precision_and_recall(real, 0.05 * cloud(200, seed=1))
    assert precision > 0.95 and recall < 0.2
