"""Generators: any text-to-image pipeline of diffusers; what it takes is read from its configs before it loads."""

import inspect
from dataclasses import replace
from functools import cached_property

from utils.cli.errors import UserError
from utils.style.families import FAMILIES, OWN_SCHEDULER
from utils.style.saved_pipelines import SavedPipeline, open_pipeline, refuse_class
from utils.style.schedulers import CONSISTENCY_SCHEDULERS
from utils.synthesis.few_steps import NO_GUIDANCE, FewSteps, find_few_steps

# what the sampler passes to a pipeline besides the prompts
CALL_ARGUMENTS = {"height", "width", "num_inference_steps", "guidance_scale", "generator", "output_type"}
# this one draws noise for the whole batch from a generator of its own, so that images depend on their neighbours
UNFIT_SCHEDULERS = {"DPMSolverSDEScheduler"}
GUIDANCE_INTERVAL = "guidance_interval"  # among a set's settings


class Generator(SavedPipeline):
    """A text-to-image pipeline, its commit pinned."""

    @cached_property
    def default_scheduler(self) -> str:
        """The family's; the pipeline's own for models with other noise than DDPM's, and those that are distilled."""
        wanted = self.family.default_scheduler
        return wanted if wanted == OWN_SCHEDULER or self.scheduler.is_replaceable else OWN_SCHEDULER

    @property
    def takes_negative_prompt(self) -> bool:
        """Whether a negative prompt acts at `guidance_scale`; FLUX and its kin need a scale of their own for it."""
        if self.family.negative_prompts is not None:
            return self.family.negative_prompts
        return "negative_prompt" in self.call_parameters and "true_cfg_scale" not in self.call_parameters

    @property
    def takes_guidance_interval(self) -> bool:
        """Whether guidance is a second half of each batch, which can be left out of some steps."""
        return self.family.negative_prompts is True and not self.denoiser_config.get("time_cond_proj_dim")

    @cached_property
    def resolution_step(self) -> int:
        """What the resolution must be a multiple of: transformers see latents in patches of two by two or more."""
        patch_size = max(2, self.denoiser_config.get("patch_size") or 0) if self.has_transformer else 1
        return max(8, self.vae_scale * patch_size)

    @cached_property
    def call_parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters of the pipeline's call."""
        import diffusers

        return dict(inspect.signature(getattr(diffusers, self.pipeline_class).__call__).parameters)

    def check(self, settings: dict) -> None:
        """Check that the generator takes a set's settings, and that its weights can be loaded; it loads none.

        Raises:
            UserError: it does not; the message names the flag.
        """
        resolution, negative_prompt = settings["resolution"], settings["negative_prompt"]
        if resolution % self.resolution_step:
            raise UserError(
                f"--resolution {resolution}: must be a multiple of {self.resolution_step} for this generator."
            )
        if negative_prompt and not self.takes_negative_prompt:
            raise UserError(f"--negative_prompt '{negative_prompt}': {self.pipeline_class} takes none; leave it out.")
        interval = settings.get(GUIDANCE_INTERVAL)
        if interval is not None and not self.takes_guidance_interval:
            titles = ", ".join(family.title for family in FAMILIES.values() if family.negative_prompts)
            raise UserError(
                f"--guidance_interval {' '.join(map(str, interval))}: not with {self.source.name}, whose guidance "
                f"cannot be left out of some steps; that of {titles} can, where the scale is no input of the denoiser."
            )
        self.check_scheduler(settings["scheduler"], settings["num_inference_steps"])
        _ = self.variants

    def check_scheduler(self, scheduler: str, num_inference_steps: int) -> None:
        """Check that the generator can sample with a scheduler, and that takes this number of steps.

        Raises:
            UserError: it does not fit the generator's own; the message lists those that do.
        """
        own = self.scheduler
        compatible = {kind.__name__ for kind in type(own.scheduler)._get_compatibles()}
        if self.family.scales_model_input:  # made from any config with the noise of DDPM
            compatible |= set(CONSISTENCY_SCHEDULERS)
        fitting = [OWN_SCHEDULER, *sorted(compatible - UNFIT_SCHEDULERS)]
        if scheduler not in fitting:
            raise UserError(
                f"--scheduler {scheduler}: does not fit {self.source.name}, which takes {', '.join(fitting)}."
            )
        if scheduler != OWN_SCHEDULER and not own.has_noise_of(scheduler):
            raise UserError(
                f"--scheduler {scheduler}: makes other noise levels of the config of {self.source.name} than its "
                f"{own.class_name}; {OWN_SCHEDULER} is right."
            )
        if self.family.scales_model_input:
            self._try_scheduler(scheduler, num_inference_steps)

    @cached_property
    def few_steps(self) -> FewSteps | None:
        """How the generator is sampled if it is distilled for few steps, by its configs or its name on the Hub."""
        named = None if self.source.is_local else find_few_steps(self.source.name)
        signs = self.scheduler.signs_of_distillation
        if signs is None:
            return named and replace(named, scheduler=OWN_SCHEDULER, scheduler_config={})
        number = named.num_inference_steps if named else 4
        takes_scale = self.denoiser_config.get("time_cond_proj_dim")  # as an input, and no value leaves it out
        why = f"{self.source.flag} {self.source.name} looks distilled for few steps ({signs})"
        return FewSteps(why, num_inference_steps=number, guidance_scale=None if takes_scale else NO_GUIDANCE)

    def _try_scheduler(self, scheduler: str, num_inference_steps: int) -> None:
        """Make one step with a scheduler as Stable Diffusion's pipelines do: not all that they load work in them."""
        import torch

        is_own = scheduler == OWN_SCHEDULER
        class_name = self.scheduler.class_name if is_own else scheduler
        made = self.scheduler.make(class_name)
        try:
            made.set_timesteps(num_inference_steps)
            if made.timesteps.isnan().any():  # of KDPM2, where few steps begin from pure noise
                raise ValueError("its timesteps are NaN")
        except ValueError as error:
            raise UserError(
                f"--num_inference_steps {num_inference_steps}: not with the {class_name} of {self.source.name} "
                f"({error})"
            ) from None
        try:
            with torch.random.fork_rng(devices=[]):  # some draw noise
                latents = torch.ones(1, 4, 8, 8) * made.init_noise_sigma
                made.step(made.scale_model_input(latents, made.timesteps[0]), made.timesteps[0], latents)
        except (AttributeError, TypeError, ValueError, LookupError, NotImplementedError) as error:
            named = f"{self.prefix} its {class_name}" if is_own else f"--scheduler {scheduler}:"
            raise UserError(
                f"{named} does not work in a {self.pipeline_class} with the model's config ({error}); one like "
                "EulerDiscreteScheduler or DDIMScheduler, with the noise of the model, is wanted."
            ) from None


def open_generator(name: str, flag: str, revision: str | None, hub_token: str | None) -> Generator:
    """Return a text-to-image pipeline, its commit pinned, after a look at its `model_index.json`.

    Raises:
        UserError: what `open_pipeline` raises; it is a pipeline of another kind.
    """
    source, pipeline_class = open_pipeline(name, flag, revision, hub_token)
    # imported late: it takes seconds
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
