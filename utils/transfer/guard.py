"""The guard of replay: measure what synthetic images add to the real ones before anything is trained on either.

A probe of the pretrained features is fitted on real images alone, and on real and synthetic images together, with the
synthetic ones weighted as in replay. Both are tested by cross-validation on real images that they have not seen. The
cost is extracting features of some images; it does not depend on what is trained later.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from sklearn.metrics import recall_score

from utils.data.splits import balanced_indices
from utils.transfer.classifiers import load_classifier
from utils.transfer.image_format import EvalImages
from utils.transfer.methods import StagePlan, percent, with_fresh_head
from utils.transfer.probe import build_probe, can_probe, cross_validated_predictions, extract_features
from utils.transfer.replay import ReplayedImages

logger = logging.getLogger(__name__)

# the gain of the probe's accuracy at which synthetic images get the whole share that replay plans
WHOLE_GAIN = 0.06
# limits on the images that are measured: per class, and in total for each kind
MAX_REAL_PER_CLASS, MAX_SYNTHETIC_PER_CLASS, MAX_IMAGES = 50, 100, 5_000


@dataclass(frozen=True)
class Usefulness:
    """Accuracies of probes on `num_images` real training images, means over `num_classes` classes in [0, 1].

    The probes are fitted on synthetic images alone (`synthetic_accuracy`), on other real images (`probe_accuracy`), or
    on both (`joint_accuracy`). The last two are None if half of the classes have one image, so that there are no other
    images to fit a probe on.
    """

    num_images: int
    num_classes: int
    synthetic_accuracy: float
    probe_accuracy: float | None = None
    joint_accuracy: float | None = None

    @property
    def is_guessing(self) -> bool:
        return self.num_classes > 1 and self.synthetic_accuracy <= 1 / self.num_classes

    @property
    def weight(self) -> float:
        """The weight of synthetic images, in [0, 1]: a factor on the planned odds of synthetic to real images."""
        if self.is_guessing:
            return 0.0
        if self.probe_accuracy is None:
            return 1.0
        return round(float(np.clip((self.joint_accuracy - self.probe_accuracy) / WHOLE_GAIN, 0.0, 1.0)), 4)

    def results(self, planned: float, guarded: float) -> dict:
        """Return the entries for the results, with the share that was planned and the one that was used.

        `finding` describes all of it in words.
        """
        shares = {"planned_share": planned, "synthetic_share": guarded}
        return asdict(self) | shares | {"finding": f"{self._describe()}: {self._conclude(planned, guarded)}."}

    def _describe(self) -> str:
        images = f"{self.num_images} of your images ({self.num_classes} classes)"
        alone = percent(self.synthetic_accuracy)
        if self.probe_accuracy is None:
            return (
                f"A linear probe of the pretrained features, fitted on synthetic images, is right on {alone} of "
                f"{images}; with one real image per class no other probe can be tested"
            )
        added = 100 * (self.joint_accuracy - self.probe_accuracy)
        return (
            f"A linear probe of the pretrained features, tested on {images}, is right on "
            f"{percent(self.probe_accuracy)} if fitted on other real images, {alone} on synthetic images alone, and "
            f"{percent(self.joint_accuracy)} on both ({added:+.1f} points)"
        )

    def _conclude(self, planned: float, guarded: float) -> str:
        if self.is_guessing:
            return (
                "synthetic images alone are no better than guessing (do they have the right labels?), and are left out"
            )
        if guarded == 0:
            return "synthetic images are left out"
        change = f"is cut from {percent(planned)} to" if guarded < planned else "stays at"
        return f"the share of synthetic images {change} {percent(guarded)}"


def guard_stages(
    plan: Callable[[float], list[StagePlan]], images: ReplayedImages, pretrained, class_names: list[str], seed: int,
    batch_size: int = 128, num_workers: int = 0,
) -> tuple[list[StagePlan], dict]:  # fmt: skip
    """Return the stages for the measured weight of the synthetic images, and the entries for the results.

    `plan` maps a weight to the stages of `plan_stages`. A share of less than one image per batch is rounded to none.
    Without synthetic images, the first stage starts from the head of a probe if the network can have one, else from a
    fresh head.
    """
    base = load_classifier(pretrained.name, class_names, True, seed, **pretrained.hub_options)
    planned = plan(1.0)
    share, images_per_batch = planned[-1].synthetic_share, planned[-1].settings.per_device_train_batch_size
    if share * images_per_batch < 1:
        finding = "With this many real images, less than one image per batch would be synthetic: they are left out."
        stages, results = plan(0.0), {"planned_share": share, "synthetic_share": 0.0, "finding": finding}
    else:
        usefulness = measure_usefulness(base, images, share, pretrained.image_processor, batch_size, num_workers)
        stages = plan(usefulness.weight)
        if stages[-1].synthetic_share * images_per_batch < 1:
            stages = plan(0.0)
        results = usefulness.results(share, stages[-1].synthetic_share)
    if stages[0].head_init == "probe" and planned[-1].head_init == "keep":
        real = EvalImages(images.real, pretrained.image_processor)
        if not can_probe(base, torch.as_tensor(real[0]["pixel_values"]), np.array(images.real["label"])):
            stages = [with_fresh_head(stages[0]), *stages[1:]]
    if PartialState().is_main_process:
        logger.info(results["finding"])
        for flag, was, now in (
            ("average", planned[-1].average, stages[-1].average),
            ("batch_norm", planned[-1].settings.batch_norm, stages[-1].settings.batch_norm),
        ):
            if was != now:
                logger.info(f"--{flag} {was} does nothing: synthetic images were left out.")
    return stages, {"guard": results}


def measure_usefulness(
    base, images: ReplayedImages, share: float, image_processor, batch_size: int = 128, num_workers: int = 0
) -> Usefulness:
    """Return the accuracy of probes of the features of `base` on real training images; `share` is that of replay.

    Only classes with synthetic images are tested. All processes extract features, the first one fits.
    """
    synthetic = _choose_synthetic(images)
    labels = np.array(images.real["label"])
    judged = np.flatnonzero(np.isin(labels, np.unique(synthetic["label"])))
    number = min(MAX_IMAGES, MAX_REAL_PER_CLASS * len(np.unique(labels[judged])))
    real = images.real.select(judged[balanced_indices(labels[judged], number, seed=0)])
    loading = image_processor, batch_size, num_workers
    (features, labels), (others, other_labels) = (_extract(base, kind, *loading) for kind in (real, synthetic))
    found = [None]
    if PartialState().is_main_process:
        found = [_measure(features, labels, others, other_labels, share)]
    broadcast_object_list(found)  # fitted once: processes share cores, and must plan the same stages
    return found[0]


def _choose_synthetic(images: ReplayedImages) -> Dataset:
    if images.is_streamed:
        number = min(MAX_IMAGES, MAX_SYNTHETIC_PER_CLASS * len(np.unique(images.real["label"])))
        return Dataset.from_list(list(images.synthetic.take(number)), features=images.synthetic.features)
    labels = np.array(images.synthetic["label"])
    number = min(MAX_IMAGES, MAX_SYNTHETIC_PER_CLASS * len(np.unique(labels)))
    return images.synthetic.select(balanced_indices(labels, number, seed=0))


def _extract(base, images: Dataset, image_processor, batch_size: int, num_workers: int):
    return extract_features(base, EvalImages(images, image_processor), batch_size, num_workers)


def _measure(
    features: np.ndarray, labels: np.ndarray, others: np.ndarray, other_labels: np.ndarray, share: float
) -> Usefulness:
    def accuracy(predictions: np.ndarray | None) -> float | None:
        if predictions is None:
            return None
        return float(recall_score(labels, predictions, average="macro", zero_division=0, labels=np.unique(labels)))

    alone = build_probe().fit(others, other_labels).predict(features) if len(np.unique(other_labels)) > 1 else None
    extra = others, other_labels, share / (1 - share)
    return Usefulness(
        len(labels), len(np.unique(labels)), accuracy(alone) if alone is not None else 1.0,
        accuracy(cross_validated_predictions(features, labels)),
        accuracy(cross_validated_predictions(features, labels, extra)),
    )  # fmt: skip
