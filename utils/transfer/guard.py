"""The guard of replay: how far synthetic images help on one's own images, measured before real ones are trained on.

The model of stage 1 has seen none of the real training images, so its accuracy on them says honestly, at any number of
images, what the synthetic ones are worth. What the real ones are worth without them, a probe of the pretrained
features says, cross-validated on the same images.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
from sklearn.metrics import recall_score
from torch import nn

from utils.data.splits import balanced_indices
from utils.transfer.evaluation import classification_metrics, predict
from utils.transfer.image_format import EvalImages
from utils.transfer.methods import StagePlan, percent
from utils.transfer.probe import cross_validated_predictions, extract_features
from utils.transfer.replay import ReplayedImages

# accuracy after stage 1 over the probe's: below the first synthetic images have no share, from the second on all
USELESS, USEFUL = 2 / 3, 1.0
MAX_IMAGES_PER_CLASS = 50  # on these the accuracies are measured, of at most so many images in all:
MAX_IMAGES = 10_000


@dataclass(frozen=True)
class Usefulness:
    """Accuracies, means over `num_classes` classes in [0, 1], on `num_images` real training images.

    `synthetic_accuracy` is that of the network after `num_steps` on synthetic images alone, `probe_accuracy` that of a
    probe; None where half of the classes have one image, so that nothing is left to test a probe on.
    """

    num_images: int
    num_classes: int
    num_steps: int
    synthetic_accuracy: float
    probe_accuracy: float | None = None

    @property
    def is_guessing(self) -> bool:
        return self.num_classes > 1 and self.synthetic_accuracy <= 1 / self.num_classes

    @property
    def weight(self) -> float:
        """What the synthetic images count, in [0, 1]: replayed images do so with it times the odds of their share."""
        if self.is_guessing:
            return 0.0
        if self.probe_accuracy is None:
            return 1.0
        ratio = self.synthetic_accuracy / max(self.probe_accuracy, 1 / self.num_images)
        return round(float(np.clip((ratio - USELESS) / (USEFUL - USELESS), 0.0, 1.0)), 4)

    def guard(self, stage: StagePlan) -> StagePlan:
        """Return a stage with the share that the synthetic images earn.

        Where that is none, it begins as if there had been no synthetic images.
        """
        share = stage.synthetic_share
        guarded = self.weight * share / (self.weight * share + 1 - share)
        start = stage if guarded > 0 or stage.without_synthetic is None else stage.without_synthetic
        return replace(start, synthetic_share=guarded)

    def results(self, planned: float, guarded: float) -> dict:
        """Return what results say of it, and of a stage that it guarded: its share planned, and the one that was given.

        `finding` is all of it in words.
        """
        shares = {"planned_share": planned, "synthetic_share": guarded}
        return asdict(self) | shares | {"finding": f"{self._describe()}: {self._conclude(planned, guarded)}."}

    def _describe(self) -> str:
        measured = (
            f"After {self.num_steps} steps on synthetic images alone, the network is right on "
            f"{percent(self.synthetic_accuracy)} of {self.num_images} of your images"
        )
        if self.probe_accuracy is None:
            return f"{measured}; with one real image per class, no probe can be tested"
        return f"{measured}, a probe fitted on real ones on {percent(self.probe_accuracy)}"

    def _conclude(self, planned: float, guarded: float) -> str:
        if guarded == 0:
            left_out = "synthetic images are left out, with what was learned from them, and these steps are lost"
            doubt = "no better than guessing (do the synthetic images have the right labels?), so "
            return f"{doubt if self.is_guessing else ''}{left_out}"
        change = f"is cut from {percent(planned)} to" if guarded < planned else "stays"
        return f"the synthetic share of each batch {change} {percent(guarded)}"


def measure_usefulness(
    bridged: nn.Module, num_steps: int, pretrained: nn.Module, images: ReplayedImages, image_processor,
    batch_size: int = 128, num_workers: int = 0,
) -> Usefulness:  # fmt: skip
    """Return how right the model of stage 1, of `num_steps`, is on real training images, and a probe of the features.

    The probe is of the features of `pretrained`, and is cross-validated. Both are measured on the same images: those of
    classes that have synthetic images (of a stream, all), at most `MAX_IMAGES_PER_CLASS` of each.
    """
    labels = np.array(images.real["label"])
    judged = np.arange(len(labels))
    if not images.is_streamed:
        judged = np.flatnonzero(np.isin(labels, np.unique(images.synthetic["label"])))
    number = min(MAX_IMAGES, MAX_IMAGES_PER_CLASS * len(np.unique(labels[judged])))
    real = images.real.select(judged[balanced_indices(labels[judged], number, seed=0)])
    eval_images = EvalImages(real, image_processor)
    logits, labels = predict(bridged, eval_images, batch_size, num_workers)
    features, _ = extract_features(pretrained, eval_images, batch_size, num_workers)
    predictions, num_classes = cross_validated_predictions(features, labels), len(np.unique(labels))
    accuracy = classification_metrics(logits, labels)["mean_per_class_accuracy"]
    probe_accuracy = (
        None if predictions is None else recall_score(labels, predictions, average="macro", zero_division=0)
    )
    return Usefulness(len(real), num_classes, num_steps, accuracy, probe_accuracy)
