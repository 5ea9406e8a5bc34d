"""Alignment: a stage on synthetic images that makes their features, and those of unlabelled real ones, alike.

Each synthetic image comes with a real one, whose label is left out. Both are augmented alike, also by Mixup, each kind
within itself. They go through the model in one forward pass; the classes' loss is that of the synthetic images, and a
loss on the features that enter the head is added to it. With BatchNorm in `train` mode, both kinds share the statistics
of the batch.
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
    """The synthetic images of a stage, and the real ones to whose features it aligns theirs."""

    alignment: Alignment

    @property
    def own(self):
        return self.synthetic

    def __len__(self) -> int:
        return 0 if self.is_streamed else len(self.synthetic)


class AlignedItems(PairedItems):
    """All training items of a stage, in their order: synthetic ones, each with a real one as `real`, without label."""

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
    """Tell features of synthetic images from those of real ones, and pull the features to where it cannot.

    Its layers are linear, ReLU, linear, with `HIDDEN_FEATURES` between them. It learns at the head's learning rate.
    What its loss sends back to the features is reversed, times `weight` and the paper's lambda, which grows from 0 to
    1 with the stage's steps; its own gradients are not weighted.

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
    """Return lambda after a part of the steps in [0, 1]: 0 at first, then quickly near 1."""
    return 2 / (1 + math.exp(-STEEPNESS * progress)) - 1


def reverse_gradient(features: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the same values, whose gradient reaches `features` times -`factor`."""
    reversed_features = features.view_as(features)
    if reversed_features.requires_grad:
        reversed_features.register_hook(lambda gradient: -factor * gradient)
    return reversed_features


class CovarianceDistance(nn.Module):
    """The distance of the covariances of both kinds of features, of the batch of one process, times `weight`.

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
    """Return ||C_1 - C_2||_F^2 / (4 d^2) of the covariances of features `(images, d)`; 0 where one is of one image."""
    if min(len(first), len(second)) < 2:
        return 0.0 * (first.sum() + second.sum())
    return (first.T.cov() - second.T.cov()).square().sum() / (4 * first.shape[1] ** 2)


def build_alignment(alignment: Alignment, num_features: int, seed: int) -> DomainClassifier | CovarianceDistance:
    """Return the loss of an alignment; `seed` draws its weights, where it has some."""
    if alignment.kind == "adversarial":
        return DomainClassifier(num_features, alignment.weight, seed)
    return CovarianceDistance(alignment.weight)
