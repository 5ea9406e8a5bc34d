"""Command lines: argument groups from dataclasses, recipes, ranges, and one-line errors."""

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
from transformers.hf_argparser import string_to_bool

from utils.cli.errors import UserError
from utils.cli.options import list_needs
from utils.cli.processes import is_main_process

MAX_FLOAT = 1e30  # float32 overflows with larger numbers
RECIPE_SUFFIXES = (".yaml", ".yml", ".json")

# what a value must be, its test, and the flags; values that are not given pass
RANGES = (
    ("above 0", lambda value: value > 0, (
        # real and synthetic images
        "num_shots", "max_train_samples", "max_synthetic_samples_per_class", "mix_ratio", "max_eval_samples", "volumes",
        "search_shots", "max_images_per_class", "num_pairs", "num_repeats", "sample", "page_size",
        # training
        "learning_rate", "bridge_learning_rate", "head_learning_rate", "bridge_head_learning_rate", "learning_rates",
        "bridge_learning_rates", "head_learning_rate_factors", "bridge_head_learning_rate_factor", "num_train_epochs",
        "bridge_num_train_epochs", "bridge_max_steps", "step_counts", "bridge_step_counts", "max_train_steps",
        "per_device_train_batch_size", "bridge_per_device_train_batch_size", "per_device_eval_batch_size",
        "train_batch_size", "batch_size", "gradient_accumulation_steps", "eval_accumulation_steps", "lora_r",
        "lora_alpha", "lora_learning_rate", "num_vectors", "resolution", "bridge_alignment_weight", "max_words",
        "max_new_tokens",
        # logging, checkpoints and processes
        "logging_steps", "eval_steps", "save_steps", "save_total_limit", "checkpointing_steps",
        "checkpoints_total_limit", "validation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor",
        "ddp_bucket_cap_mb", "ddp_timeout", "num_workers",
        # generating
        "num_inference_steps", "images_per_shard",
    )),
    ("2 or above", lambda value: value >= 2, ("num_folds",)),
    ("0 or above", lambda value: value >= 0, (
        "mixup_alpha", "bridge_mixup_alpha", "bridge_mixup_alphas", "weight_decay", "bridge_weight_decay",
        "warmup_steps", "bridge_warmup_steps", "lr_warmup_steps",
        "adam_epsilon", "max_grad_norm", "neftune_noise_alpha", "eval_delay", "dataloader_num_workers",
        "num_validation_images", "max_redraws", "guidance_scale",
    )),
    ("0 or above, and whole from 1 on", lambda value: value >= 0 and (value < 1 or value == int(value)), (
        "head_warmup_steps", "bridge_head_warmup_steps",
    )),
    ("0 or above, and below 1", lambda value: 0 <= value < 1, (
        "label_smoothing_factor", "bridge_label_smoothing_factor", "dropout", "drop_path_rate", "lora_dropout",
        "adam_beta1", "adam_beta2", "drop_share",
    )),
    ("from -1 to 1", lambda value: -1 <= value <= 1, ("min_score",)),
    ("from 0 to 1", lambda value: 0 <= value <= 1, ("guidance_interval",)),
    ("above 0 and at most 1", lambda value: 0 < value <= 1, ("strength",)),
    ("above 0 and below 1", lambda value: 0 < value < 1, ("train_val_split", "average", "ema_decay")),
    ("0 or above, and below 2**32", lambda value: 0 <= value < 2**32, (  # the seeds that NumPy accepts
        "seed", "data_seed", "few_shot_seed", "fold_seed", "seeds", "search_seeds", "sample_seed",
    )),
    ("above 0, or left out to train for epochs", lambda value: value > 0 or value == -1, ("max_steps",)),
    ("from 1 to 65535", lambda value: 1 <= value <= 65535, ("port",)),
    ("from 1 to 100", lambda value: 1 <= value <= 100, ("image_quality",)),
)  # fmt: skip


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that keeps the script's docstring as written, and has one spelling and the default, if any, of each flag."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = re.sub("_PER_[A-Z]+$", "", self._get_default_metavar_for_optional(action))
        values = self._format_args(action, name.rpartition("_")[2])
        if action.type is string_to_bool:
            values = "[true|false]"
        spellings = [option for option in action.option_strings if "-" not in option[2:]]
        return f"{', '.join(spellings)} {values}".strip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_no_default = action.default is None or action.const is False  # of --no_name, the default would confuse
        return action.help if has_no_default else super()._get_help_string(action)


class ScriptArgumentParser(HfArgumentParser):
    """`HfArgumentParser` without abbreviations, with recipes that flags override, and with one-line errors."""

    def __init__(self, dataclass_types, **kwargs):
        super().__init__(
            dataclass_types,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
            usage="%(prog)s [recipe.yaml] [flags; recipe keys are flags]",
            **kwargs,
        )
        self.given: set[str] = set()  # names of the flags on the command line and in the recipe, after parsing
        self._typed: set[str] = set()  # those on the command line
        self._recipe: Path | None = None
        # flags of TrainingArguments that take JSON
        self._dict_fields = {name for kind in self.dataclass_types for name in getattr(kind, "_VALID_DICT_FIELDS", ())}

    def error(self, message: str) -> NoReturn:
        raise UserError(re.sub(r"^argument (--\w+)[^:\s]*", r"\1", message))

    def parse(self, argv: Sequence[str] | None = None) -> tuple:
        """Return the dataclass instances for `argv` (the process's own arguments when None).

        A first argument that ends in .yaml, .yml or .json is a recipe: its keys are flag names, and flags override
        them.

        A flag on the command line whose needs are not met is an error. A recipe may serve several runs: its keys
        without effect in this one are listed in one line.

        Raises:
            UserError: an unknown flag or recipe key, a value of the wrong type or outside its choices or range, or
                flags that exclude each other, have no effect, or are not supported by this machine.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        if argv and argv[0].endswith(RECIPE_SUFFIXES):
            self._apply_recipe(Path(argv.pop(0)))
        actions = (self._option_string_actions.get(word.partition("=")[0]) for word in argv)
        self._typed = {action.dest for action in actions if action is not None}
        self.given |= self._typed
        self._check_switches(argv)
        try:
            *instances, unknown = self.parse_args_into_dataclasses(
                argv, look_for_args_file=False, return_remaining_strings=True
            )
        except UserError:
            raise
        except (ValueError, TypeError, ImportError, OSError) as error:  # of TrainingArguments
            raise UserError(str(error)) from None
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            raise UserError(f"{unknown[0]}: unknown flag{suggestion(unknown[0], flags)}; --help lists them.")
        return tuple(instances)

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        """Add a field's flag, without our own metadata, which argparse does not know.

        A `bool` or `bool | None` is on by `--name` and off by `--no_name`, whatever its default.
        """
        is_open = field.type == (bool | None) and field.default is None
        field = copy.copy(field)
        ours = ("affects_result", "needs", "parse")
        parse = field.metadata.get("parse")
        field.metadata = {key: value for key, value in field.metadata.items() if key not in ours}
        field.metadata |= {"nargs": "?", "const": True} if is_open else {}
        HfArgumentParser._parse_dataclass_field(parser, field)
        if parse is not None:
            parser._actions[-1].type = parser._actions[-1].parse = parse
        if field.type is bool and field.default is True:  # it has added --no_name
            if field.metadata.get("help") != argparse.SUPPRESS:
                parser._actions[-1].help = f"The opposite of --{field.name}."
        elif is_open or field.type is bool:
            names = f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}"
            parser.add_argument(
                *names, action="store_false", default=field.default, dest=field.name,
                help=f"The opposite of --{field.name}." if is_open else argparse.SUPPRESS,
            )  # fmt: skip

    def parse_known_args(self, args=None, namespace=None) -> tuple:
        """Parse as `ArgumentParser` does, and check the values before dataclasses are created from them."""
        namespace, unknown = super().parse_known_args(args, namespace)
        check_ranges(vars(namespace))
        self.check_needs(vars(namespace))
        return namespace, unknown

    def _check_switches(self, argv: Sequence[str]) -> None:
        """Raise if the command line turns a flag both on and off, as in --flag --no_flag; for other flags, the last
        wins."""
        said: dict[str, dict[bool, str]] = {}
        for word, following in zip(argv, [*argv[1:], "--"]):
            flag, has_value, value = word.partition("=")
            action = self._option_string_actions.get(flag)
            if action is None or not (action.type is string_to_bool or action.const is False):
                continue
            if action.nargs != 0 and not has_value and not following.startswith("-"):
                flag, value = f"{flag} {following}", following
            try:
                switch = string_to_bool(value) if value else bool(action.const)
            except argparse.ArgumentTypeError:  # argparse reports it
                continue
            of_flag = said.setdefault(action.dest, {})
            of_flag[switch] = f"{flag}={value}" if has_value else flag
            if len(of_flag) == 2:
                raise UserError(f"{of_flag[True]}: not together with {of_flag[False]}; give one of the two.")

    def check_needs(self, values: Mapping[str, object]) -> None:
        """Check that each given flag in `values` has an effect; a flag that is off, as by default, needs nothing.

        Raises:
            UserError: one on the command line has none.
        """
        idle: dict[str, list[str]] = {}  # recipe keys by what they lack
        for field, needs in (item for kind in self.dataclass_types for item in list_needs(kind)):
            name, value = field.name, values.get(field.name)
            if name not in self.given or name not in values or (not value and value == field.default):
                continue
            for need in needs:
                if need.is_met(values):
                    continue
                lack = need.lack.format_map({key: _shown(other) for key, other in values.items()})
                if name in self._typed:
                    flag = f"--{name} {_shown(value)}".removesuffix(" true")
                    raise UserError(f"{flag}: does nothing {lack}; {need.remedy}leave --{name} out.")
                idle.setdefault(lack, []).append(name)
                break
        if idle and is_main_process():
            told = "; ".join(f"{', '.join(names)} ({lack})" for lack, names in idle.items())
            print(f"{self._recipe}: no effect in this run: {told}.", file=sys.stderr)

    def fill_in(self, groups: Iterable, values: Mapping[str, object]) -> None:
        """Set, in place, the flags in `values` that were not given, for example from a record."""
        for group in groups:
            for field in dataclasses.fields(group):
                if field.name in values and field.name not in self.given:
                    setattr(group, field.name, values[field.name])

    def _get_value(self, action: argparse.Action, arg_string: str) -> object:
        if (parse := getattr(action, "parse", None)) is not None:  # argparse would replace its message
            return parse(arg_string)
        value = super()._get_value(action, arg_string)
        if isinstance(value, float) and not abs(value) <= MAX_FLOAT:  # written this way, it refuses NaN too
            raise argparse.ArgumentError(action, f"must be a finite number of at most {MAX_FLOAT:g}, got {value}")
        return value

    def _apply_recipe(self, path: Path) -> None:
        self._recipe = path
        actions = {action.dest: action for action in reversed(self._actions)}
        defaults = {}
        for key, value in read_mapping(path, "recipe").items():
            if key not in actions:
                raise UserError(f"{path}: key '{key}': not a flag of this script{suggestion(key, list(actions))}.")
            defaults[key] = self._convert(path, key, value, actions[key])
            actions[key].required = False
        self.given |= set(defaults)
        self.set_defaults(**defaults)

    def _convert(self, path: Path, key: str, value: object, action: argparse.Action) -> object:
        if value is None and action.default is not None:
            raise UserError(f"{path}: '{key}' is empty; give a value, or remove the key to use {action.default}.")
        takes_many = action.nargs == "+"
        if isinstance(value, dict) and key not in self._dict_fields or isinstance(value, list) and not takes_many:
            kind = "a mapping" if isinstance(value, dict) else "a list"
            raise UserError(f"{path}: '{key}' takes one value, the recipe gives {kind}.")
        if value is None or isinstance(value, dict):
            return value
        converted = []
        for item in value if isinstance(value, list) else [value]:
            try:
                converted.append(self._get_value(action, str(item)))
                self._check_value(action, converted[-1])
            except argparse.ArgumentError as error:
                raise UserError(f"{path}: '{key}: {item}': {error.message}.") from None
        return converted if takes_many else converted[0]


def _shown(value: object) -> str:
    """Return a flag's value as a user types it."""
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_ranges(values: Mapping[str, object]) -> None:
    """Check the numbers, or lists of numbers, in a mapping of flags to values.

    Raises:
        UserError: one is out of range.
    """
    for wanted, is_within, names in RANGES:
        for name in names:
            value = values.get(name)
            for number in value if isinstance(value, list) else [value]:
                if number is not None and not is_within(number):
                    raise UserError(f"--{name} {number}: must be {wanted}.")


def suggestion(name: object, known: Iterable[str]) -> str:
    """Return ', did you mean x?' for the closest known name; empty if none is close."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f", did you mean {close[0]}?" if close else ""


def read_mapping(path: Path, what: str) -> dict:
    """Return the mapping in a YAML or JSON file.

    Raises:
        UserError: the file is missing, malformed, or not a mapping.
    """
    mapping = _read_yaml_or_json(path, f"{path}: {what}")
    if not isinstance(mapping, dict):
        raise UserError(f"{path}: {what} must be a mapping of names to values.")
    return mapping


def _read_yaml_or_json(path: Path, name: str) -> object:
    text = read_text(path, name)
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # YAML raises ValueError for the date 2020-13-01
        raise UserError(f"{name} is malformed: {error}") from None


def read_entries(path: Path, name: str) -> object:
    """Return the content of a YAML or JSON file, or the lines of any other file, without blank lines and # comments.

    Raises:
        UserError: the file is missing or malformed; the message begins with `name`.
    """
    if path.suffix in RECIPE_SUFFIXES:
        return _read_yaml_or_json(path, name)
    lines = [line.strip() for line in read_text(path, name).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def read_text(path: Path, name: str) -> str:
    """Return the text of a UTF-8 file; messages begin with `name`.

    Raises:
        UserError: the file is missing or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise UserError(f"{name} cannot be read (not UTF-8).") from None
