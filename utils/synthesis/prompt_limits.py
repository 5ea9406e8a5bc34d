"""What of a prompt a generator's text encoders read: its tokens counted, and what must not be cut checked."""

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from utils.cli.errors import UserError
from utils.data.prompts import token_text
from utils.synthesis.generators import Generator

logger = logging.getLogger(__name__)

PROMPTS_AT_A_TIME = 1000


def check_prompts_fit(
    generator: Generator,
    prompts: Iterable[tuple[str, int]],
    placeholder: str | None,
    num_vectors: int,
    flag: str = "--prompt_templates",
) -> None:
    """Check that the text encoder reads what matters of each prompt: all before a position, counted in characters.

    One warning tells how many prompts are cut behind that position. `placeholder` counts as `num_vectors` tokens.

    Raises:
        UserError: a prompt is cut before its position; the message begins with `flag` and shows what would be left.
    """
    tokenizer, limit = _load_prompt_tokenizer(generator)
    expand = _prepare_placeholder(tokenizer, placeholder, num_vectors)
    num_cut, example = 0, ""
    for batch in _batched(prompts):
        texts = [expand(prompt) for prompt, _ in batch]
        for ids, text, (prompt, position) in zip(tokenizer(texts, verbose=False).input_ids, texts, batch):
            if len(ids) <= limit:
                continue
            left = _cut_text(tokenizer, text, limit)
            if len(left) < len(expand(prompt[:position]).rstrip()):
                raise UserError(
                    f"{flag}: '{prompt}' has {len(ids)} tokens, the text encoder takes {limit} and would see '{left}' "
                    "only, without all of the class name and the style token; shorten it or put these first."
                )
            num_cut, example = num_cut + 1, example or left
    if num_cut:
        logger.warning(
            "%s: prompts longer than %d tokens are cut behind what matters: %d, for example to '%s'.",
            flag, limit, num_cut, example,
        )  # fmt: skip


def count_prompt_tokens(
    generator: Generator, prompts: Iterable[str], placeholder: str | None, num_vectors: int
) -> list[int]:
    """Return the tokens of each prompt with start and end; every vector of the style token counts as one."""
    tokenizer, _ = _load_prompt_tokenizer(generator)
    expand = _prepare_placeholder(tokenizer, placeholder, num_vectors)
    batches = (tokenizer([expand(prompt) for prompt in batch], verbose=False).input_ids for batch in _batched(prompts))
    return [len(ids) for batch in batches for ids in batch]


def _load_prompt_tokenizer(generator: Generator) -> tuple:
    """Return the tokenizer of the text encoder that reads furthest, and the number of tokens up to where it reads.

    CLIP reads as many as its tokenizer says (77), others (T5) up to the pipeline's `max_sequence_length`.
    """
    import transformers

    source, parameters, tokenizers = generator.source, generator.call_parameters, []
    for name, (library, kind) in generator.parts.items():
        if not name.startswith("tokenizer") or name.replace("tokenizer", "text_encoder") not in generator.parts:
            continue
        if library != "transformers":
            raise UserError(f"{source.flag} {source.name}: its tokenizer, {kind}, is not one of transformers.")
        with source.reading("has no usable tokenizer", also=(ValueError,)):
            tokenizer = getattr(transformers, kind).from_pretrained(
                source.name, subfolder=name, **source.load_options()
            )
        is_cut_by_pipeline = not kind.startswith("CLIP") and "max_sequence_length" in parameters
        limit = parameters["max_sequence_length"].default if is_cut_by_pipeline else tokenizer.model_max_length
        tokenizers.append((tokenizer, limit))
    if not tokenizers:
        raise UserError(f"{source.flag} {source.name}: has no tokenizer with a text encoder.")
    return max(tokenizers, key=lambda pair: pair[1])


def _prepare_placeholder(tokenizer, placeholder: str | None, num_vectors: int) -> Callable[[str], str]:
    """Add the placeholder's tokens to the tokenizer; return what writes them out in a prompt, as the pipeline does."""
    if placeholder is None:
        return str
    vectors = token_text(placeholder, num_vectors)
    tokenizer.add_tokens(vectors.split())
    return lambda prompt: prompt.replace(placeholder, vectors)


def _cut_text(tokenizer, text: str, limit: int) -> str:
    """Return what is left of a text whose tokens are cut to `limit`, up to the first letter that is not read.

    Not up to the last that is: a token of T5 for the space in front has the place of the letter behind it.
    """
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False).offset_mapping
    first_lost, _ = offsets[limit - tokenizer.num_special_tokens_to_add()]
    return text[:first_lost].rstrip()


def _batched(items: Iterable) -> Iterator[list]:
    items = iter(items)
    while batch := list(islice(items, PROMPTS_AT_A_TIME)):
        yield batch
