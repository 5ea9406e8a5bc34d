"""Metrics of a classifier, and LEEP, a score of how well a model's outputs predict new labels."""

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from scipy.stats import bootstrap
from sklearn.metrics import accuracy_score, f1_score, recall_score

NUM_CALIBRATION_BINS = 15
MAX_DRAWS_IN_MEMORY = 1_000_000  # of the bootstrap: 8 MB


class ImageClassification(evaluate.Metric):
    """Metrics from one row an image: `predictions` and `references` are classes, `confidences` probabilities in [0, 1].

    `ranks` are the places of the true classes, 0 for the most probable. Rows hold numbers, no logits: those of 50,000
    images and 1,000 classes would take 12 s to go through Arrow, and come back as lists.
    """

    def _info(self) -> evaluate.MetricInfo:
        columns = {"predictions": "int64", "references": "int64", "confidences": "float32", "ranks": "int64"}
        return evaluate.MetricInfo(
            description="Accuracy, top-5, mean per-class accuracy, macro F1 and calibration error of a classifier.",
            citation="",
            features=Features({name: Value(dtype) for name, dtype in columns.items()}),
            format="numpy",
        )

    def _compute(self, predictions, references, confidences, ranks, num_classes: int) -> dict[str, float]:
        of_each_class = {"average": "macro", "labels": np.unique(references)}
        metrics = {
            "accuracy": accuracy_score(references, predictions),
            "mean_per_class_accuracy": recall_score(references, predictions, **of_each_class),
            "macro_f1": f1_score(references, predictions, **of_each_class),
            "expected_calibration_error": _calibration_error(confidences, predictions == references),
        }
        if num_classes > 5:
            metrics["top5_accuracy"] = np.mean(ranks < 5)
        return {name: float(value) for name, value in metrics.items()}


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return accuracy, top-5 (above 5 classes), mean per-class accuracy, macro F1 and calibration error, in [0, 1].

    `logits` is `(n, classes)` float, `labels` `(n,)` int. Means over classes are over those that `labels` has. The
    expected calibration error is the mean distance of confidence and accuracy over 15 bins of confidence.
    """
    return ImageClassification(keep_in_memory=True).compute(
        predictions=logits.argmax(1),
        references=labels,
        confidences=confidences(logits),
        ranks=_true_class_ranks(logits, labels),
        num_classes=logits.shape[1],
    )


def confidences(logits: np.ndarray) -> np.ndarray:
    """Return the probability `(n,)` in [0, 1] of the most probable class."""
    return torch.from_numpy(logits).float().softmax(1).amax(1).numpy()


def _true_class_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return how many classes come before the true one; of equal ones the first does, as in argmax."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    at_or_behind = (logits < own) | ((logits == own) & (np.arange(logits.shape[1]) >= labels[:, None]))
    return (~at_or_behind).sum(1)  # where logits are NaN, all classes do


def _calibration_error(confidences: np.ndarray, is_correct: np.ndarray) -> float:
    from torchmetrics.functional.classification import binary_calibration_error  # takes a second to import

    if not np.isfinite(confidences).all():
        return float("nan")
    # whether the most probable class is right is a question with two answers
    return float(
        binary_calibration_error(
            torch.from_numpy(confidences), torch.from_numpy(is_correct).int(), n_bins=NUM_CALIBRATION_BINS
        )
    )


def accuracy_interval(logits: np.ndarray, labels: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the accuracy, in [0, 1]: what other test images would give.

    It does not cover what another training seed or other training images would give. `logits` is `(n, classes)`,
    `labels` `(n,)` int. A single image says nothing: (0, 1).

    Source: Efron & Tibshirani 1993, section 13.3 (percentile interval).
    """
    if len(labels) < 2:
        return 0.0, 1.0
    interval = bootstrap(
        (logits.argmax(1) == labels,),
        np.mean,
        method="percentile",
        batch=max(1, MAX_DRAWS_IN_MEMORY // len(labels)),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def test_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return what `all_results.json` says of the test images: all metrics, the accuracy's interval, how many there are.

    `num_test_classes` are the classes among them, of `num_classes`.
    """
    low, high = accuracy_interval(logits, labels)
    metrics = classification_metrics(logits, labels) | {"accuracy_low": low, "accuracy_high": high}
    counts = {
        "num_test_images": len(labels), "num_test_classes": len(np.unique(labels)), "num_classes": logits.shape[1],
    }  # fmt: skip
    return {f"test_{name}": value for name, value in metrics.items()} | counts


def leep(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the log expected empirical prediction of `labels` from a model's own classes; 0 is best.

    `probabilities` is `(n, source classes)` float, rows sum to 1; `labels` `(n,)` int.

    Source: Nguyen et al. 2020 (arXiv 2002.12462), equations 1 and 2.
    """
    probabilities = probabilities.astype(np.float64)
    classes, targets = np.unique(labels, return_inverse=True)
    joint = np.eye(len(classes))[targets].T @ probabilities / len(labels)
    conditional = joint / np.maximum(joint.sum(0), np.finfo(np.float64).tiny)
    return float(np.log((probabilities @ conditional.T)[np.arange(len(labels)), targets]).mean())
