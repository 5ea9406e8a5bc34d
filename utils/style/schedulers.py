"""What a pipeline's scheduler config says of its model: the noise it was trained with, and whether it is distilled."""

import inspect
from dataclasses import dataclass
from functools import cached_property

from utils.cli.errors import UserError
from utils.style.families import FAST_SCHEDULER

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# samplers of consistency models, which serve nothing else
CONSISTENCY_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
FEW_STEP_SCHEDULERS = (*CONSISTENCY_SCHEDULERS, "FlowMatchLCMScheduler")
# with timestep_spacing "trailing" those of sd-turbo, sdxl-turbo and SDXL-Lightning
EULER_SCHEDULERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")


@dataclass(frozen=True)
class OwnScheduler:
    """The scheduler that a pipeline comes with: the class of its `model_index.json`, the config of its folder.

    `prefix` is how messages about the pipeline begin, `denoiser_config` that of its U-Net or transformer.
    """

    prefix: str
    class_name: str
    saved_config: dict
    denoiser_config: dict

    @cached_property
    def scheduler(self):
        """The scheduler itself, whose config has the class's defaults for what is not saved.

        Raises:
            UserError: diffusers does not take the config.
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
        """What tells that the model was not trained with the noise of DDPM's betas; None where nothing does.

        The config decides, whatever the class: one that was made from another's config keeps the other's keys.
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
        except NotImplementedError:  # a schedule of betas that DDPM does not have
            is_ddpm = False
        if not is_ddpm:
            return "noise levels of its own"
        largest = ((1 - alphas[-1]) / alphas[-1]) ** 0.5
        if (config.get("sigma_max") or 0) > 1.1 * largest:
            return f"larger noise than its betas give (sigma_max {config['sigma_max']})"
        return None

    def make_noise_scheduler(self):
        """Return the `DDPMScheduler` with the same betas, number of steps and prediction type."""
        from diffusers import DDPMScheduler

        # not from_config: it leaves out what is another class's default
        parameters = inspect.signature(DDPMScheduler.__init__).parameters
        return DDPMScheduler(**{name: value for name, value in self.config.items() if name in parameters})

    def check_trainable(self) -> None:
        """Check that a style token can be learned with what the model was trained on.

        Raises:
            UserError: other noise than DDPM's, or another target than noise, velocity or image.
        """
        wanted = "as those of Stable Diffusion 1.x, 2.x and XL base; choose such a model"
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
        """What tells that the model was distilled for few steps; None where nothing does.

        Hyper-SD with DDIM, and what is distilled in flow matching (FLUX.1-schnell), cannot be told by their configs.
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
        """Whether DPM-Solver++ samples the model as well: same noise, and made for many steps."""
        return (
            self.foreign_noise is None
            and self.config.get("prediction_type", "epsilon") in PREDICTION_TYPES
            and self.signs_of_distillation is None
            and self.has_noise_of(FAST_SCHEDULER)
        )

    def has_noise_of(self, class_name: str) -> bool:
        """Return whether another class makes the same noise levels of this one's config.

        It takes its own defaults for what is not saved.
        """
        alphas, others = (getattr(made, "alphas_cumprod", None) for made in (self.scheduler, self.make(class_name)))
        return alphas is None or others is None or _are_close(alphas, others)

    def make(self, class_name: str, **config):
        """Return a scheduler of another class with this one's config but for `config`, as diffusers makes it."""
        import diffusers

        return getattr(diffusers, class_name).from_config(self.scheduler.config, **config)


def check_scheduler_class(entry: object, prefix: str) -> str:
    """Return the class that a pipeline's `model_index.json` names as its scheduler in `entry`.

    Raises:
        UserError: it is none that diffusers has; the message begins with `prefix`.
    """
    import diffusers

    library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, entry)
    kind = getattr(diffusers, class_name, None) if library == "diffusers" and isinstance(class_name, str) else None
    bases = (diffusers.SchedulerMixin, diffusers.ConfigMixin)
    if not (inspect.isclass(kind) and all(issubclass(kind, base) for base in bases)):
        raise UserError(
            f"{prefix} its model_index.json names the scheduler {entry}, which diffusers does not "
            "have; a class like DDIMScheduler is wanted."
        )
    return class_name


def _are_close(alphas, others) -> bool:
    # some classes keep the last level of zero terminal SNR a little above zero
    return len(alphas) == len(others) and bool((alphas - others).abs().max() < 1e-3)
