"""A simulated GPU."""

from contextlib import nullcontext

import pytest
import torch


@pytest.fixture
def gpu(monkeypatch):
    """Simulate a GPU in torch, with or without bfloat16."""

    def have(bf16: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "device", lambda number: nullcontext())
        # every GPU supports it in emulation
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16
        )
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    return have
