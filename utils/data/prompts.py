"""Prompts: templates filled with a noun and the style token. No torch."""

import re
from pathlib import Path

from utils.cli.errors import UserError
from utils.cli.parsing import read_entries

DSI_TEMPLATE = "A {class} photo in the style of {token}"
CLASSLESS_TEMPLATE = "A photo in the style of {token}"
PLAIN_TEMPLATE = "A good photo of the {class}"
CONTEXT_PLACE = "{context}"
PLACES = ("{class}", "{token}", CONTEXT_PLACE)

# values of --article
AUTO, AS_WRITTEN = "auto", "as_written"
ARTICLES = (AUTO, AS_WRITTEN)
ARTICLE_HELP = (
    "Article directly before {class} in a template: auto writes 'a' or 'an' to suit the noun, as_written keeps the "
    "template's own."
)
ARTICLE = re.compile(r"(?<![\w'-])([Aa])n?(?=\s+\{class\})")
VOWEL_SOUND = re.compile(r"(?!uni(?![dmn])|us[ae]|ute|eu|ewe|one\b|once\b)[aeiou]|hour|honest|heir", re.IGNORECASE)


def check_template(
    template: str, *, needs_token: bool, needs_class: bool = True, needs_context: bool = False,
    flag: str = "--prompt_template",
) -> None:  # fmt: skip
    """Check that a template has `{class}`, `{token}` and `{context}` if and only if they are filled, and no others.

    Raises:
        UserError: a placeholder is missing or would not be filled; the message begins with `flag`.
    """
    name = f"{flag} '{template}':"
    right = PLAIN_TEMPLATE if not needs_token else DSI_TEMPLATE if needs_class else CLASSLESS_TEMPLATE
    right = add_context(right) if needs_context else right
    if not needs_class and "{class}" in template:
        raise UserError(f"--include_class_name false: template '{template}' has {{class}}; try '{right}'.")
    if not needs_token and "{token}" in template:
        raise UserError(f"{name} has {{token}}, but there is no style token.")
    if not needs_context and CONTEXT_PLACE in template:
        raise UserError(f"{name} has {{context}}, which needs --contexts_file.")
    unknown = [place for place in re.findall(r"\{[^{}]*\}", template) if place not in PLACES]
    if unknown:
        raise UserError(f"{name} has {unknown[0]}, which nothing fills; try '{right}'.")
    for place, is_needed in (("{class}", needs_class), ("{token}", needs_token), (CONTEXT_PLACE, needs_context)):
        if is_needed and place not in template:
            raise UserError(f"{name} has no {place}; try '{right}'.")


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


def render_prompt(template: str, noun: str, token_text: str = "", article: str = AS_WRITTEN) -> str:
    """Return the prompt for a class noun and the text of the style token (all its vectors, separated by spaces).

    With `article` 'auto', "a" or "an" directly before `{class}` is chosen to suit the noun. The rule looks at its first
    letters only and knows a few exceptions ("a unicorn", "an hour"), so it can be wrong for abbreviations ("SUV",
    "MD-80"), numbers ("8-ball") and rare words.
    """
    if article == AUTO:
        n = "n" if VOWEL_SOUND.match(noun.strip()) else ""
        template = ARTICLE.sub(lambda match: match[1] + n, template)
    return template.replace("{class}", noun).replace("{token}", token_text)


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
