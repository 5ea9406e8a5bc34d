"""generate_synthetic.py compared with the usual way: a loop over classes that calls the pipeline.

    python -m benchmarks.generate_speed

Weights, prompts, steps, scheduler, batch and precision are the same; runs alternate, each in its own process. On a CPU
the pipeline is the demo's, on one core and on all; on a GPU it has the size of Stable Diffusion 1.5 and random weights.
"""

import argparse
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.children import Child, gpu_column, median_peaks, run_child
from benchmarks.commands import environment_of, make_parser
from benchmarks.drawing import DRAWING_BAR, Case, demo_case, quick_case, sd15_case
from benchmarks.matrix_rate import matrix_rate
from benchmarks.peer_loop import BAR as LOOP_BAR
from benchmarks.pipelines import drawing_cost
from benchmarks.report import format_table, publish_section
from utils.synthesis.output_folder import STATE_DIR

OURS = "`generate_synthetic.py`"
METHOD = (
    "Against `benchmarks/peer_loop.py`, a loop over classes that calls `pipe(prompt, num_images_per_prompt=batch)` and "
    "`image.save`. Medians of alternating rounds (smallest to largest). Images/s are for sampling: from the loaded "
    "pipeline to the last file on disk, including the first batch and compiling; the start is the time before. Memory "
    "is the peak of anonymous memory, summed over a command's processes and their launcher."
)


@dataclass(frozen=True)
class Program:
    """One way to draw a case."""

    name: str
    is_loop: bool = False
    num_threads: int = 1
    num_processes: int = 1
    torch_compile: bool = False

    @property
    def bar(self) -> str:
        return LOOP_BAR if self.is_loop else DRAWING_BAR

    def command(self, case: Case, work_dir: Path) -> list[str]:
        if self.is_loop:
            return case.peer_command(work_dir)
        return case.our_command(work_dir, self.num_processes, torch_compile=self.torch_compile)


@dataclass(frozen=True)
class Run:
    """Measurements of a program's run; `start` and `first_batch` in seconds, `peaks` as in `Child`."""

    start: float
    first_batch: float
    images_per_second: float
    later_images_per_second: float  # without the first batch
    peaks: dict[str, float]


ONE_PROCESS = [Program("the loop", is_loop=True), Program(OURS)]
COMPILING = [Program(OURS), Program(f"{OURS} `--torch_compile`", torch_compile=True)]


def programs_on(num_cores: int) -> list[Program]:
    """Return the ways to use all cores of a CPU."""
    return [
        Program("the loop", is_loop=True, num_threads=num_cores),
        Program(f"{OURS}, one process", num_threads=num_cores),
        Program(f"{OURS}, {num_cores} processes of one thread", num_processes=num_cores),
    ]


def run_program(program: Program, case: Case, device: str) -> Run:
    """Draw a case into a temporary folder.

    Raises:
        RuntimeError: the command failed, or ran with another number of processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder)
        environment = environment_of(work_dir, device, program.num_threads)
        environment |= {"TORCHINDUCTOR_CACHE_DIR": str(work_dir / "compiled")}  # every run compiles again
        environment |= {"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}
        child = run_child(program.command(case, work_dir), work_dir / "log.txt", environment)
        num_others = len(list((work_dir / "set" / STATE_DIR).glob("drawn-[!0]*")))
    if num_others != program.num_processes - 1:
        raise RuntimeError(f"{program.name}: was run by {num_others + 1} processes, not {program.num_processes}")
    return read_run(child, program, case)


def read_run(child: Child, program: Program, case: Case) -> Run:
    """Return the times from a bar, drawn when the pipeline is loaded, after the first batch and at the end."""
    ticks = child.bars[program.bar, case.num_images]
    seconds = child.seconds_of(program.bar, case.num_images)
    first_batch = next(tick.seconds for tick in ticks if tick.done) - ticks[0].seconds
    num_later = case.num_images - program.num_processes * case.batch_size
    return Run(
        start=ticks[0].seconds,
        first_batch=first_batch,
        images_per_second=case.num_images / seconds,
        later_images_per_second=num_later / (seconds - first_batch),
        peaks=child.peaks,
    )


def format_range(values: list[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def describe_program(program: Program, runs: list[Run], first_runs: list[Run], matrix_share: float) -> dict[str, str]:
    """Return a program's table row, compared with the first program round by round.

    `matrix_share` is the share of the matrix rate that one image/s needs.
    """
    speeds = [run.images_per_second for run in runs]
    ratios = [speed / first.images_per_second for speed, first in zip(speeds, first_runs)]
    peaks = median_peaks(run.peaks for run in runs)
    return {
        "": program.name,
        "images/s": format_range(speeds, 1),
        "times the first row's": format_range(ratios, 2),
        "of the matrix rate": f"{statistics.median(speeds) * matrix_share:.0%}",
        "start, s": f"{statistics.median(run.start for run in runs):.1f}",
        "memory, MiB": f"{peaks['RssAnon']:,.0f}",
        **gpu_column(peaks),
    }


def describe_compiling(plain: list[Run], compiled: list[Run]) -> str:
    """Return a sentence on what compiling costs, and after how many images it pays off."""
    before, after = (statistics.median(run.later_images_per_second for run in runs) for runs in (plain, compiled))
    first, first_compiled = (statistics.median(run.first_batch for run in runs) for runs in (plain, compiled))
    repaid = "never pays off"
    if after > before:
        repaid = f"pays off after {(first_compiled - first) / (1 / before - 1 / after):,.0f} images per process"
    return (
        f"Compiling takes {first_compiled - first:.0f} s; the speed is then {after:.1f} images/s instead of "
        f"{before:.1f}, so it {repaid}."
    )


def compare(case: Case, programs: list[Program], rounds: int, device: str, num_threads: int) -> str:
    """Run programs in turn; return the case's part of the report."""
    torch.set_num_threads(num_threads)  # for the matrix product
    matrix_rates, runs = [], {program: [] for program in programs}
    for number in range(rounds):
        matrix_rates.append(matrix_rate(device, case.mixed_precision))
        for program in programs:
            runs[program].append(run_program(program, case, device))
            speed = runs[program][-1].images_per_second
            print(f"{case.name}, round {number + 1} of {rounds}: {program.name} {speed:.1f} images/s", flush=True)
    rate = statistics.median(matrix_rates)
    cost = drawing_cost(case.pipeline_dir, case.num_inference_steps, case.guidance_scale)
    rows = [describe_program(program, runs[program], runs[programs[0]], cost / rate) for program in programs]
    cores = {"cuda": "", "cpu": f" on {num_threads} core{'s' if num_threads > 1 else ''}"}[device]
    compiling = f"\n\n{describe_compiling(*runs.values())}" if programs == COMPILING else ""
    return (
        f"**{case.name}{cores}**: {case.num_images:,} images of {case.num_inference_steps} steps, guidance "
        f"{case.guidance_scale}, batch {case.batch_size}: {cost / 1e9:,.1f} GFLOP per image. A large matrix product "
        f"reaches {rate / 1e12:.3g} TFLOP/s here. Rounds: {rounds}.\n\n{format_table(rows)}{compiling}"
    )


def compare_on_cpu(args: argparse.Namespace, work_dir: Path) -> list[str]:
    """Compare on one core, and with twice the images on all; compiling, which takes longest, has one round."""
    cases = [demo_case(args.num_images_per_class), demo_case(2 * args.num_images_per_class)]
    if args.small:
        cases = [quick_case(4, work_dir)] * 2
    num_cores = len(os.sched_getaffinity(0))
    return [
        compare(cases[0], ONE_PROCESS, args.rounds, "cpu", num_threads=1),
        compare(cases[0], COMPILING, 1, "cpu", num_threads=1),
        compare(cases[1], programs_on(num_cores), args.rounds, "cpu", num_cores),
    ]


def main():
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument(
        "--num_images_per_class",
        type=int,
        default=50,
        help="for each of ten classes, a multiple of the batch (default: 50)",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.device == "cpu":
            parts = compare_on_cpu(args, Path(folder))
        else:
            case = (quick_case if args.small else sd15_case)(args.num_images_per_class, Path(folder))
            parts = [compare(case, programs, args.rounds, "cuda", 1) for programs in (ONE_PROCESS, COMPILING)]
    title = f"Speed compared with a plain loop, on a {'GPU' if args.device == 'cuda' else 'CPU'}"
    body = "\n\n".join([METHOD, *parts])
    publish_section("generate_synthetic", title, body, args.small)


if __name__ == "__main__":
    main()
