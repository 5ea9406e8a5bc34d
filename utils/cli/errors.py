"""How a script ends early: bad input in one line with exit status 2, a signal gracefully, a bug with its traceback."""

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
# a folder is not writable, or was removed; inputs can raise these errors too
FOLDER_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR)
# in the words of libraries that do not raise OSError: safetensors, and torch.save, which gives no reason
DISK_WORDS = re.compile("|".join([*map(os.strerror, DISK_ERRORS), "PytorchStreamWriter failed", "inline_container"]))
REMOVED_WORDS = re.compile(r"[Dd]irectory \S+ does not exist|No such file or directory")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS_TO_END = 10.0


class UserError(ValueError):
    """Bad input. The message gives the flag, its value, what is wrong and what would be right."""


class DivergedError(UserError):
    """A loss or a weight is not finite; the settings are at fault, not the data."""


class Interrupted(KeyboardInterrupt):
    """A signal arrived. The message says what is kept and how to resume."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


@contextmanager
def graceful_interrupt(advice: Callable[[], str]) -> Iterator[None]:
    """Turn SIGINT or SIGTERM within the block into `Interrupted` with `advice()` as its message.

    Further signals within seconds are ignored: after Ctrl-C, `accelerate launch` sends SIGTERM as well. A process
    forked within the block ends at SIGTERM, as its pool expects.
    """
    received, owner = [], os.getpid()

    def interrupt(signal_number: int, _) -> None:
        if signal_number == signal.SIGTERM and os.getpid() != owner:
            os._exit(128 + signal_number)  # an exception can get lost, and its pool would wait forever
        received.append((signal_number, time.monotonic()))
        if received[-1][1] - received[0][1] > SECONDS_TO_END or len(received) == 1:
            raise KeyboardInterrupt  # again if the first one got lost, as in a destructor

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
    """Turn a failure to write output within the block into a one-line error that ends with `advice()`.

    Raises:
        UserError: the disk is full or read-only, or the folder is not writable or was removed.
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
def report_how_to_resume(folder: str | Path, advice: Callable[[], str]) -> Iterator[None]:
    """End the message with `advice()` if a signal ends the block or the output folder cannot be written."""
    with graceful_interrupt(advice), report_unwritable(folder, advice):
        yield


def _why_unwritable(error: Exception, folder: str | Path) -> str | None:
    """Return why a file in the folder could not be written; None for other errors."""
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
    """Call a script's `main`: a `UserError` becomes one line and exit status 2, a bug keeps its traceback.

    After a signal the exit status is 128 plus the signal's number, as in a shell.
    """
    try:
        with graceful_interrupt(lambda: "Nothing is lost; run the same command again."):
            main()
    except UserError as error:
        _end(f"error: {' '.join(str(error).split())}", 2)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        named = f"{error.filename}: " if error.filename else ""
        _end(f"error: {named}cannot be written ({error.strerror}); free some space, or choose another location.", 2)
    except Interrupted as interruption:
        print(file=sys.stderr)  # below a progress bar
        _end(f"interrupted. {interruption}", 128 + interruption.signal_number)


def _end(message: str, status: int) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)
