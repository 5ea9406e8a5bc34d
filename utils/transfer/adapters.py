"""LoRA with peft: one adapter and head for both stages, saved next to the merged weights and checked by reloading."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from utils.cli.errors import UserError
from utils.transfer.classifiers import save_classifier
from utils.transfer.image_format import read_image_format
from utils.transfer.model_parts import head_module_names

ADAPTER_DIR = "adapter"
NUM_CHECKED_IMAGES = 4
MAX_RELATIVE_DIFFERENCE = 1e-3  # of logits; merging rounds weights, about 1e-6 of them


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank update of `r` per layer, scaled by `alpha / r`; `dropout` in [0, 1) acts on its input.

    `target_modules` are full names of layers or endings of names, as in peft. None takes all linear layers and
    convolutions outside the head, for any architecture.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: list[str] | None = None


def add_adapter(model: PreTrainedModel, lora: LoraSettings, seed: int, *, revision: str | None = None) -> PeftModel:
    """Return the classifier with a fresh LoRA adapter drawn from `seed`; only the adapter and the head are trained.

    `revision` is the checkpoint's; it is saved with the adapter, which loads on this checkpoint.

    Raises:
        UserError: a name of `target_modules` matches no layer, or a layer that cannot take an adapter.

    Source: LoRA, Hu et al. 2022.
    """
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, revision=revision,
        target_modules=_target_modules(model, lora.target_modules), modules_to_save=head_module_names(model),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _target_modules(model: PreTrainedModel, ends: list[str] | None) -> list[str]:
    """Return the layers outside the head whose names have these endings, if peft can both train and merge them.

    peft cannot merge grouped convolutions, ignores dilation and padding mode, and does not know subclasses of torch
    layers with their own forward pass (timm's TensorFlow padding, standardised weights).
    """
    head = head_module_names(model)
    adaptable = [name for name, module in model.named_modules() if name not in head and _is_adaptable(module)]
    if ends is None:
        return adaptable
    names = {end: [name for name, _ in model.named_modules() if f".{name}".endswith(f".{end}")] for end in ends}
    for end, found in names.items():
        refused = sorted(set(found) - set(adaptable))
        if refused or not found:
            problem = f"{', '.join(refused)} cannot take an adapter" if refused else "no such layer"
            examples = ", ".join(adaptable[:5])
            raise UserError(f"--lora_target_modules {end}: {problem}; layers that can: {examples}, ...")
    return [name for found in names.values() for name in found]


def _is_adaptable(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
    return type(module) is nn.Linear


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Return the classifier with the adapter and the head from a folder, both trainable."""
    return PeftModel.from_pretrained(model, str(folder), is_trainable=True)


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write adapter and head as safetensors, with the base checkpoint's name and commit in `adapter_config.json`."""
    model.save_pretrained(str(folder))
    (Path(folder) / "README.md").unlink()  # peft's card is an empty form


def save_merged(model: PeftModel, image_processor, output_dir: str | Path) -> None:
    """Write a plain classifier with merged weights, and the adapter in `adapter/`; reload both and compare.

    The classifier loads like any checkpoint. The adapter loads on the base checkpoint, whose name and commit are in
    `adapter_config.json`, with the classes of the classifier:

        config = AutoConfig.from_pretrained(output_dir)
        base = AutoModelForImageClassification.from_pretrained(base_id, config=config, ignore_mismatched_sizes=True)
        model = PeftModel.from_pretrained(base, f"{output_dir}/adapter")

    The model is left in eval mode.

    Raises:
        AssertionError: one of the two does not predict the same as the model.
    """
    adapter_dir = Path(output_dir) / ADAPTER_DIR
    save_adapter(model, adapter_dir)
    # only the head differs in size, and the adapter brings its own; the rest was loaded before
    base = AutoModelForImageClassification.from_pretrained(
        model.get_base_model().name_or_path, config=copy.deepcopy(model.get_base_model().config),
        ignore_mismatched_sizes=True, dtype=torch.float32, revision=model.peft_config["default"].revision,
        local_files_only=True,
    )  # fmt: skip
    adapted = PeftModel.from_pretrained(base, str(adapter_dir))
    # not through the adapter's forward pass, which mixed precision may have wrapped
    expected = _logits(model.get_base_model(), image_processor)
    _check_same(expected, _logits(adapted.get_base_model(), image_processor), adapter_dir)
    save_classifier(adapted.merge_and_unload(), image_processor, output_dir)
    merged = AutoModelForImageClassification.from_pretrained(output_dir, dtype=torch.float32)
    _check_same(expected, _logits(merged, image_processor), output_dir)


@torch.no_grad()
def _logits(model: PreTrainedModel, image_processor) -> torch.Tensor:
    """Return logits of a fixed random batch, on the CPU, which computes in full float32."""
    size = (NUM_CHECKED_IMAGES, 3, *read_image_format(image_processor).size)
    device = model.device
    logits = model.eval().to("cpu")(pixel_values=torch.randn(size, generator=torch.Generator().manual_seed(0))).logits
    model.to(device)
    return logits


def _check_same(expected: torch.Tensor, found: torch.Tensor, folder: str | Path) -> None:
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    # written so that it fails on NaN
    assert difference <= MAX_RELATIVE_DIFFERENCE, f"{folder}: logits differ by {difference:.2g} after reloading"
