"""What the verdicts come to: acceptance of each class, agreement of reviewers, accuracy of people in the blind mode."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from utils.cli.tables import print_table
from utils.data.left_out import ACCEPT, REJECT, Key, list_rejected
from utils.review.set_images import SetImages
from utils.review.verdicts import Review, Verdicts

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Share:
    """`number` of `total`, with Wilson's interval (Wilson 1927) of `CONFIDENCE`, in [0, 1]."""

    number: int
    total: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval of the share that the images were drawn from; None without images."""
        if not self.total:
            return None
        return tuple(map(float, binomtest(self.number, self.total).proportion_ci(CONFIDENCE, method="wilson")))

    def __str__(self) -> str:
        if not self.total:
            return "-"
        low, high = self.interval
        return f"{self.number / self.total:.0%} [{low:.0%}, {high:.0%}]"


@dataclass(frozen=True)
class ClassSummary:
    """How many images of a class are to be reviewed, have been, and are rejected, as training counts it."""

    name: str
    num_images: int
    num_reviewed: int
    num_rejected: int

    @property
    def accepted(self) -> Share | None:
        """The share that is not rejected; None until all are reviewed, as doubtful images may come first."""
        if self.num_reviewed < self.num_images:
            return None
        return Share(self.num_reviewed - self.num_rejected, self.num_reviewed)


@dataclass(frozen=True)
class Agreement:
    """Agreement of reviewers on the `num_images` that all of them judged; `kappa` is None where it is not defined.

    1 is perfect, 0 what chance gives. `name` is Cohen's for two reviewers, Fleiss' for more.
    """

    reviewers: list[str]
    num_images: int
    name: str
    kappa: float | None

    def __str__(self) -> str:
        who = ", ".join(self.reviewers)
        if not self.num_images:
            return f"Reviewers: {who}; they have no images in common, so their agreement is not known."
        value = "not defined (all gave one verdict)" if self.kappa is None else f"{self.kappa:.2f}"
        return f"Reviewers: {who}; agreement on the {self.num_images:,} images of all: {self.name} kappa {value}."


def summarise_classes(keys_by_class: Mapping[str, Iterable[Key]], verdicts: Verdicts) -> list[ClassSummary]:
    """Return the summary of each class, of the given images only."""
    rejected = list_rejected(verdicts)
    summaries = []
    for name, keys in keys_by_class.items():
        keys, of_class = list(keys), verdicts.get(name, {})
        reviewed = [key for key in keys if str(key[1]) in of_class]
        summaries.append(ClassSummary(name, len(keys), len(reviewed), sum(key in rejected for key in reviewed)))
    return summaries


def measure_agreement(verdicts: Verdicts) -> Agreement | None:
    """Return the agreement of all reviewers; None with fewer than two of them."""
    images = [by_reviewer for of_class in verdicts.values() for by_reviewer in of_class.values()]
    reviewers = sorted(set(chain.from_iterable(images)))
    if len(reviewers) < 2:
        return None
    judged = [[image[name]["verdict"] for name in reviewers] for image in images if len(image) == len(reviewers)]
    if len(reviewers) == 2:
        columns = list(zip(*judged))
        is_defined = len(set(chain(*columns))) > 1
        return Agreement(reviewers, len(judged), "Cohen's", float(cohen_kappa_score(*columns)) if is_defined else None)
    return Agreement(reviewers, len(judged), "Fleiss'", fleiss_kappa(judged))


def fleiss_kappa(judged: list[list[str]]) -> float | None:
    """Return the kappa of images with one verdict of each of the reviewers; None where all verdicts are the same.

    Source: Fleiss 1971, Measuring nominal scale agreement among many raters.
    """
    if not judged:
        return None
    counts = np.array([[Counter(votes)[verdict] for verdict in (ACCEPT, REJECT)] for votes in judged])
    num_raters = len(judged[0])
    expected = float(((counts.sum(0) / counts.sum()) ** 2).sum())
    observed = float((counts * (counts - 1)).sum() / (len(judged) * num_raters * (num_raters - 1)))
    return None if math.isclose(expected, 1) else (observed - expected) / (1 - expected)


@dataclass(frozen=True)
class BlindSummary:
    """What people recognise: the class, by class, of real and of synthetic images, and which of them are real."""

    by_class: dict[str, tuple[Share, Share]]  # class -> right on real images, right on synthetic images
    real_recognised: Share
    synthetic_taken_for_real: Share


def summarise_blind(blind: Mapping[str, Mapping[str, dict]], class_names: Iterable[str]) -> BlindSummary | None:
    """Return what all reviewers' answers come to; None without answers."""
    answers = [answer for of_reviewer in blind.values() for answer in of_reviewer.values()]
    if not answers:
        return None

    def count(some: list[dict], is_meant: Callable[[dict], bool]) -> Share:
        return Share(sum(map(is_meant, some)), len(some))

    by_kind = {kind: [answer for answer in answers if answer["is_real"] == kind] for kind in (True, False)}
    by_class = {
        name: tuple(
            count(
                [answer for answer in of_kind if answer["class"] == name],
                lambda answer: answer["said_class"] == answer["class"],
            )
            for of_kind in by_kind.values()
        )
        for name in class_names
    }
    return BlindSummary(by_class, *(count(of_kind, lambda answer: answer["said_real"]) for of_kind in by_kind.values()))


def tabulate_summary(
    classes: list[ClassSummary], agreement: Agreement | None, blind: BlindSummary | None, is_sample: bool
) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the summary for the page and the terminal: the heads of a table, its rows, and lines below it.

    The share that is accepted is there for a sample only: of images that were chosen otherwise, such as the doubtful
    ones first, it says nothing about the class.
    """
    heads, rows = ["class", "images", "reviewed", "rejected"], []
    heads += ["accepted (95 % interval)"] if is_sample else []
    heads += ["real: class recognised", "synthetic: class recognised"] if blind else []
    for found in classes:
        row = [found.name, *(f"{value:,}" for value in (found.num_images, found.num_reviewed, found.num_rejected))]
        row += [str(found.accepted or "not all reviewed")] if is_sample else []
        rows.append(row + ([str(share) for share in blind.by_class[found.name]] if blind else []))
    num_images, num_reviewed, num_rejected = (
        sum(getattr(found, name) for found in classes) for name in ("num_images", "num_reviewed", "num_rejected")
    )
    lines = [f"Reviewed: {num_reviewed:,} of {num_images:,} images; rejected: {num_rejected:,}."]
    lines += [str(agreement)] if agreement else []
    if blind is not None:
        real, synthetic = (_add(shares[kind] for shares in blind.by_class.values()) for kind in (0, 1))
        lines.append(
            f"Blind test: class recognised on real images {real}, on synthetic images {synthetic}; called real: of the "
            f"real images {blind.real_recognised}, of the synthetic images {blind.synthetic_taken_for_real}."
        )
    return heads, rows, lines


def summarise_review(
    review: Review, images: SetImages, shown: Mapping[int, np.ndarray], is_sample: bool
) -> tuple[list[str], list[list[str]], list[str]]:
    """Return what `tabulate_summary` does, of the images in `shown`, numbers by label."""
    keys = {images.class_names[label]: map(images.key, numbers.tolist()) for label, numbers in shown.items()}
    return tabulate_summary(
        summarise_classes(keys, review.verdicts), measure_agreement(review.verdicts),
        summarise_blind(review.blind, images.class_names), is_sample,
    )  # fmt: skip


def print_summary(heads: list[str], rows: list[list[str]], lines: list[str]) -> None:
    """Print what `tabulate_summary` returns."""
    table = Table(*heads)
    for row in rows:
        table.add_row(*map(escape, row))
    print_table(table, Console())
    print("\n".join(lines))


def _add(shares: Iterable[Share]) -> Share:
    shares = list(shares)
    return Share(sum(share.number for share in shares), sum(share.total for share in shares))
