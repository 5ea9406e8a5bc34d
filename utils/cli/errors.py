"""How a script ends early: bad input in one line with exit status 2, a signal cleanly, a bug with its traceback."""

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

# a disk is full, or read-only
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# a folder may not be written, or was removed; inputs have these errors, too
FOLDER_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR)
# as libraries put it that do not raise an OSError: safetensors, and torch.save, which does not say why
DISK_WORDS = re.compile("|".join([*map(os.strerror, DISK_ERRORS), "PytorchStreamWriter failed", "inline_container"]))
REMOVED_WORDS = re.compile(r"[Dd]irectory \S+ does not exist|No such file or directory")
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
    A process that was forked within the block ends at SIGTERM, as its pool expects.
    """
    received, owner = [], os.getpid()

    def interrupt(signal_number: int, _) -> None:
        if signal_number == signal.SIGTERM and os.getpid() != owner:
            os._exit(128 + signal_number)  # an exception can get lost, and its pool would wait for ever
        received.append((signal_number, time.monotonic()))
        if received[-1][1] - received[0][1] > SECONDS_TO_END or len(received) == 1:
            raise KeyboardInterrupt  # once more where the first got lost, as it does in a destructor

    handlers = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    except KeyboardInterrupt:
        if not received:
            raise
        raise Interrupted(advice(), received[0][0]) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def report_unwritable(folder: str | Path, advice: Callable[[], str]) -> Iterator[None]:
    """Turn an output that cannot be written within the block into one line, which ends in `advice()`.

    Raises:
        UserError: the folder's disk is full or read-only, the folder may not be written, or was removed.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (reason := _why_unwritable(error, folder)) is None:
            raise
        raise UserError(f"--output_dir {folder}: cannot be written ({reason}); {advice()}") from None


@contextmanager
def saying_how_to_go_on(folder: str | Path, advice: Callable[[], str]) -> Iterator[None]:
    """Say `advice()` where a signal ends the block, or an output folder cannot be written."""
    with graceful_interrupt(advice), report_unwritable(folder, advice):
        yield


def _why_unwritable(error: Exception, folder: str | Path) -> str | None:
    """Return why a file in a folder could not be written, None where the error is another one."""
    name = getattr(error, "filename", None)
    name = None if name is None else Path(os.fsdecode(name)).absolute()
    is_ours = name is not None and name.is_relative_to(Path(folder).absolute())
    if not Path(folder).is_dir() and (is_ours or REMOVED_WORDS.search(str(error))):
        return "it was removed"
    if not isinstance(error, OSError) or error.errno is None:
        found = DISK_WORDS.search(str(error))
        return found and found[0]
    if error.errno in DISK_ERRORS:
        return f"{error.strerror}: {name}" if name is not None and not is_ours else error.strerror
    return error.strerror if error.errno in FOLDER_ERRORS and is_ours else None


def run_script(main: Callable[[], object]) -> None:
    """Call a script's `main`; a `UserError` ends it with one line and exit status 2, a bug keeps its traceback.

    A signal ends it with exit status 128 and the signal's number, as a shell gives it.
    """
    try:
        with graceful_interrupt(lambda: "Nothing is lost: run the same command again."):
            main()
    except UserError as error:
        _end(f"error: {' '.join(str(error).split())}", 2)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        named = f"{error.filename}: " if error.filename else ""
        _end(f"error: {named}cannot be written ({error.strerror}); make room, or name another place.", 2)
    except Interrupted as interruption:
        print(file=sys.stderr)  # below a progress bar
        _end(f"interrupted. {interruption}", 128 + interruption.signal_number)


def _end(message: str, status: int) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)
