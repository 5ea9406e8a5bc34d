"""The style token: rows of its own, spliced into the embedding output of a frozen text encoder."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from utils.cli.errors import UserError
from utils.data.prompts import token_text

LEARNED_EMBEDS = "learned_embeds.safetensors"


def add_placeholder_tokens(tokenizer, placeholder_token: str, num_vectors: int, initializer_token: str) -> int:
    """Add the placeholder's tokens to `tokenizer`, named as `load_textual_inversion` does; return the initializer's id.

    Raises:
        UserError: the placeholder is in the vocabulary already; the initializer is not exactly one token.
    """
    names = token_text(placeholder_token, num_vectors).split(" ")
    taken = [name for name in names if name in tokenizer.get_vocab()]
    if taken:
        raise UserError(
            f"--placeholder_token {placeholder_token}: the tokenizer has {taken[0]} already; choose another."
        )
    initializer_ids = tokenizer.encode(initializer_token, add_special_tokens=False)
    if len(initializer_ids) != 1:
        raise UserError(
            f"--initializer_token {initializer_token}: is {len(initializer_ids)} tokens, must be one, such as 'style'."
        )
    tokenizer.add_tokens(names)
    return initializer_ids[0]


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


def vocabulary_norm_quantile(embedding: StyleTokenEmbedding) -> tuple[float, float]:
    """Return the token's mean row norm, and the share of the vocabulary's rows, in [0, 1], whose norm is smaller."""
    norm = embedding.rows.detach().norm(dim=-1).mean()
    vocabulary = embedding.table.weight.detach().float().norm(dim=-1)
    return norm.item(), (vocabulary < norm.to(vocabulary.device)).float().mean().item()


def save_learned_embeds(output_dir: str | Path, placeholder_token: str, rows: torch.Tensor) -> Path:
    """Write `{placeholder_token: (num_vectors, dim)}` float32, as `pipe.load_textual_inversion` takes it."""
    path = Path(output_dir) / LEARNED_EMBEDS
    save_file({placeholder_token: rows.detach().float().cpu().contiguous()}, path)
    return path
