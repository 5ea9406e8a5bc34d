"""Predictions of a classifier, divided over the processes, and LEEP of a checkpoint."""

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Subset

from utils.transfer.classifiers import load_pretrained
from utils.transfer.image_datasets import Collator
from utils.transfer.metrics import leep


@torch.inference_mode()
def predict(model: nn.Module, images, batch_size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Return logits `(n, classes)` float32 and labels `(n,)` of `EvalImages` (or a list of its items), in their order.

    The work is divided over the processes; each returns all of it. The model is left in eval mode.
    """
    state = PartialState()
    model.eval().to(state.device, memory_format=torch.channels_last)
    with state.split_between_processes(list(range(len(images)))) as indices:
        loader = DataLoader(
            Subset(images, indices), batch_size=batch_size, collate_fn=Collator(model.config.num_labels)
        )
        parts = [
            (model(pixel_values=batch["pixel_values"].to(state.device)).logits.float().cpu(), batch["labels"])
            for batch in loader
        ]
    logits, labels = zip(*gather_object(parts))
    return torch.cat(logits).numpy(), torch.cat(labels).numpy()


def leep_of_checkpoint(name: str, images, **hub_options) -> float | None:
    """Return LEEP of a checkpoint's own classes for the labels of `images`; None for a backbone without a head.

    With fewer images than classes of its own (few shots), a checkpoint's score is too good to compare with others.
    """
    model = load_pretrained(str(name), **hub_options)
    if model is None:
        return None
    logits, labels = predict(model, images)
    return leep(torch.from_numpy(logits).softmax(1).numpy(), labels)
