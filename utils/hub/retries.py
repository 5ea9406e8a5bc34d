"""Calls to the Hub that the client does not repeat by itself (commit, create, info), repeated with a growing pause."""

import logging
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from utils.cli.errors import UserError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_TRIES = 6
FIRST_PAUSE = 1.0  # seconds, doubled from try to try
LONGEST_PAUSE = 60.0
PASSING_STATUSES = {408, 429, 500, 502, 503, 504}


class HubUnavailable(UserError):
    """The Hub did not do what was asked within the limit of tries; asking again later is right."""


def log_and_sleep(problem: str, pause: float) -> None:
    logger.warning(problem)
    time.sleep(pause)


# called with the problem in a line and the seconds to wait; a thread beside other work sets its own way for itself
wait_between_tries: ContextVar[Callable[[str, float], None]] = ContextVar("wait_between_tries", default=log_and_sleep)


def with_retries(call: Callable[[], Result], what: str) -> Result:
    """Return `call()`, repeated while it fails for reasons that pass: server errors, rate limits, lost connections.

    Raises:
        HubUnavailable: it failed so `MAX_TRIES` times. Other errors are raised as they are.
    """
    for attempt in range(1, MAX_TRIES + 1):
        try:
            return call()
        except (HTTPError, OSError, RuntimeError) as error:
            pause = pause_after(error, attempt)
            if pause is None:
                raise
            if attempt == MAX_TRIES:
                raise HubUnavailable(f"{what}: gave up after {MAX_TRIES} tries ({first_line(error)}).") from error
            problem = f"{what}: {first_line(error)}; again in {pause:.0f} s ({attempt} of {MAX_TRIES} tries)"
            wait_between_tries.get()(problem, pause)
    raise AssertionError("unreachable")


def pause_after(error: BaseException, attempt: int) -> float | None:
    """Return the seconds to wait before the next try, None when another try would not help."""
    cause = error
    # how the client wraps a failed upload, and a failed download
    while isinstance(cause, (RuntimeError, LocalEntryNotFoundError)) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, HfHubHTTPError):
        if cause.response.status_code not in PASSING_STATUSES:
            return None
        asked = cause.response.headers.get("Retry-After", "")
        if asked.isdigit():
            return min(float(asked) + 1, LONGEST_PAUSE)
    elif isinstance(cause, OfflineModeIsEnabled) or not isinstance(cause, (HTTPError, ConnectionError, TimeoutError)):
        return None
    return min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)


def first_line(error: BaseException) -> str:
    """Return an error's type and first line, without the advice that follows in the client's messages."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
