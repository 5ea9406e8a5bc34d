"""The command of a run, as a card shows it."""

import shlex
import sys
from collections.abc import Sequence

TOKEN_FLAGS = ("--hub_token", "--hub-token")  # HfArgumentParser takes both spellings


def public_command(script: str, argv: Sequence[str] | None) -> str:
    """Return a run's command for the shell, without the value of --hub_token; `argv` as `main` got it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    hidden = []
    for previous, word in zip([None, *argv], argv):
        flag, has_value, _ = word.partition("=")
        if previous in TOKEN_FLAGS:
            word = "..."
        elif has_value and flag in TOKEN_FLAGS:
            word = f"{flag}=..."
        hidden.append(word)
    return shlex.join(["accelerate", "launch", script, *hidden])
