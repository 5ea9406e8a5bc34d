"""BatchNorm statistics per kind of image: synthetic images in a mixed batch are normalised with their own.

The model's running statistics are those of real images, so a saved classifier is a plain one. After Mixup, an image
counts as the kind of its larger part.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from utils.transfer.image_format import EvalImages
from utils.transfer.model_parts import batch_norm_modules, recalibrate_batch_norm


def measure_statistics(
    model: nn.Module, synthetic: EvalImages, real: EvalImages, device: torch.device, seed: int, batch_size: int = 128
) -> dict[str, torch.Tensor]:
    """Set BatchNorm's running statistics to those of the real images, and return those of the synthetic ones.

    Their keys are `<module>.running_mean` and `<module>.running_var`. Does nothing without BatchNorm.
    """
    recalibrate_batch_norm(model, synthetic, device, seed, batch_size)
    modules = batch_norm_modules(model)
    statistics = {
        f"{name}.{statistic}": getattr(module, statistic).clone()
        for name, module in model.named_modules()
        if module in modules
        for statistic in ("running_mean", "running_var")
    }
    recalibrate_batch_norm(model, real, device, seed, batch_size)
    return statistics


@contextmanager
def normalising_synthetic(model: nn.Module, statistics: Mapping[str, torch.Tensor], state: dict) -> Iterator[None]:
    """Normalise the images of a batch that `state["is_synthetic"]` `(batch,)` marks with these statistics.

    BatchNorm must be in eval mode. If `state` marks none, all images get the running statistics.

    Source: Domain-Specific Batch Normalization, Chang et al. 2019, here with fixed statistics, and with scale
        and shift shared by both kinds as in AdaBN, Li et al. 2016.
    """
    modules = batch_norm_modules(model)
    hooks = []
    for name, module in model.named_modules():
        if module in modules:
            own = [statistics[f"{name}.{statistic}"] for statistic in ("running_mean", "running_var")]
            hooks.append(module.register_forward_pre_hook(partial(_move_synthetic, own, state)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _move_synthetic(own: list[torch.Tensor], state: dict, module: nn.Module, args: tuple) -> tuple:
    """Return the input with synthetic images shifted so that the running statistics normalise them like their own."""
    inputs, is_synthetic = args[0], state.get("is_synthetic")
    if is_synthetic is None:
        return args
    mean, variance = (statistic.to(inputs.device) for statistic in own)
    scale = ((module.running_var + module.eps) / (variance + module.eps)).sqrt()
    shift = module.running_mean - mean * scale
    by_channel = (1, -1, *[1] * (inputs.ndim - 2))
    moved = (inputs * scale.view(by_channel) + shift.view(by_channel)).to(inputs.dtype)
    return (torch.where(is_synthetic.view(-1, *[1] * (inputs.ndim - 1)), moved, inputs), *args[1:])
