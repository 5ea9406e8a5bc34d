"""LoRA adapters of a base model in training: on its U-Net and, if asked, its text encoders, in diffusers' format."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from utils.cli.errors import UserError
from utils.style.base_models import BaseModel
from utils.style.families import LORA_WEIGHTS

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the attention projections, as in the examples of diffusers
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank update of `r` per layer, scaled by `alpha / r`.

    `target_modules` are endings of the names of layers of the U-Net, as in peft. With `text_encoder`, the attention of
    the text encoders gets an adapter too.
    """

    r: int = 16
    alpha: int = 16
    target_modules: Sequence[str] = UNET_TARGETS
    learning_rate: float = 1e-4
    text_encoder: bool = False

    def check(self, base_model: BaseModel) -> None:
        """Check, before any weights load, that each name of `target_modules` matches a layer of the U-Net.

        Raises:
            UserError: one matches none, or a layer that cannot take an adapter; the rank is above that of all of them.
        """
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel.from_config(base_model.config("unet"))
        layers = {name: type(module) in (nn.Linear, nn.Conv2d) for name, module in unet.named_modules()}
        ranks = []
        for end in self.target_modules:
            found = [name for name in layers if f".{name}".endswith(f".{end}")]
            refused = [name for name in found if not layers[name]]
            if refused or not found:
                problem = f"{refused[0]} cannot take an adapter" if refused else "no such layer in the U-Net"
                endings = dict.fromkeys(_ending(name) for name, is_adaptable in layers.items() if is_adaptable)
                raise UserError(f"--lora_target_modules '{end}': {problem}; layers that can: {', '.join(endings)}.")
            ranks += [min(unet.get_submodule(name).weight.flatten(1).shape) for name in found]
        if self.r > max(ranks):
            raise UserError(
                f"--lora_r {self.r}: above the rank of every layer to adapt (at most {max(ranks):,}); an adapter is "
                "useful far below it, such as 16."
            )


def _ending(name: str) -> str:
    """Return the last part of a layer's name, with the one before if it is a number: `to_out.0`."""
    *_, before, last = ["", *name.split(".")]
    return f"{before}.{last}" if last.isdigit() else last


@dataclass(frozen=True)
class LoraAdapters:
    """The adapters of a base model's parts, by the part's name; their weights are float32, whatever the part's are."""

    parts: dict[str, nn.Module]
    settings: LoraSettings

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All weights of the adapters, in the order of the parts."""
        named = [pair for part in self.parts.values() for pair in part.named_parameters()]
        return [value for name, value in named if ".lora_" in name]

    @contextmanager
    def turned_off(self) -> Iterator[None]:
        """Leave the adapters out in the block, for measuring without gradients."""
        modules = [module for part in self.parts.values() for module in part.modules()]
        layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def save(self, folder: str | Path, pipeline_class: str) -> Path:
        """Write `pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights` takes with its alpha.

        Its bytes are the same for the same weights, wherever the base model is.
        """
        metadata = {}
        for name, part in self.parts.items():
            config = part.peft_config["default"].to_dict() | {"base_model_name_or_path": None}
            metadata |= {f"{name}.{key}": sorted(v) if isinstance(v, set) else v for key, v in config.items()}

        def write(weights: dict[str, torch.Tensor], filename: str) -> None:
            # without "format", which diffusers adds: two entries would be in any order
            save_file(weights, filename, {LORA_ADAPTER_METADATA_KEY: json.dumps(metadata, sort_keys=True)})

        layers = {
            f"{name}_lora_layers": {key: value.detach().cpu().contiguous() for key, value in _state(part).items()}
            for name, part in self.parts.items()
        }
        getattr(diffusers, pipeline_class).save_lora_weights(str(folder), **layers, save_function=write)
        return Path(folder) / LORA_WEIGHTS

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Take the weights that `save` wrote."""
        saved = load_file(Path(folder) / LORA_WEIGHTS)
        for name, part in self.parts.items():
            for key, value in _state(part).items():
                value.copy_(saved[f"{name}.{key}"])


def _state(part: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of a part's adapter by the names that diffusers gives them; they share memory with it."""
    return convert_state_dict_to_diffusers(get_peft_model_state_dict(part, save_embedding_layers=False))


def add_adapters(
    unet: nn.Module, text_encoders: dict[str, nn.Module], settings: LoraSettings, seed: int
) -> LoraAdapters:
    """Add fresh adapters, drawn from `seed`, to the U-Net and, if the settings say so, to the named text encoders.

    They change no output yet. What else the parts train, such as a style token's rows, stays trained.

    Source: LoRA, Hu et al. 2022; diffusers, examples/dreambooth/train_dreambooth_lora_sdxl.py.
    """
    parts = {"unet": unet, **(text_encoders if settings.text_encoder else {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, part in parts.items():
            targets = settings.target_modules if name == "unet" else TEXT_ENCODER_TARGETS
            trained = [value for value in part.parameters() if value.requires_grad]
            part.add_adapter(LoraConfig(r=settings.r, lora_alpha=settings.alpha, target_modules=list(targets)))
            cast_training_params(part)  # float32
            for value in trained:  # peft has frozen them
                value.requires_grad_(True)
    return LoraAdapters(parts, settings)
