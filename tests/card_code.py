"""The code of a card, run as a reader would run it."""

import re


def run_python(card: str) -> dict:
    """Run the Python blocks of a card one after another, in the working directory; return what they define."""
    blocks = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    assert blocks
    defined = {}
    for block in blocks:
        exec(compile(block, "card", "exec"), defined)
    return defined
