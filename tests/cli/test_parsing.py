from dataclasses import dataclass, field
from typing import Literal

import pytest
from transformers.hf_argparser import string_to_bool

from tests.command_lines import script_parsers
from utils.cli.errors import UserError
from utils.cli.parsing import RANGES, ScriptArgumentParser, check_ranges

ANY_NUMBER = {"local_rank"}  # -1 outside torch.distributed, which sets it


@dataclass
class Arguments:
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak."})
    names: list[str] = field(default_factory=lambda: ["a"])
    flip: bool = True
    kind: Literal["x", "y"] = "x"
    steps: int | None = None
    rates: list[float] | None = None


def parse(*argv):
    return ScriptArgumentParser(Arguments).parse(argv)[0]


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("learning_rate: 5e-5\nflip: false\nnames: [b, c]\nsteps: 7\n")
    assert parse(str(recipe), "--steps", "9") == Arguments(5e-5, ["b", "c"], False, "x", 9)
    recipe.write_text("steps: null\nrates:\nnames: b\n")  # an optional value may be empty, a list may have one entry
    assert parse(str(recipe)) == Arguments(names=["b"])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("learning_rat: 1", "key 'learning_rat': not a flag of this script, did you mean learning_rate?"),
        ("learning_rate: fast", "'learning_rate: fast'"),
        ("kind: z", "'kind: z'"),
        ("steps: [1, 2]", "'steps' takes one value, the recipe gives a list"),
        ("flip: null", "'flip' is empty; give a value, or remove the key to use True"),
        ("learning_rate:", "'learning_rate' is empty; give a value, or remove the key to use 0.001"),
        ("flip: {a: 1}", "'flip' takes one value, the recipe gives a mapping"),
        ("rates: {}", "'rates' takes one value, the recipe gives a mapping"),
        ("learning_rate: .nan", "'learning_rate: nan': must be a finite number of at most 1e+30, got nan"),
        ("rates: [1, .inf]", "'rates: inf': must be a finite number of at most 1e+30, got inf"),
        ("rates: [1, fast]", "'rates: fast': invalid float value"),
        ("- a", "must be a mapping"),
        ("a: [", "malformed"),
        (None, "recipe cannot be read"),
    ],
)
def test_a_bad_recipe_is_an_error_that_names_file_and_key(tmp_path, recipe, message):
    path = tmp_path / "r.yaml"
    if recipe is not None:
        path.write_text(recipe)
    with pytest.raises(UserError) as error:
        parse(str(path))
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_help_has_the_docstring_as_written_and_each_flag_once():
    text = ScriptArgumentParser(Arguments, description="First.\n\n    a command  --steps 3").format_help()
    assert "First.\n\n    a command  --steps 3\n" in text
    assert "  --learning_rate RATE" in text
    assert "(default: 0.001)" in text
    assert "--learning-rate" not in text
    assert "default: None" not in text
    assert "-h, --help" in text


@pytest.mark.parametrize("argv", [["--learning_rat", "1"], ["--steps", "many"], ["--kind", "z"], ["--step", "1"]])
def test_bad_flags_are_an_error_that_names_them(argv):
    with pytest.raises(UserError, match=argv[0].replace("--", "--?")):
        parse(*argv)


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "1e31"])
def test_a_number_that_is_not_finite_is_refused_for_every_flag(value):
    for argv in ([f"--learning_rate=-{value}"], ["--rates", "1", value]):
        with pytest.raises(UserError, match="^--(learning_rate|rates): must be a finite number of at most 1e.30, got "):
            parse(*argv)


def test_every_numeric_flag_of_every_script_has_a_range_and_none_has_two():
    parsers = script_parsers().values()
    numeric = {action.dest for parser in parsers for action in parser._actions if action.type in (int, float)}
    names = [name for _, _, group in RANGES for name in group]
    assert len(set(names)) == len(names)
    assert set(names) == numeric - ANY_NUMBER
    for parser in parsers:
        check_ranges({action.dest: action.default for action in parser._actions})


def test_every_boolean_is_on_with_its_name_and_off_with_the_prefix_no():
    seen = set()
    for parser in script_parsers().values():
        for name in {action.dest for action in parser._actions if action.type is string_to_bool}:
            seen.add(name)
            for words, value in [
                ([f"--{name}"], True),
                ([f"--{name}", "true"], True),
                ([f"--{name}", "false"], False),
                ([f"--no_{name}"], False),
                ([f"--no-{name.replace('_', '-')}"], False),
            ]:
                namespace, unknown = parser.parse_known_args(words)
                assert (getattr(namespace, name), unknown) == (value, [])
    assert {"hub_private_repo", "match_steps", "tf32", "torch_compile", "random_flip", "push_to_hub"} <= seen


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("learning_rate", 0.0, "must be above 0."),
        ("guidance_scale", [3.0, -1.0], "must be 0 or above."),
        ("max_steps", 0, "must be above 0, or left out to train for epochs."),
        ("head_warmup_steps", 1.5, "must be 0 or above, and whole from 1 on."),
        ("max_steps", -2, "must be above 0, or left out to train for epochs."),
        ("save_steps", 0, "must be above 0."),
        ("seed", 2**32, "must be 0 or above, and below 2**32."),
        ("train_val_split", 1.0, "must be above 0 and below 1."),
        ("label_smoothing_factor", 1.0, "must be 0 or above, and below 1."),
        ("image_quality", 101, "must be from 1 to 100."),
        ("weight_decay", float("nan"), "must be 0 or above."),
    ],
)
def test_a_value_out_of_range_is_named_with_the_valid_range(flag, value, message):
    with pytest.raises(UserError) as error:
        check_ranges({flag: value})
    assert str(error.value) == f"--{flag} {value[-1] if isinstance(value, list) else value}: {message}"


def test_values_at_the_ends_of_ranges_and_missing_ones_pass():
    check_ranges({"max_steps": -1, "dropout": 0.0, "weight_decay": 0, "seed": 2**32 - 1, "image_quality": 100})
    check_ranges({"num_shots": None, "volumes": None, "learning_rates": [1e-5, 1e5]})


def test_a_value_out_of_range_is_found_before_the_dataclass_acts_on_it():
    @dataclass
    class Acting:
        save_steps: int = 1

        def __post_init__(self):
            assert self.save_steps

    with pytest.raises(UserError, match="^--save_steps 0: must be above 0"):
        ScriptArgumentParser(Acting).parse(["--save_steps", "0"])


def test_every_boolean_is_refused_if_turned_both_on_and_off():
    for script, parser in script_parsers().items():
        for name in {action.dest for action in parser._actions if action.type is string_to_bool}:
            dashed = name.replace("_", "-")
            for words, message in [
                ([f"--{name}", "true", f"--no_{name}"], f"--{name} true: not together with --no_{name};"),
                ([f"--no-{dashed}", f"--{name}"], f"--{name}: not together with --no-{dashed};"),
                ([f"--{name}=yes", f"--{dashed}", "0"], f"--{name}=yes: not together with --{dashed} 0;"),
            ]:
                with pytest.raises(UserError) as error:
                    parser.parse(words)
                assert str(error.value) == f"{message} give one of the two.", script


def test_a_boolean_may_be_given_twice_and_flags_win_over_a_recipe(tmp_path):
    (recipe := tmp_path / "r.yaml").write_text("flip: true\n")
    assert not parse(str(recipe), "--no_flip").flip
    assert not parse("--flip", "false", "--no_flip", "--steps", "1", "--steps", "2").flip
    with pytest.raises(UserError, match="^--flip: Truthy value expected: got maybe"):
        parse("--flip", "maybe", "--no_flip")
