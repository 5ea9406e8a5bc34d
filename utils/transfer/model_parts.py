"""Parts of an image classifier, with or without an adapter: its head (find, reset, imprint) and its BatchNorm."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from peft import PeftModel
from scipy.optimize import minimize_scalar
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from utils.cli.errors import UserError
from utils.transfer.image_format import EvalImages

NO_IMPRINT = "--head_init imprint: the head of {name} is not linear on one feature vector; choose reset or keep."
# with 0.1, the demo's test loss before training is within 0.02 of that of the best scale, at 1, 4 and 16 shots
IMPRINT_SMOOTHING = 0.1
MAX_LOGIT = 1000.0  # of a class's mean for its own class


def base_classifier(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model, without the wrapper of an adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def head_parameter_names(model: PreTrainedModel | PeftModel) -> list[str]:
    """Return the names of the parameters whose shape depends on the number of classes, in the model's order.

    With an adapter, these are its trained copies, not the base model's parameters that they replace.
    """
    base = base_classifier(model)
    other_config = copy.deepcopy(base.config)
    other_config.num_labels = base.config.num_labels + 1
    with torch.device("meta"):  # shapes without memory
        other_shapes = {name: parameter.shape for name, parameter in type(base)(other_config).named_parameters()}
    names = []
    for name, parameter in model.named_parameters():
        name_in_base = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
        if parameter.shape != other_shapes.get(name_in_base, parameter.shape):
            names.append(name)
    return names


def head_module_names(model: PreTrainedModel | PeftModel) -> list[str]:
    """Return the names of the modules that own the head's parameters, in the model's order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in head_parameter_names(model)))


def reset_head(model: PreTrainedModel | PeftModel, seed: int) -> None:
    """Initialise the head again from `seed`, as transformers does for this architecture; nothing else changes."""
    names = head_parameter_names(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in names:
            model.get_parameter(name).fill_(torch.nan)  # NaN that remains was not initialised
        for module_name in head_module_names(model):
            module = model.get_submodule(module_name)
            for owner in (module, *module.parameters(recurse=False)):
                # transformers skips modules marked as initialised
                owner._is_hf_initialized = False
            base_classifier(model)._init_weights(module)
    for name in names:
        assert model.get_parameter(name).isfinite().all(), f"{name} was not initialised again"


def linear_heads(model: PreTrainedModel | PeftModel, problem: str) -> list[nn.Linear]:
    """Return the modules of the head, in the model's order.

    Raises:
        UserError: one is not a linear layer; the message is `problem`, formatted with the model's `name`.
    """
    heads = [model.get_submodule(name) for name in head_module_names(model)]
    if not all(isinstance(head, nn.Linear) for head in heads):
        raise UserError(problem.format(name=base_classifier(model).config.name_or_path))
    return heads


@contextmanager
def record_inputs(heads: list[nn.Module]) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """Yield a mapping that always holds the latest input features of each head."""
    entered = {}
    hooks = [head.register_forward_pre_hook(lambda head, args: entered.update({head: args[0]})) for head in heads]
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def imprint_head(model: PreTrainedModel | PeftModel, images: EvalImages, batch_size: int = 128) -> None:
    """Set the head's weights to the class means of its normalised input features, normalised and scaled; no bias.

    The paper normalises features and learns a scale. Here the head gets plain features, and the scale is chosen to give
    sensible probabilities before training: it minimises the cross-entropy of the classes' mean features with smoothed
    labels. (The images' plain cross-entropy has no minimum if each class has one image, and no fixed scale suits all
    networks.) `images` are `EvalImages` or a list of their items, divided over the processes. The model is left in eval
    mode.

    Raises:
        UserError: a class has no image, or the head is not a linear layer on one feature vector per image.

    Source: Low-Shot Learning with Imprinted Weights, Qi et al. 2018, section 3.2; the scale is our own.
    """
    config = base_classifier(model).config
    heads = linear_heads(model, NO_IMPRINT)
    sums, counts = _class_sums(model, heads, images, batch_size)
    missing = [class_name for label, class_name in config.id2label.items() if counts[label] == 0]
    if missing:
        raise UserError(f"--head_init imprint: no image of {', '.join(missing)}; choose reset or keep.")
    for head, (normalised_sums, feature_sums) in zip(heads, sums):
        directions = nn.functional.normalize(normalised_sums, dim=1)
        head.weight.copy_(directions * _logit_scale(feature_sums / counts[:, None] @ directions.T))
        if head.bias is not None:
            head.bias.zero_()


def _class_sums(model, heads: list[nn.Linear], images, batch_size: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return sums `(2, classes, features)` of each head's input, normalised and plain, and counts `(classes,)`."""
    state = PartialState()
    config = base_classifier(model).config
    model.eval().to(state.device, memory_format=torch.channels_last)
    sums = [torch.zeros(2, config.num_labels, head.in_features, device=state.device) for head in heads]
    counts = torch.zeros(config.num_labels, device=state.device)
    loader = DataLoader(Subset(images, range(state.process_index, len(images), state.num_processes)), batch_size)
    with record_inputs(heads) as entered:
        for batch in loader:
            model(pixel_values=batch["pixel_values"].to(state.device, memory_format=torch.channels_last))
            one_hot = nn.functional.one_hot(batch["labels"].to(state.device), config.num_labels).float()
            counts += one_hot.sum(0)
            for head, head_sums in zip(heads, sums):
                features = entered[head].float()
                if features.ndim != 2:
                    raise UserError(NO_IMPRINT.format(name=config.name_or_path))
                head_sums += one_hot.T @ torch.stack([nn.functional.normalize(features), features])
    return [reduce(head_sums, "sum") for head_sums in sums], reduce(counts, "sum")


def _logit_scale(class_logits: torch.Tensor) -> float:
    """Return the factor on the `(classes, classes)` logits of class means that minimises smoothed cross-entropy."""
    class_logits = class_logits.double().cpu()  # in float32 the loss is too flat to find its minimum
    own = class_logits.diagonal().mean()
    logits, labels = class_logits / own, torch.arange(len(class_logits))
    best = minimize_scalar(
        lambda scale: nn.functional.cross_entropy(scale * logits, labels, label_smoothing=IMPRINT_SMOOTHING).item(),
        bounds=(0, MAX_LOGIT),
        method="bounded",
    )
    return best.x / own.item()


def batch_norm_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that normalise with batch statistics in training and running statistics in evaluation."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def recalibrate_batch_norm(
    model: nn.Module, images: EvalImages, device: torch.device, seed: int, batch_size: int = 128
) -> None:
    """Set BatchNorm's running statistics to those of `images`, in place; does nothing without BatchNorm.

    Batches are as equal in size as possible, as each counts the same. `seed` is for the order and for dropout, which is
    on.

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
