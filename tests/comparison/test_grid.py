import dataclasses

import pytest

from utils.cli.errors import UserError
from utils.comparison.grid import (
    VARIANTS,
    Arm,
    Recipe,
    choose_best,
    look_up_recipe,
    make_cell,
    parse_arms,
    parse_synthetic_sets,
    plan_cell,
)
from utils.transfer.methods import StageSettings, plan_stages

BRIDGE = StageSettings(90, 5e-4, mixup_alpha=0.2)
REST = StageSettings(0, 0.0, batch_norm="train", weight_decay=0.1)
RECIPE = Recipe(1e-4, 30)


def stages_of(name, num_shots=4):
    return plan_cell(make_cell(Arm(name, name, "dsi"), num_shots, 0, RECIPE, BRIDGE), REST)


def test_matched_methods_take_the_steps_of_both_stages():
    bridge, real = StageSettings(90, 5e-4), StageSettings(30, 1e-4)
    for method in ("vanilla", "mix"):
        (stage,) = plan_stages(method, bridge, real, match_steps=True)
        assert stage.settings.max_steps == 120
    assert [stage.settings.max_steps for stage in plan_stages("bridged", bridge, real)] == [90, 30]


@pytest.mark.parametrize("name", VARIANTS)
def test_all_methods_but_vanilla_and_synthetic_only_take_the_same_steps(name):
    num_steps = sum(stage.settings.max_steps for stage in stages_of(name))
    assert num_steps == {"vanilla": 30, "synthetic_only": 90}.get(name, 120)


def test_variants_differ_from_their_rivals_in_what_their_name_says():
    def differences(name, rival):
        ours, theirs = stages_of(name), stages_of(rival)
        return {
            (stage.name, field.name): getattr(stage.settings, field.name)
            for stage, other in zip(ours, theirs)
            for field in dataclasses.fields(StageSettings)
            if getattr(stage.settings, field.name) != getattr(other.settings, field.name)
        } | {
            (stage.name, "head"): stage.head_init
            for stage, other in zip(ours, theirs)
            if stage.head_init != other.head_init
        }

    kept_head = {("stage2", "head"): "keep", ("stage2", "head_learning_rate_factor"): 1.0}
    no_mixup = {("stage1", "mixup_alpha"): 0.0}
    assert differences("vanilla_matched", "vanilla") == {("vanilla", "max_steps"): 120}
    assert differences("vanilla_mixup", "vanilla_matched") == {("vanilla", "mixup_alpha"): 0.2}
    assert differences("mix_mixup", "mix") == {("mix", "mixup_alpha"): 0.2}
    assert differences("bridged_keep", "bridged") == kept_head
    assert differences("bridged_no_mixup", "bridged") == no_mixup
    assert differences("bridged_plain", "bridged") == kept_head | no_mixup
    assert differences("bridged_recalibrate", "bridged") == {("stage2", "batch_norm"): "recalibrate"}
    assert differences("bridged_imprint", "bridged_keep") == {("stage2", "head"): "imprint"}
    assert VARIANTS["mix_balanced"].mix_ratio == 1.0
    warmup = stages_of("bridged_head_warmup")
    assert [(stage.name, stage.settings.max_steps, stage.settings.freeze_backbone) for stage in warmup] == [
        ("stage1", 90, False), ("stage2_head", 15, True), ("stage2", 15, False),
    ]  # fmt: skip
    assert warmup[0] == stages_of("bridged")[0]


def test_a_stage_takes_what_recipe_and_variant_leave_open_from_the_shared_settings():
    (stage,) = stages_of("vanilla")
    assert (stage.settings.batch_norm, stage.settings.weight_decay) == ("train", 0.1)
    assert (stage.settings.learning_rate, stage.settings.head_learning_rate_factor) == (1e-4, 10.0)


def test_runs_that_are_the_same_are_one_cell():
    vanilla, alone = Arm("vanilla", "vanilla", "dsi"), Arm("synthetic_only", "synthetic_only", "dsi")
    assert make_cell(vanilla, 1, 0, RECIPE, BRIDGE, 500) == make_cell(vanilla, 1, 0, RECIPE, BRIDGE, 1000)
    assert make_cell(alone, 1, 0, RECIPE, BRIDGE) == make_cell(alone, 4, 0, Recipe(1e-3, 9), BRIDGE)
    assert make_cell(vanilla, 1, 0, RECIPE, BRIDGE) != make_cell(vanilla, 4, 0, RECIPE, BRIDGE)
    assert make_cell(alone, 1, 0, RECIPE, BRIDGE, 500) != make_cell(alone, 1, 0, RECIPE, BRIDGE, 1000)


def test_unsearched_shots_take_the_nearest_smaller_recipe():
    def entry(rate):
        return {"learning_rate": rate, "max_steps": 30, "head_learning_rate_factor": None}

    chosen = {"bridged": {"2": entry(1e-4), "8": entry(2e-4)}}
    arm = Arm("bridged@plain", "bridged", "plain")
    assert [look_up_recipe(chosen, arm, n).learning_rate for n in (1, 4, 16, None)] == [1e-4, 1e-4, 2e-4, 2e-4]
    chosen["bridged"]["all"] = entry(4e-4)
    assert [look_up_recipe(chosen, arm, n).learning_rate for n in (16, None)] == [2e-4, 4e-4]
    assert look_up_recipe({"bridged": {"all": entry(4e-4)}}, arm, 1).learning_rate == 4e-4
    with pytest.raises(UserError, match="--settings: has no recipe for 'mix'; it has bridged"):
        look_up_recipe(chosen, Arm("mix", "mix", "dsi"), 1)


def test_choice_is_the_best_mean():
    low, high = Recipe(1e-4, 30), Recipe(1e-3, 30)
    assert choose_best({low: [0.5, 0.6], high: [0.9, 0.1]}) == (low, pytest.approx(0.55))


@pytest.mark.parametrize("methods", [["nonsense"], ["bridged@nowhere"], ["mix", "mix"]])
def test_bad_methods_are_user_errors(methods):
    with pytest.raises(UserError, match="--methods"):
        parse_arms(methods, ["dsi"])


def test_synthetic_sets_take_names_or_one_bare_path():
    assert parse_synthetic_sets(["some/path"]) == {"dsi": "some/path"}
    assert parse_synthetic_sets(["a=x-{seed}", "b=y"]) == {"a": "x-{seed}", "b": "y"}
    with pytest.raises(UserError, match="NAME=PATH"):
        parse_synthetic_sets(["a=x", "y"])
