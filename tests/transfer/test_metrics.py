import numpy as np
import pytest

from utils.transfer.metrics import classification_metrics, leep


def test_leep_matches_the_definition_written_as_loops():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), 12)
    labels = rng.integers(0, 3, 12)
    joint = np.zeros((3, 4))
    for theta, label in zip(probabilities, labels):
        joint[label] += theta / 12
    total = 0.0
    for theta, label in zip(probabilities, labels):
        total += np.log(sum(joint[label, z] / joint[:, z].sum() * theta[z] for z in range(4)))
    assert leep(probabilities, labels) == pytest.approx(total / 12)


def test_leep_of_a_perfect_model_is_zero():
    labels = np.array([0, 1, 2, 1])
    assert leep(np.eye(3)[labels], labels) == pytest.approx(0)


def test_metrics_of_hand_counted_predictions():
    logits = np.eye(6)[[0, 0, 1, 2]]
    metrics = classification_metrics(logits, np.array([0, 1, 1, 2]))
    assert metrics["accuracy"] == 0.75
    assert metrics["mean_per_class_accuracy"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert "top5_accuracy" in metrics
