"""The share of generate_synthetic.py's sampling that is neither denoiser nor VAE.

    python -m benchmarks.generate_overhead

The script runs in this process, on one CPU thread or on a GPU, with timers around the modules' calls.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

import generate_synthetic
from benchmarks.commands import make_parser
from benchmarks.drawing import Case, demo_case, quick_case, sd15_case
from benchmarks.report import format_table, publish_section
from utils.synthesis.runner import Runner

TITLE = "Overhead of everything but denoiser and VAE"
BODY = (
    "The time of sampling (with checks, encoding and writing, without loading) and of the calls of the U-Net and of "
    "the VAE's decoder in it, measured inside the running script. {machine} {name}, {num_images:,} images, one row per "
    "run. **{share:.1%} of the time is spent in neither of the two** (median)."
)
ON_CPU = (
    "One thread computes, while encoding and writing use other cores. So the last column is about the processor time "
    "of all threads: the share that is not spent in those calls."
)
# methods, and the watches that measure them
TARGETS = [
    (UNet2DConditionModel, "forward", ("denoiser", "work of both")),
    (AutoencoderKL, "decode", ("VAE", "work of both")),
    (Runner, "make_shards", ("whole", "whole work")),
]


def elapsed(start: float, end: float) -> float:
    return end - start


@dataclass
class Watch:
    """Measures calls: `mark` is called before and after each, `between` returns the seconds between two marks."""

    mark: Callable
    between: Callable = elapsed
    spans: list[tuple] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(self.between(*span) for span in self.spans)

    def wrap(self, function: Callable) -> Callable:
        @wraps(function)
        def timed(*args, **kwargs):
            start = self.mark()
            result = function(*args, **kwargs)
            self.spans.append((start, self.mark()))
            return result

        return timed


def cuda_mark() -> torch.cuda.Event:
    """Return a mark in the GPU's queue, as a call returns long before it is computed."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def cuda_elapsed(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return start.elapsed_time(end) / 1000


def watch_run(command: list[str], device: str) -> dict[str, float]:
    """Run the script in this process; return the seconds of each watch of TARGETS; "work" is processor time."""
    module_clock = (time.perf_counter,) if device == "cpu" else (cuda_mark, cuda_elapsed)
    watches = {
        "denoiser": Watch(*module_clock),
        "VAE": Watch(*module_clock),
        "whole": Watch(time.perf_counter),
        "work of both": Watch(time.thread_time),
        "whole work": Watch(time.process_time),
    }
    with ExitStack() as stack:
        for kind, method, names in TARGETS:
            function = getattr(kind, method)
            for name in names:
                function = watches[name].wrap(function)
            stack.enter_context(patch.object(kind, method, function))
        generate_synthetic.main(command[2:])
    return {name: watch.seconds for name, watch in watches.items()}


def overhead(seconds: dict[str, float]) -> float:
    """Return the share of the time spent in neither denoiser nor VAE."""
    return 1 - (seconds["denoiser"] + seconds["VAE"]) / seconds["whole"]


def describe_run(number: int, seconds: dict[str, float], device: str) -> dict[str, str]:
    """Return a run's table row."""
    # not on a GPU, where the calling thread works for the calls after they have returned, too
    of_the_work = 1 - seconds["work of both"] / seconds["whole work"]
    return {
        "run": f"{number}",
        "sampling, s": f"{seconds['whole']:.1f}",
        "denoiser, s": f"{seconds['denoiser']:.1f}",
        "VAE, s": f"{seconds['VAE']:.1f}",
        "neither": f"{overhead(seconds):.1%}",
        **({"neither, of the work": f"{of_the_work:.1%}"} if device == "cpu" else {}),
    }


def measure(case: Case, rounds: int, device: str) -> str:
    """Draw a case several times; return the section of the report."""
    runs = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(watch_run(case.our_command(Path(folder)), device))
    text = BODY.format(
        name=case.name, num_images=case.num_images, share=statistics.median(overhead(seconds) for seconds in runs),
        machine=ON_CPU if device == "cpu" else "Times of the modules are those of the GPU's queue.",
    )  # fmt: skip
    rows = [describe_run(number, seconds, device) for number, seconds in enumerate(runs, 1)]
    return f"{text}\n\n{format_table(rows)}"


def main():
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--num_images_per_class", type=int, default=50, help="for each of ten classes (default: 50)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.small:
            case = quick_case(args.num_images_per_class, Path(folder))
        elif args.device == "cuda":
            case = sd15_case(args.num_images_per_class, Path(folder))
        else:
            case = demo_case(args.num_images_per_class)
        body = measure(case, args.rounds, args.device)
    publish_section("generate_synthetic", TITLE, body, args.small)


if __name__ == "__main__":
    main()
