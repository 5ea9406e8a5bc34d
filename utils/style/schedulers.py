"""Facts about a model from its scheduler config: the noise it was trained with, and whether it is distilled."""

import inspect
from dataclasses import dataclass
from functools import cached_property

from utils.cli.errors import UserError
from utils.style.families import FAST_SCHEDULER

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# samplers only for consistency models
CONSISTENCY_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
FEW_STEP_SCHEDULERS = (*CONSISTENCY_SCHEDULERS, "FlowMatchLCMScheduler")
# with timestep_spacing "trailing": sd-turbo, sdxl-turbo and SDXL-Lightning
EULER_SCHEDULERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")


@dataclass(frozen=True)
class OwnScheduler:
    """A pipeline's own scheduler: the class from its `model_index.json`, the config from its folder.

    `prefix` is the beginning of messages about the pipeline, `denoiser_config` that of its U-Net or transformer.
    """

    prefix: str
    class_name: str
    saved_config: dict
    denoiser_config: dict

    @cached_property
    def scheduler(self):
        """The scheduler itself, with the class's defaults for settings that are not saved.

        Raises:
            UserError: diffusers rejects the config.
        """
        import diffusers

        try:
            return getattr(diffusers, self.class_name).from_config(self.saved_config)
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            raise UserError(f"{self.prefix} its {self.class_name} cannot be made from its config ({error}).") from None

    @property
    def config(self) -> dict:
        return {**self.saved_config, **self.scheduler.config}

    @cached_property
    def foreign_noise(self) -> str | None:
        """The evidence that the model was not trained with the noise of DDPM's betas; None if there is none.

        The config decides, not the class: a scheduler made from another one's config keeps its keys.
        """
        config = self.config
        if config.get("sigma_data") is not None:
            return f"EDM's noise levels (sigma_data {config['sigma_data']})"
        flow_keys = [key for key in ("use_flow_sigmas", "use_dynamic_shifting", "shift") if config.get(key)]
        if flow_keys or str(config.get("prediction_type")).startswith("flow"):
            return f"the noise of flow matching ({', '.join(flow_keys) or config['prediction_type']})"
        if config.get("timestep_type", "discrete") != "discrete":
            return f"noise levels without steps (timestep_type {config['timestep_type']})"
        alphas = getattr(self.scheduler, "alphas_cumprod", None)
        try:
            is_ddpm = alphas is not None and _are_close(alphas, self.make_noise_scheduler().alphas_cumprod)
        except NotImplementedError:  # a beta schedule that DDPM does not have
            is_ddpm = False
        if not is_ddpm:
            return "its own noise levels"
        largest = ((1 - alphas[-1]) / alphas[-1]) ** 0.5
        if (config.get("sigma_max") or 0) > 1.1 * largest:
            return f"larger noise than its betas give (sigma_max {config['sigma_max']})"
        return None

    def make_noise_scheduler(self):
        """Return the `DDPMScheduler` with the same betas, number of steps and prediction type."""
        from diffusers import DDPMScheduler

        # not from_config, which leaves out the defaults of another class
        parameters = inspect.signature(DDPMScheduler.__init__).parameters
        return DDPMScheduler(**{name: value for name, value in self.config.items() if name in parameters})

    def check_trainable(self) -> None:
        """Check that a style token can be learned with the model's training objective.

        Raises:
            UserError: its noise is not DDPM's, or its target is not noise, velocity or image.
        """
        wanted = "as in Stable Diffusion 1.x, 2.x and XL base; choose such a model"
        if self.foreign_noise is not None:
            raise UserError(
                f"{self.prefix} its scheduler ({self.class_name}) has {self.foreign_noise}; a style token is learned "
                f"with the noise of DDPM's betas, {wanted}."
            )
        prediction_type = self.config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"{self.prefix} predicts '{prediction_type}'; supported: {', '.join(PREDICTION_TYPES)}, {wanted}."
            )

    @property
    def signs_of_distillation(self) -> str | None:
        """The evidence that the model was distilled for few steps; None if there is none.

        Configs do not reveal Hyper-SD with DDIM, or models distilled with flow matching (FLUX.1-schnell).
        """
        if self.class_name in FEW_STEP_SCHEDULERS:
            return f"its scheduler is the {self.class_name}"
        if self.denoiser_config.get("time_cond_proj_dim"):
            return "its denoiser has an embedding for the guidance scale (time_cond_proj_dim)"
        # models with zero terminal SNR have trailing steps without being distilled (Lin et al. 2023)
        spacing, has_zero_snr = (self.config.get(key) for key in ("timestep_spacing", "rescale_betas_zero_snr"))
        if self.class_name in EULER_SCHEDULERS and spacing == "trailing" and not has_zero_snr:
            return f"its scheduler config says {self.class_name} with timestep_spacing 'trailing'"
        return None

    @property
    def is_replaceable(self) -> bool:
        """Whether DPM-Solver++ can sample the model: same noise, and made for many steps."""
        return (
            self.foreign_noise is None
            and self.config.get("prediction_type", "epsilon") in PREDICTION_TYPES
            and self.signs_of_distillation is None
            and self.has_same_noise(FAST_SCHEDULER)
        )

    def has_same_noise(self, class_name: str) -> bool:
        """Return whether another class makes the same noise levels from this config.

        It uses its own defaults for settings that are not saved.
        """
        alphas, others = (getattr(made, "alphas_cumprod", None) for made in (self.scheduler, self.make(class_name)))
        return alphas is None or others is None or _are_close(alphas, others)

    def make(self, class_name: str, **config):
        """Return a scheduler of another class with this one's config, updated with `config`."""
        import diffusers

        return getattr(diffusers, class_name).from_config(self.scheduler.config, **config)


def check_scheduler_class(entry: object, prefix: str) -> str:
    """Return the scheduler class in an `entry` of a pipeline's `model_index.json`.

    Raises:
        UserError: diffusers has no such class; the message begins with `prefix`.
    """
    import diffusers

    library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, entry)
    kind = getattr(diffusers, class_name, None) if library == "diffusers" and isinstance(class_name, str) else None
    bases = (diffusers.SchedulerMixin, diffusers.ConfigMixin)
    if not (inspect.isclass(kind) and all(issubclass(kind, base) for base in bases)):
        raise UserError(
            f"{prefix} its model_index.json names the scheduler {entry}; must be a scheduler of "
            "diffusers, such as DDIMScheduler."
        )
    return class_name


def _are_close(alphas, others) -> bool:
    # some classes keep the last level of zero terminal SNR slightly above zero
    return len(alphas) == len(others) and bool((alphas - others).abs().max() < 1e-3)
