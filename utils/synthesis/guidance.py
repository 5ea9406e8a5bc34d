"""Guidance in a limited interval: outside it, the denoiser computes the prompt without the negative prompt."""

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from torch.utils._pytree import tree_map_only


def find_denoiser(pipe: DiffusionPipeline) -> torch.nn.Module:
    """Return the U-Net or transformer of a pipeline."""
    return pipe.components["unet" if "unet" in pipe.components else "transformer"]


class GuidanceInterval:
    """Leaves out the unconditional half of a pipeline's passes before `low` and from `high` on, in [0, 1] of its steps.

    The pipeline must put both halves into one batch, the unconditional one first. The prediction of the conditional
    half is returned as both halves; guidance between two equal halves gives that half, whatever the scale. So the
    pipeline's own loop stays unchanged, and its images are exact.

    Source: Applying Guidance in a Limited Interval, Kynkäänniemi et al. 2024 (arXiv 2404.07724), with noise levels; as
        fractions of the steps, from noise to image, in the guiders of diffusers.
    """

    def __init__(self, pipe: DiffusionPipeline, low: float, high: float):
        self.pipe, self.low, self.high = pipe, low, high
        self._num_passes: int | None = None  # in this call so far; None without guidance
        denoiser = find_denoiser(pipe)
        self.forward: Callable = denoiser.forward
        denoiser.forward = self._pass

    def begin(self, is_guided: bool, num_skipped: int = 0) -> None:
        """Prepare for the next call of the pipeline, with or without guidance, which skips its first steps."""
        self._num_passes = num_skipped if is_guided else None

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
        """Return whether this pass is within the interval, and count it."""
        place = self._num_passes / len(self.pipe.scheduler.timesteps)
        self._num_passes += 1
        return self.low <= place < self.high
