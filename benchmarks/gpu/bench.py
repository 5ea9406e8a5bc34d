"""The context of a part of the run: device, sizes, remaining time, and its results."""

import gc
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState

from benchmarks.commands import environment_of
from benchmarks.gpu.lines import FAILED, LEFT_OUT, TARGETS, Line, append_line
from benchmarks.matrix_rate import matrix_rate

TINY_MATRIX = 256
LOG_LENGTH = 3000  # characters to keep of a failure's log


class LeftOutError(Exception):
    """Something is not measured; the message says why."""


@dataclass(frozen=True)
class Bench:
    """The context of a part. `deadline` is the `time.time()` at which its process is stopped.

    With `is_tiny` everything has the size of a test, and no target is judged.
    """

    part: str
    device: str
    is_tiny: bool
    work_dir: Path
    results_path: Path
    deadline: float
    diffusers: Path | None = None
    transformers: Path | None = None

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the models: bfloat16 on a GPU, else float32."""
        return torch.bfloat16 if self.is_cuda else torch.float32

    @property
    def precision(self) -> str:
        return "bf16" if self.is_cuda else "no"

    @property
    def shape(self):
        """The `Shape` of the pipelines."""
        from benchmarks.pipelines import SD15, TINY  # takes seconds

        return TINY if self.is_tiny else SD15

    @cached_property
    def pipeline_dir(self) -> Path:
        """A pipeline with random weights for all parts, written by the first part that needs it."""
        from benchmarks.pipelines import save_pipeline

        folder = self.work_dir / "pipeline"
        if not folder.exists():
            unfinished = self.work_dir / f"pipeline-{self.part}"  # stays there if the part is stopped
            save_pipeline(self.shape, unfinished, self.device, torch.bfloat16).rename(folder)
            self.free_memory()
        return folder

    @cached_property
    def rate(self) -> float:
        """Operations per second of a large matrix product in the precision of the models."""
        return matrix_rate(self.device, self.precision, TINY_MATRIX if self.is_tiny else None)

    @cached_property
    def environment(self) -> dict[str, str]:
        """The environment of commands: no network, caches in the working folder."""
        environment = environment_of(self.work_dir, self.device)
        return environment | ({} if self.is_cuda else {"ACCELERATE_USE_CPU": "true"})

    def own_dir(self, name: str) -> Path:
        """Return a new folder for this part."""
        folder = self.work_dir / f"{self.part}-{name}"
        folder.mkdir()
        return folder

    def report(self, name: str, text: str, status: str = "measured", target: str | None = None, **values) -> None:
        """Print and store a line; `values` contains the value of its `target` under the target's name."""
        verdict = None
        if target is not None and not self.is_tiny:
            verdict = TARGETS[target].judge(values[target])
        append_line(self.results_path, Line(self.part, name, text, status, values, target, verdict))

    def require_seconds(self, seconds: float) -> None:
        """Raise `LeftOutError` if less time is left than `seconds`, an estimate for a GPU."""
        left = self.deadline - time.time()
        if not self.is_tiny and left < seconds:
            raise LeftOutError(f"takes about {seconds:.0f} s, but {left:.0f} s are left")

    @contextmanager
    def measuring(self, name: str) -> Iterator[None]:
        """Turn errors into a line, so that the part continues, and free memory at the end."""
        try:
            yield
        except LeftOutError as error:
            self.report(name, str(error), LEFT_OUT)
        except (Exception, SystemExit) as error:
            log = "".join(traceback.format_exception(error))[-LOG_LENGTH:]
            self.report(name, last_line(error), FAILED, log=log)
            traceback.clear_frames(error.__traceback__)  # they keep memory in use
        # scripts that ran in this process leave behind the state of their `Accelerator`
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        self.free_memory()

    def free_memory(self) -> None:
        """Free unused memory of the device, and reset its peak."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> float:
        """Return the time after the device has finished all work."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def last_line(error: BaseException) -> str:
    """Return an error as one line; for a command that failed, the last line of its output."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[-1] if type(error) is RuntimeError else f"{type(error).__name__}: {lines[-1]}"
