"""The VAE's posteriors of all images, encoded once and kept in memory."""

from dataclasses import dataclass

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from utils.data.images import centre_square, to_model_range


@dataclass(frozen=True)
class LatentCache:
    """Posterior mean and standard deviation `(copies, images, channels, height, width)`; copy 1 is mirrored."""

    mean: torch.Tensor
    std: torch.Tensor

    @property
    def num_copies(self) -> int:
        return self.mean.shape[0]

    def sample(self, indices: torch.Tensor, copies: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return unscaled latents `(batch, channels, height, width)` drawn with standard normal `noise`."""
        return self.mean[copies, indices] + self.std[copies, indices] * noise


@torch.no_grad()
def encode_latents(
    vae, images: Dataset, resolution: int, *, random_flip: bool, show_progress: bool, batch_size: int = 16
) -> LatentCache:
    """Encode the column `image` of a data set, centre-cropped to `resolution` pixels, mirrored too if asked for."""
    copies = 2 if random_flip else 1
    means, stds = [[] for _ in range(copies)], [[] for _ in range(copies)]
    starts = range(0, len(images), batch_size)
    for start in tqdm(starts, desc="encoding images", unit="batch", disable=not show_progress):
        batch = images[start : start + batch_size]["image"]
        pixel_values = torch.from_numpy(to_model_range([centre_square(image, resolution) for image in batch]))
        pixel_values = pixel_values.to(vae.device, vae.dtype)
        for copy in range(copies):
            posterior = vae.encode(pixel_values.flip(-1) if copy else pixel_values).latent_dist
            means[copy].append(posterior.mean.float().cpu())
            stds[copy].append(posterior.std.float().cpu())
    return LatentCache(*(torch.stack([torch.cat(copy) for copy in parts]) for parts in (means, stds)))
