"""LoRA adapters of a generator: pinned and checked before anything loads, then fused into its weights."""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

from utils.cli.errors import UserError
from utils.cli.options import absolute_if_local
from utils.cli.processes import warn_once
from utils.hub.repositories import Source, open_source
from utils.style.families import OWN_SCHEDULER
from utils.style.saved_pipelines import PROBLEMS
from utils.synthesis.few_steps import FewSteps, find_few_steps
from utils.synthesis.generators import Generator

LORA = "lora"  # among a set's settings
WEIGHTS = "pytorch_lora_weights.safetensors"  # the file that diffusers writes
SAMPLING = "sampling.json"  # next to the weights, if the adapter states its own sampling settings
# the keys of sampling.json, what their values must be, and the test
SAMPLING_VALUES = {
    "scheduler": ("the name of a scheduler class", lambda value: isinstance(value, str)),
    "num_inference_steps": ("a whole number above 0", lambda value: type(value) is int and value > 0),
    "guidance_scale": (
        "a number, 0 or above, or null",
        lambda value: value is None or type(value) in (int, float) and 0 <= value < float("inf"),
    ),
    "scheduler_config": ("a mapping", lambda value: isinstance(value, dict)),
}
DOWN = r"\W?(?:lora_A|lora_down|lora\.down|_lora\.down|lora_linear_layer\.down)"
TEXT_LAYER = re.compile(r"attn2.to_k\W?(lora_A|lora_down|lora\.down|lora_linear_layer\.down)|attn2_to_k\.lora_down")
# attention of a U-Net: its block, and the block's number
UNET_LAYER = re.compile(rf"(down_blocks|up_blocks|mid_block)[._](\d*).*attn[12]\W?(?:processor\.)?_?to_q{DOWN}")
ENCODER_LAYER = re.compile(rf"(text_encoder(?:_2)?)\..*q_proj{DOWN}")
MAX_LISTED = 8
INCONSISTENT, LAYER_NAME = "an inconsistency was discovered", re.compile(r"'([\w.]+)'")  # in the warning of peft


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter: its file in a source pinned to a commit, and its scale.

    One that `is_learned` belongs to a style token, and is not for few steps, whatever the token is called.
    """

    source: Source
    filename: str
    scale: float
    path: Path
    sha256: str
    is_learned: bool = False

    def to_dict(self) -> dict:
        """Return the adapter's entries in a record."""
        return {
            LORA: absolute_if_local(self.source.name), "lora_revision": self.source.revision,
            "lora_filename": self.filename, "lora_sha256": self.sha256, "lora_scale": self.scale,
        }  # fmt: skip

    @cached_property
    def few_steps(self) -> FewSteps | None:
        """How to sample with it, from its `sampling.json`, else by its name; None if it is not for few steps.

        Raises:
            UserError: that file is malformed.
        """
        if self.is_learned:
            return None
        folder = str(PurePosixPath(self.filename).parent)
        path = SAMPLING if folder == "." else f"{folder}/{SAMPLING}"
        if not self.source.has_one_of([path]):
            # not by the parent folders of a local adapter
            return find_few_steps(self.filename) or find_few_steps(
                Path(self.source.name).name if self.source.is_local else self.source.name
            )
        prefix = f"{self.source.flag} {self.source.name}: its {SAMPLING}"
        try:
            values = json.loads(self.source.file(path).read_text())
        except ValueError as error:
            raise UserError(f"{prefix} cannot be read as JSON ({error}).") from None
        if not isinstance(values, dict) or values.keys() - SAMPLING_VALUES.keys():
            raise UserError(f"{prefix} must be a mapping with keys among {', '.join(SAMPLING_VALUES)}.")
        for name, value in values.items():
            wanted, is_right = SAMPLING_VALUES[name]
            if not is_right(value):
                raise UserError(f"{prefix}: {name} must be {wanted}, got {value!r}.")
        return FewSteps(f"its {SAMPLING} says", **values)

    def check(self, generator: Generator) -> None:
        """Check that it fits this generator, as far as its file shows.

        Raises:
            UserError: it is not an adapter, is for a model of another size, or has NaN or infinite weights.
        """
        prefix = f"{self.source.flag} {self.source.name}/{self.filename}:"
        try:
            with safe_open(self.path, "pt") as weights:
                keys = weights.keys()
                shapes = {key: weights.get_slice(key).get_shape() for key in keys}
                broken = next((key for key in keys if not weights.get_tensor(key).float().isfinite().all()), None)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{prefix} cannot be read as safetensors ({error}).") from None
        if not any("lora" in key.lower() for key in shapes):
            raise UserError(f"{prefix} has no weights of a LoRA adapter.")
        if broken is not None:
            raise UserError(
                f"{prefix} has NaN or infinite weights ({broken}): the file is damaged, or its training diverged; "
                "choose another adapter."
            )
        widths = {shape[-1] for key, shape in shapes.items() if TEXT_LAYER.search(key)}
        wanted = generator.denoiser_config.get("cross_attention_dim")
        if isinstance(wanted, int) and widths and widths != {wanted}:
            raise UserError(
                f"{prefix} is for a model with text embeddings of {min(widths)} numbers, those of "
                f"{generator.source.name} have {wanted}; choose an adapter for this generator."
            )
        for key, shape in shapes.items():
            for layer, size in _find_sizes(key, generator):
                if len(shape) == 2 and shape[1] != size:
                    raise UserError(
                        f"{prefix} is for another model: {layer} has {shape[1]} channels in it, {size} in "
                        f"{generator.source.name}; choose an adapter for this generator."
                    )
        if self.few_steps is not None and generator.family.scales_model_input:
            self._check_sampling(generator, self.few_steps)

    def _check_sampling(self, generator: Generator, few_steps: FewSteps) -> None:
        """Raise if the adapter's settings do not fit the generator, as otherwise a flag would be blamed."""
        prefix = f"{self.source.flag} {self.source.name}: wants"
        try:
            generator.check_scheduler(few_steps.scheduler, few_steps.num_inference_steps)
            if few_steps.scheduler != OWN_SCHEDULER:
                made = generator.scheduler.make(few_steps.scheduler, **few_steps.scheduler_config)
                made.set_timesteps(few_steps.num_inference_steps)
        except UserError as error:
            raise UserError(f"{prefix} {error}") from None
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(
                f"{prefix} a {few_steps.scheduler} with {few_steps.scheduler_config} and "
                f"{few_steps.num_inference_steps} steps, which does not work ({error})."
            ) from None

    def fuse(self, pipe) -> None:
        """Fuse it into the weights of a pipeline, and warn if some of its layers are left out.

        Raises:
            UserError: it does not fit the pipeline.
        """
        with self.source.reading(f"{self.filename} does not fit a {type(pipe).__name__}", also=PROBLEMS):
            with warnings.catch_warnings(record=True) as caught:
                pipe.load_lora_weights(str(self.path.parent), weight_name=self.path.name)
            self._replace_warnings(caught)
            if not pipe.get_list_adapters():
                raise UserError(
                    f"{self.source.flag} {self.source.name}/{self.filename}: has no weights for any part of a "
                    f"{type(pipe).__name__}."
                )
            pipe.fuse_lora(lora_scale=self.scale)
            pipe.unload_lora_weights()

    def _replace_warnings(self, caught: list[warnings.WarningMessage]) -> None:
        """Replace peft's long warning about left-out layers by one line; pass on all other warnings."""
        for warning in caught:
            if INCONSISTENT not in str(warning.message):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
                continue
            layers = LAYER_NAME.findall(str(warning.message))
            warn_once(
                f"{self.source.flag} {self.source.name}/{self.filename}: left out of {len(layers)} layers ("
                f"{layers[0]}, ...), as the file mixes two naming schemes. Save it with one of them."
            )


def _find_sizes(key: str, generator: Generator) -> Iterator[tuple[str, int]]:
    """Yield the layer of a weight and its size in the generator; nothing if the configs do not state it."""
    config, match = generator.denoiser_config, UNET_LAYER.search(key)
    if match and not generator.has_transformer:
        side, number = match[1], int(match[2] or 0)
        sizes, kinds = config.get("block_out_channels") or [], config.get(f"{side.removesuffix('s')}_types") or []
        if side == "mid_block":
            sizes, kinds = sizes[-1:], ["CrossAttn"]
        elif side == "up_blocks":
            sizes = sizes[::-1]
        if number < min(len(sizes), len(kinds)) and "CrossAttn" in kinds[number]:
            yield f"attention of {'.'.join(filter(None, match.groups()))}", sizes[number]
    match = ENCODER_LAYER.match(key)
    if match and match[1] in generator.parts:
        size = generator.config(match[1]).get("hidden_size")
        if isinstance(size, int):
            yield f"attention of {match[1]}", size


def open_loras(
    values: Sequence[str], revisions: Sequence[str] | None, generator: Generator, token: str | None
) -> tuple[LoraAdapter, ...]:
    """Return the adapters that the values of `--lora` name, each at its own revision, if any, and checked.

    Raises:
        UserError: from `open_lora` and `LoraAdapter.check`; there is not one revision for each adapter, or two adapters
            set how to sample.
    """
    if revisions and len(revisions) != len(values):
        raise UserError(
            f"--lora_revision {' '.join(revisions)}: has {len(revisions)} values for {len(values)} adapters; give one "
            "for each, in their order."
        )
    loras = tuple(open_lora(*each, token) for each in zip(values, revisions or [None] * len(values)))
    for lora in loras:
        lora.check(generator)
    sampling = [lora for lora in loras if lora.few_steps is not None]
    if len(sampling) > 1:
        why = "; ".join(f"{lora.source.name}: {lora.few_steps.why}" for lora in sampling)
        raise UserError(f"--lora {' '.join(values)}: {len(sampling)} of them set how to sample ({why}); give only one.")
    return loras


def record_adapters(loras: Sequence[LoraAdapter]) -> dict:
    """Return the entries of adapters in a record: values of a single one, lists of several."""
    entries = [lora.to_dict() for lora in loras]
    if len(entries) > 1:
        return {name: [entry[name] for entry in entries] for name in entries[0]}
    return entries[0] if entries else {LORA: None}


def recorded_adapters(settings: dict) -> list[dict]:
    """Return the entries of each adapter in the settings that `record_adapters` wrote."""
    if settings.get(LORA) is None:
        return []
    names = [name for name in settings if name == LORA or name.startswith("lora_")]
    values = [settings[name] if isinstance(settings[name], list) else [settings[name]] for name in names]
    return [dict(zip(names, of_one)) for of_one in zip(*values)]


def open_lora(value: str, revision: str | None, token: str | None) -> LoraAdapter:
    """Return the adapter that `ID_OR_FOLDER[/FILE.safetensors][:SCALE]` names.

    Raises:
        UserError: there is none, or there are several and none is named.
    """
    name, colon, scale = value.rpartition(":")
    if not colon or Path(value).exists():
        name, scale = value, "1"
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"--lora {value}: the scale after the colon must be a number above 0, such as {name}:0.8.")
    filename = None
    if name.endswith(".safetensors"):
        parts = PurePosixPath(name).parts
        place = len(parts) - 1 if Path(name).is_file() else 2  # user/name/FILE
        name, filename = str(PurePosixPath(*parts[:place])), "/".join(parts[place:])
    source = open_source(name, "--lora", revision=revision, token=token)
    filename = filename or _find_file(source)
    path = source.file(filename)
    return LoraAdapter(source, filename, number, path, hashlib.sha256(path.read_bytes()).hexdigest())


def _find_file(source: Source) -> str:
    names = source.list_files()
    found = [name for name in names if name.endswith(".safetensors")]
    if WEIGHTS in found:
        return WEIGHTS
    if len(found) == 1:
        return found[0]
    if not found:
        pickled = any(name.endswith((".bin", ".pt", ".ckpt")) for name in names)
        why = "has only pickled weights; only safetensors are loaded" if pickled else "has no .safetensors file"
        raise UserError(f"--lora {source.name}: {why}.")
    listed = ", ".join(found[:MAX_LISTED]) + (", ..." if len(found) > MAX_LISTED else "")
    raise UserError(
        f"--lora {source.name}: has {len(found)} weight files ({listed}); name one, as in --lora "
        f"{source.name}/{found[0]}."
    )
