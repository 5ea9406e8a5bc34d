"""Metrics of a classifier, and LEEP, a score of how well a model's outputs predict new labels."""

import numpy as np
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, top_k_accuracy_score


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return accuracy, top-5 (above 5 classes), mean per-class accuracy and macro F1, in [0, 1].

    `logits` is `(n, classes)` float, `labels` `(n,)` int.
    """
    predictions = logits.argmax(1)
    metrics = {
        "accuracy": accuracy_score(labels, predictions),
        "mean_per_class_accuracy": balanced_accuracy_score(labels, predictions),
        "macro_f1": f1_score(labels, predictions, average="macro", labels=np.unique(labels)),
    }
    if logits.shape[1] > 5:
        metrics["top5_accuracy"] = top_k_accuracy_score(labels, logits, k=5, labels=np.arange(logits.shape[1]))
    return {name: float(value) for name, value in metrics.items()}


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
