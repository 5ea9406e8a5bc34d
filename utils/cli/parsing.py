"""Command lines: dataclasses into argument groups, recipes, and errors of one line."""

import argparse
import copy
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import yaml
from transformers import HfArgumentParser

from utils.cli.errors import UserError
from utils.cli.ranges import check_ranges

MAX_FLOAT = 1e30  # with larger ones float32 overflows
RECIPE_SUFFIXES = (".yaml", ".yml", ".json")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with a script's docstring as it is written, one spelling of each flag, and the defaults that are some."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action).rpartition("_")[2])
        spellings = [option for option in action.option_strings if "-" not in option[2:]]
        return f"{', '.join(spellings)} {values}".strip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class ScriptArgumentParser(HfArgumentParser):
    """`HfArgumentParser` without abbreviations, with recipes below flags, and with errors of one line."""

    def __init__(self, dataclass_types, **kwargs):
        super().__init__(
            dataclass_types,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
            usage="%(prog)s [recipe.yaml] [flags; recipe keys are flags]",
            **kwargs,
        )
        self.given: set[str] = set()  # names of the flags on the command line and in the recipe, once parsed
        # of TrainingArguments: flags that take JSON
        self._dict_fields = {name for kind in self.dataclass_types for name in getattr(kind, "_VALID_DICT_FIELDS", ())}

    def error(self, message: str) -> NoReturn:
        raise UserError(re.sub(r"^argument (--\w+)[^:\s]*", r"\1", message))

    def parse(self, argv: Sequence[str] | None = None) -> tuple:
        """Return the dataclass instances for `argv` (the process's own arguments when None).

        A first argument that ends in .yaml, .yml or .json is a recipe: its keys are flag names, and flags given
        beside it win.

        Raises:
            UserError: an unknown flag or recipe key, a value of the wrong type or out of its choices or range, flags
                that do not go together, or that this machine does not support.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        if argv and argv[0].endswith(RECIPE_SUFFIXES):
            self._apply_recipe(Path(argv.pop(0)))
        actions = (self._option_string_actions.get(word.partition("=")[0]) for word in argv)
        self.given |= {action.dest for action in actions if action is not None}
        try:
            *instances, unknown = self.parse_args_into_dataclasses(
                argv, look_for_args_file=False, return_remaining_strings=True
            )
        except UserError:
            raise
        except (
            ValueError,
            TypeError,
            ImportError,
            OSError,
        ) as error:  # of TrainingArguments
            raise UserError(str(error)) from None
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            raise UserError(f"{unknown[0]}: no such flag{suggestion(unknown[0], flags)}; --help lists them.")
        return tuple(instances)

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        """Add a field's flag; of its metadata, argparse does not know whether it affects a result.

        A `bool | None` is on by `--name` and off by `--no_name`, as is a `bool`.
        """
        is_open = field.type == (bool | None) and field.default is None
        field = copy.copy(field)
        field.metadata = {key: value for key, value in field.metadata.items() if key != "affects_result"}
        field.metadata |= {"nargs": "?", "const": True} if is_open else {}
        HfArgumentParser._parse_dataclass_field(parser, field)
        if is_open:
            names = f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}"
            parser.add_argument(*names, action="store_false", default=None, dest=field.name)

    def parse_known_args(self, args=None, namespace=None) -> tuple:
        """Parse as `ArgumentParser` does, and check ranges before the dataclasses are made, which act on values."""
        namespace, unknown = super().parse_known_args(args, namespace)
        check_ranges(vars(namespace))
        return namespace, unknown

    def fill_in(self, groups: Iterable, values: Mapping[str, object]) -> None:
        """Set, in place, the flags in `values` that are not given: what a record or a table says for them."""
        for group in groups:
            for field in dataclasses.fields(group):
                if field.name in values and field.name not in self.given:
                    setattr(group, field.name, values[field.name])

    def _get_value(self, action: argparse.Action, arg_string: str) -> object:
        value = super()._get_value(action, arg_string)
        if isinstance(value, float) and not abs(value) <= MAX_FLOAT:  # so written, it refuses NaN too
            raise argparse.ArgumentError(action, f"must be a finite number of at most {MAX_FLOAT:g}, got {value}")
        return value

    def _apply_recipe(self, path: Path) -> None:
        actions = {action.dest: action for action in reversed(self._actions)}
        defaults = {}
        for key, value in read_mapping(path, "recipe").items():
            if key not in actions:
                raise UserError(f"{path}: key '{key}' is no flag of this script{suggestion(key, list(actions))}.")
            defaults[key] = self._convert(path, key, value, actions[key])
            actions[key].required = False
        self.given |= set(defaults)
        self.set_defaults(**defaults)

    def _convert(self, path: Path, key: str, value: object, action: argparse.Action) -> object:
        if value is None and action.default is not None:
            raise UserError(f"{path}: '{key}' is empty; give a value, or leave it out for {action.default}.")
        if isinstance(value, dict) and key not in self._dict_fields:
            raise UserError(f"{path}: '{key}' takes one value, the recipe gives a mapping.")
        if value is None or isinstance(value, dict):
            return value
        if isinstance(value, list):
            if action.nargs != "+":
                raise UserError(f"{path}: '{key}' takes one value, the recipe gives a list.")
            return [self._convert_one(path, key, item, action) for item in value]
        converted = self._convert_one(path, key, value, action)
        return [converted] if action.nargs == "+" else converted

    def _convert_one(self, path: Path, key: str, value: object, action: argparse.Action) -> object:
        try:
            converted = self._get_value(action, str(value))
            self._check_value(action, converted)
        except argparse.ArgumentError as error:
            raise UserError(f"{path}: '{key}: {value}': {error.message}.") from None
        return converted


def suggestion(name: object, known: Iterable[str]) -> str:
    """Return ', did you mean x?' for the known name that is closest, nothing where none is close."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f", did you mean {close[0]}?" if close else ""


def read_mapping(path: Path, what: str) -> dict:
    """Return the mapping in a YAML or JSON file.

    Raises:
        UserError: the file is missing, malformed, or holds something else than a mapping.
    """
    mapping = read_yaml_or_json(path, f"{path}: {what}")
    if not isinstance(mapping, dict):
        raise UserError(f"{path}: {what} must be a mapping of names to values.")
    return mapping


def read_yaml_or_json(path: Path, name: str) -> object:
    """Return what a YAML or JSON file holds; messages begin with `name`.

    Raises:
        UserError: the file is missing or malformed.
    """
    text = read_text(path, name)
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is also YAML's of the date 2020-13-01
        raise UserError(f"{name} is malformed: {error}") from None


def read_entries(path: Path, name: str) -> object:
    """Return what a YAML or JSON file holds, or the lines of any other file without blank ones and # comments.

    Raises:
        UserError: the file is missing or malformed; the message begins with `name`.
    """
    if path.suffix in RECIPE_SUFFIXES:
        return read_yaml_or_json(path, name)
    lines = [line.strip() for line in read_text(path, name).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def read_text(path: Path, name: str) -> str:
    """Return the text of a UTF-8 file; messages begin with `name`.

    Raises:
        UserError: the file is missing, or no text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise UserError(f"{name} cannot be read (not UTF-8).") from None
