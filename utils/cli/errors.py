"""How a script ends early: bad input in one line with exit status 2, a signal cleanly, a bug with its traceback."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS_TO_END = 10.0


class UserError(ValueError):
    """Bad input. The message names the flag and its value, what is wrong with it, and what would be right."""


class DivergedError(UserError):
    """Training came to losses or weights that are no finite numbers; the settings are at fault, not the data."""


class Interrupted(KeyboardInterrupt):
    """A signal came. The message says what is kept and how to go on."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


@contextmanager
def graceful_interrupt(advice: Callable[[], str]) -> Iterator[None]:
    """Turn SIGINT or SIGTERM within the block into `Interrupted` with `advice()` as its message.

    Those that follow at once are ignored: `accelerate launch` sends its processes SIGTERM after the SIGINT of a Ctrl-C.
    """
    received = []

    def interrupt(signal_number: int, _) -> None:
        received.append((signal_number, time.monotonic()))
        if received[-1][1] - received[0][1] > SECONDS_TO_END or len(received) == 1:
            raise KeyboardInterrupt  # once more where the first got lost, as it does in a destructor

    handlers = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(advice(), received[0][0]) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_script(main: Callable[[], object]) -> None:
    """Call a script's `main`; a `UserError` ends it with one line and exit status 2, a bug keeps its traceback.

    A signal ends it with exit status 128 and the signal's number, as a shell gives it.
    """
    try:
        main()
    except UserError as error:
        _end(f"error: {' '.join(str(error).split())}", 2)
    except Interrupted as interruption:
        _end(f"interrupted. {interruption}", 128 + interruption.signal_number)
    except KeyboardInterrupt:
        _end("interrupted", 128 + signal.SIGINT)


def _end(message: str, status: int) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)
