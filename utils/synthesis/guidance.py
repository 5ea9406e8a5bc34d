"""Guidance in the middle of the trajectory alone: outside it, the denoiser sees the prompt and no negative prompt."""

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from torch.utils._pytree import tree_map_only


def find_denoiser(pipe: DiffusionPipeline) -> torch.nn.Module:
    """Return the U-Net or transformer of a pipeline."""
    return pipe.components["unet" if "unet" in pipe.components else "transformer"]


class GuidanceInterval:
    """Leaves the unconditional half out of a pipeline's passes before `low` and from `high` on, of its steps in [0, 1].

    The pipeline has to put both halves into one batch, the unconditional one first. Of the conditional half alone both
    are made, and the guided prediction of two equal halves is that half, whatever the scale: so the pipeline's own loop
    stays as it is, and what it draws is exact.

    Source: Applying Guidance in a Limited Interval, Kynkäänniemi et al. 2024 (arXiv 2404.07724), who give it in noise
        levels; in shares of the steps as in diffusers' guiders, from noise to image.
    """

    def __init__(self, pipe: DiffusionPipeline, low: float, high: float):
        self.pipe, self.low, self.high = pipe, low, high
        self._num_passes: int | None = None  # of this call so far; None where it is not guided at all
        denoiser = find_denoiser(pipe)
        self.forward: Callable = denoiser.forward
        denoiser.forward = self._pass

    def begin(self, is_guided: bool) -> None:
        """Say that the pipeline is called next, and whether with guidance."""
        self._num_passes = 0 if is_guided else None

    def _pass(self, sample: torch.Tensor | None = None, *args, **kwargs):
        sample = kwargs.pop("hidden_states") if sample is None else sample
        if self._num_passes is None or self._is_guided_step():
            return self.forward(sample, *args, **kwargs)
        both, half = len(sample), len(sample) // 2

        def conditional(values: torch.Tensor) -> torch.Tensor:
            return values[half:] if values.ndim > 0 and len(values) == both else values

        sample, args, kwargs = tree_map_only(torch.Tensor, conditional, (sample, args, kwargs))
        output = self.forward(sample, *args, **kwargs)
        return tree_map_only(torch.Tensor, lambda half: torch.cat([half, half]), output)

    def _is_guided_step(self) -> bool:
        """Return whether the next pass is within the interval, and count it."""
        place = self._num_passes / len(self.pipe.scheduler.timesteps)
        self._num_passes += 1
        return self.low <= place < self.high
