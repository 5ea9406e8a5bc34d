from dataclasses import replace

import pytest

from utils.transfer.methods import STAGE_NAMES, StageSettings, mix_indices, plan_stages, steps_per_epoch

BRIDGE, REAL = StageSettings(90, 5e-4, mixup_alpha=0.2), StageSettings(30, 1e-4)


def outline(stages):
    return [(stage.name, stage.images, stage.head_init, stage.start, stage.settings.max_steps) for stage in stages]


def test_bridged_is_synthetic_then_real_from_there_with_a_fresh_head():
    stages = plan_stages("bridged", BRIDGE, REAL)
    assert outline(stages) == [
        ("stage1", "synthetic", "reset", None, 90),
        ("stage2", "real", "reset", "stage1", 30),
    ]
    assert [stage.settings for stage in stages] == [BRIDGE, REAL]
    assert [stage.head_init for stage in plan_stages("bridged", BRIDGE, REAL, "imprint")] == ["reset", "imprint"]


@pytest.mark.parametrize(
    ("method", "match_steps", "expected"),
    [
        ("vanilla", False, ("vanilla", "real", "reset", None, 30)),
        ("vanilla", True, ("vanilla", "real", "reset", None, 120)),
        ("mix", False, ("mix", "both", "reset", None, 30)),
        ("mix", True, ("mix", "both", "reset", None, 120)),
        ("synthetic_only", False, ("stage1", "synthetic", "reset", None, 90)),
    ],
)
def test_the_other_methods_are_one_stage(method, match_steps, expected):
    assert outline(plan_stages(method, BRIDGE, REAL, "keep", match_steps)) == [expected]


def test_a_head_warmup_is_a_stage_of_its_own_with_the_rest_frozen_and_counts_as_steps():
    bridge, real = replace(BRIDGE, head_warmup_steps=5), replace(REAL, head_warmup_steps=7)
    stages = plan_stages("bridged", bridge, real)
    assert outline(stages) == [
        ("stage1_head", "synthetic", "reset", None, 5),
        ("stage1", "synthetic", "keep", "stage1_head", 90),
        ("stage2_head", "real", "reset", "stage1", 7),
        ("stage2", "real", "keep", "stage2_head", 30),
    ]
    assert [stage.settings.freeze_backbone for stage in stages] == [True, False, True, False]
    matched = plan_stages("vanilla", bridge, real, match_steps=True)
    assert sum(stage.settings.max_steps for stage in matched) == sum(stage.settings.max_steps for stage in stages)
    assert {stage.name for stage in stages + matched} <= set(STAGE_NAMES)


def test_a_head_learns_faster_where_it_is_fresh_unless_a_rate_is_given():
    unset = replace(BRIDGE, head_learning_rate_factor=None), replace(REAL, head_learning_rate_factor=None)

    def factors(head_init):
        return [stage.settings.head_learning_rate_factor for stage in plan_stages("bridged", *unset, head_init)]

    assert (factors("reset"), factors("keep"), factors("imprint")) == ([10, 10], [10, 1], [10, 1])
    warm = plan_stages("vanilla", BRIDGE, replace(unset[1], head_warmup_steps=7))
    assert [stage.settings.head_learning_rate_factor for stage in warm] == [10, 1]
    assert plan_stages("vanilla", BRIDGE, replace(REAL, head_learning_rate_factor=3.0))[0].settings == replace(
        REAL, head_learning_rate_factor=3.0
    )


@pytest.mark.parametrize(
    ("ratio", "num_real_rows", "num_synthetic_rows"), [(None, 4, 10), (2.5, 4, 10), (1.0, 10, 10), (5.0, 4, 20)]
)
def test_mixing_holds_its_ratio_by_repeating_what_is_too_few(ratio, num_real_rows, num_synthetic_rows):
    rows = mix_indices(4, 10, ratio)
    real, synthetic = [row for row in rows if row < 4], [row - 4 for row in rows if row >= 4]
    assert (len(real), len(synthetic)) == (num_real_rows, num_synthetic_rows)
    for kind, size in ((real, 4), (synthetic, 10)):
        counts = [kind.count(row) for row in range(size)]
        assert max(counts) - min(counts) <= 1 and min(counts) >= 1


def test_steps_of_an_epoch_count_the_last_part_of_a_batch_and_of_a_step():
    assert [steps_per_epoch(*case) for case in ((64, 32), (65, 32), (65, 32, 2), (1, 32, 4), (160, 32, 2))] == [
        2, 3, 2, 1, 3,
    ]  # fmt: skip
