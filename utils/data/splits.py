"""Which image is in which part: validation carved from train, few-shot subsets. Pure functions of the labels."""

import numpy as np

SPLIT_SEED = 0


def stratified_split(labels: np.ndarray, fraction: float, seed: int = SPLIT_SEED) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted indices of the rest and of a part with `fraction` of every class (at least one image).

    `labels` is `(n,)` int. A class with a single image leaves it in the rest.
    """
    rest, part = [], []
    for label in np.unique(labels):
        indices = _shuffled_class(labels, label, seed)
        size = min(max(1, round(len(indices) * fraction)), len(indices) - 1)
        part.append(indices[:size])
        rest.append(indices[size:])
    return np.sort(np.concatenate(rest)), np.sort(np.concatenate(part))


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
