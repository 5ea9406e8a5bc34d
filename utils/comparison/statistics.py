"""Accuracies and costs of a comparison, and gains paired by seed and test image with intervals. No torch."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from utils.comparison.grid import Row

CONFIDENCE = 0.95
COSTS = ("steps", "images_seen", "seconds", "gpu_hours")


@dataclass(frozen=True)
class Gain:
    """Mean gain over `num_images` test images and its 95 % interval, in points of accuracy (percent).

    If all differences are equal, or there is one image, `low` and `high` are None. With few images they may exceed 100.
    """

    mean: float
    low: float | None
    high: float | None
    num_images: int

    @property
    def verdict(self) -> str:
        if self.low is None:
            return "cannot be judged"
        if self.low > 0:
            return "gains"
        return "loses" if self.high < 0 else "makes no clear difference"

    def __str__(self) -> str:
        if self.low is None:
            why = "one test image" if self.num_images == 1 else "all differences are equal"
            return f"{self.mean:+.1f} [not known: {why}]"
        return f"{self.mean:+.1f} [{self.low:.1f}, {self.high:.1f}]"


def pack_correct(correct: np.ndarray) -> dict:
    """Return which images a model got right, `(n,)` bool, for JSON: one bit per image, in base64."""
    return {"correct": base64.b64encode(np.packbits(correct).tobytes()).decode(), "num_images": len(correct)}


def unpack_correct(results: dict) -> np.ndarray:
    """Return the `(n,)` bool that `pack_correct` put into `results`."""
    packed = np.frombuffer(base64.b64decode(results["correct"]), dtype=np.uint8)
    return np.unpackbits(packed, count=results["num_images"]).astype(bool)


def paired_gain(correct: np.ndarray, other: np.ndarray) -> Gain:
    """Return how much more often `correct` is right than `other`, both `(seeds, test images)` bool in the same order.

    With folds both are `(folds, images)`, masked as in `stack_correct`, and the interval is that of `_fold_gain`. The
    rest is about seeds that all test on the same images.

    The differences, paired by seed and test image, form a two-way table of seeds and images, both drawn at random. The
    interval allows for both draws, widens with few seeds as Student's t does, and is never narrower than the images'
    own noise. A seed determines the shots, the style token and its images if each seed has its own, and all randomness
    in training. With one seed the interval is Student's t over the test images and does not cover the luck of the seed.
    It is unknown for one test image, and if every difference is the same gain or loss; equal predictions are a gain of
    exactly zero.

    It does not cover the choice of recipes, another dataset, model or generator, or that many gains are compared: of
    twenty gains that are truly zero, one interval misses zero on average.

    Source: Hillis 2007, A comparison of denominator degrees of freedom methods for multiple observer ROC analysis,
    Statistics in Medicine 26; its readers are our seeds, its cases our images, on one table of differences. It assumes
    very many cases; here the degrees of freedom are at most those of the images, so seeds that agree count as one.
    """
    differences = 100 * (correct.astype(float) - other.astype(float))
    if isinstance(differences, np.ma.MaskedArray):
        return _fold_gain(differences)
    num_seeds, num_images = differences.shape
    mean = differences.mean()
    if num_images == 1 or differences.min() == differences.max() != 0:
        return Gain(float(mean), None, None, num_images)
    over_images = num_seeds * differences.mean(0).var(ddof=1)
    if num_seeds == 1:
        variance, freedom = over_images, num_images - 1
    else:
        residuals = differences - differences.mean(0) - differences.mean(1, keepdims=True) + mean
        noise = (residuals**2).sum() / ((num_seeds - 1) * (num_images - 1))
        # three seeds that differ by noise alone may by chance agree better than noise allows
        over_seeds = max(num_images * differences.mean(1).var(ddof=1), noise)
        variance = over_seeds + max(over_images - noise, 0)
        freedom = (num_seeds - 1) * (variance / over_seeds) ** 2 if over_seeds > 0 else np.inf
        freedom = min(freedom, num_images - 1)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * np.sqrt(variance / (num_seeds * num_images))
    return Gain(float(mean), float(mean - half), float(mean + half), num_images)


def _fold_gain(differences: np.ma.MaskedArray) -> Gain:
    """Return the mean of `(folds, images)` differences, masked where a fold did not test, with its interval.

    The folds of a repeat are adjacent. Two variances are added: the variance of the images' means over repeats, and the
    variance of the gain between models of different folds, as far as it exceeds the images' noise. Training parts
    overlap, so the latter is weighted by 1 / folds + test images / training images. The interval is for the mean gain
    of models trained on as many randomly drawn images as a fold's training part has.

    Source: Nadeau & Bengio 2003, Inference for the generalization error, Machine Learning 52, for the weight. There it
    weights all variance; but folds test on different images and do not share the images' noise, and weighting that too
    makes intervals twice as wide as needed (benchmarks/fold_coverage.py).
    """
    num_runs, num_images = differences.shape
    mean, values = float(differences.mean()), differences.compressed()
    if num_images == 1 or values.min() == values.max() != 0:
        return Gain(mean, None, None, num_images)
    num_folds = count_folds(differences)
    num_repeats = num_runs // num_folds
    num_tested = num_images / num_folds
    of_images = float(differences.mean(0).var(ddof=1)) / num_images
    of_folds = differences.mean(1)
    noise = float(((differences - of_folds[:, None]) ** 2).sum()) / max(len(values) - num_runs, 1)
    spread = float(of_folds.reshape(num_repeats, num_folds).var(axis=1, ddof=1).mean())
    of_models = max(spread - noise / num_tested, 0) * (1 / num_runs + 1 / (num_folds - 1))
    variance, freedom = of_images + of_models, num_images - 1
    if of_models > 0:  # Satterthwaite's
        freedom = variance**2 / (of_images**2 / freedom + of_models**2 / (num_repeats * (num_folds - 1)))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * np.sqrt(variance)
    return Gain(mean, mean - float(half), mean + float(half), num_images)


def count_folds(masked: np.ma.MaskedArray) -> int:
    """Return how many folds a repeat has, from `(folds, images)`; a repeat tests each image once."""
    return masked.size // int(masked.count())


def stack_correct(
    results: dict[Row, dict], tested: Sequence[np.ndarray] | None = None, num_images: int | None = None
) -> dict[Row, dict]:
    """Return row -> shots -> `(seeds, test images)` bool from row -> shots -> results of the seeds.

    With folds, `tested` holds the indices, among `num_images` images, that each fold was tested on; the result is
    `(folds, images)`, masked where a fold did not test.
    """

    def stack(by_run: list[dict]) -> np.ndarray:
        if tested is None:
            return np.stack(list(map(unpack_correct, by_run)))
        stacked = np.ma.masked_all((len(by_run), num_images), bool)
        for run, (places, result) in enumerate(zip(tested, by_run, strict=True)):
            stacked[run, places] = unpack_correct(result)
        return stacked

    return {
        row: {num_shots: stack(by_run) for num_shots, by_run in by_shots.items()} for row, by_shots in results.items()
    }


def summarise(results: dict[Row, dict], baseline: Row | None, correct: dict[Row, dict] | None = None) -> list[dict]:
    """Return one entry per row and shot count: accuracy in percent over seeds, gain over `baseline`, mean costs.

    `results` is row -> shots (None: all images) -> results of the seeds' cells. `std` is the sample standard deviation
    over seeds, None for one seed. `correct` is what `stack_correct` returns for the results, needed with folds; then
    each fold of a seed counts as a run, and entries have `num_folds`.
    """
    summary = []
    correct = stack_correct(results) if correct is None else correct
    for row, by_shots in correct.items():
        for num_shots, right in by_shots.items():
            values = 100 * right.mean(1)
            entry = {
                "method": row.label, "volume": row.volume, "num_shots": num_shots, "mean": float(values.mean()),
                "std": float(values.std(ddof=1)) if len(values) > 1 else None, "num_seeds": len(values),
                "num_test_images": right.shape[1], "values": values.tolist(),
            }  # fmt: skip
            if isinstance(right, np.ma.MaskedArray):
                entry["mean"] = float(100 * right.mean())  # folds may differ in size
                entry["num_folds"] = count_folds(right)
                entry["num_seeds"] = len(right) // entry["num_folds"]
            if baseline is not None and row != baseline:
                gain = paired_gain(right, correct[baseline][num_shots])
                entry |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
            summary.append(entry | mean_costs(results[row][num_shots]))
    return summary


def mean_costs(results: list[dict]) -> dict:
    """Return the mean costs of one run with all its stages, also shared ones; None for unknown costs."""
    costs = {}
    for cost in COSTS:
        values = [value for result in results for key, value in result.items() if key.endswith(f"_{cost}")]
        costs[cost] = None if not values or None in values else sum(values) / len(results)
    return costs


def count_runs(summary: list[dict]) -> tuple[int, str]:
    """Return how many runs a mean is over, and what they are: folds or seeds."""
    return len(summary[0]["values"]), "folds" if "num_folds" in summary[0] else "seeds"
