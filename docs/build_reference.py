"""Write docs/reference.md, the flags of all scripts, from the dataclasses that define them.

python -m docs.build_reference
"""

import argparse
import dataclasses
import inspect
import re
from enum import Enum
from pathlib import Path

from transformers import TrainingArguments

from tests.command_lines import SCRIPTS, script_parsers
from utils.cli.records import write_text

REFERENCE = Path(__file__).with_name("reference.md")
TRAINER_DOCS = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
ORDER = (
    "train_dsi.py", "generate_synthetic.py", "train_bridged.py", "compare_transfer.py", "quality_report.py",
    "filter_synthetic.py", "review_synthetic.py", "describe_images.py",
)  # fmt: skip
INTRODUCTION = """# All flags

Look up what a flag does and its default. `--help` prints the same for one script.

- Flags can also be keys of a YAML or JSON recipe: `python train_dsi.py recipe.yaml --seed 1`. Flags on the command line
  win over the recipe.
- A switch (default `true` or `false`) is turned on by its flag and off by the same flag with `no_` in front:
  `--dry_run`, `--no_random_flip`.
- A flag with an empty default is not set unless you set it; its text says what happens then.
- A flag that would do nothing in a run is an error that says why.

*Written by `make docs`; change the help text in the script or in `utils/*/arguments.py` instead.*
"""


def build() -> str:
    """Return the page: a section for each script, in it a table for each group of flags."""
    parsers = script_parsers()
    return "\n".join([INTRODUCTION, *(_describe_script(script, parsers[script]) for script in ORDER)])


def _describe_script(script: str, parser: argparse.ArgumentParser) -> str:
    summary, *paragraphs = inspect.getdoc(SCRIPTS[script]).split("\n\n")
    commands = "\n".join(inspect.cleandoc(text) for text in paragraphs if text.startswith("    "))
    parts = [f"## {script}\n", f"{summary}\n", f"```bash\n{commands}\n```\n"]
    actions = {action.dest: action for action in reversed(parser._actions)}  # of two spellings, not the --no_ one
    for group in parser.dataclass_types:
        inherited = set()
        if issubclass(group, TrainingArguments):
            inherited = {field.name for field in dataclasses.fields(TrainingArguments)} - set(_own_names(group))
        fields = [field for field in dataclasses.fields(group) if field.init and field.name not in inherited]
        fields = [field for field in fields if actions[field.name].help != argparse.SUPPRESS]
        parts += [f"### {script}: {group._argument_group_name}\n", "| flag | default | what it is |", "|---|---|---|"]
        parts += [_describe_flag(field, actions[field.name]) for field in fields]
        parts.append("")
        if inherited:
            names = ", ".join(f"`--{name}`" for name in sorted(inherited & set(actions)))
            parts.append(f"Also all other flags of [transformers' `TrainingArguments`]({TRAINER_DOCS}): {names}.\n")
    return "\n".join(parts)


def _own_names(group: type) -> list[str]:
    """Return the names of the flags that a group defines itself, or one of its bases below `TrainingArguments`."""
    bases = [base for base in group.__mro__ if base not in TrainingArguments.__mro__]
    return [name for base in bases for name in vars(base).get("__annotations__", ())]


def _describe_flag(field: dataclasses.Field, action: argparse.Action) -> str:
    text = action.help.replace("%%", "%")
    if action.choices:
        text += f" One of: {', '.join(f'`{choice}`' for choice in action.choices)}."
    return f"| `--{field.name}` | {_describe_default(field)} | {_as_cell(text)} |"


def _describe_default(field: dataclasses.Field) -> str:
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory()
        if not isinstance(default, list):
            return "by the machine"
    if default is None or default == [] or default == "":
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, Enum):
        default = default.value
    return f"`{' '.join(map(str, default)) if isinstance(default, list) else default}`"


def _as_cell(text: str) -> str:
    """Return a help text as a cell of a Markdown table, with flags as code and without markup by accident."""
    pieces = re.split(r"(`[^`]*`)", text)
    for number in range(0, len(pieces), 2):
        pieces[number] = re.sub(r"--\w+", r"`\g<0>`", re.sub(r"[<>*|]", r"\\\g<0>", pieces[number]))
    return "".join(pieces)


if __name__ == "__main__":
    write_text(REFERENCE, build())
    print(REFERENCE)
