"""The files of a diffusers pipeline: its configs, and which weights of its parts there are."""

import json
import logging
import re
from collections.abc import Iterable

from safetensors import SafetensorError

from utils.cli.errors import UserError
from utils.hub.repositories import Source

logger = logging.getLogger(__name__)

EXPECTED = "a pipeline of diffusers"
SHARD = r"(?:-\d{5}-of-\d{5})?"
# of diffusers and of transformers, whole or in shards: model.safetensors, model.fp16-00001-of-00002.safetensors
SAFETENSORS = re.compile(rf"(?:diffusion_pytorch_)?model(?:\.(\w+))?{SHARD}(?:\.(\w+))?\.safetensors")
PICKLED = re.compile(r"(?:diffusion_)?pytorch_model.*\.(?:bin|ckpt|pt|pth)")
VARIANT = "fp16"
# what the libraries raise on configs and weights that do not go together
PROBLEMS = (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, RuntimeError, SafetensorError)


def read_config(source: Source, filename: str) -> dict:
    """Return a JSON file of a pipeline.

    Raises:
        UserError: there is no such file, or it is no JSON mapping.
    """
    path = source.file(filename, EXPECTED)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{source.flag} {source.name}: its {filename} is not JSON ({error}).") from None
    if not isinstance(config, dict):
        raise UserError(f"{source.flag} {source.name}: its {filename} holds no JSON mapping, so it is not {EXPECTED}.")
    return config


def find_variants(source: Source, parts: Iterable[str]) -> dict[str, str | None]:
    """Return for each part with safetensors weights the variant to load: None, or 'fp16' where that is all there is.

    A part without any weights is left out: what loads it says what is missing. A variant is told in one warning.

    Raises:
        UserError: a part has no weights but pickled ones (`.bin`), or ones of variants that nobody can choose among.
    """
    weights = list_weights(source, parts)
    pickled = [part for part, (variants, others) in weights.items() if others and not variants]
    if pickled:
        raise UserError(
            f"{source.flag} {source.name}: has no safetensors weights for {', '.join(pickled)}, only pickled ones "
            "(.bin), which are not loaded; choose a repository or revision with safetensors, or convert it: "
            f"DiffusionPipeline.from_pretrained('{source.name}', use_safetensors=False).save_pretrained('FOLDER')."
        )
    chosen = {}
    for part, (variants, _) in weights.items():
        if variants and not {None, VARIANT} & set(variants):
            raise UserError(
                f"{source.flag} {source.name}: its {part} has safetensors weights of variant "
                f"{', '.join(sorted(variants))} only; those without a variant or {VARIANT} are wanted."
            )
        if variants:
            chosen[part] = None if None in variants else VARIANT
    only = [part for part, variant in chosen.items() if variant]
    if only:
        logger.warning(
            "%s %s: the weights of %s are there in half precision only; variant '%s' is loaded.",
            source.flag, source.name, ", ".join(only), VARIANT,
        )  # fmt: skip
    return chosen


def list_weights(source: Source, parts: Iterable[str]) -> dict[str, tuple[dict[str | None, list[str]], list[str]]]:
    """Return for each part its safetensors files by variant (None for those without), and its pickled files."""
    weights = {part: ({}, []) for part in parts}
    for filename in source.list_files():
        part, _, name = filename.rpartition("/")
        if part not in weights:
            continue
        variants, pickled = weights[part]
        if match := SAFETENSORS.fullmatch(name):
            variants.setdefault(match[1] or match[2], []).append(filename)
        elif PICKLED.fullmatch(name):
            pickled.append(filename)
    return weights
