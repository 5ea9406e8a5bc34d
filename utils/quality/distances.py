"""Distances of two image sets in the features of a model, as a whole and per class."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from utils.data.splits import evenly_spaced
from utils.quality.vectors import UnitFeatures

CHUNK = 4096
MAX_KERNEL_IMAGES = 5000  # the kernel distance keeps its features in memory, and more hardly change it
KERNEL_SUBSETS = 50
MAX_SUBSET_SIZE = 1000
MAX_CONFUSIONS = 10

Rows = tuple[np.ndarray, np.ndarray]  # features `(n, num_features)`, and the selected rows


def matched_rows(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted rows of two sets, drawn at random, with the same number of images per class; labels are `(n,)` int.

    Distances depend on the number of images and on class frequencies: only such subsets are comparable.
    """
    rng = np.random.default_rng(0)
    chosen = [np.zeros((2, 0), int)]
    for label in np.intersect1d(first, second):
        classes = [np.flatnonzero(labels == label) for labels in (first, second)]
        size = min(map(len, classes))
        chosen.append(np.array([rng.permutation(rows)[:size] for rows in classes]))
    return tuple(np.sort(np.hstack(chosen)))


def frechet_distances(train: Rows, others: dict[str, Rows]) -> dict[str, float]:
    """Return name -> Frechet distance between training images and others; each needs two or more images.

    Only sums are kept in memory.
    """
    features = torch.nn.Identity()  # they are already computed
    features.num_features = train[0].shape[1]
    metric = FrechetInceptionDistance(features, reset_real_features=False, normalize=True)
    metric.set_dtype(torch.float64)

    def update(raw: np.ndarray, rows: np.ndarray, real: bool) -> None:
        for start in range(0, len(rows), CHUNK):
            metric.update(torch.from_numpy(np.asarray(raw[rows[start : start + CHUNK]], np.float64)), real=real)

    update(*train, real=True)
    distances = {}
    for name, other in others.items():
        metric.reset()
        update(*other, real=False)
        distances[name] = max(0.0, metric.compute().item())  # below 0 only by rounding
    return distances


def kernel_distances(train: Rows, others: dict[str, Rows]) -> tuple[dict[str, tuple[float, float]], int]:
    """Return name -> kernel distance (mean and standard deviation over subsets), and the size of the subsets.

    Arguments are those of `frechet_distances`. The distance is unbiased: it does not depend on the number of images,
    and can be slightly below 0. Of large sets, it uses `MAX_KERNEL_IMAGES`, evenly spaced.
    """
    smallest = min(len(rows) for _, rows in (train, *others.values()))
    subset_size = max(2, min(MAX_SUBSET_SIZE, smallest // 2))  # halves, as subsets of all images would be equal
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning about memory
        metric = KernelInceptionDistance(
            torch.nn.Identity(), KERNEL_SUBSETS, subset_size, reset_real_features=False, normalize=True
        )

    def select(raw: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        chosen = rows[evenly_spaced(len(rows), MAX_KERNEL_IMAGES)]
        return torch.from_numpy(np.asarray(raw[chosen], np.float32))

    metric.update(select(*train), real=True)
    distances = {}
    with torch.random.fork_rng(devices=[]):
        for name, other in others.items():
            torch.manual_seed(0)  # subsets are drawn with the global generator
            metric.reset()
            metric.update(select(*other), real=False)
            mean, deviation = metric.compute()
            distances[name] = mean.item(), deviation.item()
    return distances, subset_size


@dataclass(frozen=True)
class ClassSums:
    """The sums `(classes, num_features)` and counts `(classes,)` of features of length 1.

    Class means, their distances and the classes' diversity need nothing else, for any number of images.
    """

    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, features: UnitFeatures, labels: np.ndarray, num_classes: int) -> "ClassSums":
        sums = torch.zeros(num_classes, features.raw.shape[1], dtype=torch.float64)
        for start, chunk in features.chunks(CHUNK):
            sums.index_add_(0, torch.from_numpy(labels[start : start + len(chunk)]), chunk.double())
        return cls(sums.numpy(), np.bincount(labels, minlength=num_classes))

    @property
    def means(self) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return self.sums / self.counts[:, None]

    @property
    def diversity(self) -> np.ndarray:
        """The mean cosine distance `(classes,)` over all pairs of images of a class; NaN without a pair."""
        pairs = np.where(self.counts > 1, self.counts * (self.counts - 1.0), np.nan)
        return 1 - ((self.sums**2).sum(1) - self.counts) / pairs

    def squared_distances(self, others: "ClassSums") -> np.ndarray:
        """Return the squared distances `(classes, classes)` from these class means to the others'.

        The expected distance by chance is subtracted, so two subsets of one class have distance 0 on average, for any
        number of images; values slightly below 0 are chance. NaN for a class of fewer than two images. It is the kernel
        distance with a linear kernel, which needs far fewer images than a covariance.
        """
        means, other_means = self.means, others.means
        distances = (means**2).sum(1)[:, None] + (other_means**2).sum(1) - 2 * means @ other_means.T
        # half the mean squared distance of two images, over their number: the squared error of a mean by chance
        with np.errstate(invalid="ignore", divide="ignore"):
            return distances - (self.diversity / self.counts)[:, None] - others.diversity / others.counts


def class_shifts(others: ClassSums, train: ClassSums) -> np.ndarray:
    """Return the distance of each class `(classes,)` from its real class.

    The unit is the distance from that real class to the nearest other one: 0 is as close as real images, 1 as far as
    another class. NaN with too few images.
    """
    between = np.sqrt(np.maximum(train.squared_distances(train), 0))
    np.fill_diagonal(between, np.nan)
    own = np.sqrt(np.maximum(np.diagonal(others.squared_distances(train)), 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        nearest = np.fmin.reduce(between, axis=1)  # NaN only if a whole row is
        shifts = own / nearest
    return np.where(np.isfinite(shifts), shifts, np.nan)


def nearest_class_shares(features: UnitFeatures, labels: np.ndarray, train: ClassSums) -> np.ndarray:
    """Return the share of each class's images that is nearest to each real class mean, `(classes, classes)`.

    Rows of classes without images are NaN.
    """
    num_classes = len(train.counts)
    far_away = 1e3  # no image is nearest to a class without training images
    means = torch.from_numpy(np.nan_to_num(train.means, nan=far_away)).float()
    counts = np.zeros((num_classes, num_classes))
    for start, chunk in features.chunks(CHUNK):
        nearest = torch.cdist(chunk, means).argmin(1).numpy()
        np.add.at(counts, (labels[start : start + len(chunk)], nearest), 1)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(1, keepdims=True)


def list_confusions(shares: np.ndarray, real_shares: np.ndarray, class_names: list[str]) -> list[dict]:
    """Return the pairs of classes that are confused more often than real images, sorted by the excess.

    Both shares are results of `nearest_class_shares`.
    """
    known = np.nan_to_num(shares)
    excess = known - np.nan_to_num(real_shares)
    np.fill_diagonal(excess, 0)
    order = np.argsort(-excess, axis=None, kind="stable")[:MAX_CONFUSIONS]
    return [
        {
            "class": class_names[label],
            "nearest": class_names[other],
            "share": float(known[label, other]),
            "real_share": None if np.isnan(real_shares[label, other]) else float(real_shares[label, other]),
        }
        for label, other in zip(*np.unravel_index(order, excess.shape))
        if excess[label, other] > 0
    ]
