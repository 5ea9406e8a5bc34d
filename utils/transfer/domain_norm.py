"""Statistics of BatchNorm by kind of image: synthetic images of a mixed batch are normalised with their own.

The model's running statistics are those of real images, so that nothing of this is left in a saved classifier. An image
that Mixup has made is of the kind of its larger part.
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
    """Replace BatchNorm's running statistics by those of the real images, and return those of the synthetic ones.

    They are `<module>.running_mean` and `<module>.running_var`; without BatchNorm nothing is done.
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
    """Normalise those images of a batch that `state["is_synthetic"]` `(batch,)` marks with these statistics.

    BatchNorm has to be in eval mode. Where `state` marks none, all images get the running statistics.

    Source: Domain-Specific Batch Normalization, Chang et al. 2019, for statistics that stay as they were measured, with
        scale and shift shared by both kinds as in AdaBN, Li et al. 2016.
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
    """Return the input with its synthetic images moved so that the running statistics give what their own would."""
    inputs, is_synthetic = args[0], state.get("is_synthetic")
    if is_synthetic is None:
        return args
    mean, variance = (statistic.to(inputs.device) for statistic in own)
    scale = ((module.running_var + module.eps) / (variance + module.eps)).sqrt()
    shift = module.running_mean - mean * scale
    by_channel = (1, -1, *[1] * (inputs.ndim - 2))
    moved = (inputs * scale.view(by_channel) + shift.view(by_channel)).to(inputs.dtype)
    return (torch.where(is_synthetic.view(-1, *[1] * (inputs.ndim - 1)), moved, inputs), *args[1:])
