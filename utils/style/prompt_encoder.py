"""Prompts with the style token into what the U-Net is conditioned on."""

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from utils.style.token import splice_style_token

# name -> tensor, batch first: `encoder_hidden_states` (batch, length, dim); Stable Diffusion XL: `text_embeds` as well
Conditioning = dict[str, torch.Tensor]


class PromptEncoder(nn.Module):
    """The frozen text encoders of a base model, with the style token's rows as the only parameters that learn.

    One module for both encoders of Stable Diffusion XL, so that one wrapper synchronises all rows between processes.
    The placeholder keeps its real token id: an encoder that pools at the largest id of a prompt pools at the style
    token, here as in the pipeline that loads it.
    """

    def __init__(self, text_encoders: list[nn.Module], tokenizers: list, num_vectors: int, initializer_ids: list[int]):
        super().__init__()
        for text_encoder, tokenizer, initializer_id in zip(text_encoders, tokenizers, initializer_ids, strict=True):
            splice_style_token(text_encoder, tokenizer, num_vectors, initializer_id)
        self.text_encoders = nn.ModuleList(text_encoders)

    @property
    def style_tokens(self) -> list:
        """The `StyleTokenEmbedding` of each text encoder."""
        return [text_encoder.get_input_embeddings() for text_encoder in self.text_encoders]

    @property
    def rows(self) -> list[nn.Parameter]:
        """The trained parameters, `(num_vectors, dim)` float32 for each text encoder."""
        return [style_token.rows for style_token in self.style_tokens]

    def forward(self, input_ids: torch.Tensor) -> Conditioning:
        """Encode token ids `(batch, encoders, length)` as the base model's own pipeline does."""
        if len(self.text_encoders) == 1:
            return {"encoder_hidden_states": self.text_encoders[0](input_ids[:, 0])[0]}
        outputs = [
            text_encoder(input_ids[:, position], output_hidden_states=True)
            for position, text_encoder in enumerate(self.text_encoders)
        ]
        return {
            "encoder_hidden_states": torch.cat([output.hidden_states[-2] for output in outputs], dim=-1),
            "text_embeds": outputs[-1].text_embeds,
        }


@dataclass(frozen=True)
class PromptIds:
    """Token ids `(prompts, encoders, length)` of all prompts, each padded to the encoders' length.

    `training` has the prompts of the first template, a class each, then those of the next; `plain` has a prompt
    without the token for each class; `empty` is the empty prompt.
    """

    training: torch.Tensor
    plain: torch.Tensor
    empty: torch.Tensor

    @classmethod
    def tokenize(cls, tokenizers: list, training: list[str], plain: list[str], device: torch.device) -> "PromptIds":
        def ids(prompts: list[str]) -> torch.Tensor:
            options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            per_encoder = [tokenizer(prompts, **options).input_ids for tokenizer in tokenizers]
            return torch.stack(per_encoder, dim=1).to(device)

        return cls(ids(training), ids(plain), ids([""]))

    def key(self, latents_key: str) -> str:
        """Return a hash of the latents' key and the training prompts."""
        return hashlib.sha256(latents_key.encode() + self.training.cpu().numpy().tobytes()).hexdigest()

    def of_classes(self, labels: list[int], template: int = 0) -> torch.Tensor:
        """Return the training prompts of one template for these classes."""
        return self.training[[template * len(self.plain) + label for label in labels]]


def encode_distinct(
    prompt_encoder: nn.Module, prompt_ids: PromptIds, templates: torch.Tensor, labels: torch.Tensor
) -> Conditioning:
    """Return the conditioning of a batch's training prompts, each distinct one encoded once.

    `templates` and `labels` `(batch,)` are on the CPU: finding the distinct ones would make it wait for a GPU.
    """
    distinct, places = (templates * len(prompt_ids.plain) + labels).unique(return_inverse=True)
    conditioning = prompt_encoder(prompt_ids.training[distinct.to(prompt_ids.training.device)])
    return {name: value[places.to(value.device)] for name, value in conditioning.items()}


def unet_arguments(conditioning: Conditioning, resolution: int, dtype: torch.dtype) -> dict:
    """Return the U-Net's keyword arguments for a conditioning.

    Stable Diffusion XL is told that images have `resolution` pixels a side and are not cropped, as in its pipeline.
    """
    arguments = {"encoder_hidden_states": conditioning["encoder_hidden_states"].to(dtype)}
    if "text_embeds" in conditioning:
        text_embeds = conditioning["text_embeds"].to(dtype)
        time_ids = text_embeds.new_tensor([resolution, resolution, 0, 0, resolution, resolution])
        arguments["added_cond_kwargs"] = {
            "text_embeds": text_embeds,
            "time_ids": time_ids.expand(len(text_embeds), -1),
        }
    return arguments
