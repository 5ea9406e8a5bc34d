"""Everything random in a training step, as a function of (seed, step): the same for any number of processes."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class StepDraws:
    """What a step draws for its whole batch, over all processes; every field has the batch first."""

    indices: torch.Tensor  # which image
    copies: torch.Tensor  # which cached copy of it: 0 as it is, 1 mirrored
    templates: torch.Tensor  # which prompt template
    timesteps: torch.Tensor
    posterior_noise: torch.Tensor  # standard normal, of the latents' shape
    noise: torch.Tensor

    def part(self, rank: int, num_parts: int) -> "StepDraws":
        """Return the rows of one process."""
        return StepDraws(*(value[rank::num_parts] for value in vars(self).values()))


def draw_step(
    seed: int, step: int, batch_size: int, num_images: int, num_copies: int, num_templates: int,
    num_train_timesteps: int, latent_shape: tuple[int, ...],
) -> StepDraws:  # fmt: skip
    """Draw one step's images, prompts, timesteps and noise.

    Timesteps are stratified: the range is cut into `batch_size` equal parts and one is drawn from each, which leaves
    much less noise in the gradient than independent draws.
    """
    # hashed: torch's CPU generator takes only the lower 32 bits of a seed
    hashed_seed = int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
    generator = torch.Generator().manual_seed(hashed_seed)
    strata = torch.arange(batch_size) + torch.rand(batch_size, generator=generator)
    timesteps = (strata * num_train_timesteps / batch_size).long().clamp(max=num_train_timesteps - 1)
    return StepDraws(
        indices=torch.randint(num_images, (batch_size,), generator=generator),
        copies=torch.randint(num_copies, (batch_size,), generator=generator),
        templates=torch.randint(num_templates, (batch_size,), generator=generator),
        timesteps=timesteps,
        posterior_noise=torch.randn(batch_size, *latent_shape, generator=generator),
        noise=torch.randn(batch_size, *latent_shape, generator=generator),
    )
