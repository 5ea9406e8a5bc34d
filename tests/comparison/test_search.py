"""A chosen_settings.json, perhaps edited by hand: read before any model, with one-line errors."""

import json

import pytest

import compare_transfer
from utils.cli.errors import UserError
from utils.cli.records import read_record, write_record
from utils.comparison.grid import Row
from utils.comparison.search import check_settings, read_settings, write_settings
from utils.transfer.methods import StageSettings

STAGE_1 = {"max_steps": 9, "learning_rate": 1e-4, "head_learning_rate_factor": 10.0, "mixup_alpha": 0.2}
RECIPE = {"learning_rate": 1e-3, "max_steps": 3, "head_learning_rate_factor": None, "validation_accuracy": None}
GOOD = {"stage1": STAGE_1, "bridged": {"1": RECIPE, "all": RECIPE}}


def without(mapping: dict, name: str) -> dict:
    return {key: value for key, value in mapping.items() if key != name}


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"bridged": {"1": 5}}, "bridged with 1 shots is 5, must be a mapping of settings to values"),
        ({"bridged": 5}, "bridged is 5, must be a mapping of shots to recipes"),
        ({"bridged": [RECIPE]}, "bridged is .*, must be a mapping of shots to recipes"),
        ({"bridged": {"few": RECIPE}}, "bridged is .*, must be a mapping of shots to recipes"),
        ({"bridged": {"1": without(RECIPE, "max_steps")}}, "bridged with 1 shots has no max_steps"),
        ({"bridged": {"1": RECIPE | {"max_steps": 2.5}}}, "max_steps of .* is 2.5, must be a whole number above 0"),
        ({"mix": {"1": RECIPE | {"learning_rate": "1e-3"}}}, "learning_rate of mix .* is '1e-3', must be a number abo"),
        ({"bridged": {"1": RECIPE | {"learning_rate": float("nan")}}}, "learning_rate of .* is nan, must be a number"),
        ({"bridged": {"1": RECIPE | {"head_learning_rate_factor": 0}}}, "is 0, must be a number above 0, or null"),
        ({"stage1": [STAGE_1]}, "stage1 is .*, must be a mapping of settings to values"),
        ({"stage1": None}, "stage1 is None, must be a mapping of settings to values"),
        ({"stage1": without(STAGE_1, "mixup_alpha")}, "stage1 has no mixup_alpha"),
        ({"stage1": STAGE_1 | {"max_steps": True}}, "max_steps of stage1 is True, must be a whole number above 0"),
        ({"stage1": STAGE_1 | {"mixup_alpha": -1}}, "mixup_alpha of stage1 is -1, must be a number, 0 or above"),
        ({"stage1": STAGE_1 | {"seeps": 2}}, "stage1 has an unknown seeps"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_a_one_line_error_before_the_synthetic_set_is_opened(changed, problem, tmp_path):
    path = tmp_path / "chosen.json"
    path.write_text(json.dumps({"schema_version": 1, **GOOD, **changed}))  # `write_record` writes no NaN
    with pytest.raises(UserError, match=rf"^--settings \S+: not a chosen_settings.json of this script \(.*{problem}"):
        compare_transfer.main(["--synthetic_dataset", "nowhere", "--methods", "bridged", "--settings", str(path)])


def test_recipes_of_several_classifiers_are_found_by_their_labels(tmp_path):
    path = tmp_path / "chosen.json"
    other = GOOD | {"stage1": STAGE_1 | {"max_steps": 5}}
    write_record(path, {"classifiers": {"vit": GOOD, "resnet18": other}})
    rows = [Row("bridged", "bridged", "dsi")]
    assert check_settings(str(path), rows, "vit") == GOOD
    settings = read_settings(str(path), rows, StageSettings(0, 0.0), "resnet18")
    assert settings["stage1"]["max_steps"] == 5
    arguments = ["--synthetic_dataset", "nowhere", "--methods", "bridged", "--settings", str(path)]
    with pytest.raises(UserError, match="has no recipes for the classifier 'swin'; it has vit, resnet18.$"):
        compare_transfer.main([*arguments, "--model_name_or_path", "user/vit", "user/swin"])
    write_record(path, {"classifiers": {"vit": GOOD, "resnet18": without(GOOD, "stage1")}})
    with pytest.raises(UserError, match="not a chosen_settings.json of this script .stage1 is None"):
        compare_transfer.main([*arguments, "--model_name_or_path", "user/vit", "user/resnet18"])
    write_record(path, {"classifiers": [GOOD]})
    with pytest.raises(UserError, match="not a chosen_settings.json of this script .classifiers must map names to"):
        compare_transfer.main(arguments)
    # recipes of a single classifier serve any classifier
    write_record(path, GOOD)
    assert check_settings(str(path), rows, "swin") == check_settings(str(path), rows) == GOOD


def test_the_file_for_one_classifier_has_the_earlier_format(tmp_path):
    chosen = GOOD | {"stage1": STAGE_1 | {"weight_decay": 0.5}}
    write_settings(tmp_path / "one.json", {"vit": chosen})
    assert read_record(tmp_path / "one.json") == GOOD
    write_settings(tmp_path / "two.json", {"vit": chosen, "swin": chosen})
    assert read_record(tmp_path / "two.json") == {"classifiers": {"vit": GOOD, "swin": GOOD}}


def test_a_missing_file_or_method_is_an_error_before_the_synthetic_set_is_opened(tmp_path):
    with pytest.raises(UserError, match=r"gone.json: cannot be read as a record"):
        compare_transfer.main(["--synthetic_dataset", "nowhere", "--settings", str(tmp_path / "gone.json")])
    write_record(tmp_path / "chosen.json", GOOD | {"vanilla": {}})
    for method in ("vanilla", "mix"):
        with pytest.raises(UserError, match=f"^--settings .*chosen.json: has no recipe for '{method}'; it has bridged"):
            check_settings(str(tmp_path / "chosen.json"), [Row(method, method, "dsi")])
    rows = [Row("synthetic_only", "synthetic_only", "dsi"), Row("bridged@plain", "bridged", "plain")]
    assert check_settings(str(tmp_path / "chosen.json"), rows)["bridged"] == GOOD["bridged"]


def test_settings_that_are_not_searched_come_from_the_run(tmp_path, capsys):
    write_record(tmp_path / "chosen.json", GOOD | {"stage1": STAGE_1 | {"weight_decay": 0.5}})
    settings = StageSettings(0, 0.0, weight_decay=0.1)
    chosen = read_settings(str(tmp_path / "chosen.json"), [Row("bridged", "bridged", "dsi")], settings)
    assert StageSettings(**chosen["stage1"]) == StageSettings(9, 1e-4, 10.0, 0.2, weight_decay=0.1)
    assert "was searched with weight_decay 0.5; this run uses its own values" in capsys.readouterr().out
