import importlib

import pytest

from utils.cli.errors import UserError
from utils.cli.parsing import ScriptArgumentParser
from utils.cli.ranges import RANGES, check_ranges

SCRIPTS = ("train_dsi", "generate_synthetic", "quality_report", "train_bridged", "compare_transfer")
ANY_NUMBER = {"local_rank"}  # -1 outside torch.distributed, which sets it


def test_every_numeric_flag_of_every_script_has_a_range_and_none_has_two(monkeypatch):
    parsers = []

    def parse(self, argv=None):
        parsers.append(self)
        raise UserError("seen")

    monkeypatch.setattr(ScriptArgumentParser, "parse", parse)
    for script in SCRIPTS:
        with pytest.raises(UserError, match="seen"):
            importlib.import_module(script).main([])
    numeric = {action.dest for parser in parsers for action in parser._actions if action.type in (int, float)}
    names = [name for _, _, group in RANGES for name in group]
    assert len(parsers) == len(SCRIPTS) and len(set(names)) == len(names)
    assert set(names) == numeric - ANY_NUMBER
    for parser in parsers:
        check_ranges({action.dest: action.default for action in parser._actions})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.0}, "--learning_rate 0.0: must be above 0."),
        ({"guidance_scale": [3.0, 0.0]}, "--guidance_scale 0.0: must be above 0."),
        ({"max_steps": 0}, "--max_steps 0: must be above 0, or left out to train for epochs."),
        ({"max_steps": -2}, "--max_steps -2: must be above 0, or left out to train for epochs."),
        ({"save_steps": 0}, "--save_steps 0: must be above 0."),
        ({"seed": 2**32}, "--seed 4294967296: must be 0 or above, and below 2**32."),
        ({"train_val_split": 1.0}, "--train_val_split 1.0: must be above 0 and below 1."),
        ({"label_smoothing_factor": 1.0}, "--label_smoothing_factor 1.0: must be 0 or above, and below 1."),
        ({"image_quality": 101}, "--image_quality 101: must be from 1 to 100."),
        ({"weight_decay": float("nan")}, "--weight_decay nan: must be 0 or above."),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_right(values, message):
    with pytest.raises(UserError) as error:
        check_ranges(values)
    assert str(error.value) == message


def test_values_at_the_ends_of_ranges_and_those_not_given_pass():
    check_ranges({"max_steps": -1, "dropout": 0.0, "weight_decay": 0, "seed": 2**32 - 1, "image_quality": 100})
    check_ranges({"num_shots": None, "volumes": None, "learning_rates": [1e-5, 1e5]})
