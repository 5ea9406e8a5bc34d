"""How many images a set has of each class, and in which order: the same number, or more of rare classes. No torch."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from utils.cli.errors import UserError

FLAG = "--num_images_per_class"
BALANCE = "balance"  # in the flag, and among a set's settings
NUM_OF_CLASS = "num_images_of_class"  # in a set's record


def parse_number(text: str | int) -> int | str:
    """Return the value of --num_images_per_class: 500 for `500`, and `balance:500` as it is.

    Raises:
        UserError: it is neither, or not above 0.
    """
    kind, colon, number = str(text).rpartition(":")
    if not number.isascii() or not number.lstrip("-").isdigit() or (colon and kind != BALANCE):
        raise UserError(
            f"{FLAG} {text}: must be a whole number, or {BALANCE} and a number, such as {BALANCE}:500, which draws "
            "more images of classes with fewer real ones."
        )
    if int(number) <= 0:
        raise UserError(f"{FLAG} {text}: must be above 0.")
    return f"{BALANCE}:{int(number)}" if colon else int(number)


def split_number(value: int | str) -> tuple[int, bool]:
    """Return the number in a value of `parse_number`, and whether it balances."""
    return int(str(value).rpartition(":")[2]), not isinstance(value, int)


def missing_to_largest(num_real: Sequence[int], labels: Sequence[int]) -> tuple[int, ...]:
    """Return how many real images each of `labels` has fewer than the largest class.

    `num_real` are the real training images of all classes, by label.
    """
    largest = max(num_real)
    return tuple(largest - num_real[label] for label in labels)


@dataclass(frozen=True)
class Counts:
    """`per_class` images of each class; `extra` are the further ones of each, in the order of the drawn classes.

    The extra images come first, in rounds of one image of each class that still lacks some; then come rounds of one
    image of each class. So a larger `per_class` only adds images at the end.
    """

    num_drawn: int
    per_class: int
    extra: tuple[int, ...] = ()

    @property
    def num_images(self) -> int:
        return self.per_class * self.num_drawn + sum(self.extra)

    @property
    def most(self) -> int:
        """The number of images of the class with most."""
        return self.per_class + max(self.extra, default=0)

    def of_class(self, position: int) -> int:
        """Return the number of images of a class."""
        return self.per_class + (self.extra[position] if self.extra else 0)

    def place(self, index: int) -> tuple[int, int]:
        """Return which image of its class image `index` is, and the position of the class.

        The index can be after the set's end. Takes the time of a binary search; no list of images is made.
        """
        starts, lows, sizes = self._levels
        if not sizes or index >= starts[-1]:
            round_number, position = divmod(index - (starts[-1] if sizes else 0), self.num_drawn)
            return round_number + (self.extra[position] if self.extra else 0), position
        level = bisect_right(starts, index) - 1
        round_number, place = divmod(index - starts[level], sizes[level])
        return lows[level] + round_number, self._by_extra[place]

    def last_index(self, number: int) -> int:
        """Return the index of the last of the first `number` images of all classes, `number` at most `per_class`."""
        return sum(self.extra) + number * self.num_drawn - 1

    @cached_property
    def _by_extra(self) -> list[int]:
        """The positions of the classes, those with most extra images first."""
        return sorted(range(len(self.extra)), key=lambda position: -self.extra[position])

    @cached_property
    def _levels(self) -> tuple[list[int], list[int], list[int]]:
        """For each run of rounds with the same classes: its first index, its first round, its number of classes.

        The list of first indices ends with the number of extra images.
        """
        ends = sorted(set(self.extra) - {0})
        lows = [0, *ends][: len(ends)]
        ascending = sorted(self.extra)
        sizes = [len(ascending) - bisect_right(ascending, low) for low in lows]
        lengths = [(end - low) * size for low, end, size in zip(lows, ends, sizes)]
        return [0, *accumulate(lengths)], lows, sizes
