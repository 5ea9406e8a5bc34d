"""Errors that a user can cause: one line on stderr, exit status 2, no traceback."""

import sys
from collections.abc import Callable
from pathlib import Path

from utils.cli.interruptions import Interrupted


class UserError(ValueError):
    """Bad input. The message names the flag and its value, what is wrong with it, and what would be right."""


class DivergedError(UserError):
    """Training came to losses or weights that are no finite numbers; the settings are at fault, not the data."""


def run_script(main: Callable[[], object]) -> None:
    """Call a script's `main`; a `UserError` ends it with one line and exit status 2, a bug keeps its traceback.

    A signal ends it with exit status 128 and the signal's number, as a shell gives it.
    """
    try:
        main()
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as interruption:
        print(f"{Path(sys.argv[0]).name}: interrupted. {interruption}", file=sys.stderr)
        sys.exit(128 + interruption.signal_number)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
