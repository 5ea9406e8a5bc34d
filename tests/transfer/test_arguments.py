"""The needs of the flags of train_bridged.py, against the stages that result."""

import dataclasses

import pytest

from tests.command_lines import script_parsers
from utils.cli.options import list_needs
from utils.transfer.arguments import BridgedTrainingArguments, BridgeStageArguments, StageArguments
from utils.transfer.methods import METHODS, plan_stages, stage_settings

NUM_IMAGES = {"real": 100, "synthetic": 1000, "both": 1100}
OF_STAGES = [*dataclasses.fields(StageArguments), *dataclasses.fields(BridgeStageArguments)]
NAMES = [field.name for field in OF_STAGES] + [
    "num_train_epochs", "max_steps", "label_smoothing_factor", "head_init", "mix_ratio",
]  # fmt: skip
NEEDS = {
    field.name: needs for kind in script_parsers()["train_bridged.py"].dataclass_types
    for field, needs in list_needs(kind)
}  # fmt: skip


def other_value(name: str, value):
    """Return a value that differs from a flag's default and from the value of every method."""
    if name in ("augmentation", "bridge_augmentation"):
        return "trivialaugment"
    return {"frozen": "train", False: True}.get(value, 3)


@pytest.mark.parametrize("match_steps", [None, True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_flag_changes_the_stages_of_a_method_exactly_if_its_needs_are_met(method, match_steps):
    defaults = vars(script_parsers()["train_bridged.py"].parse_known_args([])[0])
    defaults |= {"learning_rate": 1e-3, "method": method, "match_steps": match_steps}
    of_method = {} if match_steps is None else {"match_steps": match_steps}

    def stages(given: dict) -> tuple:
        row = METHODS[method].with_flags(of_method | given)
        bridge, real = stage_settings(row, defaults | given, NUM_IMAGES, num_processes=1)
        return row.mix_ratio, plan_stages(row, bridge, real, images_per_class=4)

    for name in NAMES:
        values = ["reset", "keep"] if name == "head_init" else [other_value(name, defaults[name])]
        changes = any(stages({name: value}) != stages({}) for value in values)
        is_met = all(need.is_met(defaults | {name: values[-1]}) for need in NEEDS[name])
        assert changes == is_met, name
    assert BridgedTrainingArguments._inherited_needs.keys() <= NEEDS.keys()
