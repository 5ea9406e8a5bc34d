"""Assigns splits to the training, validation and test parts, and images to parts and subsets."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets
from datasets.data_files import SPLIT_KEYWORDS

from utils.cli.errors import UserError
from utils.data.class_folders import split_words

# train, validation, test -> the names that `datasets` accepts, the usual one first
KNOWN_NAMES = {str(role): tuple(names) for role, names in SPLIT_KEYWORDS.items()}
TEST_SHARE = 0.1  # of a dataset without a test split


@dataclass(frozen=True)
class Selection:
    """What a flag such as `--test_split` selects: its text, and the slices of splits, in order."""

    spec: str
    slices: tuple[tuple[str, range], ...]

    @property
    def rows(self) -> np.ndarray:
        """The rows in the split; for several splits together, indices in the whole."""
        rows = np.concatenate([np.arange(rows.start, rows.stop) for _, rows in self.slices])
        return rows if len(self.splits) == 1 else np.arange(len(rows))

    @property
    def splits(self) -> list[str]:
        """The splits that the rows come from, each once."""
        return list(dict.fromkeys(split for split, _ in self.slices))

    def read(self, splits: dict[str, Dataset]) -> Dataset:
        """Return the images; the splits must have the same features."""
        parts = [splits[split].select(rows) for split, rows in self.slices]
        return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def count_shared(slices: Iterable[tuple[str, range]], others: Iterable[tuple[str, range]]) -> int:
    """Return the number of rows in both."""
    return sum(
        len(range(max(rows.start, theirs.start), min(rows.stop, theirs.stop)))
        for (split, rows), (their_split, theirs) in product(slices, others)
        if split == their_split
    )


def assign_splits(
    splits: DatasetDict, given: dict[str, str | None], name: str, is_labelled: Callable[[str], bool]
) -> dict[str, Selection]:
    """Return the selections for `train`, `validation` and `test`, without parts to be carved off `train`.

    `given` has the flags' values by part. By default, test is the split with a usual name for it, else the one with a
    name for validation; validation is a split with its name that is left. Splits without any label (`is_labelled`) are
    skipped. `name` is the dataset's.

    Raises:
        UserError: a split or slice does not exist or is empty, or two parts share images.
    """
    chosen = {part: select(splits, part, spec, name) for part, spec in given.items() if spec is not None}
    # a single split with a name for validation is the test part
    for part in ("test", "validation", "validation"):
        if part in chosen:
            continue
        taken = {split for selection in chosen.values() for split in selection.splits}
        left = [split for split in splits if split not in taken and len(splits[split])]
        usable = next((split for split in named_for(part, left) if is_labelled(split)), None)
        if usable is not None:
            chosen["test" if "test" not in chosen else part] = select(splits, part, usable, name)
    for part, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
        if part in chosen and other in chosen and (shared := count_shared(chosen[part].slices, chosen[other].slices)):
            raise UserError(
                f"--{part}_split {chosen[part].spec}: {shared} of its images are in --{other}_split "
                f"{chosen[other].spec} too; parts must not share images, for example --train_split 'train[:80%]' "
                "--test_split 'train[80%:]'."
            )
    return chosen


def named_for(part: str, splits: list[str]) -> list[str]:
    """Return the splits with a usual name of a part, then those with such a word, as in 'seg_test'."""
    words = {split: split_words(split) for split in splits}
    exact = [split for known in KNOWN_NAMES[part] for split in splits if words[split] == [known]]
    return exact + [split for split in splits if split not in exact and set(KNOWN_NAMES[part]) & set(words[split])]


def select(splits: DatasetDict, part: str, spec: str, name: str) -> Selection:
    """Return the selection of `spec`: a split, or slices such as `train[80%:]` and `train+extra`.

    Raises:
        UserError: there is no such split, the text is not a slice, or it is empty.

    Source: datasets, `ReadInstruction`, for the slices.
    """
    sizes = {split: len(images) for split, images in splits.items()}
    if part == "train" and spec == "train" and spec not in sizes:
        spec = next(iter(named_for("train", list(sizes))), spec)
    if spec in sizes:
        slices = [(spec, range(sizes[spec]))]
    else:
        try:
            pieces = ReadInstruction.from_spec(spec).to_absolute(sizes)
        except (ValueError, AssertionError):
            listed = ", ".join(f"{split} ({size:,} images)" for split, size in sizes.items())
            raise UserError(
                f"--{part}_split {spec}: '{name}' has {listed}; give one of these, or a slice such as 'train[80%:]'."
            ) from None
        slices = [(piece.splitname, range(piece.from_, piece.to)) for piece in pieces]
    slices = [(split, rows) for split, rows in slices if rows]
    if not slices:
        raise UserError(f"--{part}_split {spec}: must not be empty.")
    if any(count_shared([one], [other]) for one, other in combinations(slices, 2)):
        raise UserError(f"--{part}_split {spec}: takes some images twice; its slices must not overlap.")
    return Selection(spec, tuple(slices))


def carve(labels: np.ndarray, places: np.ndarray, rows: np.ndarray, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Return which of the sorted `rows` stay and which are carved off: about a share `end` of each class.

    `labels` are `(n,)` int, `places` are `(n,)` numbers in [0, 1) that depend on the image's content only: those below
    `end` are carved off. So adding or removing an image moves no other, unless it is its class's only one in a part: of
    two or more images, at least one is carved off and one stays; a single one stays.
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
    """Return at most `limit` of `number` rows, evenly spaced, as a dataset may be sorted by class."""
    return np.linspace(0, number - 1, number if limit is None else min(limit, number)).astype(int)


def balanced_indices(labels: np.ndarray, num_samples: int | None, seed: int) -> np.ndarray:
    """Return the sorted indices of `num_samples` images, taken from the classes in turn; all if there are fewer.

    A larger number includes the images of a smaller one. K shots are K times the number of classes. With fewer samples
    than classes, the last classes get none.
    """
    classes = [
        np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))
        for label in np.unique(labels)
    ]
    turns = np.concatenate([np.arange(len(indices)) for indices in classes])
    # a stable sort: the first image of every class, then the second of every class
    return np.sort(np.concatenate(classes)[np.argsort(turns, kind="stable")][:num_samples])
