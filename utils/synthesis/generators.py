"""Generators: any text-to-image pipeline of diffusers, checked by its configs before it loads."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

from utils.cli.errors import UserError
from utils.style.families import FAMILIES, OWN_SCHEDULER
from utils.style.saved_pipelines import SavedPipeline, open_pipeline, unsupported_class_error
from utils.style.schedulers import CONSISTENCY_SCHEDULERS
from utils.synthesis.few_steps import NO_GUIDANCE, FewSteps, find_few_steps

# arguments that the sampler passes to a pipeline besides the prompts
CALL_ARGUMENTS = {"height", "width", "num_inference_steps", "generator", "output_type"}
# those that guidance goes to
GUIDANCE_SCALE, TRUE_CFG_SCALE = "guidance_scale", "true_cfg_scale"
GUIDANCE_PARAMETER = "guidance_parameter"  # among a set's settings, if it is another one than guidance_scale
# it draws noise for the whole batch from its own generator, so images would depend on their batch
UNFIT_SCHEDULERS = {"DPMSolverSDEScheduler"}
GUIDANCE_INTERVAL = "guidance_interval"  # among a set's settings


class Generator(SavedPipeline):
    """A text-to-image pipeline, pinned to a commit."""

    @cached_property
    def default_scheduler(self) -> str:
        """The family's scheduler; the pipeline's own for distilled models and those with other noise than DDPM's."""
        wanted = self.family.default_scheduler
        return wanted if wanted == OWN_SCHEDULER or self.scheduler.is_replaceable else OWN_SCHEDULER

    @property
    def takes_negative_prompt(self) -> bool:
        """Whether a negative prompt works with guidance; FLUX and similar models take the scale as an input."""
        if self.family.negative_prompts is not None:
            return self.family.negative_prompts
        if TRUE_CFG_SCALE in self.call_parameters and self.guidance_parameter != TRUE_CFG_SCALE:
            return False
        return "negative_prompt" in self.call_parameters

    @cached_property
    def guidance_parameter(self) -> str | None:
        """The parameter of the pipeline's call that the guidance scale goes to; None if guidance has no effect.

        A pipeline with `true_cfg_scale` guides by a negative prompt, which it then needs, and ignores `guidance_scale`,
        unless its denoiser takes that as an input (`guidance_embeds`), as FLUX.1-dev does, but not FLUX.1-schnell.
        """
        if self._index.get("is_distilled") is True:  # of FLUX.2-klein
            return None
        if TRUE_CFG_SCALE not in self.call_parameters or self.denoiser_config.get("guidance_embeds"):
            return GUIDANCE_SCALE
        return None if self.family.negative_prompts is False else TRUE_CFG_SCALE

    @property
    def takes_guidance_interval(self) -> bool:
        """Whether guidance is a second half of each batch, which some steps can leave out."""
        return self.family.negative_prompts is True and not self.denoiser_config.get("time_cond_proj_dim")

    @cached_property
    def resolution_step(self) -> int:
        """The resolution must be a multiple of this: transformers take latents in patches of 2 x 2 or more."""
        patch_size = max(2, self.denoiser_config.get("patch_size") or 0) if self.has_transformer else 1
        return max(8, self.vae_scale * patch_size)

    @cached_property
    def call_parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters of the pipeline's call."""
        import diffusers

        return dict(inspect.signature(getattr(diffusers, self.pipeline_class).__call__).parameters)

    def check(self, settings: dict) -> None:
        """Check that the generator accepts a set's settings and has usable weights, without loading them.

        Raises:
            UserError: it does not; the message names the flag.
        """
        resolution, negative_prompt = settings["resolution"], settings["negative_prompt"]
        if resolution % self.resolution_step:
            raise UserError(
                f"--resolution {resolution}: must be a multiple of {self.resolution_step} for this generator."
            )
        if negative_prompt and not self.takes_negative_prompt:
            raise UserError(
                f"--negative_prompt '{negative_prompt}': not supported by {self.pipeline_class}; leave it out."
            )
        interval = settings.get(GUIDANCE_INTERVAL)
        if interval is not None and not self.takes_guidance_interval:
            titles = ", ".join(family.title for family in FAMILIES.values() if family.negative_prompts)
            raise UserError(
                f"--guidance_interval {' '.join(map(str, interval))}: not supported by {self.source.name}, "
                f"whose guidance cannot be limited to some steps; choose {titles}, not distilled with guidance."
            )
        self.check_scheduler(settings["scheduler"], settings["num_inference_steps"])
        _ = self.variants

    def check_scheduler(self, scheduler: str, num_inference_steps: int) -> None:
        """Check that the generator can sample with a scheduler, and the scheduler with this number of steps.

        Raises:
            UserError: it does not fit the generator; the message lists the schedulers that do.
        """
        own = self.scheduler
        compatible = {kind.__name__ for kind in type(own.scheduler)._get_compatibles()}
        if self.family.scales_model_input:  # works with any config with DDPM's noise
            compatible |= set(CONSISTENCY_SCHEDULERS)
        fitting = [OWN_SCHEDULER, *sorted(compatible - UNFIT_SCHEDULERS)]
        if scheduler not in fitting:
            raise UserError(
                f"--scheduler {scheduler}: does not fit {self.source.name}; must be one of {', '.join(fitting)}."
            )
        if scheduler != OWN_SCHEDULER and not own.has_same_noise(scheduler):
            raise UserError(
                f"--scheduler {scheduler}: has other noise levels than the {own.class_name} of {self.source.name}; try "
                f"{OWN_SCHEDULER}."
            )
        if self.family.scales_model_input:
            self._try_scheduler(scheduler, num_inference_steps)

    @cached_property
    def few_steps(self) -> FewSteps | None:
        """How to sample the generator if its configs or its name on the Hub say that it is distilled for few steps."""
        named = None if self.source.is_local else find_few_steps(self.source.name)
        signs = self.scheduler.signs_of_distillation
        if signs is None:
            return named and replace(named, scheduler=OWN_SCHEDULER, scheduler_config={})
        number = named.num_inference_steps if named else 4
        takes_scale = self.denoiser_config.get("time_cond_proj_dim")  # as an input, which no value turns off
        why = f"{self.source.flag} {self.source.name} looks distilled for few steps ({signs})"
        return FewSteps(why, num_inference_steps=number, guidance_scale=None if takes_scale else NO_GUIDANCE)

    def _try_scheduler(self, scheduler: str, num_inference_steps: int) -> None:
        """Make one step with a scheduler as Stable Diffusion's pipelines do: they load some that do not work."""
        import torch

        is_own = scheduler == OWN_SCHEDULER
        class_name = self.scheduler.class_name if is_own else scheduler
        made = self.scheduler.make(class_name)
        try:
            made.set_timesteps(num_inference_steps)
            if made.timesteps.isnan().any():  # of KDPM2, if few steps start from pure noise
                raise ValueError("its timesteps are NaN")
        except ValueError as error:
            raise UserError(
                f"--num_inference_steps {num_inference_steps}: does not work with the {class_name} of "
                f"{self.source.name} ({error})"
            ) from None
        try:
            with torch.random.fork_rng(devices=[]):  # some draw noise
                latents = torch.ones(1, 4, 8, 8) * made.init_noise_sigma
                made.step(made.scale_model_input(latents, made.timesteps[0]), made.timesteps[0], latents)
        except (AttributeError, TypeError, ValueError, LookupError, NotImplementedError) as error:
            named = f"{self.prefix} its {class_name}" if is_own else f"--scheduler {scheduler}:"
            raise UserError(
                f"{named} does not work in a {self.pipeline_class} with the model's config ({error}); try "
                "EulerDiscreteScheduler or DDIMScheduler."
            ) from None


def _takes_all_arguments(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return parameters.keys() >= CALL_ARGUMENTS and bool(parameters.keys() & {GUIDANCE_SCALE, TRUE_CFG_SCALE})


def open_generator(name: str, flag: str, revision: str | None, hub_token: str | None) -> Generator:
    """Return a text-to-image pipeline, pinned to a commit, after a check of its `model_index.json`.

    Raises:
        UserError: from `open_pipeline`; or it is another kind of pipeline.
    """
    source, pipeline_class = open_pipeline(name, flag, revision, hub_token)
    # imported late: it takes seconds
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    supported = [
        kind.__name__
        for kind in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()
        # a ControlNet also needs an image
        if "Control" not in kind.__name__ and _takes_all_arguments(inspect.signature(kind.__call__).parameters)
    ]
    if pipeline_class not in supported:
        raise unsupported_class_error(source, pipeline_class, supported)
    return Generator(source, pipeline_class)
