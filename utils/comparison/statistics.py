"""What a comparison measures: accuracies, costs, gains paired by seed and test image, their intervals. No torch."""

import base64
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


def stack_correct(results: dict[Row, dict]) -> dict[Row, dict]:
    """Return row -> shots -> `(seeds, test images)` bool from row -> shots -> results of the seeds."""
    return {
        row: {num_shots: np.stack(list(map(unpack_correct, by_seed))) for num_shots, by_seed in by_shots.items()}
        for row, by_shots in results.items()
    }


def summarise(results: dict[Row, dict], baseline: Row | None) -> list[dict]:
    """Return one entry for each row and shot count: accuracy in percent over seeds, gain over `baseline`, mean costs.

    `results` is row -> shots (None: all images) -> results of the seeds' cells. `std` is the sample standard deviation
    over seeds, None for one seed.
    """
    summary = []
    correct = stack_correct(results)
    for row, by_shots in correct.items():
        for num_shots, right in by_shots.items():
            values = 100 * right.mean(1)
            entry = {
                "method": row.label, "volume": row.volume, "num_shots": num_shots, "mean": float(values.mean()),
                "std": float(values.std(ddof=1)) if len(values) > 1 else None, "num_seeds": len(values),
                "num_test_images": right.shape[1], "values": values.tolist(),
            }  # fmt: skip
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
