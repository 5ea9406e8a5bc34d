"""The setting that benchmarks.generate_quality chooses, the sets that it draws, and a whole run at tiny size."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

from benchmarks import generate_quality, quality_sets, quality_settings, report
from benchmarks.quality_plot import draw_results
from benchmarks.quality_scores import SCORES, compare_features
from benchmarks.quality_sets import SetToDraw
from benchmarks.quality_settings import (
    LOOP,
    SETTINGS,
    Result,
    choose,
    describe_choice,
    is_good_enough,
    list_rows,
    pareto_front,
    select_settings,
)
from generate_synthetic import SamplingArguments
from tests.synthesis.tokens import save_token
from utils.comparison import cells
from utils.comparison.statistics import Gain
from utils.quality.features import Part

pytest_plugins = ["tests.synthesis.fixtures", "tests.transfer.fixtures"]
BY_NAME = {setting.name: setting for setting in SETTINGS}


def make_result(name, speed, accuracy=60.0, frechet=900.0, loop=60.0) -> Result:
    gain = Gain(accuracy - loop, accuracy - loop - 2, accuracy - loop + 2, 2000)
    scores = {score: [0.5, 0.6] for score in SCORES} | {"frechet": [frechet - 10, frechet + 10]}
    return Result(BY_NAME[name], [10 * speed] * 2, [speed] * 2, [accuracy - 1, accuracy + 1], gain, scores)


LOOP_RESULT = make_result("loop", 1.0)


def names_of(results):
    return [result.setting.name for result in results]


def test_the_fastest_good_enough_setting_is_chosen():
    results = [
        LOOP_RESULT,
        make_result("ddim-12", 2.0, accuracy=70, frechet=800),  # better, and slower
        make_result("dpm-8", 3.0, accuracy=60, frechet=945),  # just good enough
        make_result("dpm-6", 4.0, accuracy=59.9),
        make_result("dpm-4", 5.0, accuracy=70, frechet=946),
    ]
    assert [is_good_enough(result, LOOP_RESULT) for result in results] == [True, True, True, False, False]
    assert choose(results).setting.name == "dpm-8"
    answer, reason = describe_choice(results)
    assert answer.startswith(
        "**Take `--scheduler DPMSolverMultistepScheduler --num_inference_steps 8 --guidance_scale 1.0`"
    )
    assert "3.0 times" in answer and "60.0 % (+0.0 [-2.0, 2.0] points" in answer and "945 (+5.0%)" in answer
    assert "fastest of 5 settings" in reason and "loss of 2.0 points" in reason


def test_without_a_good_enough_faster_setting_the_loops_setting_stays():
    others = [make_result("dpm-4", 5.0, accuracy=50), make_result("ddim-12", 0.9, accuracy=70)]
    assert choose([LOOP_RESULT, *others]) == LOOP_RESULT
    answer, reason = describe_choice([LOOP_RESULT, *others])
    assert answer.startswith("**Stay with the loop's setting**") and "the 2 others" in reason


def test_the_front_has_the_settings_that_no_other_beats_in_both():
    results = [
        make_result("dpm-4", 5.0, accuracy=55),
        LOOP_RESULT,
        make_result("ddim-12", 2.0, accuracy=65),
        make_result("ddim-8", 3.0, accuracy=60),
        make_result("ddim-6", 4.0, accuracy=60),
        make_result("dpm-6", 4.0, accuracy=60),
    ]
    front = pareto_front(results, lambda result: result.accuracy)
    assert names_of(front) == ["ddim-12", "ddim-6", "dpm-6", "dpm-4"]
    assert names_of(pareto_front(results, lambda result: -result.frechet)) == ["dpm-4"]


def test_speed_is_relative_to_the_loop_and_independent_of_a_busy_machine():
    busy = replace(make_result("dpm-8", 3.0), speeds=[9.0, 30.0])
    assert busy.speed == 3.0


def test_every_row_has_its_own_name_and_flags_that_the_script_has():
    assert len(BY_NAME) == len(SETTINGS) and SETTINGS[0] == LOOP
    for setting in SETTINGS:
        assert set(setting.flags) - {"lora"} <= set(SamplingArguments.__dataclass_fields__)
    assert BY_NAME["ddim-12-interval"].words[-3:] == ["--guidance_interval", "0.2", "0.8"]
    assert BY_NAME["unipc-6-guided"].flags["guidance_scale"] == 1.2 and BY_NAME["unipc-6"].flags["guidance_scale"] == 1


def test_rows_without_their_adapter_are_left_out_with_a_message(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quality_settings, "ROOT", tmp_path)
    chosen, lacking = select_settings(["adapter-4", "dpm-6"])
    assert names_of_settings(chosen) == ["loop", "dpm-6"] and names_of_settings(lacking) == ["adapter-4"]
    (tmp_path / "config.json").touch()
    generate_quality.parse_arguments(["--settings", "adapter-4", "--classifier", str(tmp_path)])
    assert capsys.readouterr().out == "adapter-4 is left out: its adapter demo/few_steps does not exist.\n"
    (tmp_path / "demo" / "few_steps").mkdir(parents=True)
    chosen, lacking = select_settings(None)
    assert chosen == list(SETTINGS) and lacking == []


def names_of_settings(settings):
    return [setting.name for setting in settings]


@pytest.mark.parametrize(("flags", "message"), [
    (["--settings", "dpm-5"], "--settings dpm-5: unknown; choose from loop, ddim-12,"),
    (["--style_tokens", "none-{seed}"], "--style_tokens none-{seed}: none-0 has no dsi_config.json; must be"),
    (["--classifier", "none"], "--classifier none: has no config.json; `make install` makes the demo's."),
    (["--num_workers", "0"], "--num_workers 0: must be at least 1."),
    (["--seeds", "1", "1"], "--seeds 1 1: duplicate values."),
])  # fmt: skip
def test_wrong_flags_are_errors(flags, message, capsys):
    with pytest.raises(SystemExit):
        generate_quality.parse_arguments(flags)
    assert message in capsys.readouterr().err


def test_the_table_marks_the_choice_and_ends_with_real_images():
    rows = list_rows([LOOP_RESULT, make_result("dpm-8", 3.0, accuracy=61)], dict.fromkeys(SCORES, 0.25))
    assert [row["setting"] for row in rows] == ["loop", "**dpm-8**", "real images"]
    assert rows[0]["to the loop's setting"] == "" and rows[1]["to the loop's setting"] == "+1.0 [-1.0, 3.0]"
    assert rows[1]["times the loop's"] == "**3.00** (3.00 to 3.00)"
    assert rows[1]["accuracy, %"] == "61.0 ± 1.4" and rows[1]["s per 1,000"] == "33.3"
    assert rows[1]["Frechet"] == "900 (+0.0%)" and rows[2]["recall"] == "0.250" and rows[2]["images/s"] == ""


def test_the_picture_names_every_line_and_point_of_both_panels(tmp_path):
    results = [
        LOOP_RESULT,
        *(make_result(name, BY_NAME[name].num_steps / 4) for name in ("dpm-8", "dpm-6", "adapter-2")),
    ]
    figure = draw_results(results, "Take dpm-8")
    for axis in figure.axes:
        texts = {text.get_text() for text in axis.texts}
        assert {result.setting.series for result in results} <= texts
        assert {"12", "8", "6", "2"} <= texts
    figure.savefig(tmp_path / "picture.png")
    assert figure.axes[1].yaxis_inverted()  # small distances are good


def test_features_are_compared_with_equal_class_counts():
    rng = np.random.default_rng(0)

    def side(num_per_class, mean):
        labels = np.tile([0, 1], num_per_class)
        features = (rng.normal(size=(len(labels), 4)) + mean + labels[:, None]).astype(np.float16)
        return features, Part(None, labels, np.arange(len(labels)), len(labels))

    reference, floor = side(60, 0.0), side(20, 0.0)
    scores = compare_features(side(20, 3.0), reference, floor, num_classes=2)
    assert set(scores["set"]) == set(scores["floor"]) == set(SCORES)
    assert scores["set"]["frechet"] > 10 * scores["floor"]["frechet"]
    assert scores["set"]["precision"] < 0.2 and scores["floor"]["precision"] > 0.7


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, tiny_pipeline_dir, real_images_dir):
    """Style tokens of two seeds, as a path pattern."""
    folder = tmp_path_factory.mktemp("tokens")
    for seed in (0, 1):
        save_token(folder / f"style-{seed}", tiny_pipeline_dir, real_images_dir)
    return str(folder / "style-{seed}")


def test_other_inputs_give_another_set(tokens, tmp_path):
    token = Path(tokens.replace("{seed}", "0"))
    drawn = SetToDraw(BY_NAME["dpm-6"], 0, token, 5, tmp_path)
    assert drawn.name == replace(drawn, work_dir=tmp_path / "other").name and drawn.num_images == 15
    others = [replace(drawn, seed=1), replace(drawn, num_images_per_class=6), replace(drawn, setting=BY_NAME["dpm-4"])]
    assert len({each.name for each in (drawn, *others)}) == 4
    before = drawn.name
    record = json.loads((token / "dsi_config.json").read_text())
    (token / "dsi_config.json").write_text(json.dumps(record | {"resolution": 32, "note": "learned again"}))
    assert replace(drawn).name != before


@pytest.mark.soak  # the tests above are about its parts
def test_a_whole_run_draws_measures_and_trains_and_repeats_nothing(
    tokens, real_images_dir, classifiers, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(report, "FOLDER", tmp_path / "nothing-is-written")
    flags = [
        "--small", "--style_tokens", tokens, "--seeds", "1", "--settings", "dpm-4", "--num_images_per_class", "5",
        "--num_workers", "2", "--max_steps", "2", "--real_images", str(real_images_dir),
        "--classifier", classifiers["resnet"], "--output_dir", str(tmp_path / "work"),
    ]  # fmt: skip
    monkeypatch.setattr(quality_sets, "LOOP_CLASSES", quality_sets.LOOP_CLASSES[:1])
    monkeypatch.setattr(quality_sets, "RECIPE", tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("{batch_size: 5, images_per_shard: 10, image_format: png, scheduler: other}")
    monkeypatch.setattr(generate_quality, "train_classifiers", one_worker(generate_quality.train_classifiers))
    first = generate_quality.main(flags)
    assert names_of(first) == ["loop", "dpm-4"]
    loop = first[0]
    assert loop.gain == Gain(0.0, 0.0, 0.0, 8) and all(
        0 <= result.accuracy <= 100 and result.frechet > 0 for result in first
    )
    printed = capsys.readouterr().out
    assert printed.count("the plain loop:") == 2 and "Quality per second" in printed
    assert (tmp_path / "work" / "generate_quality.png").stat().st_size > 10_000
    assert not (tmp_path / "nothing-is-written").exists()
    assert not (tmp_path / "work" / "stage1").exists()
    [folder] = (tmp_path / "work" / "sets").glob("dpm-4-*")
    settings = json.loads((folder / "generation_config.json").read_text())["settings"]
    assert (settings["scheduler"], settings["num_inference_steps"]) == ("DPMSolverMultistepScheduler", 4)
    assert settings["guidance_scale"] == [1.0] and settings["seed"] == 1
    assert len(load_dataset(str(folder), split="train")) == 15

    monkeypatch.setattr(quality_sets, "run_child", None)  # nor is anything drawn
    monkeypatch.setattr(cells, "run_method", None)  # or trained
    monkeypatch.setattr("benchmarks.quality_scores.extract_features", None)
    assert generate_quality.main(flags) == first


def one_worker(function):
    """Workers take seconds to import all that they need."""
    return lambda sets, judge, num_workers, max_steps: function(sets, judge, 1, max_steps)
