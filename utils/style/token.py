"""The style token and class tokens: trainable rows in text encoders, prompts that name them, and the U-Net that they
condition."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from utils.cli.errors import UserError
from utils.data.contexts import fill_contexts
from utils.data.prompts import token_text
from utils.style.base_models import BaseModel
from utils.style.families import LEARNED_EMBEDS, ROW_NAMES
from utils.style.lora import LoraAdapters

AUTO = "auto"  # value of --initializer_token: choose the word by its loss
INITIALIZER_WORDS = ("photo", "image", "picture", "style", "painting", "drawing", "object")
# name -> tensor, batch first: `encoder_hidden_states` (batch, length, dim); Stable Diffusion XL: `text_embeds` as well
Conditioning = dict[str, torch.Tensor]
# their names in a pipeline's call
PIPELINE_NAMES = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}


def find_initializers(tokenizers: list, initializer_token: str) -> dict[str, list[int]]:
    """Return the words that a token may start from, with their ids in every tokenizer: one word, or several for `auto`.

    Raises:
        UserError: the word is not exactly one token; for `auto`, no word is.
    """
    is_auto = initializer_token == AUTO
    found = {}
    for word in INITIALIZER_WORDS if is_auto else (initializer_token,):
        ids = [tokenizer.encode(word, add_special_tokens=False) for tokenizer in tokenizers]
        if all(len(each) == 1 for each in ids):
            found[word] = [number for [number] in ids]
        elif not is_auto:
            number = max(map(len, ids))
            raise UserError(f"--initializer_token {word}: must be one token, got {number}. Try 'style'.")
    if not found:
        raise UserError(
            f"--initializer_token {AUTO}: none of {', '.join(INITIALIZER_WORDS)} is a single token of this base model; "
            "give a word that is."
        )
    return found


def add_placeholder_tokens(tokenizers: list, placeholder_token: str, num_vectors: int) -> None:
    """Add the placeholder's tokens to each tokenizer, named as `load_textual_inversion` does.

    Raises:
        UserError: the placeholder is already in the vocabulary, or is not found in a prompt.
    """
    names = [name for name in token_text(placeholder_token, num_vectors).split(" ") if name]
    for tokenizer in tokenizers:
        taken = [name for name in names if name in tokenizer.get_vocab()]
        if taken:
            raise UserError(
                f"--placeholder_token {placeholder_token}: {taken[0]} is already in the vocabulary; choose another."
            )
        if not _add_tokens(tokenizer, names, num_vectors):
            raise UserError(
                f"--placeholder_token '{placeholder_token}': not found by the tokenizer in a prompt; choose "
                "something like '<my-style>', without spaces."
            )


def class_token_names(num_classes: int) -> list[str]:
    """Return the name of each class's own token, by label id."""
    return [f"<dsi-class-{label}>" for label in range(num_classes)]


def add_class_tokens(tokenizers: list, num_classes: int) -> list[str]:
    """Add a token per class to each tokenizer, after the placeholder's; return their names.

    Raises:
        UserError: one is already in the vocabulary, or is not found in a prompt.
    """
    names = class_token_names(num_classes)
    for tokenizer in tokenizers:
        is_taken = not tokenizer.get_vocab().keys().isdisjoint(names)
        if is_taken or not _add_tokens(tokenizer, names, num_classes):
            raise UserError(
                f"--class_tokens: the tokenizer has tokens named as {names[0]} already; choose another "
                "--placeholder_token or base model."
            )
    return names


def _add_tokens(tokenizer, names: list[str], number: int) -> bool:
    """Add tokens to a tokenizer; return whether it finds them in a prompt."""
    tokenizer.add_tokens(names)
    new_ids = list(range(len(tokenizer) - number, len(tokenizer)))
    return tokenizer.encode(" ".join(names), add_special_tokens=False) == new_ids


def find_noun_ids(tokenizers: list, nouns: list[str]) -> list[list[int | None]]:
    """Return, for each tokenizer, the ids of the nouns that are a single token, and None for the others."""
    encoded = [[tokenizer.encode(noun, add_special_tokens=False) for noun in nouns] for tokenizer in tokenizers]
    return [[ids[0] if len(ids) == 1 else None for ids in of_nouns] for of_nouns in encoded]


def check_prompt_lengths(tokenizers: list, prompts: list[str]) -> None:
    """Check that no prompt is truncated, as the style token is at its end.

    Raises:
        UserError: a prompt has more tokens than the text encoder accepts.
    """
    for tokenizer in tokenizers:
        for prompt in prompts:
            length = len(tokenizer(prompt).input_ids)
            if length > tokenizer.model_max_length:
                kept = tokenizer.decode(tokenizer(prompt, truncation=True).input_ids, skip_special_tokens=True)
                raise UserError(
                    f"--prompt_templates: '{prompt}' has {length} tokens, the text encoder takes "
                    f"{tokenizer.model_max_length} and would only see '{kept}'; shorten the template or the class name."
                )


class StyleTokenEmbedding(nn.Module):
    """A frozen embedding table, followed by trainable float32 rows: the style token's, then one per class, if any.

    The table is never written, so no other row can change, and the optimizer holds only `rows`. Ids from the table's
    size on are the style token's vectors, in order, then the class tokens. All start from the embedding of
    `initializer_id`, except for class tokens with an id of their own in `class_ids`.
    """

    def __init__(
        self, table: nn.Embedding, num_vectors: int, initializer_id: int, class_ids: Sequence[int | None] = ()
    ):  # fmt: skip
        super().__init__()
        self.table = table.requires_grad_(False)
        self.num_vectors = num_vectors
        self.class_ids = list(class_ids)
        self.rows = nn.Parameter(self._rows_of(initializer_id))

    @property
    def style_rows(self) -> torch.Tensor:
        return self.rows[: self.num_vectors]

    @property
    def class_rows(self) -> torch.Tensor:
        return self.rows[self.num_vectors :]

    @torch.no_grad()
    def start_from(self, initializer_id: int) -> None:
        """Set all rows to where they start with this word."""
        self.rows.copy_(self._rows_of(initializer_id))

    def _rows_of(self, initializer_id: int) -> torch.Tensor:
        of_classes = [initializer_id if number is None else number for number in self.class_ids]
        return self.table.weight.detach()[[initializer_id] * self.num_vectors + of_classes].float()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return embeddings `(batch, length, dim)` in the table's dtype for `input_ids` `(batch, length)`."""
        is_style = input_ids >= self.table.num_embeddings
        frozen = self.table(input_ids.masked_fill(is_style, 0))
        style = self.rows[(input_ids - self.table.num_embeddings).clamp(min=0)]
        return torch.where(is_style.unsqueeze(-1), style.to(frozen.dtype), frozen)


def splice_style_token(
    text_encoder: nn.Module, tokenizer, num_vectors: int, initializer_id: int, class_ids: Sequence[int | None] = ()
) -> StyleTokenEmbedding:
    """Freeze `text_encoder`, replace its token embedding with a `StyleTokenEmbedding`, and return that.

    `tokenizer` must have the placeholder's tokens and, last, those of the classes.
    """
    table = text_encoder.get_input_embeddings()
    first_id = len(tokenizer) - num_vectors - len(class_ids)
    if first_id != table.num_embeddings:
        # the tables of some text encoders are padded; the extra rows are never used
        table = nn.Embedding.from_pretrained(table.weight[:first_id])
    text_encoder.requires_grad_(False)
    embedding = StyleTokenEmbedding(table, num_vectors, initializer_id, class_ids)
    text_encoder.set_input_embeddings(embedding)
    return embedding


class PromptEncoder(nn.Module):
    """The frozen text encoders of a base model, with the rows of the style token and of class tokens to train.

    One module for both encoders of Stable Diffusion XL, so that one wrapper covers all rows. The placeholder keeps its
    real token id: an encoder that pools at the largest id of a prompt pools at the style token (at the class token, if
    there is one), as in the pipeline that loads the tokens. `class_ids` are those of `find_noun_ids`, if each class has
    a token.
    """

    def __init__(
        self, text_encoders: list[nn.Module], tokenizers: list, num_vectors: int, initializer_ids: list[int],
        class_ids: Sequence[Sequence[int | None]] | None = None,
    ):  # fmt: skip
        super().__init__()
        parts = zip(text_encoders, tokenizers, initializer_ids, class_ids or [()] * len(tokenizers), strict=True)
        self.style_tokens = [
            splice_style_token(text_encoder, tokenizer, num_vectors, initializer_id, of_classes)
            for text_encoder, tokenizer, initializer_id, of_classes in parts
        ]
        self.text_encoders = nn.ModuleList(text_encoders)

    @property
    def rows(self) -> list[nn.Parameter]:
        """The trainable rows, `(num_vectors + num_classes, dim)` float32 for each text encoder; without class tokens,
        `(num_vectors, dim)`."""
        return [style_token.rows for style_token in self.style_tokens]

    def start_from(self, initializer_ids: list[int]) -> None:
        """Set all rows to where they start with a word; `initializer_ids` has its id in each text encoder."""
        for style_token, number in zip(self.style_tokens, initializer_ids, strict=True):
            style_token.start_from(number)

    def forward(self, input_ids: torch.Tensor) -> Conditioning:
        """Encode token ids `(batch, encoders, length)` as the base model's own pipeline does."""
        if len(self.text_encoders) == 1:
            return {"encoder_hidden_states": self.text_encoders[0](input_ids[:, 0])[0]}
        outputs = [
            text_encoder(input_ids[:, position], output_hidden_states=True)
            for position, text_encoder in enumerate(self.text_encoders)
        ]
        hidden_states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {"encoder_hidden_states": hidden_states, "text_embeds": outputs[-1].text_embeds}


@dataclass(frozen=True)
class PromptIds:
    """Token ids `(prompts, encoders, length)` of all prompts, each padded to the encoders' length.

    `training` has the first template's prompts for all classes, then those of the next; `plain` has one prompt per
    class without the token; `empty` is the empty prompt.
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


@dataclass(frozen=True)
class ImagePrompts:
    """The prompts of the training images: `labels` has each image's place among `ids.plain`, its class or its own.

    `record` is what a token's record says about them.
    """

    ids: PromptIds
    labels: list[int]
    record: dict


def tokenize_image_prompts(
    tokenizers: list, prompts: Sequence[str], labels: Sequence[int], contexts: Sequence[str], prompt_ids: PromptIds
) -> tuple[PromptIds, str]:
    """Return the token ids of each image's own prompts, and a line on contexts that are empty or too long, if any.

    `prompts` has the first template's prompts for all classes, then those of the next; the context of an image fills
    `{context}`, shortened if it does not fit. The ids are like `prompt_ids`, with each image as a class of its own.
    """

    def fits(texts: list[str]) -> list[bool]:
        is_fitting = [True] * len(texts)
        for tokenizer in tokenizers:
            lengths = map(len, tokenizer(texts, verbose=False).input_ids)
            is_fitting = [fit and length <= tokenizer.model_max_length for fit, length in zip(is_fitting, lengths)]
        return is_fitting

    num_classes, filled, num_short, notes = len(prompt_ids.plain), [], 0, []
    for start in range(0, len(prompts), num_classes):
        texts, _, number = fill_contexts([prompts[start + label] for label in labels], contexts, fits)
        filled, num_short = [*filled, *texts], max(num_short, number)
    if num_empty := sum(not context for context in contexts):
        notes.append(f"{num_empty:,} of {len(contexts):,} training images have no context, so their prompts have none")
    if num_short:
        limit = min(tokenizer.model_max_length for tokenizer in tokenizers)
        notes.append(
            f"{num_short:,} of {len(contexts):,} contexts are shortened: the text encoder takes {limit} tokens, with "
            "class and token"
        )
    training = PromptIds.tokenize(tokenizers, filled, [""], prompt_ids.training.device).training
    plain = prompt_ids.plain[torch.as_tensor(labels, device=prompt_ids.plain.device)]
    return replace(prompt_ids, training=training, plain=plain), f"{'; '.join(notes)}." if notes else ""


@dataclass(frozen=True)
class Denoiser:
    """A U-Net with the prompts of a style token: all that the token's loss depends on besides the images.

    `dtype` is the U-Net's, which takes milliseconds to look up. `lora` are adapters that are trained with the token.
    """

    base_model: BaseModel
    unet: nn.Module
    noise_scheduler: object
    encoder: nn.Module
    prompt_ids: PromptIds
    resolution: int
    dtype: torch.dtype
    lora: LoraAdapters | None = None

    @property
    def device(self) -> torch.device:
        return self.prompt_ids.training.device

    def encode_distinct(self, templates: torch.Tensor, labels: torch.Tensor) -> Conditioning:
        """Return the conditioning of a batch's training prompts; each distinct prompt is encoded once.

        `templates` and `labels` `(batch,)` are on the CPU, so that finding the distinct ones need not wait for a GPU.
        """
        distinct, places = (templates * len(self.prompt_ids.plain) + labels).unique(return_inverse=True)
        conditioning = self.encoder(self.prompt_ids.training[distinct.to(self.device)])
        return {name: value[places.to(value.device)] for name, value in conditioning.items()}

    def predict(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add noise, and return the U-Net's prediction and its target: velocity, image or noise.

        Both are `(batch, channels, height, width)` float32; their mean squared difference is the denoising loss.
        `latents` and `noise` have that shape and are at the U-Net's scale; `timesteps` is `(batch,)`.
        """
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
        arguments = unet_arguments(conditioning, self.resolution, self.dtype)
        model_pred = self.unet(noisy_latents.to(self.dtype), timesteps, **arguments).sample.float()
        prediction_type = self.noise_scheduler.config.prediction_type
        if prediction_type == "v_prediction":
            return model_pred, self.noise_scheduler.get_velocity(latents, noise, timesteps).float()
        if prediction_type == "sample":
            # weighted by the signal-to-noise ratio, the loss of the image equals that of the noise; as in diffusers,
            # examples/unconditional_image_generation/train_unconditional.py
            alphas = self.noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
            scale = (alphas / (1 - alphas)).sqrt()
            return model_pred * scale, latents.float() * scale
        return model_pred, noise.float()


def unet_arguments(conditioning: Conditioning, resolution: int, dtype: torch.dtype) -> dict:
    """Return the U-Net's keyword arguments for a conditioning.

    For Stable Diffusion XL, they state images of `resolution` pixels a side that are not cropped, as in its pipeline.
    """
    arguments = {"encoder_hidden_states": conditioning["encoder_hidden_states"].to(dtype)}
    if "text_embeds" in conditioning:
        text_embeds = conditioning["text_embeds"].to(dtype)
        time_ids = text_embeds.new_tensor([resolution, resolution, 0, 0, resolution, resolution])
        time_ids = time_ids.expand(len(text_embeds), -1)
        arguments["added_cond_kwargs"] = {"text_embeds": text_embeds, "time_ids": time_ids}
    return arguments


@torch.no_grad()
def norm_in_vocabulary(embedding: StyleTokenEmbedding) -> dict:
    """Return the token's mean row norm, the share of the vocabulary below it, and the vocabulary's quantiles.

    A norm far above those of all words means that training has diverged.
    """
    vocabulary = embedding.table.weight.float().norm(dim=-1)
    norm = embedding.style_rows.norm(dim=-1).mean()
    quantiles = vocabulary.quantile(vocabulary.new_tensor([0.05, 0.5, 0.95]))
    return {
        "norm": round(norm.item(), 4),
        "vocabulary_quantile": round((vocabulary < norm).float().mean().item(), 4),
        "vocabulary_5_50_95": [round(value, 4) for value in quantiles.tolist()],
    }


def save_learned_embeds(
    output_dir: str | Path, names: Sequence[str], rows: list[torch.Tensor], filename: str = LEARNED_EMBEDS
) -> Path:
    """Write the rows `(num_vectors, dim)` of each text encoder as float32, for `pipe.load_textual_inversion`.

    `names` are those of `Family.row_names`, one for each text encoder.
    """
    path = Path(output_dir) / filename
    save_file({name: value.detach().float().cpu().contiguous() for name, value in zip(names, rows, strict=True)}, path)
    return path


def load_learned_embeds(path: str | Path) -> list[torch.Tensor]:
    """Return the rows that `save_learned_embeds` wrote, in the order of the text encoders."""
    tensors = load_file(path)
    return [tensors[name] for name in ROW_NAMES if name in tensors] or list(tensors.values())
