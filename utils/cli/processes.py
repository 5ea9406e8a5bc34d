"""The processes of a launch: by which command it was started, which of them this is, what only one of them says."""

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from functools import cache

logger = logging.getLogger(__name__)

RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # as accelerate asks for them
TOKEN_FLAGS = ("--hub_token", "--hub-token")  # HfArgumentParser takes both spellings


def is_main_process() -> bool:
    """Return whether this is the main process of all machines, or the only one; needs no torch."""
    return all(os.environ.get(name, "0") in ("0", "-1") for name in RANK_VARIABLES)


@cache
def warn_once(line: str) -> None:
    """Warn in the main process, once a run: a set or a model is loaded for one purpose, and again for another."""
    if is_main_process():
        logger.warning(line)


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
