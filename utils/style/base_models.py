"""Base models: the pipelines that a style token can be learned for, and their frozen parts."""

import hashlib
import math
from functools import cached_property

from utils.cli.errors import UserError
from utils.cli.processes import warn_once
from utils.style.families import WITH_STYLE_TOKENS
from utils.style.saved_pipelines import PROBLEMS, SavedPipeline, list_weights, open_pipeline, unsupported_class_error

# parts of other classes would load with random weights
PART_CLASSES = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}
DEFAULT_LATENT_SCALE = 0.18215  # if the VAE's config has none


class BaseModel(SavedPipeline):
    """A Stable Diffusion pipeline whose parts are loaded one by one, when needed."""

    @cached_property
    def latent_scale(self) -> float:
        """The factor from the scale of the VAE's latents to that of the U-Net."""
        return self.config("vae").get("scaling_factor", DEFAULT_LATENT_SCALE)

    @cached_property
    def latent_statistics(self) -> tuple[list[float], list[float]] | None:
        """Mean and standard deviation of each latent channel; None if the pipeline does not use them."""
        mean, std = (self.config("vae").get(name) for name in ("latents_mean", "latents_std"))
        return (mean, std) if self.family.normalizes_latents and mean is not None and std is not None else None

    def scale_latents(self, latents):
        """Bring the VAE's latents `(batch, channels, height, width)` to the U-Net's scale."""
        mean, std = self._statistics_for(latents)
        return (latents - mean) * self.latent_scale / std

    def unscale_latents(self, latents):
        """Bring the U-Net's latents to the VAE's scale, as the pipeline does before decoding."""
        mean, std = self._statistics_for(latents)
        return latents * std / self.latent_scale + mean

    def _statistics_for(self, latents) -> tuple:
        """Return mean and standard deviation, shaped for latents; 0 and 1 if the pipeline uses none."""
        if self.latent_statistics is None:
            return 0, 1
        return tuple(latents.new_tensor(values).view(1, -1, 1, 1) for values in self.latent_statistics)

    @cached_property
    def vae_identity(self) -> str:
        """The identity of the VAE: repository and commit, or a hash of the folder's files.

        Latents are cached before they are scaled, so they depend on nothing else.
        """
        return self._identify_vae()

    def check_vae_unchanged(self) -> None:
        """Check, once the VAE is loaded, that it is the identified one.

        Raises:
            UserError: it was replaced in between.
        """
        if self._identify_vae() != self.vae_identity:
            raise UserError(f"{self.prefix} its VAE was replaced while it was read; run the same command again.")

    def _identify_vae(self) -> str:
        if not self.source.is_local:
            return f"{self.source.name}@{self.source.revision}"
        digest = hashlib.sha256()
        variants, _ = list_weights(self.source, ["vae"])["vae"]
        for name in ("vae/config.json", *sorted(variants.get(self.variants.get("vae"), []))):
            with self.source.file(name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @property
    def loaded_parts(self) -> dict[str, str]:
        """The parts that training needs, with their classes."""
        return {encoder.part: encoder.class_name for encoder in self.family.text_encoders} | PART_CLASSES

    def check(self) -> None:
        """Check the configs and file names, before anything loads; warn about settings that are ignored.

        Raises:
            UserError: a part is missing, of another class or without safetensors weights, or does not fit another.
        """
        for part, wanted in self.loaded_parts.items():
            found = self.parts.get(part, [None])[-1]
            if found != wanted:
                raise UserError(f"{self.prefix} its {part} must be {wanted}, got {found}.")
        unet, vae = self.config("unet"), self.config("vae")
        size, blocks = unet.get("sample_size"), vae.get("block_out_channels")
        scale = self.latent_scale
        if not (isinstance(scale, int | float) and math.isfinite(scale) and scale):
            raise UserError(f"{self.prefix} its VAE's scaling_factor must be a number other than 0, got {scale}.")
        if not isinstance(size, int) or size < 1 or not isinstance(blocks, list) or not blocks:
            raise UserError(
                f"{self.prefix} its configs do not give its resolution (sample_size {size} of its U-Net, "
                f"block_out_channels {blocks} of its VAE)."
            )
        num_channels = vae.get("latent_channels", 4)
        for name in ("in_channels", "out_channels"):
            if unet.get(name, 4) != num_channels:
                raise UserError(
                    f"{self.prefix} its U-Net has {unet.get(name, 4)} {name}, its VAE {num_channels} latent channels; "
                    "they must be equal (inpainting and editing models take more channels, but no style tokens)."
                )
        if self.latent_statistics and {len(values) for values in self.latent_statistics} != {num_channels}:
            raise UserError(f"{self.prefix} its VAE's latents_mean and latents_std must have {num_channels} values.")
        names = ["shift_factor"] if self.latent_statistics else ["shift_factor", "latents_mean", "latents_std"]
        ignored = [name for name in names if vae.get(name)]
        if ignored:
            what = " and ".join(ignored)
            warn_once(f"{self.prefix} {what} of its VAE: ignored in training, as in a {self.pipeline_class}.")
        _ = self.variants  # found, with warnings, before the images are read

    def load_tokenizers(self) -> list:
        """Return the tokenizer of each text encoder."""
        from transformers import CLIPTokenizer

        with self.source.reading("has no usable tokenizer"):
            return [
                CLIPTokenizer.from_pretrained(self.source.name, subfolder=encoder.tokenizer, **self._options)
                for encoder in self.family.text_encoders
            ]

    def load_text_encoders(self, dtype) -> list:
        """Return the text encoders that a style token is learned for, on the CPU."""
        return [self._load_model(encoder.part, dtype) for encoder in self.family.text_encoders]

    def load_vae(self):
        """Return the VAE in float32, as that of Stable Diffusion XL overflows in half precision."""
        import torch

        return self._load_model("vae", torch.float32)

    def load_unet(self, dtype):
        return self._load_model("unet", dtype)

    def load_noise_scheduler(self):
        """Return the scheduler that adds noise, with the base model's noise levels and prediction type.

        Raises:
            UserError: the model was trained with other noise, or has an unsupported prediction type.
        """
        self.scheduler.check_trainable()
        if (signs := self.scheduler.signs_of_distillation) is not None:
            warn_once(
                f"{self.prefix} looks distilled for few steps ({signs}), so it was not trained on the denoising loss "
                "of a style token; the model that it was distilled from is a better base."
            )
        return self.scheduler.make_noise_scheduler()

    def load_pipeline(self, unet):
        """Return the pipeline with `unet`, VAE and scheduler, for prompts that are already encoded."""
        from diffusers import DiffusionPipeline

        left_out = dict.fromkeys(self.parts.keys() - {"scheduler"})
        parts = left_out | {"unet": unet, "vae": self.load_vae()}
        with self.source.reading("its pipeline cannot be loaded", also=PROBLEMS):
            return DiffusionPipeline.from_pretrained(self.source.name, **parts, **self._options)

    @cached_property
    def _options(self) -> dict:
        return self.source.load_options()

    def _load_model(self, part: str, dtype):
        """Load a part, and check that all its weights are there: missing ones would be random."""
        import diffusers
        import transformers

        kind = getattr(diffusers if part in PART_CLASSES else transformers, self.loaded_parts[part])
        with self.source.reading(f"its {part} cannot be loaded", also=PROBLEMS):
            model, info = kind.from_pretrained(
                self.source.name, subfolder=part, dtype=dtype, use_safetensors=True, variant=self.variants.get(part),
                output_loading_info=True, **self._options,
            )  # fmt: skip
        missing = sorted(info["missing_keys"])
        if missing:
            raise UserError(
                f"{self.prefix} its {part} lacks {len(missing)} weights, such as {missing[0]}; the files are damaged "
                "or belong to another model."
            )
        return model.requires_grad_(False).eval()


def open_base_model(name: str, flag: str, revision: str | None = None, token: str | None = None) -> BaseModel:
    """Return a pipeline that a style token can be learned for.

    Raises:
        UserError: it is another kind of pipeline; or from `open_pipeline` and `BaseModel.check`.
    """
    source, pipeline_class = open_pipeline(name, flag, revision, token)
    if pipeline_class not in list(WITH_STYLE_TOKENS):  # the entry can be a list
        supported = [f"{kind} ({family.title})" for kind, family in WITH_STYLE_TOKENS.items()]
        raise unsupported_class_error(source, pipeline_class, supported)
    base_model = BaseModel(source, pipeline_class)
    base_model.check()
    return base_model
