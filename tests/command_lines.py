"""Parses commands as users type them, with the script's own parser, without running the script."""

import shlex
from pathlib import Path

import pytest

import compare_transfer
import describe_images
import filter_synthetic
import generate_synthetic
import quality_report
import review_synthetic
import train_bridged
import train_dsi
from utils.cli.parsing import ScriptArgumentParser

MODULES = (
    train_dsi, generate_synthetic, quality_report, filter_synthetic, review_synthetic, train_bridged, compare_transfer,
    describe_images,
)  # fmt: skip
SCRIPTS = {f"{module.__name__}.py": module for module in MODULES}


class Parsed(Exception):
    """Every flag and recipe key was understood."""


def parse_flags(script: str, flags: list[str]) -> dict:
    """Return the parsed flags of a script, without running the rest of it.

    Raises:
        UserError: a flag, a key of the recipe or a value is wrong.
    """

    def parse(parser, argv=None):
        raise Parsed({key: value for group in original(parser, argv) for key, value in vars(group).items()})

    original = ScriptArgumentParser.parse
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptArgumentParser, "parse", parse)
        with pytest.raises(Parsed) as parsed:
            SCRIPTS[script].main(flags)
    return parsed.value.args[0]


def script_parsers() -> dict[str, ScriptArgumentParser]:
    """Return the parser of each script; none is run."""
    parsers = {}

    def keep(parser, argv=None):
        raise Parsed(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptArgumentParser, "parse", keep)
        for name, script in SCRIPTS.items():
            with pytest.raises(Parsed) as parsed:
                script.main([])
            [parsers[name]] = parsed.value.args
    return parsers


def split_command(command: str) -> tuple[str, list[str]]:
    """Return the script of a typed command, with any launcher, and its flags."""
    words = shlex.split(command, comments=True)
    number = next(number for number, word in enumerate(words) if Path(word).name in SCRIPTS)
    return words[number], words[number + 1 :]
