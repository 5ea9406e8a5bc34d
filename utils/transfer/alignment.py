"""Alignment: a stage on synthetic images that makes their features similar to those of unlabelled real images.

Each synthetic image is paired with a real one without its label. Both are augmented in the same way, with Mixup within
each kind. They go through the model in one forward pass. The classification loss is on the synthetic images; a loss on
the input features of the head is added. With BatchNorm in `train` mode, both kinds share the batch statistics.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from utils.transfer.methods import Alignment
from utils.transfer.replay import REAL, SYNTHETIC, ImagePair, PairedItems, StreamedPairedItems

HIDDEN_FEATURES = 256  # of the domain classifier
STEEPNESS = 10.0  # gamma of the paper's schedule


@dataclass(frozen=True)
class AlignedImages(ImagePair):
    """The synthetic images of a stage, and the real images to align their features with."""

    alignment: Alignment

    @property
    def own(self):
        return self.synthetic

    def __len__(self) -> int:
        return 0 if self.is_streamed else len(self.synthetic)


class AlignedItems(PairedItems):
    """All training items of a stage in order: synthetic ones, each with an unlabelled real one as `real`."""

    def __getitem__(self, position: int) -> dict:
        return self.make(SYNTHETIC, position) | {"real": _unlabelled(self.make(REAL, position))}


class StreamedAlignedItems(StreamedPairedItems):
    """`AlignedItems` whose synthetic images come from a stream, without end."""

    def __iter__(self) -> Iterator[dict]:
        for position, item in enumerate(self.stream):
            yield item | {"real": _unlabelled(self.make_real(position))}


def _unlabelled(item: dict) -> dict:
    return {name: value for name, value in item.items() if name != "labels"}


class DomainClassifier(nn.Module):
    """Classify features as synthetic or real, with a reversed gradient that makes them indistinguishable.

    Its layers are linear, ReLU, linear, with `HIDDEN_FEATURES` hidden units. It learns at the head's learning rate. The
    gradient of its loss on the features is reversed and multiplied by `weight` and the paper's lambda, which grows from
    0 to 1 over the stage; the gradients of its own weights are not.

    Source: Domain-Adversarial Training of Neural Networks, Ganin et al. 2016, sections 4.2 and 5.2.2.
    """

    def __init__(self, num_features: int, weight: float, seed: int):
        super().__init__()
        self.weight = weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(num_features, HIDDEN_FEATURES), nn.ReLU(), nn.Linear(HIDDEN_FEATURES, 1)
            )

    def forward(self, synthetic: torch.Tensor, real: torch.Tensor, progress: float) -> torch.Tensor:
        """Return the mean loss on features `(batch, features)` of each kind; `progress` is in [0, 1]."""
        features = reverse_gradient(torch.cat([synthetic, real]), self.weight * reversal_factor(progress))
        is_real = torch.arange(len(features), device=features.device) >= len(synthetic)
        logits = self.layers(features).squeeze(1).float()
        return nn.functional.binary_cross_entropy_with_logits(logits, is_real.float())


def reversal_factor(progress: float) -> float:
    """Return lambda for a progress in [0, 1]: 0 at the start, then quickly close to 1."""
    return 2 / (1 + math.exp(-STEEPNESS * progress)) - 1


def reverse_gradient(features: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the same values; their gradient is multiplied by -`factor` on the way back to `features`."""
    reversed_features = features.view_as(features)
    if reversed_features.requires_grad:
        reversed_features.register_hook(lambda gradient: -factor * gradient)
    return reversed_features


class CovarianceDistance(nn.Module):
    """The distance between the covariances of both kinds of features, within a process's batch, times `weight`.

    So, like Mixup, it depends on how the images of a step are divided into batches and processes.

    Source: Deep CORAL, Sun and Saenko 2016, section 3.1.
    """

    def __init__(self, weight: float):
        super().__init__()
        self.weight = weight

    def forward(self, synthetic: torch.Tensor, real: torch.Tensor, progress: float) -> torch.Tensor:
        with torch.autocast(synthetic.device.type, enabled=False):
            return self.weight * coral_distance(synthetic.float(), real.float())


def coral_distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return ||C_1 - C_2||_F^2 / (4 d^2) for the covariances of features `(images, d)`; 0 if one has one image."""
    if min(len(first), len(second)) < 2:
        return 0.0 * (first.sum() + second.sum())
    return (first.T.cov() - second.T.cov()).square().sum() / (4 * first.shape[1] ** 2)


def build_alignment(alignment: Alignment, num_features: int, seed: int) -> DomainClassifier | CovarianceDistance:
    """Return the loss of an alignment; `seed` draws its weights if it has any."""
    if alignment.kind == "adversarial":
        return DomainClassifier(num_features, alignment.weight, seed)
    return CovarianceDistance(alignment.weight)
