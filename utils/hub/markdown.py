"""Names, prompts, settings and commands in a card, shown as they are, whatever characters they hold."""

import json
import re
import shlex

MAX_LENGTH = 200  # characters of a name in a card: the records have it in full
SPECIAL = re.compile(r"[\\`*~\[\]|$]|(?<![^\W_])_|_(?![^\W_])|&(?=[#\w]+;)|^[-+=#]|^\d+(?=[.)])")


def text(value: object) -> str:
    """Return a value as a line of Markdown, in a sentence, a heading, a list or a cell of a table."""
    return SPECIAL.sub(_escape, _line(value)).replace("<", "&lt;").replace(">", "&gt;")


def code(value: object) -> str:
    """Return a value as a code span, also in a cell of a table: there a code span cannot hold every character."""
    line = _line(value)
    if line and not re.search(r"[`|]|<!--", line):
        return f"`{line}`"
    entities = re.sub(r"[^\w\s]|_", lambda match: f"&#{ord(match.group())};", line)
    return f"<code>{entities}</code>"


def fence(value: str, language: str) -> str:
    """Return a value as a block of code, whose fence is longer than any in it."""
    longest = max(map(len, re.findall("`+", value)), default=0)
    return "{0}{1}\n{2}\n{0}".format("`" * max(3, longest + 1), language, value)


def python_string(value: str) -> str:
    """Return a value as a literal of Python, in double quotes."""
    return json.dumps(str(value), ensure_ascii=False)


# what templates call
FUNCTIONS = {"text": text, "code": code, "fence": fence, "python_string": python_string, "shell_word": shlex.quote}


def _line(value: object) -> str:
    line = " ".join(str(value).split())
    return line if len(line) <= MAX_LENGTH else f"{line[: MAX_LENGTH - 1]}…"


def _escape(match: re.Match) -> str:
    found = match.group()
    # of "1." the point is escaped: digits cannot be
    return f"{found}\\" if found.isdigit() else f"\\{found}"
