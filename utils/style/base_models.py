"""Base models: the pipelines a style token can be learned for, and their frozen parts."""

import hashlib
import math
from functools import cached_property

from utils.cli.errors import UserError
from utils.cli.processes import warn_once
from utils.style.families import WITH_STYLE_TOKENS
from utils.style.saved_pipelines import PROBLEMS, SavedPipeline, list_weights, open_pipeline, refuse_class

# other classes in these places would load with random weights
PART_CLASSES = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}
DEFAULT_LATENT_SCALE = 0.18215  # where the VAE's config says nothing


class BaseModel(SavedPipeline):
    """A Stable Diffusion pipeline whose parts are loaded one by one, when they are needed."""

    @cached_property
    def latent_scale(self) -> float:
        """The factor that brings the VAE's latents to the U-Net's scale."""
        return self.config("vae").get("scaling_factor", DEFAULT_LATENT_SCALE)

    @cached_property
    def latent_statistics(self) -> tuple[list[float], list[float]] | None:
        """Mean and standard deviation of each latent channel where the pipeline uses them, else None."""
        mean, std = (self.config("vae").get(name) for name in ("latents_mean", "latents_std"))
        return (mean, std) if self.family.normalizes_latents and mean is not None and std is not None else None

    def scale_latents(self, latents):
        """Bring the VAE's latents `(batch, channels, height, width)` to the U-Net's scale."""
        mean, std = self._statistics_for(latents)
        return (latents - mean) * self.latent_scale / std

    def unscale_latents(self, latents):
        """Bring the U-Net's latents to the VAE's scale, as the pipeline does before it decodes."""
        mean, std = self._statistics_for(latents)
        return latents * std / self.latent_scale + mean

    def _statistics_for(self, latents) -> tuple:
        """Return mean and standard deviation as they apply to latents; 0 and 1 where the pipeline uses none."""
        if self.latent_statistics is None:
            return 0, 1
        return tuple(latents.new_tensor(values).view(1, -1, 1, 1) for values in self.latent_statistics)

    @cached_property
    def vae_identity(self) -> str:
        """What tells this VAE from another: repository and commit, or a hash of the folder's files.

        Latents are cached before they are scaled, so nothing else decides them.
        """
        return self._identify_vae()

    def check_vae_unchanged(self) -> None:
        """Check, once the VAE is loaded, that it is the one that was identified.

        Raises:
            UserError: it was replaced meanwhile.
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
        """The parts that training needs, each with its class."""
        return {encoder.part: encoder.class_name for encoder in self.family.text_encoders} | PART_CLASSES

    def check(self) -> None:
        """Check what the configs and file names say, before anything loads; warn of what is ignored.

        Raises:
            UserError: a part is missing, of another class or without safetensors weights, or does not fit another.
        """
        for part, wanted in self.loaded_parts.items():
            found = self.parts.get(part, [None])[-1]
            if found != wanted:
                raise UserError(f"{self.prefix} its {part} is {found}; wanted is {wanted}.")
        unet, vae = self.config("unet"), self.config("vae")
        size, blocks = unet.get("sample_size"), vae.get("block_out_channels")
        scale = self.latent_scale
        if not (isinstance(scale, int | float) and math.isfinite(scale) and scale):
            raise UserError(f"{self.prefix} its VAE's scaling_factor is {scale}; a number other than 0 is wanted.")
        if not isinstance(size, int) or size < 1 or not isinstance(blocks, list) or not blocks:
            raise UserError(
                f"{self.prefix} its configs do not say at how many pixels it draws (sample_size {size} of its U-Net, "
                f"block_out_channels {blocks} of its VAE)."
            )
        num_channels = vae.get("latent_channels", 4)
        for name in ("in_channels", "out_channels"):
            if unet.get(name, 4) != num_channels:
                raise UserError(
                    f"{self.prefix} its U-Net has {unet.get(name, 4)} {name}, its VAE {num_channels} latent channels; "
                    "they must be equal (inpainting and editing models take more, and no style token)."
                )
        if self.latent_statistics and {len(values) for values in self.latent_statistics} != {num_channels}:
            raise UserError(f"{self.prefix} its VAE's latents_mean and latents_std must have {num_channels} values.")
        names = ["shift_factor"] if self.latent_statistics else ["shift_factor", "latents_mean", "latents_std"]
        ignored = [name for name in names if vae.get(name)]
        if ignored:
            what = " and ".join(ignored)
            warn_once(f"{self.prefix} ignored in training, as in a {self.pipeline_class}: {what} of its VAE.")
        _ = self.variants  # found, and told, before the images are read

    def load_tokenizers(self) -> list:
        """Return the tokenizer of each text encoder."""
        from transformers import CLIPTokenizer

        with self.source.reading("has no usable tokenizer"):
            return [
                CLIPTokenizer.from_pretrained(self.source.name, subfolder=encoder.tokenizer, **self._options)
                for encoder in self.family.text_encoders
            ]

    def load_text_encoders(self, dtype) -> list:
        """Return the text encoders that a style token is learned in, on the CPU."""
        return [self._load_model(encoder.part, dtype) for encoder in self.family.text_encoders]

    def load_vae(self):
        """Return the VAE in float32, as Stable Diffusion XL's overflows in half precision."""
        import torch

        return self._load_model("vae", torch.float32)

    def load_unet(self, dtype):
        return self._load_model("unet", dtype)

    def load_noise_scheduler(self):
        """Return the scheduler that adds noise, with the base model's own noise levels and prediction type.

        Raises:
            UserError: the model was trained with other noise, or predicts what a style token cannot be learned with.
        """
        self.scheduler.check_trainable()
        if (signs := self.scheduler.signs_of_distillation) is not None:
            warn_once(
                f"{self.prefix} looks distilled for few steps ({signs}): it was not trained on the denoising loss that "
                "a style token is learned with; the model it was distilled from is a better base."
            )
        return self.scheduler.make_noise_scheduler()

    def load_pipeline(self, unet):
        """Return the pipeline around `unet`, with its VAE and scheduler, for prompts that are encoded already."""
        from diffusers import DiffusionPipeline

        left_out = dict.fromkeys(self.parts.keys() - {"scheduler"})
        parts = left_out | {"unet": unet, "vae": self.load_vae()}
        with self.source.reading("its pipeline cannot be loaded", also=PROBLEMS):
            return DiffusionPipeline.from_pretrained(self.source.name, **parts, **self._options)

    @cached_property
    def _options(self) -> dict:
        return self.source.load_options()

    def _load_model(self, part: str, dtype):
        """Load a part, and check that it has all its weights: those that are missing would be random."""
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
                f"{self.prefix} {len(missing)} weights of its {part} are missing, such as {missing[0]}; the files are "
                "damaged, or those of another model."
            )
        return model.requires_grad_(False).eval()


def open_base_model(name: str, flag: str, revision: str | None = None, token: str | None = None) -> BaseModel:
    """Return a pipeline that a style token can be learned for.

    Raises:
        UserError: it is another pipeline, or what `open_pipeline` and `BaseModel.check` raise.
    """
    source, pipeline_class = open_pipeline(name, flag, revision, token)
    if pipeline_class not in list(WITH_STYLE_TOKENS):  # what is there may be a list, too
        supported = [f"{kind} ({family.title})" for kind, family in WITH_STYLE_TOKENS.items()]
        raise refuse_class(source, pipeline_class, supported)
    base_model = BaseModel(source, pipeline_class)
    base_model.check()
    return base_model
