from dataclasses import dataclass, field
from typing import Literal

import pytest

from utils.cli.errors import UserError, run_script
from utils.cli.parsing import ScriptArgumentParser


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
    arguments = parse(str(recipe), "--steps", "9")
    assert arguments == Arguments(5e-5, ["b", "c"], False, "x", 9)


def test_an_optional_value_may_be_empty_in_a_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text("steps: null\nrates:\n")
    assert parse(str(tmp_path / "r.yaml")) == Arguments()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("learning_rat: 1", "key 'learning_rat' is no flag of this script, did you mean learning_rate?"),
        ("learning_rate: fast", "'learning_rate: fast'"),
        ("kind: z", "'kind: z'"),
        ("steps: [1, 2]", "'steps' takes one value"),
        ("flip: null", "'flip' is empty; give a value, or leave it out for True"),
        ("learning_rate:", "'learning_rate' is empty; give a value, or leave it out for 0.001"),
        ("flip: {a: 1}", "'flip' takes one value, the recipe gives a mapping"),
        ("steps: {}", "'steps' takes one value, the recipe gives a mapping"),
        ("learning_rate: .nan", "'learning_rate: nan': must be a finite number of at most 1e+30, got nan"),
        ("rates: [1, .inf]", "'rates: inf': must be a finite number of at most 1e+30, got inf"),
        ("rates: [1, fast]", "'rates: fast': invalid float value"),
        ("- a", "must be a mapping"),
        ("a: [", "malformed"),
    ],
)
def test_a_bad_recipe_is_an_error_that_names_file_and_key(tmp_path, recipe, message):
    path = tmp_path / "r.yaml"
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


def test_a_missing_recipe_is_an_error():
    with pytest.raises(UserError, match="no-such.yaml: recipe cannot be read"):
        parse("no-such.yaml")


@pytest.mark.parametrize("argv", [["--learning_rat", "1"], ["--steps", "many"], ["--kind", "z"], ["--step", "1"]])
def test_bad_flags_are_an_error_that_names_them(argv):
    with pytest.raises(UserError, match=argv[0].replace("--", "--?")):
        parse(*argv)


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "1e31"])
def test_a_number_that_is_not_finite_is_refused_for_every_flag(value):
    for argv in ([f"--learning_rate=-{value}"], ["--rates", "1", value]):
        with pytest.raises(UserError, match="^--(learning_rate|rates): must be a finite number of at most 1e.30, got "):
            parse(*argv)


def test_a_value_out_of_range_is_found_before_the_dataclass_acts_on_it():
    @dataclass
    class Acting:
        save_steps: int = 1

        def __post_init__(self):
            assert self.save_steps

    with pytest.raises(UserError, match="^--save_steps 0: must be above 0"):
        ScriptArgumentParser(Acting).parse(["--save_steps", "0"])


def test_a_user_error_ends_the_script_with_one_line_and_status_2(capsys):
    def main():
        parse("--learning_rate", "-1")

    with pytest.raises(SystemExit) as exit_info:
        run_script(main)
    captured = capsys.readouterr()
    assert exit_info.value.code == 2
    assert captured.err.count("\n") == 1
    assert "--learning_rate -1.0: must be above 0" in captured.err
    assert captured.out == ""


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)
