"""Class names into the nouns that stand for them in prompts. No torch."""

from pathlib import Path

from utils.cli.errors import UserError
from utils.cli.parsing import read_entries, suggestion


def prompt_nouns(class_names: list[str], corrections: dict[str, str] | None = None) -> list[str]:
    """Return class names as they are written in prompts: corrected, or with underscores and runs of spaces as a space.

    Raises:
        UserError: two classes would get the same noun.
    """
    corrections = corrections or {}
    nouns = [" ".join(corrections.get(name, name.replace("_", " ")).split()) for name in class_names]
    doubles = sorted({noun for noun in nouns if nouns.count(noun) > 1})
    if doubles:
        alike = [name for name, noun in zip(class_names, nouns) if noun == doubles[0]]
        raise UserError(
            f"classes {', '.join(repr(name) for name in alike)}: all are '{doubles[0]}' in a prompt; rename them, or "
            "give their nouns to train_dsi.py with --class_names_file."
        )
    return nouns


def read_class_names_file(path: str, class_names: list[str]) -> dict[str, str]:
    """Return class name -> noun, as a file gives them: a mapping (some classes are enough), or a noun for each class.

    A mapping or list is YAML or JSON by its suffix, any other file has a noun a line; a list is in label order.

    Raises:
        UserError: the file cannot be read; a class is unknown; a noun is empty or no text; too few or too many nouns.
    """
    flag = f"--class_names_file {path}:"
    entries = read_entries(Path(path), flag)
    if isinstance(entries, list):
        if len(entries) != len(class_names):
            raise UserError(
                f"{flag} has {len(entries)} nouns for {len(class_names)} classes; right is one for each, in label "
                f"order; the first class is '{class_names[0]}'."
            )
        entries = dict(zip(class_names, entries))
    if not isinstance(entries, dict):
        raise UserError(f"{flag} must be a mapping of class names to nouns, or a list of nouns.")
    for name, noun in entries.items():
        _check_entry(flag, name, noun, class_names)
    return entries


def _check_entry(flag: str, name: object, noun: object, class_names: list[str]) -> None:
    if not isinstance(name, str) or not isinstance(noun, str):
        raise UserError(f"{flag} entry '{name}: {noun}': put quotes around what is no text in YAML, as 'no' and '1'.")
    if name not in class_names:
        raise UserError(f"{flag} entry '{name}': no such class{suggestion(name, class_names)}.")
    if not noun.strip():
        raise UserError(f"{flag} entry '{name}': its noun is empty.")
