"""Averages of weights: over the steps of one stage (EMA), and of two stages (WiSE-FT)."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def warmed_up_decay(decay: float, num_updates: int) -> float:
    """Return the decay after `num_updates`; without a warm-up, short runs would keep much of their first weights."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


def start_moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of the model that `update_parameters` turns into the exponential moving average of its weights.

    The first update copies the weights. Buffers, such as BatchNorm's statistics, are copied at every update: they are
    moving averages already.

    Source: torch, torch.optim.swa_utils.get_ema_multi_avg_fn; the warm-up of the decay as in TensorFlow's
        ExponentialMovingAverage.
    """

    def update(averaged: list[torch.Tensor], current: list[torch.Tensor], num_averaged: torch.Tensor) -> None:
        get_ema_multi_avg_fn(warmed_up_decay(decay, int(num_averaged)))(averaged, current, num_averaged)

    return AveragedModel(model, multi_avg_fn=update)


@torch.no_grad()
def swap_weights(first: nn.Module, second: nn.Module) -> None:
    """Exchange the parameters of two models of the same architecture, in place and bit by bit."""
    for own, other in zip(first.parameters(), second.parameters(), strict=True):
        kept = own.clone()
        own.copy_(other)
        other.copy_(kept)


@torch.no_grad()
def average_weights(model: nn.Module, earlier: Mapping[str, torch.Tensor], share: float) -> None:
    """Set the model's weights, in place, to `share` * weights + (1 - `share`) * `earlier`, a matching state dict.

    All floating-point parameters and buffers are averaged, including BatchNorm's running mean and variance; frozen
    statistics are equal in both and stay the same. Integers, such as BatchNorm's count of batches, are not changed.

    Source: WiSE-FT, Robust fine-tuning of zero-shot models, Wortsman et al. 2022, section 3.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.lerp(earlier[name].to(value), value, share))
