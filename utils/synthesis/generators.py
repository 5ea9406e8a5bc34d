"""Generators: any text-to-image pipeline of diffusers; what it takes is read from its configs before it loads."""

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from utils.cli.errors import UserError
from utils.hub.repositories import Source
from utils.style.base_models import SUPPORTED_PIPELINES, open_pipeline, refuse_class
from utils.style.pipeline_files import PROBLEMS, find_variants, read_config
from utils.style.schedulers import FAST_SCHEDULER, OwnScheduler, read_scheduler

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from utils.synthesis.sources import StyleToken

OWN_SCHEDULER = "default"
EXPECTED = "a pipeline of diffusers"
# what the sampler passes to a pipeline besides the prompts
CALL_ARGUMENTS = {"height", "width", "num_inference_steps", "guidance_scale", "generator", "output_type"}


@dataclass(frozen=True)
class Generator:
    """A text-to-image pipeline, its commit pinned."""

    source: Source
    pipeline_class: str

    @property
    def takes_style_tokens(self) -> bool:
        return self.pipeline_class in SUPPORTED_PIPELINES

    @cached_property
    def scheduler(self) -> OwnScheduler:
        """The pipeline's own scheduler."""
        return read_scheduler(self.source)

    @cached_property
    def default_scheduler(self) -> str:
        """Stable Diffusion and XL need few steps with DPM-Solver++; others are made for their own scheduler.

        So are those of them with other noise than DDPM's, and those that are distilled.
        """
        is_replaced = self.takes_style_tokens and self.scheduler.is_replaceable(self._denoiser_config)
        return FAST_SCHEDULER if is_replaced else OWN_SCHEDULER

    @property
    def signs_of_distillation(self) -> str | None:
        """What tells that the model was distilled for few steps; None where nothing does."""
        return self.scheduler.signs_of_distillation(self._denoiser_config)

    @property
    def embeds_guidance(self) -> bool:
        return bool(self._denoiser_config.get("time_cond_proj_dim"))

    @cached_property
    def variants(self) -> dict[str, str | None]:
        """Which weights of each part are loaded: 'fp16' where there are no others."""
        return find_variants(self.source, self.parts)

    @property
    def takes_negative_prompt(self) -> bool:
        """Whether a negative prompt acts at `guidance_scale`; FLUX and its kin need a scale of their own for it."""
        return "negative_prompt" in self.call_parameters and "true_cfg_scale" not in self.call_parameters

    @cached_property
    def native_resolution(self) -> int:
        """Pixels a side for which the model was trained: latent size times the VAE's scale factor.

        Raises:
            UserError: its configs do not say it.
        """
        # FLUX takes any size, and its pipeline has 128 written into it
        sample_size = self._denoiser_config.get("sample_size") or (128 if self.pipeline_class == "FluxPipeline" else 0)
        if not isinstance(sample_size, int) or not sample_size:
            raise UserError(
                f"{self.source.flag} {self.source.name}: its configs do not say at how many pixels it draws; give "
                "--resolution."
            )
        return sample_size * self._vae_scale

    @cached_property
    def resolution_step(self) -> int:
        """What the resolution must be a multiple of: transformers see latents in patches of two by two or more."""
        patch_size = max(2, self._denoiser_config.get("patch_size") or 0) if self._has_transformer else 1
        return max(8, self._vae_scale * patch_size)

    def config(self, part: str) -> dict:
        """Return the config of a part of the pipeline."""
        return read_config(self.source, f"{part}/config.json", EXPECTED)

    @cached_property
    def parts(self) -> dict[str, list]:
        """The names of the pipeline's parts, each with its library and class; without those that are left empty."""
        index = read_config(self.source, "model_index.json", EXPECTED)
        return {name: value for name, value in index.items() if isinstance(value, list) and value[0] is not None}

    @property
    def _has_transformer(self) -> bool:
        return "transformer" in self.parts

    @cached_property
    def _denoiser_config(self) -> dict:
        return self.config("transformer" if self._has_transformer else "unet")

    @cached_property
    def _vae_scale(self) -> int:
        config = self.config("vae") if "vae" in self.parts else {}
        channels = config.get("encoder_block_out_channels") or config.get("block_out_channels")
        return 2 ** (len(channels) - 1) if channels else 8

    @cached_property
    def call_parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters of the pipeline's call."""
        import diffusers

        return dict(inspect.signature(getattr(diffusers, self.pipeline_class).__call__).parameters)


def open_generator(name: str, flag: str, revision: str | None, hub_token: str | None) -> Generator:
    """Return a text-to-image pipeline, its commit pinned, after a look at its `model_index.json`.

    Raises:
        UserError: what `open_pipeline` raises; it is a pipeline of another kind.
    """
    source, pipeline_class = open_pipeline(name, flag, revision, hub_token)
    # imported late, here and below: it takes seconds
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    supported = [
        kind.__name__
        for kind in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()
        # a ControlNet needs an image beside the prompt
        if "Control" not in kind.__name__ and CALL_ARGUMENTS.issubset(inspect.signature(kind.__call__).parameters)
    ]
    if pipeline_class not in supported:
        raise refuse_class(source, pipeline_class, supported)
    return Generator(source, pipeline_class)


def check_scheduler(generator: Generator, scheduler: str, num_inference_steps: int | None = None) -> None:
    """Check that a generator can sample with a scheduler, and that takes this number of steps.

    Raises:
        UserError: it does not fit the generator's own; the message lists those that do.
    """
    fitting = [OWN_SCHEDULER, *_compatible_schedulers(generator)]
    if scheduler not in fitting:
        raise UserError(
            f"--scheduler {scheduler}: does not fit {generator.source.name}, which takes {', '.join(fitting)}."
        )
    own = generator.scheduler
    if scheduler != OWN_SCHEDULER and not own.has_noise_of(scheduler):
        raise UserError(
            f"--scheduler {scheduler}: makes other noise levels of the config of {generator.source.name} than its "
            f"{own.class_name}; {OWN_SCHEDULER} is right."
        )
    if num_inference_steps is not None and generator.takes_style_tokens:
        _try_scheduler(generator, scheduler, num_inference_steps)


def _try_scheduler(generator: Generator, scheduler: str, num_inference_steps: int) -> None:
    """Make one step with a scheduler as Stable Diffusion's pipelines do: not all that they load work in them."""
    import torch

    source, is_own = generator.source, scheduler == OWN_SCHEDULER
    class_name = generator.scheduler.class_name if is_own else scheduler
    made = generator.scheduler.make(class_name)
    try:
        made.set_timesteps(num_inference_steps)
    except ValueError as error:
        raise UserError(
            f"--num_inference_steps {num_inference_steps}: not with the {class_name} of {source.name} ({error})"
        ) from None
    try:
        with torch.random.fork_rng(devices=[]):  # some draw noise
            latents = torch.ones(1, 4, 8, 8) * made.init_noise_sigma
            made.step(made.scale_model_input(latents, made.timesteps[0]), made.timesteps[0], latents)
    except (AttributeError, TypeError, ValueError, LookupError, NotImplementedError) as error:
        named = f"{source.flag} {source.name}: its {class_name}" if is_own else f"--scheduler {scheduler}:"
        raise UserError(
            f"{named} does not work in a {generator.pipeline_class} with the model's config ({error}); one like "
            "EulerDiscreteScheduler or DDIMScheduler, with the noise of the model, is wanted."
        ) from None


def few_steps_advice(generator: Generator, defaults: list[str]) -> str | None:
    """Return what flags suit a distilled generator, of those whose values are the `defaults`; None for others."""
    signs, suited = generator.signs_of_distillation, {"num_inference_steps": 4}
    if not generator.embeds_guidance:  # there the scale is an input, and no value leaves it out
        suited["guidance_scale"] = 1
    flags = [f"--{name} {value}" for name, value in suited.items() if name in defaults]
    if signs is None or not flags:
        return None
    return (
        f"{generator.source.flag} {generator.source.name} looks distilled for few steps ({signs}): {' '.join(flags)} "
        "is recommended."
    )


def _compatible_schedulers(generator: Generator) -> list[str]:
    names = {kind.__name__ for kind in type(generator.scheduler.scheduler)._get_compatibles()}
    # this one draws noise for the whole batch from a generator of its own, so that images depend on their neighbours
    return sorted(names - {"DPMSolverSDEScheduler"})


def load_pipeline(
    generator: Generator, token: "StyleToken | None", scheduler: str, dtype: "torch.dtype", device: "torch.device"
) -> "DiffusionPipeline":
    """Return the pipeline with the style token in its vocabulary and the scheduler built from its own config.

    Its VAE is in float32 where it overflows in float16. A safety checker stays. Only safetensors are loaded.

    Raises:
        UserError: a part of the pipeline cannot be loaded; the token does not fit it.
    """
    import diffusers
    import torch

    name, source = generator.source.name, generator.source
    if token is not None and not generator.takes_style_tokens:
        raise UserError(
            f"--learned_embeds {token.id}: {name} is a {generator.pipeline_class}, which takes no style tokens; they "
            f"are for {' and '.join(SUPPORTED_PIPELINES.values())}."
        )
    dtypes = {"default": dtype}
    # the VAE's class says true where its config says nothing; bfloat16 has the range of float32
    if dtype == torch.float16 and "vae" in generator.parts and generator.config("vae").get("force_upcast", True):
        dtypes["vae"] = torch.float32
    # of parts that have both, diffusers then loads this one, too
    variant = next((variant for variant in generator.variants.values() if variant), None)
    with source.reading("its pipeline cannot be loaded from safetensors", also=PROBLEMS):
        pipe = diffusers.AutoPipelineForText2Image.from_pretrained(
            name, dtype=dtypes, use_safetensors=True, variant=variant, **source.load_options()
        )
        pipe.to(device)  # of weights that were missing there is nothing to move
    if "vae" in dtypes:
        for part in pipe.vae.children():
            part.register_forward_pre_hook(_in_float32)
    if token is not None:
        _add_style_token(pipe, token)
    if scheduler != OWN_SCHEDULER:
        pipe.scheduler = generator.scheduler.make(scheduler)
    return pipe.to(device)


def _in_float32(part, arguments: tuple) -> tuple:
    """Cast what goes into a part of the VAE: most pipelines hand it latents of their own precision."""
    return tuple(value.float() if value.is_floating_point() else value for value in arguments)


def _add_style_token(pipe: "DiffusionPipeline", token: "StyleToken") -> None:
    from utils.style.token import load_learned_embeds

    encoders = [(pipe.tokenizer, pipe.text_encoder)]
    if "text_encoder_2" in pipe.components:
        encoders.append((pipe.tokenizer_2, pipe.text_encoder_2))
    rows = load_learned_embeds(token.path)
    shapes = [tuple(value.shape) for value in rows]
    wanted = [(token.num_vectors, text_encoder.config.hidden_size) for _, text_encoder in encoders]
    if shapes != wanted:
        raise UserError(
            f"--learned_embeds {token.id}: has embeddings of shape {shapes}, the text encoders take {wanted}; choose "
            "a token that was learned for this generator."
        )
    for value, (tokenizer, text_encoder) in zip(rows, encoders):
        pipe.load_textual_inversion(
            value, token=token.placeholder_token, tokenizer=tokenizer, text_encoder=text_encoder
        )
