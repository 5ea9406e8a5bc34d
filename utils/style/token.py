"""The style token: rows of its own, spliced into the embedding output of a frozen text encoder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from utils.cli.errors import UserError
from utils.data.prompts import token_text
from utils.style.families import ROW_NAMES

LEARNED_EMBEDS = "learned_embeds.safetensors"


def add_placeholder_tokens(
    tokenizers: list, placeholder_token: str, num_vectors: int, initializer_token: str
) -> list[int]:
    """Add the placeholder's tokens to each tokenizer, named as `load_textual_inversion` does.

    Return the initializer's id in each.

    Raises:
        UserError: the placeholder is in the vocabulary already or not found in a prompt; the initializer is not
            exactly one token.
    """
    names = [name for name in token_text(placeholder_token, num_vectors).split(" ") if name]
    initializer_ids = []
    for tokenizer in tokenizers:
        taken = [name for name in names if name in tokenizer.get_vocab()]
        if taken:
            raise UserError(
                f"--placeholder_token {placeholder_token}: the tokenizer has {taken[0]} already; choose another."
            )
        ids = tokenizer.encode(initializer_token, add_special_tokens=False)
        if len(ids) != 1:
            raise UserError(
                f"--initializer_token {initializer_token}: is {len(ids)} tokens, must be one, such as 'style'."
            )
        tokenizer.add_tokens(names)
        new_ids = list(range(len(tokenizer) - num_vectors, len(tokenizer)))
        if tokenizer.encode(" ".join(names), add_special_tokens=False) != new_ids:
            raise UserError(
                f"--placeholder_token '{placeholder_token}': the tokenizer does not find it in a prompt; choose "
                "something like '<my-style>', without spaces."
            )
        initializer_ids += ids
    return initializer_ids


def check_prompt_lengths(tokenizers: list, prompts: list[str]) -> None:
    """Check that no prompt is cut: the style token is at its end.

    Raises:
        UserError: a prompt has more tokens than the text encoder takes.
    """
    for tokenizer in tokenizers:
        for prompt in prompts:
            length = len(tokenizer(prompt).input_ids)
            if length > tokenizer.model_max_length:
                kept = tokenizer.decode(tokenizer(prompt, truncation=True).input_ids, skip_special_tokens=True)
                raise UserError(
                    f"--prompt_templates: '{prompt}' is {length} tokens, the text encoder takes "
                    f"{tokenizer.model_max_length} and would see '{kept}' only; shorten the template or the class name."
                )


class StyleTokenEmbedding(nn.Module):
    """A frozen embedding table with the style token's trainable float32 rows behind its end.

    The table is never written, so no other row can move, and an optimiser holds `num_vectors x dim` numbers only.
    Ids from the table's size on are the token's vectors, in order.
    """

    def __init__(self, table: nn.Embedding, initial_rows: torch.Tensor):
        super().__init__()
        self.table = table.requires_grad_(False)
        self.rows = nn.Parameter(initial_rows.detach().clone().float())

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return embeddings `(batch, length, dim)` in the table's dtype for `input_ids` `(batch, length)`."""
        is_style = input_ids >= self.table.num_embeddings
        frozen = self.table(input_ids.masked_fill(is_style, 0))
        style = self.rows[(input_ids - self.table.num_embeddings).clamp(min=0)]
        return torch.where(is_style.unsqueeze(-1), style.to(frozen.dtype), frozen)


def splice_style_token(
    text_encoder: nn.Module, tokenizer, num_vectors: int, initializer_id: int
) -> StyleTokenEmbedding:
    """Freeze `text_encoder`, put a `StyleTokenEmbedding` in place of its token embedding, and return that.

    `tokenizer` has the placeholder's tokens already. All rows start as the initializer's.
    """
    table = text_encoder.get_input_embeddings()
    first_id = len(tokenizer) - num_vectors
    if first_id != table.num_embeddings:
        # some text encoders have a table padded beyond their tokenizer; its spare rows are never looked up
        table = nn.Embedding.from_pretrained(table.weight[:first_id])
    text_encoder.requires_grad_(False)
    embedding = StyleTokenEmbedding(table, table.weight[initializer_id].expand(num_vectors, -1))
    text_encoder.set_input_embeddings(embedding)
    return embedding


@torch.no_grad()
def norm_in_vocabulary(embedding: StyleTokenEmbedding) -> dict:
    """Return the token's mean row norm, the share of the vocabulary's rows whose norm is smaller, and their quantiles.

    A norm far above all words' says that training has diverged.
    """
    vocabulary = embedding.table.weight.float().norm(dim=-1)
    norm = embedding.rows.norm(dim=-1).mean()
    quantiles = vocabulary.quantile(vocabulary.new_tensor([0.05, 0.5, 0.95]))
    return {
        "norm": round(norm.item(), 4),
        "vocabulary_quantile": round((vocabulary < norm).float().mean().item(), 4),
        "vocabulary_5_50_95": [round(value, 4) for value in quantiles.tolist()],
    }


def save_learned_embeds(output_dir: str | Path, names: Sequence[str], rows: list[torch.Tensor]) -> Path:
    """Write the rows `(num_vectors, dim)` of each text encoder as float32, for `pipe.load_textual_inversion`.

    `names` are those of `Family.row_names`, one for each text encoder.
    """
    path = Path(output_dir) / LEARNED_EMBEDS
    save_file({name: value.detach().float().cpu().contiguous() for name, value in zip(names, rows, strict=True)}, path)
    return path


def load_learned_embeds(path: str | Path) -> list[torch.Tensor]:
    """Return the rows that `save_learned_embeds` wrote, in the order of the text encoders."""
    tensors = load_file(path)
    return [tensors[name] for name in ROW_NAMES if name in tensors] or list(tensors.values())
