"""What a run learns: the rows of the style token, those of class tokens, and adapters; their files and their record."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from utils.style.base_models import BaseModel
from utils.style.families import CLASS_EMBEDS, CLASS_TOKENS, LEARNED_EMBEDS, LORA_WEIGHTS
from utils.style.lora import LoraAdapters, LoraSettings, add_adapters
from utils.style.token import (
    PromptEncoder,
    class_token_names,
    find_noun_ids,
    load_learned_embeds,
    save_learned_embeds,
)


@dataclass
class LearnedWeights:
    """The trainable weights of a run: rows in each text encoder of `encoder`, and the adapters, if any.

    `row_names` are the names of the style token's rows in its file, `class_row_names` those of the class tokens'.
    """

    encoder: PromptEncoder
    row_names: list[str]
    class_row_names: list[str]
    pipeline_class: str
    lora: LoraAdapters | None = None

    def __post_init__(self):
        self._fresh_lora = [value.detach().clone() for value in self._lora_parameters]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.encoder.rows, *self._lora_parameters]

    @property
    def _lora_parameters(self) -> list[nn.Parameter]:
        return self.lora.parameters if self.lora is not None else []

    @property
    def num_classes(self) -> int:
        """The number of class tokens."""
        return len(self.encoder.style_tokens[0].class_ids)

    @property
    def can_overfit(self) -> bool:
        """Whether there is more than a style token, so that the weights of the best step are worth keeping."""
        return self.lora is not None or self.num_classes > 0

    def optimizer_groups(self, learning_rate: float) -> list:
        """Return what an optimizer takes: the rows, and the adapters with their own learning rate."""
        if self.lora is None:
            return self.encoder.rows
        adapters = {"params": self._lora_parameters, "lr": self.lora.settings.learning_rate}
        return [{"params": self.encoder.rows, "lr": learning_rate}, adapters]

    def copy(self) -> list[torch.Tensor]:
        """Return a copy of all weights, in the order of `parameters`, on the CPU."""
        return [value.detach().cpu().clone() for value in self.parameters]

    @torch.no_grad()
    def restore(self, copies: Sequence[torch.Tensor]) -> None:
        """Set all weights to those that `copy` returned."""
        for value, saved in zip(self.parameters, copies, strict=True):
            value.copy_(saved)

    @torch.no_grad()
    def reset_adapters(self) -> None:
        """Set the adapters to where they started; the rows stay."""
        for value, fresh in zip(self._lora_parameters, self._fresh_lora, strict=True):
            value.copy_(fresh)

    def save(self, folder: str | Path) -> None:
        """Write what is learned, each in its own file that diffusers loads."""
        save_learned_embeds(folder, self.row_names, [each.style_rows for each in self.encoder.style_tokens])
        if self.num_classes:
            rows = [each.class_rows for each in self.encoder.style_tokens]
            save_learned_embeds(folder, self.class_row_names, rows, CLASS_EMBEDS)
        if self.lora is not None:
            self.lora.save(folder, self.pipeline_class)

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Take the weights that `save` wrote."""
        rows = load_learned_embeds(Path(folder) / LEARNED_EMBEDS)
        if self.num_classes:
            of_classes = load_learned_embeds(Path(folder) / CLASS_EMBEDS)
            rows = [torch.cat(both) for both in zip(rows, of_classes, strict=True)]
        for value, saved in zip(self.encoder.rows, rows, strict=True):
            value.copy_(saved)
        if self.lora is not None:
            self.lora.load(folder)

    def describe(self, folder: str | Path) -> dict:
        """Return the entries of a token's record about what `save` wrote besides the style token, if anything."""
        entries = {}
        if self.lora is not None:
            settings = self.lora.settings
            entries["lora"] = {
                **_file(folder, LORA_WEIGHTS), "r": settings.r, "alpha": settings.alpha,
                "target_modules": list(settings.target_modules), "learning_rate": settings.learning_rate,
                "text_encoder": settings.text_encoder,
                "num_parameters": sum(value.numel() for value in self.lora.parameters),
            }  # fmt: skip
        if self.num_classes:
            entries["class_tokens"] = {
                **_file(folder, CLASS_EMBEDS), "names": class_token_names(self.num_classes),
                "num_parameters": sum(each.class_rows.numel() for each in self.encoder.style_tokens),
            }  # fmt: skip
        return entries


def _file(folder: str | Path, name: str) -> dict[str, str]:
    return {"filename": name, "sha256": hashlib.sha256((Path(folder) / name).read_bytes()).hexdigest()}


def load_models(
    base_model: BaseModel, tokenizers: list, dtype: torch.dtype, device: torch.device, *, placeholder_token: str,
    num_vectors: int, initializer_ids: list[int], class_nouns: list[str] | None = None,
    lora: LoraSettings | None = None, seed: int = 0,
) -> tuple[nn.Module, LearnedWeights]:  # fmt: skip
    """Load U-Net and text encoders; return the U-Net on the device, and what is trained, with the prompt encoder.

    `class_nouns` are the nouns of the classes, if each has a token; `seed` is that of the adapters' start.
    """
    family = base_model.family
    unet, text_encoders = base_model.load_unet(dtype), base_model.load_text_encoders(dtype)
    class_ids = find_noun_ids(tokenizers, class_nouns) if class_nouns is not None else None
    encoder = PromptEncoder(text_encoders, tokenizers, num_vectors, initializer_ids, class_ids)
    adapters = add_adapters(unet, name_parts(base_model, encoder), lora, seed) if lora is not None else None
    names = family.row_names(placeholder_token), family.row_names(CLASS_TOKENS)
    # moved before the optimizer sees the parameters
    return unet.to(device), LearnedWeights(encoder.to(device), *names, base_model.pipeline_class, adapters)


def average_gradients(parameters: list[nn.Parameter], accelerator) -> None:
    """Replace the gradients by their mean over all processes, in one exchange; a parameter may have none in all."""
    gradients = [value.grad for value in parameters if value.grad is not None]
    means = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, mean in zip(gradients, means.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def name_parts(base_model: BaseModel, encoder: PromptEncoder) -> dict[str, nn.Module]:
    """Return the text encoders by the names of their parts."""
    parts = [text_encoder.part for text_encoder in base_model.family.text_encoders]
    return dict(zip(parts, encoder.text_encoders, strict=True))
