"""Prompts: class names into nouns, nouns and the style token into prompts. No torch."""

from utils.cli.errors import UserError

DSI_TEMPLATE = "A {class} photo in the style of {token}"
PLAIN_TEMPLATE = "A good photo of the {class}"


def prompt_nouns(class_names: list[str]) -> list[str]:
    """Return class names as they are written in prompts: underscores and runs of spaces become one space.

    Raises:
        UserError: two classes would get the same noun.
    """
    nouns = [" ".join(name.replace("_", " ").split()) for name in class_names]
    doubles = sorted({noun for noun in nouns if nouns.count(noun) > 1})
    if doubles:
        raise UserError(f"class names {doubles}: several classes have this name in a prompt; rename them.")
    return nouns


def check_template(template: str, needs_token: bool) -> None:
    """Check that a prompt template has `{class}`, and `{token}` exactly where a style token is used.

    Raises:
        UserError: a place is missing, or `{token}` is there without a style token.
    """
    if "{class}" not in template:
        raise UserError(f"--prompt_template '{template}': has no {{class}}; right is for example '{DSI_TEMPLATE}'.")
    if needs_token and "{token}" not in template:
        raise UserError(f"--prompt_template '{template}': has no {{token}}; right is for example '{DSI_TEMPLATE}'.")
    if not needs_token and "{token}" in template:
        raise UserError(f"--prompt_template '{template}': has {{token}}, but there is no style token.")


def render_prompt(template: str, noun: str, token_text: str = "") -> str:
    """Return the prompt for a class noun and the text of the style token (all its vectors, separated by spaces)."""
    return template.replace("{class}", noun).replace("{token}", token_text)


def token_text(placeholder_token: str, num_vectors: int) -> str:
    """Return how a token of several vectors is written in a prompt, as `pipe.load_textual_inversion` names them."""
    return " ".join([placeholder_token] + [f"{placeholder_token}_{i}" for i in range(1, num_vectors)])
