"""Faults on demand, and the log of requests."""

import re
import threading
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, eq=False)
class Fault:
    """A failure of matching requests, `times` times, after the first `skip` of them.

    Kinds: `status` answers with `status` and does nothing; `drop` closes the connection without an answer and does
    nothing; `truncate` sends half of the answer's body and closes; `lost_answer` does the work and closes without an
    answer; `delay` sleeps `seconds`, then continues; `hold` continues once `released` is set.
    """

    kind: Literal["status", "drop", "truncate", "lost_answer", "delay", "hold"]
    method: str | None = None  # None: any
    path: str = ""  # regular expression, searched in the path as it came, without the query
    times: int | None = 1  # None: forever
    skip: int = 0
    status: int = 503
    retry_after: int | None = None  # seconds, for a 429
    seconds: float = 0.0
    released: threading.Event = field(default_factory=threading.Event)

    def matches(self, method: str, path: str) -> bool:
        return self.method in (None, method) and re.search(self.path, path) is not None


@dataclass(frozen=True)
class LoggedRequest:
    method: str
    path: str  # as it came, quoted
    query: str
    token: str | None
    status: int | None  # of the work, even if the answer was lost; None: no answer
    fault: str | None  # the kind of the fault
    num_bytes_in: int  # of the body
    headers: dict[str, str]  # lower-case names


class FaultPlan:
    """The pending faults. A request gets at most one: the first one injected that is due."""

    def __init__(self):
        self.lock = threading.Lock()
        self.fired: list[Fault] = []
        self._num_matches: dict[Fault, int] = {}  # in the order of injection

    def inject(self, fault: Fault) -> None:
        with self.lock:
            self._num_matches[fault] = 0

    def clear(self) -> None:
        with self.lock:
            self._num_matches.clear()
            self.fired.clear()

    def strike(self, method: str, path: str) -> Fault | None:
        """Return the fault for this request, and count it as fired."""
        with self.lock:
            matching = [fault for fault in self._num_matches if fault.matches(method, path)]
            for fault in matching:
                self._num_matches[fault] += 1  # `skip` counts requests, with or without another fault
            for fault in matching:
                left = fault.times is None or self.fired.count(fault) < fault.times
                if left and self._num_matches[fault] > fault.skip:
                    self.fired.append(fault)
                    return fault
        return None
