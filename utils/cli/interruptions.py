"""SIGINT and SIGTERM: a run ends at once, cleanly, and says how it goes on."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS_TO_END = 10.0


class Interrupted(KeyboardInterrupt):
    """A signal came. The message says what is kept and how to go on."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


@contextmanager
def ending_cleanly(advice: Callable[[], str]) -> Iterator[None]:
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
