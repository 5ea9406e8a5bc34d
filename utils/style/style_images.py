"""The images that a style token is learned from and measured on, their latents, and the data of each training step.

The data of step n is a function of (seed, n) only.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from huggingface_hub import constants
from torch.utils import data

from utils.data.image_set import RealImages, RealImagesRecord
from utils.data.opened_images import check_digests, open_all
from utils.data.real_images import load_real_images
from utils.style.base_models import BaseModel
from utils.style.latents import LatentCache, Latents

NUM_HELD_OUT_IMAGES = 64
STEP, EPOCH, NOISE = 1, 2, 3  # the purpose of a random generator, part of its seed


@dataclass(frozen=True)
class StyleImages:
    """The undamaged images, and the content hash of each, in order.

    `held_out` are some images of the validation part; training images if there are shots, which leave no others.
    """

    real: RealImages
    digests: list[str]
    held_out: Dataset
    held_out_digests: list[str]
    held_out_name: str
    num_skipped: int


def load_style_images(record: RealImagesRecord, token: str | None = None) -> StyleImages:
    """Load a labelled image set; read and decode each needed image once, in one of the processes.

    Raises:
        UserError: from `load_real_images`; an image is damaged and must not be skipped.
    """
    real = load_real_images(record, token)
    held_out = "train" if record.num_shots is not None or not len(real.validation) else "validation"
    if held_out == "validation":
        real = real.select({held_out: _some_rows(real.validation)})
    opened = open_all(real, tuple(dict.fromkeys(["train", held_out])), with_digests=True)
    real = replace(opened.images, remarks=(*real.remarks, *opened.remarks))
    if not len(getattr(real, held_out)):  # all of them were damaged
        held_out = "train"
    images, held_out_digests = getattr(real, held_out), opened.digests[held_out]
    if held_out == "train":
        rows = _some_rows(images)
        images, held_out_digests = images.select(rows), [held_out_digests[row] for row in rows]
    name = "training images" if held_out == "train" else "validation images"
    return StyleImages(real, opened.digests["train"], images, held_out_digests, name, opened.num_skipped)


def _some_rows(images: Dataset) -> np.ndarray:
    return np.random.default_rng(0).permutation(len(images))[:NUM_HELD_OUT_IMAGES]


def latents_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the folder of latents: `cache_dir`, or one in the Hugging Face cache."""
    return Path(cache_dir or Path(constants.HF_HOME) / "bridged-transfer" / "latents")


def load_latents(
    base_model: BaseModel, images: StyleImages, resolution: int, random_flip: bool, cache_dir: str | Path | None,
    device: torch.device,
) -> tuple[Latents, Latents, str]:  # fmt: skip
    """Return the memory-mapped latents of training and held-out images, and the cache key of the former.

    With `random_flip`, the training latents include those of the mirrored images.
    """
    settings = {
        "cache_dir": latents_folder(cache_dir),
        "resolution": resolution,
        "vae_identity": base_model.vae_identity,
    }
    cache = LatentCache(image_digests=images.digests, num_copies=2 if random_flip else 1, **settings)
    held_out_cache = LatentCache(image_digests=images.held_out_digests, num_copies=1, **settings)
    flag = "train_dir" if images.real.record.train_dir is not None else "dataset_name"
    check = partial(check_digests, where=f"--{flag} {images.real.record.name}")
    of_training = partial(check, images.real.train, images.digests)
    of_held_out = partial(check, images.held_out, images.held_out_digests)
    latents = _fill(cache, base_model, images.real.train, of_training, device)
    return latents, _fill(held_out_cache, base_model, images.held_out, of_held_out, device), cache.folder.name


def _fill(
    cache: LatentCache, base_model: BaseModel, images: Dataset, check: Callable[[range], None], device: torch.device
) -> Latents:
    """Encode what is missing in a cache, and open it. The VAE is loaded only if something is missing.

    The processes of each machine divide the work: machines need no common folder, and with one, they share the result.
    """
    state = PartialState()
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    missing = cache.missing_shards(state.local_process_index, num_local_processes)
    if missing:
        vae = base_model.load_vae().to(device)
        base_model.check_vae_unchanged()
        cache.encode(vae, images, missing, show_progress=state.is_local_main_process, check=check)
    state.wait_for_everyone()
    return cache.open()


@dataclass(eq=False, kw_only=True)
class TrainingSteps(data.Dataset):
    """One process's share of each optimizer step; all shares together do not depend on the number of processes.

    An item is a dictionary with the images first: `latents` (unscaled) and `noise` `(images, channels, height, width)`
    float32, `timesteps`, `labels` and `templates` (number of the prompt template) int64. This process has the images
    `mine` of all `images_per_step`; `labels` are those of all images of the set.
    """

    latents: Latents
    labels: torch.Tensor
    seed: int
    images_per_step: int
    num_templates: int
    num_train_timesteps: int
    rank: int = 0
    num_parts: int = 1

    @property
    def mine(self) -> np.ndarray:
        return np.arange(self.rank, self.images_per_step, self.num_parts)

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
        """Return the image at a position in the endless sequence of epochs, each of which has every image once."""
        epoch, place = divmod(position, len(self.labels))
        return int(_order_of_epoch(self.seed, epoch, len(self.labels))[place])

    def _draw_noise(self, step: int) -> torch.Tensor:
        """Return noise and posterior noise `(2, images, channels, height, width)`, from one generator per image."""
        shape = (2, *self.latents.latent_shape)
        images = [
            np.random.default_rng([self.seed, NOISE, step, position]).standard_normal(shape, dtype=np.float32)
            for position in self.mine
        ]
        return torch.from_numpy(np.stack(images, axis=1))


@lru_cache(maxsize=2)
def _order_of_epoch(seed: int, epoch: int, num_images: int) -> np.ndarray:
    return np.random.default_rng([seed, EPOCH, epoch]).permutation(num_images)


def micro_batches(batch: dict[str, torch.Tensor], number: int) -> list[dict[str, torch.Tensor]]:
    """Split a step's share into `number` parts of equal size, each with timesteps from the whole range."""
    return [{name: value[part::number] for name, value in batch.items()} for part in range(number)]
