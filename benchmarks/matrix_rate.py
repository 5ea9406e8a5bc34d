"""The speed of a large matrix product, as a reference for what a machine can compute."""

import statistics
import time

import torch

MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}


def matrix_rate(device: str, mixed_precision: str, size: int | None = None) -> float:
    """Return the operations per second of a large matrix product, the median of several."""
    size, dtype = size or MATRIX_SIZE[device], torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(12):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds)
