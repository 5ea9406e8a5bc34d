"""The guard of replay: how far synthetic images help on one's own images, measured before real ones are trained on.

The model of stage 1 has seen none of the real training images, so its accuracy on them says honestly, at any number of
images, what the synthetic ones are worth. What the real ones are worth without them, a probe of the pretrained
features says, cross-validated on the same images.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
from datasets import Dataset
from torch import nn

from utils.data.splits import balanced_indices
from utils.transfer.evaluation import predict
from utils.transfer.image_format import EvalImages
from utils.transfer.methods import StagePlan, percent
from utils.transfer.probe import cross_validated_hits, extract_features

# accuracy after stage 1 over the probe's: below the first synthetic images have no share, from the second on all
USELESS, USEFUL = 2 / 3, 1.0
MAX_IMAGES_PER_CLASS = 50  # on these the accuracies are measured, of at most so many images in all:
MAX_IMAGES = 10_000


@dataclass(frozen=True)
class Usefulness:
    """Accuracies in [0, 1] on `num_images` real training images, one of them after `num_steps` on synthetic images.

    `probe_accuracy` is None where half of the classes have one image, so that nothing is left to test a probe on.
    """

    num_images: int
    num_steps: int
    synthetic_accuracy: float
    probe_accuracy: float | None = None

    @property
    def weight(self) -> float:
        """What the synthetic images count, in [0, 1]: replayed images do so with it times the odds of their share."""
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

    def results(self, planned: float, guarded: float) -> dict[str, float | int | str | None]:
        """Return what results say of it, and of a stage that it guarded: its share planned, and the one that was given.

        `guard_finding` is all of it in a sentence.
        """
        finding = (
            f"{self.num_steps} steps on synthetic images alone give {percent(self.synthetic_accuracy)} on "
            f"{self.num_images} of your images"
        )
        if self.probe_accuracy is None:
            finding += f"; with one of a class there is nothing to compare with: their share stays {percent(planned)}."
        else:
            finding += f", a probe of real ones {percent(self.probe_accuracy)}: "
            if guarded == 0:
                finding += "they are left out, and their stage with them."
            else:
                is_cut = guarded < planned
                finding += (
                    f"their share {f'is cut from {percent(planned)} to' if is_cut else 'stays'} {percent(guarded)}."
                )
        measured = {f"guard_{name}": value for name, value in asdict(self).items()}
        return measured | {
            "guard_planned_share": planned, "guard_synthetic_share": guarded, "guard_finding": finding,
        }  # fmt: skip


def measure_usefulness(
    bridged: nn.Module, num_steps: int, pretrained: nn.Module, real: Dataset, image_processor, batch_size: int = 128,
    num_workers: int = 0,
) -> Usefulness:  # fmt: skip
    """Return how right the model of stage 1, of `num_steps`, is on real training images, and a probe of the features.

    The probe is of the features of `pretrained`, and is cross-validated. Both are measured on the same images, at most
    `MAX_IMAGES_PER_CLASS` of each class.
    """
    labels = np.array(real["label"])
    number = min(MAX_IMAGES, MAX_IMAGES_PER_CLASS * len(np.unique(labels)))
    images = EvalImages(real.select(balanced_indices(labels, number, seed=0)), image_processor)
    logits, labels = predict(bridged, images, batch_size, num_workers)
    features, _ = extract_features(pretrained, images, batch_size, num_workers)
    hits = cross_validated_hits(features, labels)
    accuracy = float((logits.argmax(1) == labels).mean())
    return Usefulness(len(images), num_steps, accuracy, None if hits is None else float(hits.mean()))
