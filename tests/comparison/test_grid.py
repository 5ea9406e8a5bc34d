import pytest

from utils.cli.errors import UserError
from utils.comparison.grid import Recipe, Row, look_up_recipe, make_cell, parse_rows, parse_synthetic_sets, plan_cell
from utils.comparison.search import choose_best
from utils.transfer.methods import StageSettings

BRIDGE = StageSettings(90, 5e-4, mixup_alpha=0.2)
REST = StageSettings(0, 0.0, batch_norm="train", weight_decay=0.1)
RECIPE = Recipe(1e-4, 30)


def row_of(name, synthetic="dsi", volume=None):
    return Row(name, name.partition("@")[0], synthetic, volume)


def stages_of(name, num_shots=4):
    return plan_cell(make_cell(row_of(name), num_shots, 0, RECIPE, BRIDGE), REST)


def test_a_stage_takes_settings_not_in_recipe_or_method_from_the_shared_ones():
    (stage,) = stages_of("vanilla")
    assert (stage.settings.batch_norm, stage.settings.weight_decay) == ("train", 0.1)
    assert (stage.settings.learning_rate, stage.settings.head_learning_rate_factor) == (1e-4, 10.0)


def test_runs_that_are_the_same_are_one_cell():
    vanilla, alone = row_of("vanilla"), row_of("synthetic_only")
    assert make_cell(row_of("vanilla", volume=500), 1, 0, RECIPE, BRIDGE) == make_cell(vanilla, 1, 0, RECIPE, BRIDGE)
    assert make_cell(alone, 1, 0, RECIPE, BRIDGE) == make_cell(alone, 4, 0, Recipe(1e-3, 9), BRIDGE)
    assert make_cell(vanilla, 1, 0, RECIPE, BRIDGE) != make_cell(vanilla, 4, 0, RECIPE, BRIDGE)
    assert make_cell(row_of("mix", volume=5), 1, 0, RECIPE, BRIDGE) != make_cell(row_of("mix"), 1, 0, RECIPE, BRIDGE)


def test_unsearched_shots_take_the_nearest_smaller_recipe():
    def entry(rate):
        return {"learning_rate": rate, "max_steps": 30, "head_learning_rate_factor": None}

    chosen = {"bridged": {"2": entry(1e-4), "8": entry(2e-4)}}
    row = row_of("bridged@plain", "plain")
    assert [look_up_recipe(chosen, row, n).learning_rate for n in (1, 4, 16, None)] == [1e-4, 1e-4, 2e-4, 2e-4]
    chosen["bridged"]["all"] = entry(4e-4)
    assert [look_up_recipe(chosen, row, n).learning_rate for n in (16, None)] == [2e-4, 4e-4]
    assert look_up_recipe({"bridged": {"all": entry(4e-4)}}, row, 1).learning_rate == 4e-4


def test_choice_is_the_best_mean():
    low, high = Recipe(1e-4, 30), Recipe(1e-3, 30)
    assert choose_best({low: [0.5, 0.6], high: [0.9, 0.1]}, "a search") == (low, pytest.approx(0.55))


@pytest.mark.parametrize("methods", [["nonsense"], ["bridged@nowhere"], ["mix", "mix"]])
def test_bad_methods_are_user_errors(methods):
    with pytest.raises(UserError, match="--methods"):
        parse_rows(methods, ["dsi"])


def test_synthetic_sets_take_names_or_one_bare_path():
    assert parse_synthetic_sets(["some/path"]) == {"dsi": "some/path"}
    assert parse_synthetic_sets(["a=x-{seed}", "b=y"]) == {"a": "x-{seed}", "b": "y"}
    with pytest.raises(UserError, match="NAME=PATH"):
        parse_synthetic_sets(["a=x", "y"])
