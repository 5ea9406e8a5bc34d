"""Which image is in which part: validation carved from train, few-shot subsets. Pure functions of the labels."""

import numpy as np

TEST_SHARE = 0.1  # of a set without a test part


def carve(labels: np.ndarray, places: np.ndarray, rows: np.ndarray, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Return those of the sorted `rows` that stay, and those that are carved off: about a share `end` of each class.

    `labels` are `(n,)` int, `places` `(n,)` numbers in [0, 1) that depend on an image's content only: below `end` it is
    carved off. So an image that is added or removed moves no other, but where it is a class's only one in its part: of
    two images or more one is carved off and one stays, a single one stays.
    """
    is_carved = places[rows] < end
    for label in np.unique(labels[rows]):
        of_class = np.flatnonzero(labels[rows] == label)
        in_order = of_class[np.argsort(places[rows][of_class], kind="stable")]
        if len(in_order) > 1:
            is_carved[in_order[0]] = True
        is_carved[in_order[-1]] = False
    return rows[~is_carved], rows[is_carved]


def evenly_spaced(number: int, limit: int | None) -> np.ndarray:
    """Return at most `limit` of `number` rows, evenly spaced: a set may be sorted by class."""
    return np.linspace(0, number - 1, number if limit is None else min(limit, number)).astype(int)


def few_shot_indices(labels: np.ndarray, num_shots: int, seed: int) -> np.ndarray:
    """Return the sorted indices of `num_shots` images of each class; the K-shot set is part of the K+1-shot set.

    Raises:
        ValueError: a class has fewer images.
    """
    chosen = []
    for label in np.unique(labels):
        indices = _shuffled_class(labels, label, seed)
        if len(indices) < num_shots:
            raise ValueError(f"label {label} has {len(indices)} images, {num_shots} shots are wanted")
        chosen.append(indices[:num_shots])
    return np.sort(np.concatenate(chosen))


def balanced_indices(labels: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Return the sorted indices of `num_samples` images, taken from the classes in turn; all where there are fewer.

    They are among those of any larger number, and K for each class are those of K shots. With fewer samples than
    classes the last classes have none.
    """
    classes = [_shuffled_class(labels, label, seed) for label in np.unique(labels)]
    turns = np.concatenate([np.arange(len(indices)) for indices in classes])
    # a stable sort: the first image of every class, then the second of every class
    return np.sort(np.concatenate(classes)[np.argsort(turns, kind="stable")][:num_samples])


def _shuffled_class(labels: np.ndarray, label: int, seed: int) -> np.ndarray:
    indices = np.flatnonzero(labels == label)
    return np.random.default_rng([seed, int(label)]).permutation(indices)
