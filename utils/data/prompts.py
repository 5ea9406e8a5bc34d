"""Prompts from templates, nouns and the style token. No torch."""

import re
from pathlib import Path

from utils.cli.errors import UserError
from utils.cli.parsing import read_entries

DSI_TEMPLATE = "A {class} photo in the style of {token}"
CLASSLESS_TEMPLATE = "A photo in the style of {token}"
PLAIN_TEMPLATE = "A good photo of the {class}"


def check_template(
    template: str, *, needs_token: bool, needs_class: bool = True, flag: str = "--prompt_template"
) -> None:
    """Check that a template has `{class}` and `{token}` exactly when they are needed, and no other placeholder.

    Raises:
        UserError: a placeholder is missing or cannot be filled; the message begins with `flag`.
    """
    name = f"{flag} '{template}':"
    right = PLAIN_TEMPLATE if not needs_token else DSI_TEMPLATE if needs_class else CLASSLESS_TEMPLATE
    if not needs_class and "{class}" in template:
        raise UserError(f"--include_class_name false: template '{template}' has {{class}}; expected '{right}'.")
    if not needs_token and "{token}" in template:
        raise UserError(f"{name} has {{token}}, but there is no style token.")
    unknown = [place for place in re.findall(r"\{[^{}]*\}", template) if place not in ("{class}", "{token}")]
    if unknown:
        raise UserError(f"{name} has an unknown placeholder {unknown[0]}; try '{right}'.")
    for place, is_needed in (("{class}", needs_class), ("{token}", needs_token)):
        if is_needed and place not in template:
            raise UserError(f"{name} has no {place}; try '{right}'.")


def read_templates_file(path: str) -> list[str]:
    """Return the templates in a file: a YAML or JSON list by suffix, or one per line.

    Raises:
        UserError: the file cannot be read, is not a list, is empty, or has an entry that is not text.
    """
    flag = f"--prompt_templates_file {path}:"
    templates = read_entries(Path(path), flag)
    if not isinstance(templates, list):
        raise UserError(f"{flag} must be a list of templates.")
    if not templates:
        raise UserError(f"{flag} has no templates.")
    for number, template in enumerate(templates, 1):
        if not isinstance(template, str) or not template.strip():
            raise UserError(f"{flag} template {number} ({template!r}): must be text; in YAML, use quotes.")
    return templates


def render_prompt(template: str, noun: str, token_text: str = "") -> str:
    """Return the prompt for a class noun and the text of the style token (all its vectors, separated by spaces)."""
    return template.replace("{class}", noun).replace("{token}", token_text)


def token_text(placeholder_token: str, num_vectors: int) -> str:
    """Return how a token of several vectors is written in a prompt, as `pipe.load_textual_inversion` names them."""
    return " ".join([placeholder_token] + [f"{placeholder_token}_{i}" for i in range(1, num_vectors)])
