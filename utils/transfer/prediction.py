"""Predictions of a classifier, divided over the processes, and LEEP of a checkpoint."""

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import AutoConfig

from utils.cli.errors import UserError
from utils.transfer.classifiers import load_pretrained
from utils.transfer.metrics import leep


def predict(model: nn.Module, images, batch_size: int = 128, num_workers: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return logits `(n, classes)` float32 and labels `(n,)` of `EvalImages` (or a list of its items), in their order.

    The work is divided over the processes, each image is evaluated once; each process returns all of it. `num_workers`
    processes beside each one decode. The model is left in eval mode, on its device.

    Raises:
        UserError: a logit is not finite.
    """
    state = PartialState()
    model.eval().to(state.device, memory_format=torch.channels_last)
    own = Subset(images, range(state.process_index, len(images), state.num_processes))
    # the empty ones: of a process that has no image, where there are fewer than processes
    logits = [torch.empty(0, model.config.num_labels, device=state.device)]
    labels = [torch.empty(0, dtype=torch.int64, device=state.device)]
    with torch.inference_mode():
        for batch in DataLoader(own, batch_size, num_workers=num_workers):
            pixel_values = batch["pixel_values"].to(state.device, model.dtype, memory_format=torch.channels_last)
            logits.append(model(pixel_values=pixel_values).logits.float())
            labels.append(batch["labels"].to(state.device))
    logits, labels = (_gather_in_turn(torch.cat(parts), len(images)) for parts in (logits, labels))
    if not np.isfinite(logits).all():
        raise UserError(
            f"{model.config.name_or_path}: the classifier's outputs are not finite; its weights are damaged, or "
            "mean and std of its image processor."
        )
    return logits, labels


def _gather_in_turn(part: torch.Tensor, num_rows: int) -> np.ndarray:
    """Return the `num_rows` rows of all processes, of which process p has the rows p, p + processes, ..."""
    gathered = gather(pad_across_processes(part)).cpu()
    by_process = gathered.unflatten(0, (PartialState().num_processes, -1))
    return by_process.transpose(0, 1).flatten(0, 1)[:num_rows].numpy()  # what was padded is at the end


def leep_of_model(model: nn.Module, images, batch_size: int = 128, num_workers: int = 0) -> float:
    """Return LEEP of a model's own classes for the labels of `images`."""
    logits, labels = predict(model, images, batch_size, num_workers)
    return leep(torch.from_numpy(logits).softmax(1).numpy(), labels)


def leep_of_checkpoint(name: str, images, batch_size: int = 128, num_workers: int = 0, **hub_options) -> float | None:
    """Return LEEP of a checkpoint's own classes for the labels of `images`; None for a backbone without a head.

    With fewer images than `num_source_classes` (few shots), a score is too good to compare with others.
    """
    model = load_pretrained(str(name), **hub_options)
    return None if model is None else leep_of_model(model, images, batch_size, num_workers)


def num_source_classes(name: str, **hub_options) -> int:
    """Return how many classes a checkpoint's own head has, without loading it; 0 for timm's backbones."""
    return AutoConfig.from_pretrained(str(name), **hub_options).num_labels
