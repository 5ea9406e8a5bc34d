"""The images a style token is learned from and measured on, and their latents."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from huggingface_hub import constants

from utils.data.real_images import (
    RealImages,
    RealImagesRecord,
    drop_damaged,
    inspect_images,
    load_real_images,
    refuse_damaged,
)
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
    column = real.record.image_column_name
    digests, problems = _inspect(real.train, "training images")
    if not record.skip_bad_images:
        refuse_damaged(problems, "training images", column, real.train_indices, can_skip=True)
    real = drop_damaged(real, problems)
    digests = [digests[row] for row in sorted(digests)]
    if record.num_shots is not None or len(real.validation) == 0:
        rows = _some_rows(real.train)
        held_out_digests = [digests[row] for row in rows]
        return StyleImages(
            real, digests, real.train.select(rows), held_out_digests, "training images", num_skipped=len(problems)
        )
    rows = _some_rows(real.validation)
    held_out = real.validation.select(rows)
    held_out_digests, held_out_problems = _inspect(held_out, "validation images")
    if not record.skip_bad_images:
        refuse_damaged(held_out_problems, "validation images", column, rows, can_skip=True)
    return StyleImages(
        real=real,
        digests=digests,
        held_out=held_out.select(sorted(held_out_digests)),
        held_out_digests=[held_out_digests[row] for row in sorted(held_out_digests)],
        held_out_name="validation images",
        num_skipped=len(problems) + len(held_out_problems),
    )


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


def _inspect(images: Dataset, what: str) -> tuple[dict[int, str], dict[int, str]]:
    """Return what `inspect_images` finds, from all processes."""
    state = PartialState()
    found = inspect_images(images, what, state.process_index, state.num_processes, state.is_local_main_process)
    parts = gather_object([found])
    return tuple({row: text for part in parts for row, text in part[which].items()} for which in (0, 1))
