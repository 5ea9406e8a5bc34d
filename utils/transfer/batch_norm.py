"""BatchNorm in a stage: which modules keep their statistics, and statistics of a stage's own images."""

import math

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from utils.transfer.image_datasets import EvalImages


def batch_norm_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that normalise with statistics of the batch in training and with running ones otherwise."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def recalibrate_batch_norm(
    model: nn.Module, images: EvalImages, device: torch.device, seed: int, batch_size: int = 128
) -> None:
    """Replace BatchNorm's running statistics by those of `images`, in place; without BatchNorm nothing is done.

    The batches are as equal as can be, for each counts the same. `seed` is dropout's, which is on.

    Source: torch, torch.optim.swa_utils.update_bn.
    """
    if not batch_norm_modules(model):
        return
    indices = np.random.default_rng(seed).permutation(len(images))  # a set may be sorted by class
    batches = [batch.tolist() for batch in np.array_split(indices, math.ceil(len(images) / batch_size))]
    loader = DataLoader(images, batch_sampler=batches)
    model.to(device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        update_bn((batch["pixel_values"] for batch in loader), model, device)
