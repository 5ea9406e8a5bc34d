"""Run a command as a child process and record its progress bars and memory."""

import os
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.cli.threads import WAIT_POLICY

# a bar without a description, such as the Trainer's, has the description ""
BAR = re.compile(r"(?:([^\r\n:|]+): +)?\d+%\|[^|]*\| +(\d+)/(\d+) ")
MEMORY_FIELDS = ("VmHWM", "RssAnon", "RssFile")
SECONDS_BETWEEN_LOOKS = 0.05


@dataclass(frozen=True)
class Tick:
    """One drawing of a progress bar: the units done, and the seconds since the command's start."""

    seconds: float
    done: int


@dataclass(frozen=True)
class Child:
    """A finished command; `peaks` in MiB by MEMORY_FIELDS and "device", `bars` by description and total."""

    seconds: float
    peaks: dict[str, float]
    bars: dict[tuple[str, int], list[Tick]]

    def units_per_second(self, description: str, total: int, first: int = 0, last: int | None = None) -> float:
        """Return a bar's speed between the units `first` and `last` (None: the end)."""
        ticks = self.bars[description, total]
        # a bar may be drawn once more when it is closed
        start, end = (next(tick for tick in ticks if tick.done >= unit) for unit in (first, last or total))
        return (end.done - start.done) / (end.seconds - start.seconds)

    def seconds_of(self, description: str, total: int) -> float:
        """Return the seconds from the first drawing of a bar to its last one, when it is closed."""
        ticks = self.bars[description, total]
        return ticks[-1].seconds - ticks[0].seconds


def median_peaks(runs: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the medians of several runs' peaks, in MiB."""
    runs = list(runs)
    return {name: statistics.median(peaks[name] for peaks in runs) for name in runs[0]}


def gpu_column(peaks: dict[str, float]) -> dict[str, str]:
    """Return the column of a table row that exists only on a GPU."""
    return {"GPU memory, GiB": f"{peaks['device'] / 1024:.1f}"} if peaks["device"] else {}


def run_child(command: list[str], log_path: Path, environment: dict[str, str]) -> Child:
    """Run `command` to its end, with `environment` on top of this process's; its output goes to a log.

    The wait policy of threads is not inherited: our scripts set it, and others should run as a user starts them.

    Raises:
        RuntimeError: it failed.
    """
    device_memory_before = device_memory()
    before: dict[str, float] = {}
    peaks: dict[str, float] = {}
    started = time.perf_counter()
    inherited = {name: value for name, value in os.environ.items() if name != WAIT_POLICY}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=inherited | environment)
    bars: dict[tuple[str, int], list[Tick]] = {}
    reader = threading.Thread(target=read_bars, args=(process.stdout.fileno(), log_path, started, bars))
    reader.start()
    while process.poll() is None:
        memory = tree_memory(process.pid) | {"device": device_memory() - device_memory_before}
        # what lasts for two looks: a process that is about to become another program is counted twice for a moment
        peaks = {name: max(min(value, before.get(name, 0)), peaks.get(name, 0)) for name, value in memory.items()}
        before = memory
        time.sleep(SECONDS_BETWEEN_LOOKS)
    seconds = time.perf_counter() - started
    reader.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}\n{log_path.read_text()[-3000:]}")
    return Child(seconds, peaks, bars)


def read_bars(descriptor: int, log_path: Path, started: float, bars: dict[tuple[str, int], list[Tick]]) -> None:
    """Copy a pipe into a log until its end, and add each update of a tqdm bar to `bars`."""
    with log_path.open("wb") as log:
        # a bar is drawn in one short write, which a pipe passes on in one piece
        while chunk := os.read(descriptor, 65536):
            seconds = time.perf_counter() - started
            log.write(chunk)
            for description, done, total in BAR.findall(chunk.decode(errors="replace")):
                bars.setdefault((description.strip(), int(total)), []).append(Tick(seconds, int(done)))


def tree_memory(pid: int) -> dict[str, float]:
    """Return MEMORY_FIELDS in MiB, summed over a process and its descendants; 0 for one that has just ended."""
    memory = dict.fromkeys(MEMORY_FIELDS, 0.0)
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return memory
    for name, kib in re.findall(rf"({'|'.join(MEMORY_FIELDS)}):\s+(\d+) kB", status):
        memory[name] = int(kib) / 1024
    for child in sum(children, []):
        for name, value in tree_memory(int(child)).items():
            memory[name] += value
    return memory


def device_memory() -> float:
    """Return the GPU's memory in use by all processes, in MiB; 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20
