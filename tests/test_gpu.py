"""Behaviour on a CUDA GPU: freed memory after an error, and the precision of computations."""

import time

import pytest
import torch
from torch import nn

from utils.cli.memory import MicroBatching, try_in_memory
from utils.cli.precision import allow_tf32, device_precision
from utils.transfer.waiting import WaitingTime

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU found")]


def test_a_failed_attempt_frees_its_memory():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    def attempt():
        held = [torch.empty(2**28, dtype=torch.uint8, device="cuda")]
        while True:
            held.append(torch.empty(2**32, dtype=torch.uint8, device="cuda"))

    assert try_in_memory(attempt) is None
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_a_step_that_runs_out_of_memory_is_divided_and_has_the_same_gradients():
    torch.manual_seed(0)
    layers = [layer for n in range(8) for layer in (nn.Conv2d(32 if n else 3, 32, 3, padding=1), nn.SiLU())]
    model, images = nn.Sequential(*layers).cuda(), torch.randn(32, 3, 256, 256)

    def accumulate(size: int) -> bool:
        for part in images.split(size):
            (model(part.cuda()).square().sum() / len(images)).backward()
        return True

    def gradients() -> list[torch.Tensor]:
        return [parameter.grad.clone() for parameter in model.parameters()]

    accumulate(32)
    expected = gradients()
    model.zero_grad()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    accumulate(8)
    needed = torch.cuda.max_memory_reserved()
    model.zero_grad()
    torch.cuda.empty_cache()
    micro_batching = MicroBatching(32, "--batch 32", "buy more.")
    torch.cuda.set_per_process_memory_fraction(1.3 * needed / torch.cuda.get_device_properties(0).total_memory)
    try:
        micro_batching.run(lambda: accumulate(micro_batching.size), model.zero_grad)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert micro_batching.size in (4, 8)
    for one, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 * other.abs().max().item())


def test_the_precision_suits_the_device_and_float32_products_use_tf32(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert device_precision() == ("bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16")
    before = torch.get_float32_matmul_precision()
    try:
        allow_tf32("cuda")
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_device_waits_while_images_are_read_only_where_it_has_nothing_to_do():
    device = torch.device("cuda")
    cycles = int(torch.cuda.get_device_properties(device).clock_rate * 500)  # half a second of work; kHz
    for work, expected in ((cycles, 0.0), (0, 0.2)):
        waiting = WaitingTime(device)
        torch.cuda.synchronize()
        if work:
            torch.cuda._sleep(work)
        with waiting:
            time.sleep(0.2)
        assert waiting.seconds == pytest.approx(expected, abs=0.1)
