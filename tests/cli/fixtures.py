"""A GPU that is not there."""

from contextlib import nullcontext

import pytest
import torch


@pytest.fixture
def gpu(monkeypatch):
    """Let torch have a GPU, and say whether it computes in bfloat16."""

    def have(bf16: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "device", lambda number: nullcontext())
        # emulated, every GPU has it
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16
        )
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    return have
