"""How far two image sets lie apart in the features of a model, as a whole and class by class."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from utils.data.splits import evenly_spaced
from utils.quality.vectors import UnitFeatures

CHUNK = 4096
MAX_KERNEL_IMAGES = 5000  # the kernel distance holds its images in memory, and more of them hardly change it
KERNEL_SUBSETS = 50
MAX_SUBSET_SIZE = 1000
MAX_CONFUSIONS = 10

Rows = tuple[np.ndarray, np.ndarray]  # features `(n, num_features)`, and which of them


def matched_rows(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted rows of two sets with as many images of each class, drawn at random; labels are `(n,)` int.

    Distances depend on the number of images and on how often each class occurs: only such parts are comparable.
    """
    rng = np.random.default_rng(0)
    chosen = [np.zeros((2, 0), int)]
    for label in np.intersect1d(first, second):
        classes = [np.flatnonzero(labels == label) for labels in (first, second)]
        size = min(map(len, classes))
        chosen.append(np.array([rng.permutation(rows)[:size] for rows in classes]))
    return tuple(np.sort(np.hstack(chosen)))


def frechet_distances(train: Rows, others: dict[str, Rows]) -> dict[str, float]:
    """Return name -> Frechet distance between training images and others; two or more of each.

    Only sums are held in memory.
    """
    features = torch.nn.Identity()  # they are computed already
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
        distances[name] = max(0.0, metric.compute().item())  # below 0 by rounding only
    return distances


def kernel_distances(train: Rows, others: dict[str, Rows]) -> tuple[dict[str, tuple[float, float]], int]:
    """Return name -> kernel distance (mean and standard deviation over subsets), and the size of the subsets.

    As in `frechet_distances`. The distance is unbiased: it does not depend on the number of images, and may be a
    little below 0. Of large sets it takes `MAX_KERNEL_IMAGES`, evenly spread.
    """
    smallest = min(len(rows) for _, rows in (train, *others.values()))
    subset_size = max(2, min(MAX_SUBSET_SIZE, smallest // 2))  # halves: subsets of all images would all be the same
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that features are held in memory
        metric = KernelInceptionDistance(
            torch.nn.Identity(), KERNEL_SUBSETS, subset_size, reset_real_features=False, normalize=True
        )

    def spread(raw: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        chosen = rows[evenly_spaced(len(rows), MAX_KERNEL_IMAGES)]
        return torch.from_numpy(np.asarray(raw[chosen], np.float32))

    metric.update(spread(*train), real=True)
    distances = {}
    with torch.random.fork_rng(devices=[]):
        for name, other in others.items():
            torch.manual_seed(0)  # subsets are drawn from the global generator
            metric.reset()
            metric.update(spread(*other), real=False)
            mean, deviation = metric.compute()
            distances[name] = mean.item(), deviation.item()
    return distances, subset_size


@dataclass(frozen=True)
class ClassSums:
    """The sums `(classes, num_features)` and counts `(classes,)` of features of length 1.

    They are all that class means, their distances and the classes' diversity need, however many images there are.
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
        """The mean cosine distance `(classes,)` between two images of a class, over all pairs; NaN without any."""
        pairs = np.where(self.counts > 1, self.counts * (self.counts - 1.0), np.nan)
        return 1 - ((self.sums**2).sum(1) - self.counts) / pairs

    def squared_distances(self, others: "ClassSums") -> np.ndarray:
        """Return the squared distances `(classes, classes)` of class means, from these to the others'.

        What the means of so few images differ by chance is taken off, so 0 is expected of two parts of one class,
        however many images they have; values a little below 0 are chance. NaN for a class of fewer than two images.
        It is the kernel distance with a linear kernel: it needs far fewer images than a covariance does.
        """
        means, other_means = self.means, others.means
        distances = (means**2).sum(1)[:, None] + (other_means**2).sum(1) - 2 * means @ other_means.T
        # half the mean squared distance of two images, over the number of images: how far a mean is off by chance
        with np.errstate(invalid="ignore", divide="ignore"):
            return distances - (self.diversity / self.counts)[:, None] - others.diversity / others.counts


def class_shifts(others: ClassSums, train: ClassSums) -> np.ndarray:
    """Return how far each class `(classes,)` lies from the real class of its name.

    The unit is the distance from that real class to the nearest other one: 0 is where real images lie, 1 is as far
    away as another class. NaN where there are too few images to say.
    """
    between = np.sqrt(np.maximum(train.squared_distances(train), 0))
    np.fill_diagonal(between, np.nan)
    own = np.sqrt(np.maximum(np.diagonal(others.squared_distances(train)), 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        nearest = np.fmin.reduce(between, axis=1)  # nan only where all of a row are
        shifts = own / nearest
    return np.where(np.isfinite(shifts), shifts, np.nan)


def nearest_class_shares(features: UnitFeatures, labels: np.ndarray, train: ClassSums) -> np.ndarray:
    """Return `(classes, classes)`: which share of a class's images is nearest to each real class mean.

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
    """Return which classes' images are nearest to another class, in the order of what exceeds the real images' share.

    Both are those of `nearest_class_shares`. Pairs that real images confuse as often are left out.
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
