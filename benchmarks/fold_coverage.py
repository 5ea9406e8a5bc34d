"""How often the 95 % intervals of cross-validated gains contain the true gain: for `--num_folds` and alternatives.

    make demo-full  # the synthetic sets
    python -m benchmarks.fold_coverage --runs_dir demo/runs-full

Small datasets of 20 images per class are drawn repeatedly from the demo's 6,000 real images. On the folds of each, one
classifier is trained on real images alone, and one on real and synthetic images. As there are thousands, they are
logistic regressions on frozen features of the demo's classifier. The true gain is the gain of the same models on all
real images that were not drawn, averaged over the draws; on the 2,000 test images alone it would be off by a point.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import concatenate_datasets
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from benchmarks.commands import make_parser
from benchmarks.report import format_table, publish_section
from utils.comparison.statistics import CONFIDENCE, Gain, paired_gain
from utils.data.folds import split_fold
from utils.data.image_set import RealImagesRecord
from utils.data.real_images import load_real_images
from utils.data.splits import balanced_indices
from utils.quality.features import FeatureModel, extract_features, open_feature_model
from utils.transfer.synthetic_images import load_synthetic, open_synthetic

DEMO = Path(__file__).parents[1] / "demo"
NUM_IMAGES_PER_CLASS = 20
NUM_COMPONENTS = 64  # of the features, for training in milliseconds


@dataclass(frozen=True)
class Features:
    """Features `(n, NUM_COMPONENTS)` and labels `(n,)` of the images of one kind."""

    values: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Case:
    """A synthetic set and a protocol; `num_shots` None trains on all of a fold's training part."""

    synthetic: str
    num_folds: int
    num_repeats: int
    num_shots: int | None = None

    @property
    def title(self) -> str:
        shots = "all" if self.num_shots is None else str(self.num_shots)
        return f"{self.synthetic}, {self.num_folds} folds x {self.num_repeats}, {shots} per class"


CASES = (
    Case("with token", 5, 1), Case("with token", 5, 2), Case("with token", 5, 5), Case("with token", 10, 1),
    Case("with token", 5, 1, 4), Case("with token", 5, 1, 1), Case("with token", 5, 2, 1), Case("without token", 5, 1),
)  # fmt: skip


def load_features(runs_dir: Path) -> dict[str, Features]:
    """Return the features of the real images of all parts together, and of each synthetic set."""
    real = load_real_images(RealImagesRecord(str(DEMO / "fashion-mnist")))
    sets = {"real": concatenate_datasets([real.train, real.validation, real.test])}
    for name, folder in (("with token", "synthetic-0"), ("without token", "plain-0")):
        sets[name] = load_synthetic(open_synthetic(str(runs_dir / folder)), real.class_names)
    model = FeatureModel(open_feature_model(str(DEMO / "classifier"), "--model"), "cpu")
    with tempfile.TemporaryDirectory() as work_dir:
        values = {
            name: np.array(extract_features(model, images, name, Path(work_dir) / name, 128)[0], np.float32)
            for name, images in sets.items()
        }
    components = PCA(NUM_COMPONENTS, whiten=True, random_state=0).fit(np.concatenate(list(values.values())))
    return {name: Features(components.transform(values[name]), np.asarray(sets[name]["label"])) for name in sets}


def find_correct(trained: Features, tested: Features) -> np.ndarray:
    classifier = LogisticRegression(C=0.1, tol=1e-3).fit(trained.values, trained.labels)
    return classifier.predict(tested.values) == tested.labels


def cross_validate(
    case: Case, real: Features, synthetic: Features, drawn: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return which drawn images each method gets right, `(folds, images)` masked, and the gain on other images."""
    labels = real.labels[drawn]
    others = np.setdiff1d(np.arange(len(real.labels)), drawn)
    shape = case.num_repeats * case.num_folds, len(drawn)
    ours, theirs, gains = np.ma.masked_all(shape, bool), np.ma.masked_all(shape, bool), []
    for run in range(len(ours)):
        repeat, fold = divmod(run, case.num_folds)
        repeat_seed = case.num_repeats * seed + repeat
        names = [str(label) for label in np.unique(labels)]
        trained, tested = split_fold(labels, f"{fold + 1}/{case.num_folds}", repeat_seed, names)
        num_samples = case.num_shots and case.num_shots * len(names)
        rows = drawn[trained[balanced_indices(labels[trained], num_samples, repeat_seed)]]
        alone = Features(real.values[rows], real.labels[rows])
        both = Features(*(np.concatenate(pair) for pair in zip(vars(alone).values(), vars(synthetic).values())))
        looked_at = np.concatenate([drawn[tested], others])
        judged = Features(real.values[looked_at], real.labels[looked_at])
        right, baseline = find_correct(both, judged), find_correct(alone, judged)
        ours[run, tested], theirs[run, tested] = right[: len(tested)], baseline[: len(tested)]
        gains.append(right[len(tested) :].mean() - baseline[len(tested) :].mean())
    return ours, theirs, 100 * float(np.mean(gains))


def list_intervals(ours: np.ma.MaskedArray, theirs: np.ma.MaskedArray, num_folds: int) -> dict[str, Gain]:
    """Return the intervals to compare: from the folds' means, from the images, and ours."""
    gains = 100 * (ours.mean(1) - theirs.mean(1))
    num_runs, num_images = ours.shape

    def of_folds(weight: float) -> Gain:
        half = stats.t.ppf((1 + CONFIDENCE) / 2, num_runs - 1) * np.sqrt(weight * gains.var(ddof=1))
        return Gain(gains.mean(), gains.mean() - half, gains.mean() + half, num_images)

    repeats = [
        masked.reshape(-1, num_folds, num_images).sum(1).filled(0).astype(bool)  # each image is in one fold of a repeat
        for masked in (ours, theirs)
    ]
    return {
        "naive t over folds": of_folds(1 / num_runs),
        "Nadeau & Bengio 2003": of_folds(1 / num_runs + 1 / (num_folds - 1)),
        "seeds x images, as without folds": paired_gain(*repeats),
        "ours (`--num_folds`)": paired_gain(ours, theirs),
    }


def measure(case: Case, features: dict[str, Features], num_draws: int) -> dict[str, str]:
    """Return a row of the table."""
    started = time.perf_counter()
    real, found, truths = features["real"], [], []
    num_samples = NUM_IMAGES_PER_CLASS * len(np.unique(real.labels))
    for seed in range(num_draws):
        drawn = balanced_indices(real.labels, num_samples, seed)
        ours, theirs, truth = cross_validate(case, real, features[case.synthetic], drawn, seed)
        found.append(list_intervals(ours, theirs, case.num_folds))
        truths.append(truth)
    truth, row = np.mean(truths), {"case": case.title, "true gain": f"{np.mean(truths):+.1f}"}
    for name in found[0]:
        held = np.mean([intervals[name].low <= truth <= intervals[name].high for intervals in found])
        width = np.mean([intervals[name].high - intervals[name].low for intervals in found])
        row[name] = f"{100 * held:.1f} % ({width:.1f})"
    return row | {"seconds": f"{time.perf_counter() - started:.0f}"}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--runs_dir", type=Path, default=DEMO / "runs-full", help="folder of `make demo-full`")
    parser.add_argument("--num_draws", type=int, default=400, help="datasets drawn for each case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    num_draws, cases = (20, CASES[:1]) if args.small else (args.num_draws, CASES)
    with threadpool_limits(1):  # on small matrices, more threads wait for each other
        features = load_features(args.runs_dir)
        table = format_table([measure(case, features, num_draws) for case in cases])
    body = (
        f"Share of {num_draws:,} datasets of {NUM_IMAGES_PER_CLASS} images per class, drawn from the demo's "
        f"{len(features['real'].labels):,} real images, whose 95 % interval of the gain contains the true gain; in "
        "parentheses its mean width in points of accuracy. A share near 95 % is right, a higher one too cautious. The "
        "gain is from logistic regression on frozen features of real images and 1,000 synthetic ones, over real "
        "images alone, each trained on a fold's training part (or shots of it); the true gain is the gain of the same "
        f"models on the real images that were not drawn.\n\n{table}\n\n{time.perf_counter() - started:.0f} s in all."
    )
    publish_section("compare_transfer", "Coverage of the intervals of --num_folds", body, args.small, "Statistics")


if __name__ == "__main__":
    main()
