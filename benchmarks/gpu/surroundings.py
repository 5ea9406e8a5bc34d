"""What the machine is, and whether the tests that need its GPU pass. Little is imported: that takes seconds."""

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
    """Say what the machine is, and what it can compute."""
    versions = f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores"
    if not bench.is_cuda:
        bench.tell("device", f"CPU, {versions}")
    else:
        device = torch.cuda.get_device_properties(0)
        bench.tell(
            "device", f"{device.name}, {device.total_memory / 2**30:.1f} GiB, compute capability {device.major}."
            f"{device.minor}, CUDA {torch.version.cuda}, {versions}",
        )  # fmt: skip
    for title, precision, precision_of_products in (
        ("bfloat16", "bf16", "highest"), ("float32 in TF32", "no", "high"), ("float32", "no", "highest"),
    ):  # fmt: skip
        with bench.measuring(f"matrix product, {title}"):
            torch.set_float32_matmul_precision(precision_of_products)
            rate = matrix_rate(bench.device, precision, TINY_MATRIX if bench.is_tiny else None)
            bench.tell(f"matrix product, {title}", f"{rate / 1e12:.3g} TFLOP/s", rate=rate)


def tests(bench: Bench) -> None:
    """Run the tests that are marked `gpu`; without a GPU they are skipped."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            bench.tell("test", line.partition(" ")[2], FAILED)
    if result.returncode:
        bench.tell("pytest", (lines or ["it printed nothing"])[-1], FAILED, log=(result.stdout + result.stderr)[-3000:])
    else:
        counts = re.findall(r"(\d+) (passed|skipped)", lines[-1])
        bench.tell("pytest -m gpu", ", ".join(f"{number} {what}" for number, what in counts))
