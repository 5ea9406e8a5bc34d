from dataclasses import fields, replace

import pytest

from utils.cli.errors import UserError
from utils.transfer.methods import (
    METHODS,
    StageSettings,
    check_stages,
    mix_indices,
    plan_stages,
    stage_names,
    stage_settings,
    steps_per_epoch,
)

BRIDGE, REAL = StageSettings(90, 5e-4, mixup_alpha=0.2), StageSettings(30, 1e-4)
STAGE = {
    "num_train_epochs": 30.0, "max_steps": -1, "head_learning_rate": None, "head_warmup_steps": 0,
    "freeze_backbone": False, "mixup_alpha": 0.0, "label_smoothing_factor": 0.0, "augmentation": "robust",
    "batch_norm": "frozen",
}  # fmt: skip
FLAGS = {
    "gradient_accumulation_steps": 1, "dataloader_drop_last": False,
    "streaming": False, "eval_strategy": "no", "eval_delay": 0, "metric_for_best_model": None, "learning_rate": 2e-4,
    "weight_decay": 0.01, "warmup_steps": 0.1, "per_device_train_batch_size": 32, "dropout": None,
    "drop_path_rate": None, "random_flip": True, **STAGE, "bridge_learning_rate": None, "bridge_weight_decay": None,
    "bridge_warmup_steps": None, "bridge_per_device_train_batch_size": None,
    **{f"bridge_{name}": value for name, value in STAGE.items()}, "bridge_num_train_epochs": 5.0,
    "bridge_max_steps": None, "bridge_mixup_alpha": 0.2,
}  # fmt: skip
NUM_IMAGES = {"real": 40, "synthetic": 1000, "both": 1040}


def plan(name, bridge=BRIDGE, real=REAL, **flags):
    return plan_stages(METHODS[name].with_flags(flags), bridge, real, images_per_class=4)


def outline(stages):
    return [(stage.name, stage.images, stage.head_init, stage.start, stage.settings.max_steps) for stage in stages]


STAGE_1 = ("stage1", "synthetic", "reset", None, 90)


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("bridged", {}, [STAGE_1, ("stage2", "real", "reset", "stage1", 30)]),
        ("bridged_keep", {}, [STAGE_1, ("stage2", "real", "keep", "stage1", 30)]),
        ("bridged_imprint", {}, [STAGE_1, ("stage2", "real", "imprint", "stage1", 30)]),
        ("bridged_head_warmup", {}, [STAGE_1, ("stage2_head", "real", "reset", "stage1", 15),
                                     ("stage2", "real", "keep", "stage2_head", 15)]),
        ("vanilla", {"head_init": "keep"}, [("vanilla", "real", "reset", None, 30)]),
        ("vanilla", {"match_steps": True}, [("vanilla", "real", "reset", None, 120)]),
        ("vanilla_matched", {}, [("vanilla", "real", "reset", None, 120)]),
        ("mix", {}, [("mix", "both", "reset", None, 120)]),
        ("mix", {"match_steps": False}, [("mix", "both", "reset", None, 30)]),
        ("synthetic_only", {"match_steps": True}, [STAGE_1]),
    ],
)  # fmt: skip
def test_flags_override_the_row_of_a_method(name, flags, expected):
    stages = plan(name, **flags)
    assert outline(stages) == expected
    assert {stage.name for stage in stages} <= set(stage_names())


@pytest.mark.parametrize("name", METHODS)
def test_all_methods_but_vanilla_synthetic_only_and_the_probe_take_the_same_steps(name):
    assert sum(stage.settings.max_steps for stage in plan(name)) == {
        "vanilla": 30, "synthetic_only": 90, "linear_probe": 0,
    }.get(name, 120)  # fmt: skip


def test_methods_differ_from_related_ones_as_their_names_say():
    def differences(name, rival):
        settings = [field.name for field in fields(StageSettings)]
        pairs = list(zip(plan(name), plan(rival)))
        return {
            (stage.name, setting): getattr(stage.settings, setting)
            for stage, other in pairs
            for setting in settings
            if getattr(stage.settings, setting) != getattr(other.settings, setting)
        } | {(stage.name, "head"): stage.head_init for stage, other in pairs if stage.head_init != other.head_init}

    no_mixup = {("stage1", "mixup_alpha"): 0.0}
    assert differences("vanilla_mixup", "vanilla_matched") == {("vanilla", "mixup_alpha"): 0.2}
    assert differences("mix_mixup", "mix") == {("mix", "mixup_alpha"): 0.2}
    assert differences("bridged_no_mixup", "bridged") == no_mixup
    assert differences("bridged_plain", "bridged") == no_mixup | differences("bridged_keep", "bridged")
    assert differences("bridged_recalibrate", "bridged") == {("stage2", "batch_norm"): "recalibrate"}
    assert (METHODS["mix"].mix_ratio, METHODS["mix_balanced"].mix_ratio) == (None, 1.0)
    assert plan("bridged_head_warmup")[0] == plan("bridged")[0]


@pytest.mark.parametrize(
    ("images_per_class", "num_steps", "num_first", "real_share"),
    [(1, 210, 105, 0.14), (4, 210, 105, 0.40), (8, 270, 116, 0.57), (16, 270, 74, 0.73), (200, 270, 8, 0.97)],
)
def test_replay_divides_the_steps_of_both_stages_by_the_number_of_real_images(
    images_per_class, num_steps, num_first, real_share
):
    bridge, real = replace(BRIDGE, max_steps=num_steps - 90), replace(REAL, max_steps=90)
    stages = plan_stages(METHODS["bridged_replay"], bridge, real, images_per_class)
    assert outline(stages) == [
        ("stage1", "synthetic", "reset", None, num_first),
        ("stage2", "replayed", "keep", "stage1", num_steps - num_first),
    ]
    assert [stage.synthetic_share for stage in stages] == [None, pytest.approx(1 - real_share, abs=0.005)]
    assert "synthetic_share" not in stages[0].to_dict()  # as in records of earlier versions


def test_a_flag_overrides_the_row_for_its_stage():
    assert plan("vanilla_mixup", mixup_alpha=0.0)[0].settings.mixup_alpha == 0.0
    assert plan("bridged_no_mixup", mixup_alpha=0.3)[0].settings.mixup_alpha == 0.0
    assert plan("bridged_no_mixup", bridge_mixup_alpha=0.2)[0].settings.mixup_alpha == 0.2
    assert plan("bridged_recalibrate", batch_norm="frozen")[1].settings.batch_norm == "frozen"
    assert METHODS["mix_balanced"].with_flags({"mix_ratio": 3.0}).mix_ratio == 3.0
    assert METHODS["bridged"].with_flags({"head_init": "keep", "mix_ratio": 3.0}).flags == {
        "head_init": "keep", "match_steps": False, "mix_ratio": None,
    }  # fmt: skip


def test_a_probe_takes_no_steps_and_no_synthetic_images_with_any_recipe():
    # keys of a recipe without effect are reported, not refused
    assert outline(plan("linear_probe", max_steps=50, match_steps=True)) == [("probe", "real", "probe", None, 0)]
    assert outline(plan("lp_ft")) == [("vanilla", "real", "probe", None, 120)]
    real_only = [name for name in ("linear_probe", "lp_ft", "ema", "wise_ft") if not METHODS[name].uses_synthetic]
    assert real_only == ["linear_probe", "lp_ft", "ema"]
    check_stages(plan("linear_probe"), FLAGS | {"dataloader_drop_last": True}, {"real": 3}, 5, 1)  # no batch is needed


def test_a_head_warmup_is_a_separate_stage_with_the_rest_frozen_and_counts_as_steps():
    bridge, real = replace(BRIDGE, head_warmup_steps=5), replace(REAL, head_warmup_steps=7)
    stages = plan("bridged", bridge, real)
    assert outline(stages) == [
        ("stage1_head", "synthetic", "reset", None, 5),
        ("stage1", "synthetic", "keep", "stage1_head", 90),
        ("stage2_head", "real", "reset", "stage1", 7),
        ("stage2", "real", "keep", "stage2_head", 30),
    ]
    assert [stage.settings.freeze_backbone for stage in stages] == [True, False, True, False]
    matched = plan("vanilla_matched", bridge, real)
    assert sum(stage.settings.max_steps for stage in matched) == sum(stage.settings.max_steps for stage in stages)
    assert {stage.name for stage in stages + matched} <= set(stage_names())


def test_a_fresh_head_learns_faster_unless_a_rate_is_given():
    unset = replace(BRIDGE, head_learning_rate_factor=None), replace(REAL, head_learning_rate_factor=None)

    def factors(name, *settings):
        return [stage.settings.head_learning_rate_factor for stage in plan(name, *settings)]

    assert [factors(name, *unset) for name in ("bridged", "bridged_keep", "bridged_imprint")] == [
        [10, 10], [10, 1], [10, 1],
    ]  # fmt: skip
    assert factors("vanilla", BRIDGE, replace(unset[1], head_warmup_steps=7)) == [10, 1]
    assert factors("vanilla", BRIDGE, replace(REAL, head_learning_rate_factor=3.0)) == [3.0]


@pytest.mark.parametrize(
    ("ratio", "num_real_rows", "num_synthetic_rows"), [(None, 4, 10), (2.5, 4, 10), (1.0, 10, 10), (5.0, 4, 20)]
)
def test_mixing_keeps_its_ratio_by_repeating_the_kind_with_too_few_images(ratio, num_real_rows, num_synthetic_rows):
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


def settings_of(num_processes=1, method="bridged", **flags):
    return stage_settings(METHODS[method].with_flags(flags), FLAGS | flags, NUM_IMAGES, num_processes)


@pytest.mark.parametrize(
    ("method", "flags", "num_processes", "expected"),
    [
        ("bridged", {}, 1, (5 * 32, 30 * 2)),
        ("bridged", {"gradient_accumulation_steps": 2}, 2, (5 * 8, 30 * 1)),
        ("bridged", {"bridge_max_steps": 7, "max_steps": 3}, 1, (7, 3)),
        ("bridged", {"dataloader_drop_last": True}, 1, (5 * 31, 30 * 1)),
        ("mix", {}, 1, (5 * 32, 30 * 2)),  # in addition to those of stage 1
        ("mix", {"match_steps": False}, 1, (5 * 32, 5 * 33)),  # the epochs of stage 1, over both kinds
    ],
)
def test_epochs_become_steps_over_all_processes_and_accumulated_batches(method, flags, num_processes, expected):
    bridge, real = settings_of(num_processes, method, **flags)
    assert (bridge.max_steps, real.max_steps) == expected


def test_stage_1_inherits_exactly_the_settings_without_a_flag_for_it():
    bridge, real = settings_of(
        learning_rate=1e-3, weight_decay=0.1, warmup_steps=5, dropout=0.3, mixup_alpha=0.4, augmentation="basic",
        label_smoothing_factor=0.1, batch_norm="train", head_warmup_steps=2, freeze_backbone=True,
        per_device_train_batch_size=8, max_steps=3, random_flip=False,
    )  # fmt: skip
    shared = {"weight_decay": 0.1, "warmup_steps": 5, "dropout": 0.3, "per_device_train_batch_size": 8}
    shared["random_flip"] = False
    factor = {"head_learning_rate_factor": None}
    assert bridge == StageSettings(5 * 125, 1e-3, mixup_alpha=0.2, **shared, **factor)
    assert real == StageSettings(
        3, 1e-3, mixup_alpha=0.4, augmentation="basic", label_smoothing_factor=0.1, batch_norm="train",
        head_warmup_steps=2, freeze_backbone=True, **shared, **factor,
    )  # fmt: skip
    bridge, _ = settings_of(bridge_learning_rate=5e-4, bridge_weight_decay=0.0, bridge_per_device_train_batch_size=64)
    assert (bridge.learning_rate, bridge.weight_decay, bridge.max_steps) == (5e-4, 0.0, 5 * 16)


def test_a_heads_learning_rate_is_recorded_as_a_factor():
    bridge, real = settings_of(bridge_head_learning_rate=1e-3, head_learning_rate=4e-4)
    assert (bridge.head_learning_rate_factor, real.head_learning_rate_factor) == (pytest.approx(5), pytest.approx(2))


@pytest.mark.parametrize(
    ("flags", "num_processes", "message"),
    [
        ({"dataloader_drop_last": True}, 2, "--dataloader_drop_last: stage2 would take no step: its 40 images"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 41, "streaming": True},
            1,
            "stage2 .* 40 images",
        ),
        ({"eval_strategy": "steps", "eval_delay": 161}, 1, "--eval_delay 161: .*; the longest stage has 160 steps"),
        (
            {"warmup_steps": 160},
            1,
            "--warmup_steps 160: stage1 has 160 steps, so the learning rate never reaches its p",
        ),
        ({"metric_for_best_model": "top5_accuracy"}, 1, "top5_accuracy: needs more than 5 classes, got 5"),
    ],
)
def test_flags_that_do_not_fit_the_numbers_of_images_steps_or_classes_are_found_before_training(
    flags, num_processes, message
):
    stages = plan("bridged", *settings_of(num_processes, **flags))
    with pytest.raises(UserError, match=message):
        check_stages(stages, FLAGS | flags, NUM_IMAGES, 5, num_processes)
    check_stages(plan("bridged", *settings_of(num_processes)), FLAGS, NUM_IMAGES, 5, num_processes)
    check_stages(plan("vanilla", *settings_of(warmup_steps=59)), FLAGS, NUM_IMAGES, 5, 1)
