import pytest

from utils.cli.errors import UserError
from utils.transfer.comparison import (
    Arm,
    Recipe,
    choose_recipe,
    describe_findings,
    look_up_recipe,
    parse_arms,
    parse_synthetic_sets,
    summarise,
)
from utils.transfer.methods import StageSettings, plan_stages


def test_matched_methods_take_the_steps_of_both_stages():
    bridge, real = StageSettings(90, 5e-4), StageSettings(30, 1e-4)
    for method in ("vanilla", "mix"):
        (stage,) = plan_stages(method, bridge, real, match_steps=True)
        assert stage.settings.max_steps == 120
    assert [stage.settings.max_steps for stage in plan_stages("bridged", bridge, real)] == [90, 30]


def test_gain_is_paired_by_seed_and_a_loss_is_said():
    accuracies = {"vanilla_matched": {1: {0: 0.5, 1: 0.6}}, "bridged": {1: {0: 0.4, 1: 0.5}}}
    summary = summarise(accuracies, "vanilla_matched")
    assert summary["bridged"][1]["gain"] == pytest.approx(-10)
    assert summary["bridged"][1]["gain_std"] == pytest.approx(0, abs=1e-9)
    assert "loses (-10.0 points) at 1 shot" in describe_findings(summary, "vanilla_matched", 2)


def test_unsearched_shots_take_the_nearest_smaller_recipe():
    def entry(rate):
        return {"learning_rate": rate, "max_steps": 30, "head_learning_rate_factor": None}

    chosen = {"bridged": {"2": entry(1e-4), "8": entry(2e-4)}}
    arm = Arm("bridged@plain", "bridged", "plain")
    assert [look_up_recipe(chosen, arm, n).learning_rate for n in (1, 4, 16)] == [1e-4, 1e-4, 2e-4]


def test_choice_is_the_best_mean():
    low, high = Recipe(1e-4, 30), Recipe(1e-3, 30)
    assert choose_recipe({low: [0.5, 0.6], high: [0.9, 0.1]}) == (low, pytest.approx(0.55))


@pytest.mark.parametrize("methods", [["nonsense"], ["bridged@nowhere"], ["mix", "mix"]])
def test_bad_methods_are_user_errors(methods):
    with pytest.raises(UserError, match="--methods"):
        parse_arms(methods, ["dsi"])


def test_synthetic_sets_take_names_or_one_bare_path():
    assert parse_synthetic_sets(["some/path"]) == {"dsi": "some/path"}
    assert parse_synthetic_sets(["a=x-{seed}", "b=y"]) == {"a": "x-{seed}", "b": "y"}
    with pytest.raises(UserError, match="NAME=PATH"):
        parse_synthetic_sets(["a=x", "y"])
