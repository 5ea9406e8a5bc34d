"""Prompts: templates filled with a noun, the style token and what else a run has. No torch."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from utils.cli.errors import UserError
from utils.cli.parsing import read_entries

DSI_TEMPLATE = "A {class} photo in the style of {token}"
CLASSLESS_TEMPLATE = "A photo in the style of {token}"
PLAIN_TEMPLATE = "A good photo of the {class}"
PLACEHOLDER = re.compile(r"\{(\w+)\}")
CLASS_TOKEN, CONTEXT = "class_token", "context"
CONTEXT_PLACE = f"{{{CONTEXT}}}"
# the placeholders besides {class} that a run may fill, and why another one does not
PLACEHOLDERS = {
    "token": "there is no style token",
    CLASS_TOKEN: "there are no class tokens (train_dsi.py --class_tokens learns them)",
    CONTEXT: "there are no contexts (--contexts_file gives them)",
}

# values of --article
AUTO, AS_WRITTEN = "auto", "as_written"
ARTICLES = (AUTO, AS_WRITTEN)
ARTICLE_HELP = (
    "Article directly before {class} in a template: auto writes 'a' or 'an' to suit the noun, as_written keeps the "
    "template's own."
)
ARTICLE = re.compile(r"(?<![\w'-])([Aa])n?(?=\s+\{class\})")
VOWEL_SOUND = re.compile(r"(?!uni(?![dmn])|us[ae]|ute|eu|ewe|one\b|once\b)[aeiou]|hour|honest|heir", re.IGNORECASE)


def with_others(template: str, others: Collection[str]) -> str:
    """Return a default template with those of `PLACEHOLDERS` that are filled as well, besides `{token}`."""
    if CLASS_TOKEN in others:
        template = template.replace("{class}", f"{{{CLASS_TOKEN}}} {{class}}")
    return add_context(template) if CONTEXT in others else template


def check_template(
    template: str, *, needs_token: bool, needs_class: bool = True, others: Mapping[str, bool] | None = None,
    flag: str = "--prompt_template",
) -> None:  # fmt: skip
    """Check that a template has `{class}` and `{token}` if and only if they are filled, and no other placeholder.

    `others` are the further ones of `PLACEHOLDERS` that are filled, and whether the template must have them.

    Raises:
        UserError: a placeholder is missing or would not be filled; the message begins with `flag`.
    """
    name, others = f"{flag} '{template}':", others or {}
    usual = PLAIN_TEMPLATE if not needs_token else DSI_TEMPLATE if needs_class else CLASSLESS_TEMPLATE
    right = with_others(usual, others)
    if not needs_class and "{class}" in template:
        raise UserError(f"--include_class_name false: template '{template}' has {{class}}; try '{right}'.")
    needed = {"class": needs_class} | ({"token": True} if needs_token else {}) | others
    for place in re.findall(r"\{[^{}]*\}", template):
        if (why := PLACEHOLDERS.get(place[1:-1])) and place[1:-1] not in needed:
            raise UserError(f"{name} has {place}, but {why}.")
        if place[1:-1] not in needed:
            raise UserError(f"{name} has {place}, which nothing fills; try '{right}'.")
    for place, is_needed in needed.items():
        if is_needed and f"{{{place}}}" not in template:
            raise UserError(f"{name} has no {{{place}}}; try '{right}'.")


def read_templates_file(path: str) -> list[str]:
    """Return the templates in a file: a YAML or JSON list, by its suffix, or one per line.

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
            raise UserError(f"{flag} template {number} ({template!r}): must be text, in quotes in YAML.")
    return templates


def render_prompt(
    template: str, noun: str, token_text: str = "", article: str = AS_WRITTEN, **others: str
) -> str:  # fmt: skip
    """Return the prompt for a class noun and the text of the style token (all its vectors, separated by spaces).

    `others` fill further placeholders, such as `class_token`.

    With `article` 'auto', "a" or "an" directly before `{class}` is chosen to suit the noun. The rule looks at its first
    letters only and knows a few exceptions ("a unicorn", "an hour"), so it can be wrong for abbreviations ("SUV",
    "MD-80"), numbers ("8-ball") and rare words.
    """
    if article == AUTO:
        n = "n" if VOWEL_SOUND.match(noun.strip()) else ""
        template = ARTICLE.sub(lambda match: match[1] + n, template)
    values = {"class": noun, "token": token_text, **others}
    # in one pass: what a placeholder is filled with is not filled again
    return PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


def add_context(template: str) -> str:
    """Return a template with `{context}` before its style, or else at its end."""
    before, style, after = template.partition(" in the style of {token}")
    return f"{before}, {CONTEXT_PLACE},{style}{after}" if style else f"{template}, {CONTEXT_PLACE}"


def fill_context(prompt: str, context: str) -> str:
    """Return a prompt with `{context}` filled; an empty context also takes the commas around it away."""
    if context:
        return prompt.replace(CONTEXT_PLACE, context)
    return re.sub(r"\s*,?\s*\{context\},?", "", prompt).strip()


def token_text(placeholder_token: str, num_vectors: int) -> str:
    """Return how a token of several vectors is written in a prompt, with the names of `pipe.load_textual_inversion`."""
    return " ".join([placeholder_token] + [f"{placeholder_token}_{i}" for i in range(1, num_vectors)])
