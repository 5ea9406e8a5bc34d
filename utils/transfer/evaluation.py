"""Predictions of a classifier, divided over the processes; its metrics on test images; LEEP on training images."""

import math

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from scipy.stats import bootstrap
from sklearn.metrics import accuracy_score, f1_score, recall_score
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import AutoConfig

from utils.cli.errors import UserError
from utils.transfer.classifiers import load_pretrained

NUM_CALIBRATION_BINS = 15
MAX_DRAWS_IN_MEMORY = 1_000_000  # of the bootstrap: 8 MB
ROWS_AT_A_TIME = 8192  # of logits: 33 MB of a thousand classes


def predict(model: nn.Module, images, batch_size: int = 128, num_workers: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return logits `(n, classes)` float32 and labels `(n,)` of `EvalImages` (or a list of its items), in their order.

    The processes divide the images, each image is evaluated once, and every process returns all results.
    `num_workers` decode images for each process. The model is left in eval mode, on its device.

    Raises:
        UserError: a logit is not finite.
    """
    (logits,), labels = _predict_with_each([model], images, batch_size, num_workers)
    return logits, labels


def _predict_with_each(
    models: list[nn.Module], images, batch_size: int, num_workers: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the logits of each model, and the labels; an image is decoded once for all of them."""
    state = PartialState()
    for model in models:
        model.eval().to(state.device, memory_format=torch.channels_last)
    own = Subset(images, range(state.process_index, len(images), state.num_processes))
    num_rows = math.ceil(len(images) / state.num_processes)  # the last row may be unused
    all_logits = [torch.empty(num_rows, model.config.num_labels) for model in models]  # on the CPU
    labels = torch.empty(num_rows, dtype=torch.int64)
    with torch.inference_mode():
        for number, batch in enumerate(DataLoader(own, batch_size, num_workers=num_workers)):
            rows = slice(number * batch_size, number * batch_size + len(batch["labels"]))
            labels[rows] = batch["labels"]
            for model, logits in zip(models, all_logits):
                pixel_values = batch["pixel_values"].to(state.device, model.dtype, memory_format=torch.channels_last)
                logits[rows] = model(pixel_values=pixel_values).logits
    *all_logits, labels = (_gather_in_turn(own_rows, len(images)) for own_rows in (*all_logits, labels))
    for model, logits in zip(models, all_logits):
        if not np.isfinite(logits).all():
            raise UserError(
                f"{model.config.name_or_path}: the classifier's outputs are not finite; its weights, or mean and "
                "std of its image processor, are damaged."
            )
    return all_logits, labels


def _gather_in_turn(own_rows: torch.Tensor, num_rows: int) -> np.ndarray:
    """Return the `num_rows` rows of all processes; process p holds the rows p, p + num_processes, ..."""
    state = PartialState()
    parts = [gather(part.to(state.device)).cpu() for part in own_rows.split(ROWS_AT_A_TIME)]
    by_process = torch.cat([part.unflatten(0, (state.num_processes, -1)) for part in parts], dim=1)
    return by_process.transpose(0, 1).flatten(0, 1)[:num_rows].numpy()  # unused rows are at the end


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return accuracy, top-5 (above 5 classes), mean per-class accuracy, macro F1 and calibration error, in [0, 1].

    `logits` is `(n, classes)` float, `labels` `(n,)` int. Means over classes are over the classes in `labels`. The
    expected calibration error is the mean distance between confidence and accuracy over 15 bins of confidence.
    """
    predictions = logits.argmax(1)
    of_each_class = {"average": "macro", "labels": np.unique(labels)}
    metrics = {
        "accuracy": accuracy_score(labels, predictions),
        "mean_per_class_accuracy": recall_score(labels, predictions, **of_each_class),
        "macro_f1": f1_score(labels, predictions, **of_each_class),
        "expected_calibration_error": _calibration_error(confidences(logits), predictions == labels),
    }
    if logits.shape[1] > 5:
        metrics["top5_accuracy"] = np.mean(_true_class_ranks(logits, labels) < 5)
    return {name: float(value) for name, value in metrics.items()}


def confidences(logits: np.ndarray) -> np.ndarray:
    """Return the probability `(n,)` in [0, 1] of the most probable class."""
    return torch.from_numpy(logits).float().softmax(1).amax(1).numpy()


def _true_class_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return how many classes rank above the true one; of equal logits the first ranks higher, as in argmax."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    at_or_behind = (logits < own) | ((logits == own) & (np.arange(logits.shape[1]) >= labels[:, None]))
    return (~at_or_behind).sum(1)  # with NaN logits, all classes rank above


def _calibration_error(confidences: np.ndarray, is_correct: np.ndarray) -> float:
    from torchmetrics.functional.classification import binary_calibration_error  # takes a second to import

    if not np.isfinite(confidences).all():
        return float("nan")
    # binary: the most probable class is right or wrong
    return float(
        binary_calibration_error(
            torch.from_numpy(confidences), torch.from_numpy(is_correct).int(), n_bins=NUM_CALIBRATION_BINS
        )
    )


def accuracy_interval(logits: np.ndarray, labels: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the accuracy over draws of the test images, in [0, 1].

    It does not cover other training seeds or training images. `logits` is `(n, classes)`, `labels` `(n,)` int. For a
    single image it is (0, 1).

    Source: Efron & Tibshirani 1993, section 13.3 (percentile interval).
    """
    if len(labels) < 2:
        return 0.0, 1.0
    interval = bootstrap(
        (logits.argmax(1) == labels,), np.mean, method="percentile", rng=np.random.default_rng(seed),
        batch=max(1, MAX_DRAWS_IN_MEMORY // len(labels)),
    ).confidence_interval  # fmt: skip
    return float(interval.low), float(interval.high)


def test_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the entries of `all_results.json` on the test images: metrics, the accuracy's interval, counts.

    `num_test_classes` of the `num_classes` classes have test images.
    """
    low, high = accuracy_interval(logits, labels)
    metrics = classification_metrics(logits, labels) | {"accuracy_low": low, "accuracy_high": high}
    counts = {
        "num_test_images": len(labels), "num_test_classes": len(np.unique(labels)), "num_classes": logits.shape[1],
    }  # fmt: skip
    return {f"test_{name}": value for name, value in metrics.items()} | counts


def leep_results(
    pretrained: str, bridged: nn.Module | None, images, batch_size: int = 128, num_workers: int = 0, **hub_options
) -> dict[str, float | int | None]:
    """Return the LEEP entries of `all_results.json`: how well a model's own classes predict the labels of `images`.

    `leep_pretrained` is the checkpoint's score, None for a backbone without a head. `leep_bridged` is the score of
    `bridged`, the checkpoint after training on synthetic images; None if there is none. With fewer images
    (`leep_num_images`) than the checkpoint has classes (`leep_num_source_classes`), its score is too good to compare.
    Images are decoded once for both models, as in `predict`. Memory is that of the logits: 2.4 GB for 600,000 images
    and a thousand classes.

    Raises:
        UserError: the checkpoint does not fit an image classifier; a logit is not finite.
    """
    models = {"pretrained": load_pretrained(pretrained, **hub_options), "bridged": bridged}
    models = {name: model for name, model in models.items() if model is not None}
    images_to_read = images if models else []
    all_logits, labels = _predict_with_each(list(models.values()), images_to_read, batch_size, num_workers)
    for logits in all_logits:  # turned into probabilities in place
        for rows in torch.from_numpy(logits).split(ROWS_AT_A_TIME):
            rows.copy_(rows.softmax(1))
    scores = {f"leep_{name}": leep(probabilities, labels) for name, probabilities in zip(models, all_logits)}
    num_source_classes = AutoConfig.from_pretrained(pretrained, **hub_options).num_labels  # 0 of timm's backbones
    counts = {"leep_num_images": len(images), "leep_num_source_classes": num_source_classes}
    return {"leep_pretrained": None, "leep_bridged": None} | scores | counts


def leep(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the log expected empirical prediction of `labels` from a model's own classes; 0 is best.

    `probabilities` is `(n, source classes)` float, rows sum to 1; `labels` `(n,)` int.

    Source: Nguyen et al. 2020 (arXiv 2002.12462), equations 1 and 2.
    """
    classes, targets = np.unique(labels, return_inverse=True)
    joint = np.zeros((len(classes), probabilities.shape[1]))
    parts = [slice(start, start + ROWS_AT_A_TIME) for start in range(0, len(labels), ROWS_AT_A_TIME)]
    for rows in parts:
        joint += np.eye(len(classes))[targets[rows]].T @ probabilities[rows].astype(np.float64)
    joint /= len(labels)
    conditional = joint / np.maximum(joint.sum(0), np.finfo(np.float64).tiny)
    predicted = []
    for rows in parts:
        of_all_classes = probabilities[rows].astype(np.float64) @ conditional.T
        predicted.append(np.take_along_axis(of_all_classes, targets[rows, None], axis=1))
    return float(np.log(np.concatenate(predicted)).mean())
