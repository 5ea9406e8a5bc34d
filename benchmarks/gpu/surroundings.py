"""The machine, and the tests that need its GPU. It imports little, as imports take seconds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu.bench import TINY_MATRIX, Bench
from benchmarks.gpu.lines import FAILED
from benchmarks.matrix_rate import matrix_rate

ROOT = Path(__file__).parents[2]


def machine(bench: Bench) -> None:
    """Report the machine and the speed of matrix products."""
    versions = f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores"
    if not bench.is_cuda:
        bench.report("device", f"CPU, {versions}")
    else:
        device = torch.cuda.get_device_properties(0)
        bench.report(
            "device", f"{device.name}, {device.total_memory / 2**30:.1f} GiB, compute capability {device.major}."
            f"{device.minor}, CUDA {torch.version.cuda}, {versions}",
        )  # fmt: skip
    for title, precision, precision_of_products in (
        ("bfloat16", "bf16", "highest"), ("float32 in TF32", "no", "high"), ("float32", "no", "highest"),
    ):  # fmt: skip
        with bench.measuring(f"matrix product, {title}"):
            torch.set_float32_matmul_precision(precision_of_products)
            rate = matrix_rate(bench.device, precision, TINY_MATRIX if bench.is_tiny else None)
            bench.report(f"matrix product, {title}", f"{rate / 1e12:.3g} TFLOP/s", rate=rate)


def tests(bench: Bench) -> None:
    """Run the tests marked `gpu`, which are skipped without a GPU."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            bench.report("test", line.partition(" ")[2], FAILED)
    if result.returncode:
        bench.report("pytest", (lines or ["no output"])[-1], FAILED, log=(result.stdout + result.stderr)[-3000:])
    else:
        counts = re.findall(r"(\d+) (passed|skipped)", lines[-1])
        bench.report("pytest -m gpu", ", ".join(f"{number} {what}" for number, what in counts))
