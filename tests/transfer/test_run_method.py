"""A method is one row: both scripts find it by its name, and train the same classifier."""

import re
from dataclasses import replace

import numpy as np
import pytest

import compare_transfer
import train_bridged
from utils.cli.records import read_record
from utils.transfer import run_method as run_method_module
from utils.transfer.methods import METHODS, STAGE_1, STAGE_2, Method

pytest_plugins = ["tests.transfer.fixtures"]
NAMES = ["bridged_head_warmup", "bridged_recalibrate", "bridged_domain_norm", "bridged_adversarial",
         "bridged_coral", "mix_balanced", "vanilla_mixup"]  # fmt: skip
NEW = Method(
    "a first stage, the head alone, then all of it",
    (
        STAGE_1,
        replace(STAGE_2, name="head", settings={"freeze_backbone": True}),
        replace(STAGE_2, start="head", head_init="keep", settings={"mixup_alpha": 0.3}),
    ),
)


@pytest.fixture
def outputs(monkeypatch):
    """A list that collects the logits of each method."""
    seen = []
    predict = run_method_module.predict

    def recorded(*args):
        logits, labels = predict(*args)
        seen.append(logits)
        return logits, labels

    monkeypatch.setattr(run_method_module, "predict", recorded)
    return seen


@pytest.fixture
def run(classifiers, synthetic_dir, tmp_path):
    shared = ["--synthetic_dataset", str(synthetic_dir), "--model_name_or_path", classifiers["resnet"],
              "--max_eval_samples", "6", "--num_shots", "2"]  # fmt: skip

    def run_both(name: str) -> tuple[dict, dict]:
        """Return `bridged_config.json` and `comparison.json` of one method at three and two steps."""
        bridged, compared = tmp_path / "bridged", tmp_path / "compared"
        steps = ["--bridge_max_steps", "3", "--max_steps", "2", "--learning_rate", "1e-3"]
        counts = ["--bridge_step_counts", "3", "--step_counts", "2", "--learning_rates", "1e-3"]
        if not METHODS[name].takes_steps:
            steps, counts = [], []
        train_bridged.main([*shared, "--method", name, *steps, "--use_cpu", "--seed", "1", "--few_shot_seed", "1",
                            "--output_dir", str(bridged)])  # fmt: skip
        bridge_rate = ["--bridge_learning_rates", "1e-3"] if "synthetic" in METHODS[name].kinds else []
        compare_transfer.main([*shared, "--methods", name, *counts, *bridge_rate, "--seeds", "1",
                               "--output_dir", str(compared)])  # fmt: skip
        return read_record(bridged / "bridged_config.json"), read_record(compared / "comparison.json")

    return run_both


def test_both_scripts_train_a_new_row_by_its_name(run, outputs, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "in_three", NEW)
    config, comparison = run("in_three")
    assert [(stage["name"], stage["start"]) for stage in config["stages"]] == [
        ("stage1", None), ("head", "stage1"), ("stage2", "head"),
    ]  # fmt: skip
    assert (config["method"], config["head_init"], config["match_steps"]) == ("in_three", "keep", False)
    assert [entry["method"] for entry in comparison["summary"]] == ["in_three"]
    assert comparison["summary"][0]["steps"] == 3 + 2 + 2
    ours, theirs = outputs
    assert np.array_equal(ours, theirs)
    for script in (train_bridged, compare_transfer):
        with pytest.raises(SystemExit):
            script.main(["--help"])
        assert re.search(f"in_three +{NEW.description}", capsys.readouterr().out)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_the_comparison_is_the_method_of_that_name(run, outputs, name):
    run(name)
    ours, theirs = outputs
    assert np.array_equal(ours, theirs)


def test_a_linear_probe_costs_its_images_once_and_no_steps_and_has_no_recipe(run):
    config, comparison = run("linear_probe")
    (entry,) = comparison["summary"]
    assert (entry["steps"], entry["images_seen"]) == (0, 6) and entry["seconds"] > 0
    assert list(comparison["settings"]) == ["stage1"]
    assert config["learning_rate_reason"] is None
