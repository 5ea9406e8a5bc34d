"""Measure everything of interest on a machine with a GPU, most important first, within a time limit, offline.

    python -m benchmarks.gpu --minutes 8
    python -m benchmarks.gpu --minutes 8 --diffusers diffusers --transformers transformers --output_dir out
    python -m benchmarks.gpu --parts generation variants
    python -m benchmarks.gpu --device cpu --tiny

Models are built from their configurations with random weights. Each part is a separate process, and each result is
printed and written at once: into gpu.jsonl, and into gpu.md as a report. With --diffusers and --transformers, checkouts
of these repositories, their scripts are also run for comparison. --tiny is a trial run of a minute at the size of a
test; its results are discarded unless --output_dir is given.
"""

import argparse
import shlex
import signal
import sys
import tempfile
import time
from datetime import date
from functools import partial
from pathlib import Path

from benchmarks.gpu.lines import Line, read_lines, write_report
from benchmarks.gpu.parts import PARTS, Budget, own_command, run_parts
from utils.cli.records import package_versions

SECONDS_TO_CLEAN_UP = 5.0  # at the end of the time limit
FOLDER = Path(__file__).parents[1]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of the run in minutes (default: 8)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="trial run at the size of a test")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument(
        "--diffusers", type=Path, help="checkout of the diffusers repository (default: do not run its script)"
    )
    parser.add_argument(
        "--transformers", type=Path, help="checkout of the transformers repository (default: do not run its script)"
    )
    parser.add_argument("--output_dir", type=Path, help="folder for gpu.md and gpu.jsonl (default: benchmarks)")
    # for the process of a part
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    for name, kind in (("deadline", float), ("work_dir", Path), ("results_path", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu: would take hours; add --tiny.")
    if args.device == "cuda" and args.part is None and not has_gpu():
        parser.error("--device cuda: no CUDA GPU found; use --device cpu --tiny for a trial run without one.")
    return args


def has_gpu() -> bool:
    import torch  # takes seconds

    return torch.cuda.is_available()


def run_part(args: argparse.Namespace) -> None:
    """Run one part in this process."""
    from benchmarks.gpu.bench import Bench  # takes seconds

    part = next(part for part in PARTS if part.name == args.part)
    bench = Bench(
        part.name, args.device, args.tiny, args.work_dir, args.results_path, args.deadline, args.diffusers,
        args.transformers,
    )  # fmt: skip
    with bench.measuring("all"):
        part.load()(bench)


def flags_of(args: argparse.Namespace) -> list[str]:
    """Return the flags that are passed on to a part's process."""
    flags = ["--device", args.device, *(["--tiny"] if args.tiny else [])]
    for name in ("diffusers", "transformers"):
        if (checkout := getattr(args, name)) is not None:
            flags += [f"--{name}", str(checkout.resolve())]
    return flags


def run_all(args: argparse.Namespace, work_dir: Path, output_dir: Path, command: str) -> list[Line]:
    """Run all parts, and return their lines."""
    started, results_path = time.time(), output_dir / "gpu.jsonl"
    results_path.unlink(missing_ok=True)
    parts = [part for part in PARTS if part.name in args.parts]
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())

    def write(is_over: bool = False) -> None:
        seconds = time.time() - started
        state = f"Done in {seconds:.0f} s." if is_over else f"Not finished, or stopped after {seconds:.0f} s."
        intro = f"Written by `{command}`, {date.today()}; {versions}. {state}"
        titles = {part.name: part.title for part in parts}
        write_report(output_dir / "gpu.md", read_lines(results_path), titles, intro)

    budget = Budget(60 * args.minutes - SECONDS_TO_CLEAN_UP, started, sum(part.share for part in parts))
    environment = {"TMPDIR": str(work_dir), "HF_HOME": str(work_dir / "hf-home"), "HF_HUB_OFFLINE": "1"}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(work_dir / "compiled"), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"} if args.device == "cpu" else {}
    make_command = partial(own_command, work_dir=work_dir, results_path=results_path, flags=flags_of(args))
    run_parts(parts, budget, results_path, work_dir, args.tiny, make_command, environment, write)
    write(is_over=True)
    return read_lines(results_path)


def exit_on_signal(*_) -> None:
    """Exit on SIGTERM as on an error: stop the part's processes and remove the working folder."""
    raise SystemExit(128 + signal.SIGTERM)


def main(argv: list[str] | None = None) -> list[Line]:
    args = parse_arguments(argv)
    if args.part is not None:
        run_part(args)
        return []
    before = signal.signal(signal.SIGTERM, exit_on_signal)
    command = shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)])
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        work_dir = Path(folder)
        output_dir = args.output_dir or (work_dir / "report" if args.tiny else FOLDER)
        output_dir.mkdir(parents=True, exist_ok=True)
        try:
            return run_all(args, work_dir, output_dir.resolve(), command)
        finally:
            signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
