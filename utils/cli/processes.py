"""The processes of a launch: their command, their ranks, and warnings from only one of them."""

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from functools import cache

from utils.cli.errors import UserError

logger = logging.getLogger(__name__)

RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # as accelerate reads them
OVERWRITE_FLAGS = ("--overwrite_output_dir", "--overwrite-output-dir")
TOKEN_FLAGS = ("--hub_token", "--hub-token")  # HfArgumentParser takes both spellings


def is_main_process() -> bool:
    """Return whether this is the main process of all machines, or the only process; needs no torch."""
    return all(os.environ.get(name, "0") in ("0", "-1") for name in RANK_VARIABLES)


def num_launched() -> int:
    """Return the number of processes of the launch on all machines; needs no torch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_processes_joined(num_processes: int) -> None:
    """Check that accelerate's `num_processes` are all processes of the launch.

    Raises:
        UserError: they are not: every process would do all the work, in the same folder.
    """
    if "LOCAL_RANK" in os.environ and num_processes < num_launched():
        raise UserError(
            f"--num_processes {num_launched()}: without GPUs, each process works alone; set "
            "ACCELERATE_USE_CPU=true, or launch one process."
        )


def check_single_process(advice: str) -> None:
    """Check that this is the only process, for a script that does not split its work.

    Raises:
        UserError: it is not.
    """
    if num_launched() > 1:
        raise UserError(f"--num_processes {num_launched()}: {advice}")


@cache
def warn_once(line: str) -> None:
    """Warn in the main process, once per run: a dataset or model may be loaded several times."""
    if is_main_process():
        logger.warning(line)


def public_command(script: str, argv: Sequence[str] | None) -> str:
    """Return a run's shell command without the value of --hub_token; `argv` is the argument of `main`."""
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


def without_overwrite_flag(command: str) -> str:
    """Return a command from `public_command` that resumes in its folder, even if it or its recipe would overwrite
    it."""
    words, kept = shlex.split(command), []
    for previous, word in zip([None, *words], words):
        is_value = previous in OVERWRITE_FLAGS and not word.startswith("--")
        if not is_value and word.partition("=")[0] not in OVERWRITE_FLAGS:
            kept.append(word)
    return shlex.join([*kept, "--no_overwrite_output_dir"])
