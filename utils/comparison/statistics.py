"""What a comparison measures: accuracies, costs, gains paired by seed and test image, their intervals. No torch."""

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

    Without any spread, `low` and `high` are None: not known. Of a few images they may lie beyond 100.
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
    """Return `(n,)` bool, which images a model got right, as JSON holds it in a bit an image."""
    return {"correct": base64.b64encode(np.packbits(correct).tobytes()).decode(), "num_images": len(correct)}


def unpack_correct(results: dict) -> np.ndarray:
    """Return the `(n,)` bool that `pack_correct` put into `results`."""
    packed = np.frombuffer(base64.b64decode(results["correct"]), dtype=np.uint8)
    return np.unpackbits(packed, count=results["num_images"]).astype(bool)


def paired_gain(correct: np.ndarray, other: np.ndarray) -> Gain:
    """Return how much more often `correct` is right than `other`, both `(seeds, test images)` bool in the same order.

    Of folds both are `(folds, images)`, masked as by `stack_correct`, and the interval is that of `_fold_gain`. What
    follows is on seeds that all test on the same images.

    The differences, paired by seed and test image, are a two-way table of seeds and images, both drawn at random: the
    interval allows for both, widens with few seeds as Student's t does, and is never narrower than the images' own
    noise in the runs. A seed is the draw of the shots, of the style token and its images where each seed has its own,
    and of all randomness in training. With one seed the interval is Student's t over the test images, and knows
    nothing of the luck of the seed. It is not known of one test image, nor where every difference is the same gain or
    loss; equal predictions are a gain of exactly nothing.

    It does not cover the choice of recipes, another data set, model or generator, nor that many gains are compared: of
    twenty true zeros, one lies outside on average.

    Source: Hillis 2007, A comparison of denominator degrees of freedom methods for multiple observer ROC analysis,
    Statistics in Medicine 26: readers are our seeds, cases our images, on one table of differences. The degrees of
    freedom, there of very many cases, are here at most those of the images, so seeds that agree say no more than one.
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
        # of seeds that differ by nothing else than noise, three may by chance agree better than noise allows
        over_seeds = max(num_images * differences.mean(1).var(ddof=1), noise)
        variance = over_seeds + max(over_images - noise, 0)
        freedom = (num_seeds - 1) * (variance / over_seeds) ** 2 if over_seeds > 0 else np.inf
        freedom = min(freedom, num_images - 1)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * np.sqrt(variance / (num_seeds * num_images))
    return Gain(float(mean), float(mean - half), float(mean + half), num_images)


def _fold_gain(differences: np.ma.MaskedArray) -> Gain:
    """Return the mean of `(folds, images)` differences, masked where a fold did not test, and its interval.

    The folds of a repeat follow each other. Two variances are added: that of the images' means over repeats, and that
    of what models of different folds gain, as far as their folds differ by more than the images' noise. Training parts
    overlap, so the latter is weighted by 1 / folds + test images / training images. The truth that is meant is the mean
    gain of models trained on as many images as a fold's training part has, drawn at random.

    Source: Nadeau & Bengio 2003, Inference for the generalization error, Machine Learning 52, for the weight. There it
    is that of all variance; but the images' own noise is not shared by folds, which test on different ones, and with it
    intervals are twice as wide as they need be (benchmarks/fold_coverage.py).
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
    """Return how many of the `(folds, images)` make a repeat, which tests on each image once."""
    return masked.size // int(masked.count())


def stack_correct(
    results: dict[Row, dict], tested: Sequence[np.ndarray] | None = None, num_images: int | None = None
) -> dict[Row, dict]:
    """Return row -> shots -> `(seeds, test images)` bool from row -> shots -> results of the seeds.

    Of folds, `tested` are the places of the `num_images` images on which each one was tested: `(folds, images)`,
    masked where a fold was not.
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
    """Return one entry for each row and shot count: accuracy in percent over seeds, gain over `baseline`, mean costs.

    `results` is row -> shots (None: all images) -> results of the seeds' cells. `std` is the sample standard deviation
    over seeds, None for one seed. `correct` is what `stack_correct` makes of the results, where that is of folds; a
    fold of a seed, which has `num_folds`, is then what a seed is otherwise.
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
    """Return what one run costs on average, all stages together, as if none was shared; None for what is not known."""
    costs = {}
    for cost in COSTS:
        values = [value for result in results for key, value in result.items() if key.endswith(f"_{cost}")]
        costs[cost] = None if not values or None in values else sum(values) / len(results)
    return costs


def count_runs(summary: list[dict]) -> tuple[int, str]:
    """Return how many runs a mean is over, and what these are."""
    return len(summary[0]["values"]), "folds" if "num_folds" in summary[0] else "seeds"
