"""Command lines: dataclasses into argument groups, recipes, and errors of one line."""

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import yaml
from transformers import HfArgumentParser

from utils.cli.errors import UserError

RECIPE_SUFFIXES = (".yaml", ".yml", ".json")


class ScriptArgumentParser(HfArgumentParser):
    """`HfArgumentParser` without abbreviations, with recipes below flags, and with errors of one line."""

    def __init__(self, dataclass_types, **kwargs):
        super().__init__(
            dataclass_types,
            allow_abbrev=False,
            usage="%(prog)s [recipe.yaml] [flags; recipe keys are flags]",
            **kwargs,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse(self, argv: Sequence[str] | None = None) -> tuple:
        """Return the dataclass instances for `argv` (the process's own arguments when None).

        A first argument that ends in .yaml, .yml or .json is a recipe: its keys are flag names, and flags given
        beside it win.

        Raises:
            UserError: an unknown flag or recipe key, a value of the wrong type or out of its choices.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        if argv and argv[0].endswith(RECIPE_SUFFIXES):
            self._apply_recipe(Path(argv.pop(0)))
        *instances, unknown = self.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            raise UserError(f"{unknown[0]}: no such flag{_suggestion(unknown[0], flags)}; --help lists them.")
        return tuple(instances)

    def _apply_recipe(self, path: Path) -> None:
        actions = {action.dest: action for action in reversed(self._actions)}
        defaults = {}
        for key, value in read_mapping(path, "recipe").items():
            if key not in actions:
                raise UserError(f"{path}: key '{key}' is no flag of this script{_suggestion(key, list(actions))}.")
            defaults[key] = self._convert(path, key, value, actions[key])
            actions[key].required = False
        self.set_defaults(**defaults)

    def _convert(self, path: Path, key: str, value: object, action: argparse.Action) -> object:
        if value is None or isinstance(value, dict):
            return value
        if isinstance(value, list):
            if action.nargs != "+":
                raise UserError(f"{path}: '{key}' takes one value, the recipe gives a list.")
            return [self._get_value(action, str(item)) for item in value]
        try:
            converted = self._get_value(action, str(value))
            self._check_value(action, converted)
        except argparse.ArgumentError as error:
            raise UserError(f"{path}: '{key}: {value}': {error.message}.") from None
        return [converted] if action.nargs == "+" else converted


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]}?" if close else ""


def read_mapping(path: Path, what: str) -> dict:
    """Return the mapping in a YAML or JSON file.

    Raises:
        UserError: the file is missing, malformed, or holds something else than a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        mapping = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path}: {what} cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: {what} is malformed: {error}") from None
    if not isinstance(mapping, dict):
        raise UserError(f"{path}: {what} must be a mapping of names to values.")
    return mapping


def require_positive(**values: float | None) -> None:
    """Check that every given flag value is above 0 (None passes).

    Raises:
        UserError: a value is 0 or below.
    """
    for name, value in values.items():
        if value is not None and value <= 0:
            raise UserError(f"--{name} {value}: must be above 0.")
