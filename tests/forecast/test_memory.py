"""Memory that is counted against memory that is measured: saved tensors, the allocator, autograd with checkpoints."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.pipelines import SCALED
from utils.forecast.memory import (
    StorageCounter,
    count_forward,
    count_step,
    needed_bytes,
    state_bytes,
    weight_bytes,
    without_values,
)

BATCH_SIZE = 2


def unet_loss(unet, dtype=torch.float32):
    """Return what computes a loss whose gradient goes back to the text embedding alone."""
    config = unet.config

    def compute():
        latents = torch.zeros(BATCH_SIZE, 4, config.sample_size, config.sample_size, dtype=dtype)
        words = torch.zeros(BATCH_SIZE, 24, config.cross_attention_dim, dtype=dtype, requires_grad=True)
        timesteps = torch.zeros(BATCH_SIZE, dtype=torch.long)
        return unet(latents, timesteps, words).sample.float().square().mean()

    return compute


def vit_loss(model, dtype=None):
    def compute():
        images = torch.zeros(BATCH_SIZE, 3, 128, 128)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            return model(pixel_values=images).logits.float().square().mean()

    return compute


def build_unet():
    return SCALED.build_unet().requires_grad_(False)


def build_vit():
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=384,
            image_size=128,
            patch_size=4,
        )
    )


def allocated_peak(compute, tmp_path) -> int:
    """Return by how much the allocator's bytes grow at most, as PyTorch's profiler sees it, kernels on one thread."""
    compute()  # what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = [event["args"] for event in events if event["name"] == "[memory]"]
    return max(change["Total Allocated"] for change in changes) - (changes[0]["Total Allocated"] - changes[0]["Bytes"])


def count_on_meta(build, make_loss, dtype=None, checkpointing=None):
    with torch.device("meta"):
        model = build().train()
    if checkpointing:
        getattr(model, checkpointing)()
    with without_values(model):
        return count_step(make_loss(model), list(model.parameters()))


CASES = {
    "unet": (build_unet, unet_loss, None),
    "unet, checkpointed": (build_unet, unet_loss, "enable_gradient_checkpointing"),
    "vit": (build_vit, vit_loss, None),
    "vit, checkpointed": (build_vit, vit_loss, "gradient_checkpointing_enable"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_counted_peak_is_the_allocators(case, tmp_path):
    """The allocator is asked for a little more: by kernels, for their own use."""
    build, make_loss, checkpointing = CASES[case]
    counted = count_on_meta(build, make_loss, checkpointing=checkpointing)
    model = build().train()
    if checkpointing:
        getattr(model, checkpointing)()
    compute = make_loss(model)

    def step():
        compute().backward()
        model.zero_grad()

    measured = allocated_peak(step, tmp_path)
    print(case, counted, measured)
    assert counted.peak == pytest.approx(measured, rel=0.02)
