"""How long a device waits for images."""

import time

import torch

MAX_SHARE = 0.2  # of a stage's seconds; more gives a warning


class WaitingTime:
    """The time that a device was idle while its next images were read, summed over all uses of the context.

    A GPU still has work when the process begins to wait, so the times are taken from events in its queue.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._seconds = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self):
        self._begun = self._mark()

    def __exit__(self, *exception):
        ended = self._mark()
        if self.device.type != "cuda":
            self._seconds += ended - self._begun
            return
        self._marks.append((self._begun, ended))
        while self._marks and self._marks[0][1].query():
            self._take_first()

    @property
    def seconds(self) -> float:
        while self._marks:
            self._marks[0][1].synchronize()
            self._take_first()
        return self._seconds

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._seconds, self._marks = value, []

    def _mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _take_first(self) -> None:
        begun, ended = self._marks.pop(0)
        self._seconds += begun.elapsed_time(ended) / 1000


def advise_on_waiting(seconds_waiting: float, seconds: float, num_workers: int) -> str | None:
    """Return advice if a device waited for more than `MAX_SHARE` of a stage, else None."""
    if seconds_waiting <= MAX_SHARE * seconds:
        return None
    return (
        f"the GPU waited {seconds_waiting:,.0f} of {seconds:,.0f} s for images; try more --dataloader_num_workers (now "
        f"{num_workers}) or --cache_images."
    )
