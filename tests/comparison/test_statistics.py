import json

import numpy as np
import pytest
from scipy import stats

from utils.comparison.findings import describe_findings
from utils.comparison.grid import Row
from utils.comparison.statistics import mean_costs, pack_correct, paired_gain, stack_correct, summarise


def row(label, volume=None) -> Row:
    return Row(label, label, "dsi", volume)


VANILLA, BRIDGED = row("vanilla_matched"), row("bridged")


def runs(accuracy, num_seeds=3, num_images=400, seed=0):
    """Return `(seeds, images)` bool with this accuracy in every run."""
    right = np.arange(num_images) < round(accuracy * num_images)
    rng = np.random.default_rng([seed, round(1000 * accuracy)])
    return np.stack([rng.permutation(right) for _ in range(num_seeds)])


def results_of(correct):
    return [pack_correct(right) for right in correct]


def test_packing_keeps_which_images_were_right():
    right = np.random.default_rng(0).random((3, 1003)) < 0.5
    assert np.array_equal(stack_correct({BRIDGED: {4: results_of(right)}})[BRIDGED][4], right)


def test_interval_of_one_seed_is_students_t_over_the_test_images():
    ours, theirs = runs(0.6, 1), runs(0.5, 1)
    gain = paired_gain(ours, theirs)
    expected = stats.ttest_rel(ours[0].astype(float), theirs[0].astype(float)).confidence_interval(0.95)
    assert gain.mean == pytest.approx(10)
    assert (gain.low, gain.high) == pytest.approx((100 * expected.low, 100 * expected.high))


def test_interval_of_several_seeds_is_that_of_the_two_way_table():
    """Sums of squares written out; both seeds and images vary by more than noise."""
    rng = np.random.default_rng(3)
    hard = rng.normal(0, 1, 60)
    ours, theirs = (rng.normal(0, 0.5, (4, 60)) + rng.normal(shift, 0.5, (4, 1)) + hard * turn > 0
                    for shift, turn in ((1, 1), (0, -0.5)))  # fmt: skip
    table = [[100 * (int(a) - int(b)) for a, b in zip(*rows)] for rows in zip(ours, theirs)]
    rows, columns = len(table), len(table[0])
    mean = sum(map(sum, table)) / rows / columns
    row_means = [sum(row) / columns for row in table]
    column_means = [sum(column) / rows for column in zip(*table)]
    ms_rows = columns * sum((value - mean) ** 2 for value in row_means) / (rows - 1)
    ms_columns = rows * sum((value - mean) ** 2 for value in column_means) / (columns - 1)
    total = sum((value - mean) ** 2 for row in table for value in row)
    ms_noise = (total - ms_rows * (rows - 1) - ms_columns * (columns - 1)) / (rows - 1) / (columns - 1)
    assert ms_rows > ms_noise and ms_columns > ms_noise
    freedom = (ms_rows + ms_columns - ms_noise) ** 2 / (ms_rows**2 / (rows - 1))
    half = stats.t.ppf(0.975, freedom) * ((ms_rows + ms_columns - ms_noise) / rows / columns) ** 0.5
    gain = paired_gain(ours, theirs)
    assert (gain.mean, gain.low, gain.high) == pytest.approx((mean, mean - half, mean + half))


def test_interval_covers_the_truth_about_95_percent_of_the_time():
    """400 comparisons of 3 seeds and 300 images with a true gain of 0; seeds and images both vary."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        hard = rng.normal(0, 1, 300)
        ours, theirs = (
            hard + rng.normal(0, 0.5, 300) + rng.normal(0, 0.15, (3, 1)) + rng.normal(0, 0.5, (3, 300)) > 0
            for _ in range(2)
        )
        gain = paired_gain(ours, theirs)
        covered += gain.low <= 0 <= gain.high
    assert 0.92 < covered / 400 < 0.99


def test_seeds_that_agree_by_chance_do_not_make_the_interval_narrower_than_noise():
    """Each seed gains exactly 10 points, on different images."""
    gain = paired_gain(runs(0.6), runs(0.5))
    noise = 100 * np.sqrt(2 * 0.25 / (3 * 400))
    assert gain.high - gain.mean > 1.96 * noise


def test_equal_predictions_are_a_gain_of_exactly_nothing():
    right = runs(0.5)
    gain = paired_gain(right, right)
    assert (gain.mean, gain.low, gain.high, gain.verdict) == (0, 0, 0, "makes no clear difference")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "shape, why", [((1, 1), "one test image"), ((3, 1), "one test image"), ((1, 2), "all differences are equal"),
                   ((3, 2), "all differences are equal")]
)  # fmt: skip
@pytest.mark.parametrize(("ours", "theirs", "mean"), [(True, False, "+100.0"), (False, True, "-100.0")])
def test_with_equal_differences_the_interval_is_unknown_and_nothing_is_claimed(shape, why, ours, theirs, mean):
    ours, theirs = np.full(shape, ours), np.full(shape, theirs)
    gain = paired_gain(ours, theirs)
    assert (gain.low, gain.high, gain.verdict) == (None, None, "cannot be judged")
    assert str(gain) == f"{mean} [not known: {why}]"
    summary = summarise({VANILLA: {1: results_of(theirs)}, BRIDGED: {1: results_of(ours)}}, VANILLA)
    assert json.loads(json.dumps(summary, allow_nan=False))[1]["gain_low"] is None


@pytest.mark.parametrize("num_images", [2, 5, 400])
def test_identical_seeds_count_as_one(num_images):
    ours, theirs = np.arange(num_images)[None] % 2 == 0, np.zeros((1, num_images), bool)
    one, three = (paired_gain(ours.repeat(count, 0), theirs.repeat(count, 0)) for count in (1, 3))
    assert (three.mean, three.low, three.high) == pytest.approx((one.mean, one.low, one.high))


def test_an_interval_beyond_100_percent_is_shown_as_computed():
    gain = paired_gain(np.array([[True, False]]), np.zeros((1, 2), bool))
    half = stats.t.ppf(0.975, 1) * 50
    assert (gain.low, gain.high) == pytest.approx((50 - half, 50 + half)) and gain.high > 100
    assert (str(gain), gain.verdict) == ("+50.0 [-585.3, 685.3]", "makes no clear difference")


def test_summary_has_means_deviations_and_gains_in_percent():
    ours = np.stack([runs(0.4, 1)[0], runs(0.5, 1)[0]])
    theirs = np.stack([runs(0.5, 1)[0], runs(0.6, 1)[0]])
    costs = {"stage1_steps": 90, "stage2_steps": 30, "stage1_seconds": 2.0, "stage2_seconds": 1.0}
    results = {VANILLA: {1: results_of(theirs)}, BRIDGED: {1: [entry | costs for entry in results_of(ours)]}}
    vanilla, bridged = summarise(results, VANILLA)
    assert "gain" not in vanilla and vanilla["mean"] == pytest.approx(55)
    assert bridged["values"] == pytest.approx([40, 50]) and bridged["std"] == pytest.approx(50**0.5)
    assert (bridged["gain"], bridged["num_seeds"], bridged["num_test_images"]) == (pytest.approx(-10), 2, 400)
    assert bridged["gain_low"] < -10 < bridged["gain_high"]
    assert (bridged["steps"], bridged["seconds"], bridged["gpu_hours"]) == (120, 3.0, None)
    one_seed = summarise({BRIDGED: {None: results_of(ours[:1])}}, None)
    assert one_seed[0]["std"] is None and one_seed[0]["num_shots"] is None


def test_costs_are_those_of_all_stages_averaged_over_seeds():
    seeds = [{"stage1_gpu_hours": 1.0, "stage2_gpu_hours": 0.5}, {"stage1_gpu_hours": 2.0, "stage2_gpu_hours": 0.5}]
    assert mean_costs(seeds)["gpu_hours"] == 2.0
    assert mean_costs([*seeds, {"stage1_gpu_hours": None}])["gpu_hours"] is None
    # numbers of a guard are not costs
    assert mean_costs([{"stage1_steps": 3, "stage2_steps": 2, "guard": {"num_steps": 3}}])["steps"] == 5


def folds_of(differences, num_folds, seed=0):
    """Return `(folds, images)` bool of two methods, masked where a fold does not test, with these differences."""
    num_repeats, num_images = differences.shape
    rng, ours = np.random.default_rng(seed), []
    for repeat in range(num_repeats):
        for tested in np.array_split(rng.permutation(num_images), num_folds):
            run = np.ma.masked_all(num_images, int)
            run[tested] = differences[repeat, tested]
            ours.append(run)
    gains = np.ma.stack(ours)
    return (gains > 0), (gains < 0)


@pytest.mark.parametrize("num_repeats", [1, 3])
def test_interval_of_folds_adds_the_images_variance_and_the_corrected_one_of_the_models(num_repeats):
    """Sums written out; folds differ by more than the images' noise."""
    rng = np.random.default_rng(1)
    num_images, num_folds = 40, 4
    ours, theirs = folds_of(rng.integers(-1, 2, (num_repeats, num_images)), num_folds)
    for run in range(num_repeats):
        tested = np.flatnonzero(~np.ma.getmaskarray(ours)[run * num_folds])
        ours[run * num_folds, tested], theirs[run * num_folds, tested] = True, False
    runs = [
        [100 * (int(a) - int(b)) for a, b in zip(ours[run].compressed(), theirs[run].compressed())]
        for run in range(num_repeats * num_folds)
    ]
    by_image = [[] for _ in range(num_images)]
    for run, values in enumerate(runs):
        for image, value in zip(np.flatnonzero(~np.ma.getmaskarray(ours)[run]), values):
            by_image[image].append(value)
    assert {len(values) for values in by_image} == {num_repeats}, "every image is tested once in each repeat"
    images = [sum(values) / len(values) for values in by_image]
    mean = sum(images) / num_images
    of_images = sum((value - mean) ** 2 for value in images) / (num_images - 1) / num_images
    fold_means = [sum(values) / len(values) for values in runs]
    noise = sum((value - middle) ** 2 for values, middle in zip(runs, fold_means) for value in values)
    noise /= num_repeats * (num_images - num_folds)
    between = 0
    for repeat in range(num_repeats):
        of_repeat = fold_means[repeat * num_folds : (repeat + 1) * num_folds]
        middle = sum(of_repeat) / num_folds
        between += sum((value - middle) ** 2 for value in of_repeat) / (num_folds - 1) / num_repeats
    model = between - noise / (num_images / num_folds)
    assert model > 0
    model *= 1 / (num_repeats * num_folds) + 10 / 30  # test over training images
    freedom = (of_images + model) ** 2 / (of_images**2 / (num_images - 1) + model**2 / (num_repeats * (num_folds - 1)))
    half = stats.t.ppf(0.975, freedom) * (of_images + model) ** 0.5
    gain = paired_gain(ours, theirs)
    assert (gain.mean, gain.low, gain.high) == pytest.approx((mean, mean - half, mean + half))


def test_interval_of_folds_that_agree_is_students_t_over_the_images():
    differences = np.tile([1, 0, -1, 1], 10)[None]
    ours, theirs = np.ma.masked_all((2, 40), bool), np.ma.masked_all((2, 40), bool)
    for fold, tested in enumerate((slice(0, 20), slice(20, 40))):  # the same values in each
        ours[fold, tested], theirs[fold, tested] = (differences > 0)[0, tested], (differences < 0)[0, tested]
    gain, expected = paired_gain(ours, theirs), stats.ttest_1samp(100 * differences[0], 0).confidence_interval(0.95)
    assert (gain.low, gain.high) == pytest.approx((expected.low, expected.high))
    equal = paired_gain(ours, ours)
    assert (equal.mean, equal.low, equal.high) == (0, 0, 0)
    unknown = paired_gain(ours | True, ours & False)
    assert (unknown.mean, unknown.low) == (100, None)


def test_interval_of_folds_covers_the_truth_where_models_differ_and_the_naive_one_does_not():
    """400 sets of 100 images, 5 folds x 3 repeats; images and models differ at random, the true gain is 0."""
    rng, held, naive = np.random.default_rng(0), 0, 0
    for _ in range(400):
        images, ours = rng.normal(0, 0.5, 100), []
        for _ in range(3):
            for tested in np.array_split(rng.permutation(100), 5):
                run = np.ma.masked_all(100, int)
                run[tested] = np.rint(images[tested] + rng.normal(0, 0.05) + rng.normal(0, 0.3, len(tested))).clip(
                    -1, 1
                )
                ours.append(run)
        gains = np.ma.stack(ours)
        gain, means = paired_gain(gains > 0, gains < 0), 100 * gains.mean(1)
        held += gain.low <= 0 <= gain.high
        naive += abs(means.mean()) <= stats.t.ppf(0.975, 14) * means.std(ddof=1) / 15**0.5
    assert 0.93 <= held / 400 <= 0.99 and naive / 400 < 0.9


def test_summary_of_folds_has_their_accuracies_and_the_mean_over_images():
    tested = [np.array([0, 2, 4]), np.array([1, 3])]
    right = [pack_correct(np.array([True, True, False])), pack_correct(np.array([False, False]))]
    results = {
        VANILLA: {None: right},
        BRIDGED: {None: [pack_correct(np.ones(3, bool)), pack_correct(np.ones(2, bool))]},
    }
    correct = stack_correct(results, tested, 5)
    vanilla, bridged = summarise(results, VANILLA, correct)
    assert vanilla["values"] == pytest.approx([200 / 3, 0]) and vanilla["mean"] == pytest.approx(40)
    assert (vanilla["num_folds"], vanilla["num_seeds"], vanilla["num_test_images"]) == (2, 1, 5)
    assert bridged["gain"] == pytest.approx(60) and bridged["gain_low"] < 60
    assert any("Over 2 folds, in points of accuracy" in line for line in describe_findings({"": correct}, VANILLA))
    json.dumps([vanilla, bridged], allow_nan=False)
