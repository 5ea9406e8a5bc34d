"""The sentences of a comparison; the first names the method to use for each number of images."""

import numpy as np
import pytest

from utils.comparison import findings
from utils.comparison.findings import list_highlights, recommend
from utils.comparison.grid import Row
from utils.comparison.statistics import paired_gain

NUM_IMAGES = 400


def row(label, volume=None) -> Row:
    return Row(label, label.partition("@")[0], "dsi", volume)


VANILLA, MIXUP, BRIDGED, MIX = row("vanilla_matched"), row("vanilla_mixup"), row("bridged"), row("mix")
REPLAY, KEEP, ALONE = row("bridged_replay"), row("bridged_keep"), row("synthetic_only")


def runs(accuracy, num_seeds=3, seed=0):
    """Return `(seeds, images)` bool with this accuracy in every run."""
    right = np.arange(NUM_IMAGES) < round(accuracy * NUM_IMAGES)
    rng = np.random.default_rng([seed, round(1000 * accuracy)])
    return np.stack([rng.permutation(right) for _ in range(num_seeds)])


def correct_of(accuracies: dict[Row, dict], num_seeds=3) -> dict:
    return {
        row: {num_shots: runs(accuracy, num_seeds) for num_shots, accuracy in by_shots.items()}
        for row, by_shots in accuracies.items()
    }


def describe_findings(correct: dict, baseline: Row | None) -> list[str]:
    return findings.describe_findings({"resnet18": correct}, baseline)


def test_the_first_sentence_names_the_method_to_use_its_accuracy_and_its_gain_over_the_best_real_only_one():
    correct = correct_of({VANILLA: {1: 0.5}, MIXUP: {1: 0.55}, BRIDGED: {1: 0.6}, REPLAY: {1: 0.8}})
    gain = paired_gain(correct[REPLAY][1], correct[MIXUP][1])
    first, *_, last = describe_findings(correct, VANILLA)
    assert first == (
        f"Use bridged_replay with 1 shot: 80.0 %, +25.0 points [{gain.low:.1f}, {gain.high:.1f}] over vanilla_mixup, "
        "the best without synthetic images."
    )
    assert last == (
        "The method to use was chosen among 2 with synthetic images on the same test images, so its gain is likely "
        "overstated."
    )


def test_without_a_clear_gain_the_best_real_only_method_is_named_with_the_unclear_gain():
    correct = correct_of({VANILLA: {16: 0.79}, MIXUP: {16: 0.8}, REPLAY: {16: 0.805}, MIX: {16: 0.6}})
    gain = paired_gain(correct[REPLAY][16], correct[MIXUP][16])
    first, *others = describe_findings(correct, VANILLA)
    assert first == (
        "Use vanilla_mixup with 16 shots: 80.0 %, no method with synthetic images gains clearly over it "
        f"(bridged_replay {gain})."
    )
    assert not any("overstated" in sentence for sentence in others)
    correct[REPLAY] = {16: runs(0.3)}
    assert "mix, the best with synthetic images, loses -20.0 [" in describe_findings(correct, VANILLA)[0]


def test_with_several_classifiers_the_answers_come_first_and_common_limits_once():
    gaining = correct_of({VANILLA: {1: 0.5}, BRIDGED: {1: 0.6}, REPLAY: {1: 0.8}}, num_seeds=1)
    losing = correct_of({VANILLA: {1: 0.5}, BRIDGED: {1: 0.3}, REPLAY: {1: 0.4}}, num_seeds=1)
    found = findings.describe_findings({"resnet18": gaining, "vit": losing}, VANILLA)
    assert [sentence.split(" (")[0].split(", +")[0].split(" -10")[0] for sentence in found[:4]] == [
        "resnet18: use bridged_replay with 1 shot: 80.0 %",
        "vit: use vanilla_matched with 1 shot: 50.0 %; bridged_replay, the best with synthetic images, loses",
        "resnet18: in a single run",
        "resnet18: bridged_replay gains at 1 shot",
    ]
    assert [sentence.split(" ")[0] for sentence in found[4:]] == ["vit:", "vit:", "The", "The"]


def test_two_numbers_of_images_are_one_sentence():
    correct = correct_of({MIXUP: {1: 0.5, 16: 0.8}, REPLAY: {1: 0.7, 16: 0.8}})
    first, *_ = describe_findings(correct, None)
    assert first.startswith("Use bridged_replay with 1 shot: 70.0 %, +20.0 points [")
    assert "the best without synthetic images; use vanilla_mixup with 16 shots: 80.0 %, no method with" in first


def test_with_more_numbers_of_images_the_first_sentence_has_all_answers_and_each_has_its_own_sentence():
    shots = {1: 0.5, 2: 0.5, 4: 0.5, None: 0.8}
    gaining = {1: 0.7, 2: 0.6, 4: 0.7, None: 0.8}
    correct = correct_of({VANILLA: shots, MIX: gaining, REPLAY: gaining | {2: 0.7, 4: 0.5}})
    first, *sentences = describe_findings(correct, VANILLA)
    gains = [
        paired_gain(correct[row][shots], correct[VANILLA][shots]) for row, shots in ((MIX, 1), (MIX, 4), (REPLAY, 2))
    ]
    assert first == (
        f"Use mix with 1 ({gains[0]}) and 4 shots ({gains[1]}), bridged_replay with 2 shots ({gains[2]}), "
        "vanilla_matched with all images; in parentheses the gain over the best method without synthetic images."
    )
    assert [sentence.split(":")[0] for sentence in sentences[:4]] == [
        "Use mix with 1 shot", "Use bridged_replay with 2 shots", "Use mix with 4 shots",
        "Use vanilla_matched with all images",
    ]  # fmt: skip


def test_a_clear_gain_is_preferred_to_a_higher_mean_without_one():
    """The higher mean comes from one lucky seed out of three."""
    lucky = np.stack([runs(accuracy, 1)[0] for accuracy in (0.95, 0.5, 0.5)])
    correct = correct_of({VANILLA: {1: 0.5}, MIX: {1: 0.6}}) | {KEEP: {1: lucky}}
    assert lucky.mean() > 0.6
    (found,) = recommend(correct)
    assert (found.use, found.leader) == (MIX, KEEP)
    assert "(bridged_keep has a higher mean, but does not gain clearly)." in describe_findings(correct, VANILLA)[0]


def test_the_best_without_synthetic_images_may_be_one_of_fewer_steps_but_not_at_a_tie():
    plain = row("vanilla")
    assert recommend(correct_of({plain: {1: 0.6}, VANILLA: {1: 0.5}, MIX: {1: 0.9}}))[0].real_only == plain
    assert recommend(correct_of({plain: {1: 0.5}, VANILLA: {1: 0.5}, MIX: {1: 0.9}}))[0].real_only == VANILLA


def test_missing_methods_are_mentioned():
    first, *_ = describe_findings(correct_of({BRIDGED: {1: 0.5}, MIX: {1: 0.6}}), None)
    assert first == (
        "Use mix with 1 shot: 60.0 %, the best here; no method was run on real images alone, so the gain of "
        "synthetic images is not known."
    )
    assert describe_findings(correct_of({VANILLA: {1: 0.5}, MIXUP: {1: 0.6}}), VANILLA) == [
        "Use vanilla_mixup with 1 shot: 60.0 %; no method with synthetic images was run."
    ]
    first, *others = describe_findings(correct_of({VANILLA: {1: 0.5}, MIX: {1: 0.8}}), VANILLA)
    assert first.startswith("Use mix with 1 shot: 80.0 %, +30.0 points [") and others == []


def test_methods_that_cannot_be_judged_are_not_recommended():
    ours, theirs = np.ones((3, 1), bool), np.zeros((3, 1), bool)
    first, second, *_ = describe_findings({VANILLA: {1: theirs}, BRIDGED: {1: ours}, MIX: {1: theirs}}, VANILLA)
    assert first == (
        "With 1 shot it cannot be judged whether synthetic images help: bridged 100.0 %, +100.0 [not known: one test "
        "image] over vanilla_matched."
    )
    assert "bridged cannot be judged at 1 shot (+100.0 [not known: one test image])" in second
    several = {VANILLA: {1: runs(0.5), 2: theirs, 4: theirs}, BRIDGED: {1: runs(0.9), 2: ours, 4: ours}}
    assert describe_findings(several, VANILLA)[0] == (
        f"Use bridged with 1 shot ({paired_gain(runs(0.9), runs(0.5))}); with 2 and 4 shots it cannot be judged which "
        "method to use; in parentheses the gain over the best method without synthetic images."
    )


def test_a_clear_loss_is_called_one():
    correct = correct_of({VANILLA: {16: 0.8}, MIX: {16: 0.4}, BRIDGED: {16: 0.5}})
    loss = paired_gain(correct[BRIDGED][16], correct[VANILLA][16])
    assert loss.verdict == "loses"
    first, *_ = describe_findings(correct, VANILLA)
    assert first == (
        f"Use vanilla_matched with 16 shots: 80.0 %; bridged, the best with synthetic images, loses {loss}."
    )


def test_a_loss_that_cannot_be_judged_is_no_reason_against_real_images_alone():
    ours, theirs = np.zeros((3, 1), bool), np.ones((3, 1), bool)
    assert recommend({VANILLA: {1: theirs}, BRIDGED: {1: ours}})[0].use == VANILLA


def test_with_volumes_the_largest_is_named():
    correct = correct_of({VANILLA: {1: 0.2}, row("bridged", 500): {1: 0.3}, row("bridged", 3000): {1: 0.8}})
    first, second, last = describe_findings(correct, VANILLA)
    assert first.startswith("Use bridged (3000 synthetic images per class) with 1 shot: 80.0 %, +60.0 points [")
    assert "bridged gains at 1 shot (+60.0 [" in second
    assert last.startswith("bridged, 3000 synthetic images per class instead of 500: gains at 1 shot (+50.0 [")


def test_a_picture_highlights_the_reference_the_default_what_the_answers_name_and_the_usual_methods():
    accuracies = {VANILLA: {1: 0.2, 4: 0.5}, MIXUP: {1: 0.3, 4: 0.6}, ALONE: {1: 0.3, 4: 0.3}, KEEP: {1: 0.5, 4: 0.4},
                  BRIDGED: {1: 0.4, 4: 0.4}, MIX: {1: 0.8, 4: 0.4}, REPLAY: {1: 0.7, 4: 0.5}}  # fmt: skip
    correct = {"resnet18": correct_of(accuracies)}
    first = ["vanilla_matched", "bridged_replay", "vanilla_mixup", "mix", "bridged"]
    assert list_highlights(correct, VANILLA) == [*first, "synthetic_only"], "six of seven, the last by its place"
    assert list_highlights(correct, None) == [*first[1:], "vanilla_matched", "synthetic_only"]
    few = {"vit": correct_of({row: accuracies[row] for row in (KEEP, VANILLA)})}
    assert list_highlights(few, VANILLA) == ["vanilla_matched", "bridged_keep"], "all, if there are few"


def test_a_rival_with_an_unknown_interval_does_not_beat_the_bridged_methods():
    right = np.ones((1, 1), bool)
    sentences = describe_findings({VANILLA: {1: ~right}, BRIDGED: {1: ~right}, MIX: {1: right}}, VANILLA)
    assert not any("beats" in sentence for sentence in sentences)


@pytest.mark.parametrize(
    "accuracy, verdict",
    [(0.9, "gains at 1 shot (+40.0"), (0.1, "loses at 1 shot (-40.0"), (0.51, "makes no clear difference at")],
)
def test_the_result_of_bridging_follows_also_if_it_loses(accuracy, verdict):
    correct = correct_of({VANILLA: {1: 0.5}, BRIDGED: {1: accuracy}, KEEP: {1: 0.95}})
    _, first, second, _ = describe_findings(correct, VANILLA)
    assert first.startswith("Over 3 seeds, in points of accuracy [95 % interval] over vanilla_matched: bridged ")
    assert verdict in first
    assert second.startswith("bridged_keep gains at 1 shot (+45.0 [")


def test_findings_group_the_shot_counts_by_verdict():
    correct = correct_of({VANILLA: {1: 0.3, None: 0.9}, BRIDGED: {1: 0.7, None: 0.4}, KEEP: {1: 0.7, None: 0.9}})
    _, sentence, second, _ = describe_findings(correct, VANILLA)
    assert "bridged gains at 1 shot (+40.0" in sentence and "; loses with all images (-50.0" in sentence
    assert (
        second
        == f"bridged_keep gains at 1 shot ({paired_gain(runs(0.7), runs(0.3))}); makes no clear difference "
        + ("with all images (+0.0 [0.0, 0.0]).")
    )


def test_findings_say_when_another_method_beats_the_best_bridged_one():
    correct = correct_of({VANILLA: {1: 0.2}, BRIDGED: {1: 0.3}, KEEP: {1: 0.6}, MIX: {1: 0.95}, ALONE: {1: 0.5}})
    *_, beaten, _ = describe_findings(correct, VANILLA)
    assert beaten.startswith("mix beats the best bridged method: bridged_keep at 1 shot (+35.0 [")
    correct[MIX] = {1: runs(0.55)}
    assert not any("beats" in sentence for sentence in describe_findings(correct, VANILLA))


def test_one_seed_is_called_a_single_run():
    first, second, last = describe_findings(correct_of({VANILLA: {1: 0.2}, BRIDGED: {1: 0.8}}, num_seeds=1), VANILLA)
    assert first.startswith("Use bridged with 1 shot: 80.0 %, +60.0 points [")
    assert second.startswith("In a single run (one seed)")
    assert last == "The intervals cover the draw of the test images, not the luck of this one seed."


def test_a_baseline_with_fewer_steps_is_described_as_such():
    plain = row("vanilla")
    sentences = describe_findings(correct_of({plain: {1: 0.5}, BRIDGED: {1: 0.6}}), plain)
    assert "over vanilla, which took fewer steps:" in sentences[1]


def test_runs_in_which_a_guard_left_images_out_are_counted():
    kept, dropped = {"guard": {"synthetic_share": 0.2}}, {"guard": {"synthetic_share": 0.0}}
    results = {"a": {REPLAY: {1: [kept, kept], 4: [kept, dropped], None: [dropped, dropped]}, MIX: {1: [{}, {}]}}}
    sentence = "bridged_replay left the synthetic images out in 1 of 2 runs with 4 shots, 2 of 2 runs with all images."
    assert findings.describe_guards(results) == [sentence]
    assert findings.describe_guards(results | {"b": {MIX: {1: [{}]}}}) == [f"a: {sentence}"]
