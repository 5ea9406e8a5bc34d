"""The images a style token is learned from and measured on, and their latents."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from huggingface_hub import constants

from utils.data.image_set import RealImages, RealImagesRecord
from utils.data.opened_images import open_all
from utils.data.real_images import load_real_images
from utils.style.base_models import BaseModel
from utils.style.latents import LatentCache, Latents

NUM_HELD_OUT_IMAGES = 64


@dataclass(frozen=True)
class StyleImages:
    """Images without the damaged ones, and the content hash of each of them, in order.

    `held_out` are some images of the validation part; training images where there are shots, which leave no others.
    """

    real: RealImages
    digests: list[str]
    held_out: Dataset
    held_out_digests: list[str]
    held_out_name: str
    num_skipped: int


def load_style_images(record: RealImagesRecord, token: str | None = None) -> StyleImages:
    """Load a labelled image set; read and decode each image that will be used once, in one of the processes.

    Raises:
        UserError: what `load_real_images` raises; damaged images, where they are not to be skipped.
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


def load_latents(
    base_model: BaseModel, images: Dataset, digests: list[str], resolution: int, num_copies: int,
    cache_dir: str | Path | None, device: torch.device,
) -> tuple[Latents, str]:  # fmt: skip
    """Return the images' latents, mapped into memory, and the key that tells them from others.

    The VAE is loaded only for those that the cache does not have. Each machine's processes share them out: machines
    need no common folder, and where they have one, they help each other.
    """
    state = PartialState()
    cache_dir = cache_dir or Path(constants.HF_HOME) / "bridged-transfer" / "latents"
    cache = LatentCache(cache_dir, digests, resolution, base_model.vae_identity, num_copies)
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    missing = cache.missing_shards(state.local_process_index, num_local_processes)
    if missing:
        vae = base_model.load_vae().to(device)
        cache.encode(vae, images, missing, show_progress=state.is_local_main_process)
    state.wait_for_everyone()
    return cache.open(), cache.folder.name


def _some_rows(images: Dataset) -> np.ndarray:
    return np.random.default_rng(0).permutation(len(images))[:NUM_HELD_OUT_IMAGES]
