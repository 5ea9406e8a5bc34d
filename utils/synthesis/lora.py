"""LoRA adapters of a generator: found, pinned and checked before anything loads, then fused into its weights."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

from utils.cli.errors import UserError
from utils.cli.options import absolute_if_local
from utils.hub.repositories import Source, open_source
from utils.style.saved_pipelines import PROBLEMS
from utils.synthesis.few_steps import FewSteps, find_few_steps
from utils.synthesis.generators import Generator

LORA = "lora"  # among a set's settings
WEIGHTS = "pytorch_lora_weights.safetensors"  # what diffusers writes
SAMPLING = "sampling.json"  # beside the weights, of an adapter that says itself how it is sampled
SCALE = re.compile(r"(?P<name>.+):(?P<scale>\d+\.?\d*|\.\d+)")
TEXT_LAYER = re.compile(r"attn2.to_k\W?(lora_A|lora_down|lora\.down|lora_linear_layer\.down)|attn2_to_k\.lora_down")
MAX_LISTED = 8


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter: its file in a source whose commit is pinned, and the scale that it is fused with."""

    source: Source
    filename: str
    scale: float
    path: Path
    sha256: str

    def to_dict(self) -> dict:
        """Return it as records hold it."""
        return {
            "id": absolute_if_local(self.source.name), "revision": self.source.revision, "filename": self.filename,
            "sha256": self.sha256, "scale": self.scale,
        }  # fmt: skip

    @cached_property
    def few_steps(self) -> FewSteps | None:
        """How it wants to be sampled, by its own `sampling.json`, else by its name; None where it is for any steps.

        Raises:
            UserError: that file is not as it should be.
        """
        folder = str(PurePosixPath(self.filename).parent)
        path = SAMPLING if folder == "." else f"{folder}/{SAMPLING}"
        if not self.source.has_one_of([path]):
            # not by the folders that a local one lies in
            return find_few_steps(self.filename) or find_few_steps(
                Path(self.source.name).name if self.source.is_local else self.source.name
            )
        try:
            return FewSteps(f"its {SAMPLING} says", **json.loads(self.source.file(path).read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.source.flag} {self.source.name}: its {SAMPLING} is none ({error}).") from None

    def check(self, generator: Generator) -> None:
        """Check that it is for this generator, as far as its file tells without loading either.

        Raises:
            UserError: it is no adapter, or was made for text of another width.
        """
        prefix = f"{self.source.flag} {self.source.name}/{self.filename}:"
        try:
            with safe_open(self.path, "pt") as weights:
                keys = weights.keys()
                shapes = {key: weights.get_slice(key).get_shape() for key in keys}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{prefix} cannot be read as safetensors ({error}).") from None
        if not any("lora" in key.lower() for key in shapes):
            raise UserError(f"{prefix} has no weights of a LoRA adapter.")
        widths = {shape[-1] for key, shape in shapes.items() if TEXT_LAYER.search(key)}
        wanted = generator.denoiser_config.get("cross_attention_dim")
        if isinstance(wanted, int) and widths and widths != {wanted}:
            raise UserError(
                f"{prefix} is for a model whose text is {min(widths)} wide, that of {generator.source.name} is "
                f"{wanted}; choose an adapter for this generator."
            )

    def fuse(self, pipe) -> None:
        """Add it to the weights of a pipeline.

        Raises:
            UserError: it does not fit the pipeline.
        """
        with self.source.reading(f"{self.filename} does not fit a {type(pipe).__name__}", also=PROBLEMS):
            pipe.load_lora_weights(str(self.path.parent), weight_name=self.path.name)
            if not pipe.get_list_adapters():
                raise UserError(
                    f"{self.source.flag} {self.source.name}/{self.filename}: has no weights for any part of a "
                    f"{type(pipe).__name__}."
                )
            pipe.fuse_lora(lora_scale=self.scale)
            pipe.unload_lora_weights()


def open_lora(value: str, revision: str | None, token: str | None) -> LoraAdapter:
    """Return the adapter that `ID_OR_FOLDER[/FILE.safetensors][:SCALE]` names.

    Raises:
        UserError: there is none, or several of which none is named.
    """
    match = SCALE.fullmatch(value)
    name, scale = (match["name"], float(match["scale"])) if match else (value, 1.0)
    filename = None
    if name.endswith(".safetensors"):
        parts = PurePosixPath(name).parts
        place = len(parts) - 1 if Path(name).is_file() else 2  # user/name/FILE
        name, filename = str(PurePosixPath(*parts[:place])), "/".join(parts[place:])
    source = open_source(name, "--lora", revision=revision, token=token)
    filename = filename or _find_file(source)
    path = source.file(filename)
    return LoraAdapter(source, filename, scale, path, hashlib.sha256(path.read_bytes()).hexdigest())


def _find_file(source: Source) -> str:
    names = source.list_files()
    found = [name for name in names if name.endswith(".safetensors")]
    if WEIGHTS in found:
        return WEIGHTS
    if len(found) == 1:
        return found[0]
    if not found:
        pickled = any(name.endswith((".bin", ".pt", ".ckpt")) for name in names)
        why = "has weights as pickles only; safetensors alone are loaded" if pickled else "has no .safetensors file"
        raise UserError(f"--lora {source.name}: {why}.")
    listed = ", ".join(found[:MAX_LISTED]) + (", ..." if len(found) > MAX_LISTED else "")
    raise UserError(
        f"--lora {source.name}: has {len(found)} files of weights ({listed}); name one, as in --lora "
        f"{source.name}/{found[0]}."
    )
