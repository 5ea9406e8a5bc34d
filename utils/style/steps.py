"""Training steps as a data set: what step n trains on is a function of (seed, n), whatever ran before it."""

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from utils.style.latents import Latents

STEP, EPOCH, NOISE = 1, 2, 3  # what a generator is for, part of its seed


class TrainingSteps(Dataset):
    """One process's share of each optimiser step; the shares of all processes are the same whole at any number.

    An item is a dictionary with the images first: `latents` (unscaled) and `noise` `(images, channels, height, width)`
    float32, `timesteps`, `labels` and `templates` (which prompt template) int64.
    """

    def __init__(
        self, latents: Latents, labels: list[int], seed: int, images_per_step: int, num_templates: int,
        num_train_timesteps: int, rank: int = 0, num_parts: int = 1,
    ):  # fmt: skip
        self.latents = latents
        self.labels = torch.tensor(labels)
        self.seed = seed
        self.images_per_step = images_per_step
        self.num_templates = num_templates
        self.num_train_timesteps = num_train_timesteps
        self.mine = np.arange(rank, images_per_step, num_parts)
        self.epochs = {}

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        draws = np.random.default_rng([self.seed, STEP, step])
        count, mine = self.images_per_step, self.mine
        # one timestep from each of `count` equal parts of the range: much less noise in the gradient
        timesteps = (np.arange(count) + draws.random(count)) * self.num_train_timesteps / count
        copies = draws.integers(self.latents.num_copies, size=count)
        templates = draws.integers(self.num_templates, size=count)
        indices = torch.tensor([self._image_at(step * count + position) for position in mine])
        noise, posterior_noise = self._draw_noise(step)
        return {
            "latents": self.latents.sample(indices, torch.from_numpy(copies[mine]), posterior_noise),
            "noise": noise,
            "timesteps": torch.from_numpy(timesteps[mine]).long().clamp(max=self.num_train_timesteps - 1),
            "labels": self.labels[indices],
            "templates": torch.from_numpy(templates[mine]),
        }

    def _image_at(self, position: int) -> int:
        """Return the image at a position of the endless row of epochs, each of which shows every image once."""
        epoch, place = divmod(position, len(self.labels))
        if epoch not in self.epochs:
            self.epochs = {e: order for e, order in self.epochs.items() if e >= epoch - 1}
            self.epochs[epoch] = np.random.default_rng([self.seed, EPOCH, epoch]).permutation(len(self.labels))
        return int(self.epochs[epoch][place])

    def _draw_noise(self, step: int) -> torch.Tensor:
        """Return noise and posterior noise `(2, images, channels, height, width)`, a generator for each image."""
        shape = (2, *self.latents.latent_shape)
        images = [
            np.random.default_rng([self.seed, NOISE, step, position]).standard_normal(shape, dtype=np.float32)
            for position in self.mine
        ]
        return torch.from_numpy(np.stack(images, axis=1))


def step_loader(steps: TrainingSteps, first_step: int, last_step: int, num_workers: int, pin_memory: bool):
    """Return the steps `first_step` to `last_step - 1` in order, prepared ahead by workers where there are any."""
    return DataLoader(
        steps, sampler=range(first_step, last_step), batch_size=None, num_workers=num_workers, pin_memory=pin_memory
    )


def micro_batches(batch: dict[str, torch.Tensor], number: int) -> list[dict[str, torch.Tensor]]:
    """Cut a step's share into `number` parts of equal size, each with timesteps from the whole range."""
    return [{name: value[part::number] for name, value in batch.items()} for part in range(number)]
