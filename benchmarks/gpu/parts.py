"""The parts of the run, most important first, each in its own process, so that a failure does not affect others."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.lines import FAILED, LEFT_OUT, Line, append_line

MIN_SECONDS = 5.0  # too little time for any part
SECONDS_BETWEEN_LOOKS = 0.2
ROOT = Path(__file__).parents[2]
LOG_LENGTH = 3000


def lacks_module(name: str) -> str | None:
    return None if find_spec(name) else f"{name} is not installed"


def lacks_disk(work_dir: Path, gib: float) -> str | None:
    free = shutil.disk_usage(work_dir).free / 2**30
    return (
        None if free > gib else f"needs {gib} GiB in {work_dir}, {free:.1f} GiB are free (TMPDIR sets another folder)"
    )


@dataclass(frozen=True)
class Part:
    """A function of `benchmarks.gpu` that takes a `Bench` and runs in its own process.

    `share` is the largest share of the time limit that it may take. The shares may add up to more than one; then the
    last parts may have no time left. It needs `modules` and, at full size, `gib_on_disk` in the working folder.
    """

    name: str
    module: str
    title: str
    share: float
    modules: tuple[str, ...] = ()
    gib_on_disk: float = 0.0

    def lacks(self, work_dir: Path, is_tiny: bool) -> str | None:
        """Return why this machine cannot run it, or None if it can."""
        missing = next(filter(None, map(lacks_module, self.modules)), None)
        return missing or (None if is_tiny else lacks_disk(work_dir, self.gib_on_disk))

    def load(self) -> Callable:
        return getattr(import_module(f"benchmarks.gpu.{self.module}"), self.name)


WITH_PIPELINE = {"modules": ("diffusers", "transformers"), "gib_on_disk": 4.0}
PARTS = (
    Part("machine", "surroundings", "Machine", 0.06),
    Part("parity", "checks", "CPU against GPU, bfloat16 against float32", 0.14, **WITH_PIPELINE),
    Part("generation", "drawing", "Generation compared with a plain loop", 0.35, **WITH_PIPELINE),
    Part("dsi", "training", "Learning a style token", 0.3, **WITH_PIPELINE),
    Part("tests", "surroundings", "Tests that need a GPU", 0.1, ("pytest",)),
    Part("small_cards", "checks", "Training and drawing with the memory of smaller cards", 0.15, **WITH_PIPELINE),
    Part("classifiers", "training", "Classifiers from JPEG", 0.3, ("transformers",), 4.0),
    Part("memory", "training", "Measured and counted memory", 0.12, **WITH_PIPELINE),
    Part("resume", "checks", "Resuming", 0.08, ("diffusers", "transformers")),
    Part("variants", "drawing", "Ways to draw", 0.3, **WITH_PIPELINE),
)


@dataclass(frozen=True)
class Budget:
    """The time of the run. `shares` is the sum over its parts; below one, each part may take more."""

    seconds: float
    started: float
    shares: float = 1.0
    clock: Callable[[], float] = time.time

    @property
    def left(self) -> float:
        return self.started + self.seconds - self.clock()

    def limit(self, part: Part) -> float:
        """Return the seconds that a part may take."""
        return min(self.left, self.seconds * part.share / min(1, self.shares))


def run_parts(
    parts: list[Part], budget: Budget, results_path: Path, work_dir: Path, is_tiny: bool,
    make_command: Callable[[Part, float], list[str]], environment: dict[str, str], on_change: Callable[[], None],
) -> None:  # fmt: skip
    """Run parts in order. Each writes lines; `on_change` is called when there are new ones.

    `make_command` takes a part and its deadline as `time.time()`.
    """
    for part in parts:
        tell = partial(_tell, results_path, part)
        limit = budget.limit(part)
        if (reason := part.lacks(work_dir, is_tiny)) is not None:
            tell("all", reason, LEFT_OUT)
        elif limit < MIN_SECONDS:
            tell("all", f"only {max(0, limit):.0f} s are left", LEFT_OUT)
        else:
            began = time.time()
            log = work_dir / f"{part.name}.log"
            problem = run_process(make_command(part, began + limit), limit, log, environment, results_path, on_change)
            if problem is not None:
                tell("all", problem, FAILED, log=log.read_text(errors="replace")[-LOG_LENGTH:])
            tell("time", f"{time.time() - began:.0f} s of {limit:.0f}", seconds=time.time() - began)
        on_change()


def _tell(results_path: Path, part: Part, name: str, text: str, status: str = "measured", **values) -> None:
    append_line(results_path, Line(part.name, name, text, status, values))


def run_process(
    command: list[str], limit: float, log: Path, environment: dict[str, str], results_path: Path,
    on_change: Callable[[], None],
) -> str | None:  # fmt: skip
    """Run a command for at most `limit` seconds; return what went wrong, or None.

    Its output is shown, errors go to a log. All processes that it started end with it.
    """
    size, ends_at = 0, time.monotonic() + limit
    with log.open("wb") as errors, _started(command, errors, os.environ | environment) as process:
        while process.poll() is None:
            if time.monotonic() > ends_at:
                return f"stopped after its {limit:.0f} s"
            if results_path.exists() and results_path.stat().st_size != size:
                size = results_path.stat().st_size
                on_change()
            time.sleep(SECONDS_BETWEEN_LOOKS)
    if process.returncode < 0:
        return f"killed by {signal.Signals(-process.returncode).name}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return (lines or [f"exit status {process.returncode}"])[-1].strip() if process.returncode else None


@contextmanager
def _started(command: list[str], errors, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(command, stderr=errors, env=environment, cwd=ROOT, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # all of them have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def own_command(part: Part, deadline: float, work_dir: Path, results_path: Path, flags: list[str]) -> list[str]:
    """Return the command that runs a part."""
    command = [sys.executable, "-m", "benchmarks.gpu", *flags, "--part", part.name, "--deadline", str(deadline)]
    return [*command, "--work_dir", str(work_dir), "--results_path", str(results_path)]
