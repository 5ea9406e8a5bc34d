"""Weights of classes in the loss: rare classes count as much as common ones."""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from sklearn.utils.class_weight import compute_class_weight

from utils.transfer.replay import ImagePair, ReplayedImages


def balanced_weights(labels: Sequence[int], num_classes: int, shares: Sequence[float] | None = None) -> torch.Tensor:
    """Return `(classes,)` float32: the weight of each class is 1 / (number of classes * its share of the images).

    The mean weight of the images is 1. `shares` are the weights of the images themselves, which need not sum to 1. A
    class without images has weight 1: no image has its label, only label smoothing gives it a part of one.

    Source: scikit-learn, `compute_class_weight`, after King and Zeng 2001.
    """
    labels, weights = np.asarray(labels, int), np.ones(num_classes)
    present = np.unique(labels)
    weights[present] = compute_class_weight("balanced", classes=present, y=labels, sample_weight=shares)
    return torch.from_numpy(weights).float()


def stage_weights(images: Dataset | IterableDataset | ImagePair, num_classes: int) -> torch.Tensor | None:
    """Return the balanced weights of a stage by the images whose labels it learns, in the shares that it sees.

    So every stage minimises the mean of the classes' losses, whichever images it is on: a stage on real images undoes
    their long tail, and one on a synthetic set with more images of rare classes learns all classes equally. With
    replay, real and synthetic images count by their shares of a batch. The labels of a stream are not known: it counts
    as equally many images of each class, so a stage on one alone has no weights, and None is returned.
    """
    own = images.own if isinstance(images, ImagePair) else images
    if isinstance(own, IterableDataset):
        return None
    labels, shares = np.asarray(own["label"], int), None
    if isinstance(images, ReplayedImages) and images.share > 0:
        replayed = np.arange(num_classes) if images.is_streamed else np.asarray(images.synthetic["label"], int)
        parts = [(labels, 1 - images.share), (replayed, images.share)]
        shares = np.concatenate([np.full(len(part), share / len(part)) for part, share in parts])
        labels = np.concatenate([labels, replayed])
    return balanced_weights(labels, num_classes, shares)
