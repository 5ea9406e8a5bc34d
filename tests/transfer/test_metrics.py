import random
import socket
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate.config import HF_METRICS_CACHE
from scipy.stats import binom
from sklearn.metrics import top_k_accuracy_score
from torchmetrics.functional.classification import multiclass_calibration_error

from utils.transfer import metrics
from utils.transfer.arguments import METRICS
from utils.transfer.metrics import accuracy_interval, classification_metrics, leep


def random_predictions(num_images: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return logits of a classifier that is right about half of the time, and labels; the last class is in none."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes - 1, num_images)
    logits = rng.normal(size=(num_images, num_classes)).astype(np.float32)
    logits[np.arange(num_images), labels] += 2
    logits *= rng.uniform(0.2, 6, (num_images, 1))  # some too sure of themselves, others not enough
    return logits, labels


def predictions_with(num_right: int, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(num_images) % 3
    return np.eye(3)[np.where(np.arange(num_images) < num_right, labels, (labels + 1) % 3)], labels


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
    found = classification_metrics(logits, np.array([0, 1, 1, 2]))
    assert found["accuracy"] == 0.75
    assert found["mean_per_class_accuracy"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert found["top5_accuracy"] == 1
    confidence = np.e / (np.e + 5)
    assert found["expected_calibration_error"] == pytest.approx(0.75 - confidence)
    assert "top5_accuracy" not in classification_metrics(np.eye(5), np.arange(5))


def test_metrics_equal_those_computed_another_way():
    logits, labels = random_predictions(500, 12)
    found = classification_metrics(logits, labels)
    predictions = logits.argmax(1)
    recalls, f1_scores = [], []
    for label in range(11):
        num_both = ((predictions == label) & (labels == label)).sum()
        recalls.append(num_both / (labels == label).sum())
        f1_scores.append(2 * num_both / ((predictions == label).sum() + (labels == label).sum()))
    probabilities = torch.from_numpy(logits).softmax(1)
    calibration_error = multiclass_calibration_error(probabilities, torch.from_numpy(labels), 12, n_bins=15)
    assert found == pytest.approx(
        {
            "accuracy": (predictions == labels).mean(),
            "mean_per_class_accuracy": np.mean(recalls),
            "macro_f1": np.mean(f1_scores),
            "top5_accuracy": top_k_accuracy_score(labels, logits, k=5, labels=np.arange(12)),
            "expected_calibration_error": calibration_error.item(),
        }
    )
    assert 0.3 < found["accuracy"] < found["top5_accuracy"] < 1


def test_a_model_that_tells_no_class_from_another_is_right_by_chance():
    found = classification_metrics(np.zeros((20, 10), np.float32), np.arange(20) % 10)
    assert (found["accuracy"], found["top5_accuracy"]) == (0.1, 0.5)
    assert found["expected_calibration_error"] == pytest.approx(0, abs=1e-6)


def test_logits_that_are_no_numbers_are_wrong_answers():
    logits, labels = np.eye(6)[[1, 2, 3, 4]], np.array([1, 2, 3, 4])
    logits[:2] = np.nan
    found = classification_metrics(logits, labels)
    assert (found["accuracy"], found["top5_accuracy"]) == (0.5, 0.5)
    assert np.isnan(found["expected_calibration_error"])


def test_metrics_need_no_network_write_nothing_and_leave_random_numbers_alone(monkeypatch, capfd, recwarn):
    def fail(*_, **__):
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket, "socket", fail)
    monkeypatch.setattr(socket, "create_connection", fail)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate()
    logits, labels = random_predictions(40, 12)
    metrics.test_metrics(logits, labels)
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate()) == before
    assert capfd.readouterr() == ("", "")
    assert not list(Path(HF_METRICS_CACHE).rglob("*.*"))  # not even a lock
    assert not [str(warning.message) for warning in recwarn if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize(("num_right", "num_images"), [(80, 100), (900, 1500), (3, 40)])
def test_the_accuracy_interval_is_that_of_the_binomial_distribution(num_right, num_images):
    """A resample of n images has a binomial number of right ones."""
    found = accuracy_interval(*predictions_with(num_right, num_images))
    expected = binom.ppf([0.025, 0.975], num_images, num_right / num_images) / num_images
    assert found == pytest.approx(expected, abs=1.01 / num_images)
    assert found[0] < num_right / num_images < found[1]


def test_the_accuracy_interval_depends_on_its_seed_alone():
    predictions = predictions_with(7000, 10_000)
    first = accuracy_interval(*predictions)
    np.random.seed(1)
    assert accuracy_interval(*predictions) == first == accuracy_interval(*predictions, seed=0)
    assert accuracy_interval(*predictions, seed=1) != first


def test_the_accuracy_interval_without_a_spread():
    assert accuracy_interval(*predictions_with(1, 1)) == (0, 1)
    assert accuracy_interval(*predictions_with(30, 30)) == (1, 1)


def test_the_accuracy_interval_takes_little_memory():
    predictions = predictions_with(4000, 5000)
    tracemalloc.start()
    accuracy_interval(*predictions)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6  # all resamples at once are 9,999 x 5,000 numbers


def test_results_on_the_test_images_have_the_interval_and_the_number_of_images():
    logits, labels = predictions_with(80, 100)
    low, high = accuracy_interval(logits, labels)
    found = metrics.test_metrics(logits, labels)
    assert (found["test_accuracy"], found["test_accuracy_low"], found["test_accuracy_high"]) == (0.8, low, high)
    assert found["num_test_images"] == 100
    assert {f"test_{name}" for name in classification_metrics(logits, labels)} < set(found)


@pytest.mark.parametrize("num_classes", [3, 6])
def test_the_metrics_that_a_flag_may_name_are_those_that_are_measured(num_classes):
    measured = classification_metrics(np.eye(num_classes), np.arange(num_classes))
    known = set(METRICS) - {"loss"}  # which the Trainer adds
    assert set(measured) == (known if num_classes > 5 else known - {"top5_accuracy"})
