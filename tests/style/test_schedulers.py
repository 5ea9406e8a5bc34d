"""Noise and number of steps of a model, from its scheduler config."""

import diffusers
import pytest
import torch

from utils.cli.errors import UserError
from utils.style.schedulers import OwnScheduler, check_scheduler_class

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SDXL_TURBO = {**SD, "prediction_type": "epsilon", "timestep_spacing": "trailing"}
ZERO_SNR = {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
TRAINED_BETAS = {"trained_betas": [0.01, 0.02, 0.03] * 100, "num_train_timesteps": 300}


def own(class_name: str, config: dict, **unet) -> OwnScheduler:
    return OwnScheduler("--model model:", class_name, config, unet)


@pytest.mark.parametrize(("class_name", "config"), [
    ("PNDMScheduler", SD),
    ("EulerDiscreteScheduler", SDXL_TURBO),
    ("LCMScheduler", {}),  # its class has the betas of Stable Diffusion, others have their own
    ("HeunDiscreteScheduler", {}),
    ("DDIMScheduler", ZERO_SNR),
    ("EulerDiscreteScheduler", ZERO_SNR),
    ("DDPMScheduler", TRAINED_BETAS),
    ("DPMSolverMultistepScheduler", {**SD, "use_flow_sigmas": False, "flow_shift": 3.0}),
    ("UniPCMultistepScheduler", {**SD, "sigma_max": 14.6, "sigma_min": 0.03}),
    ("DDIMScheduler", {**SD, "prediction_type": "sample"}),
])  # fmt: skip
def test_noise_is_added_as_the_models_own_scheduler_adds_it(class_name, config):
    scheduler = own(class_name, config)
    scheduler.check_trainable()
    noise_scheduler = scheduler.make_noise_scheduler()
    torch.testing.assert_close(noise_scheduler.alphas_cumprod, scheduler.scheduler.alphas_cumprod, atol=1e-6, rtol=1e-4)
    assert noise_scheduler.config.prediction_type == config.get("prediction_type", "epsilon")
    assert noise_scheduler.config.num_train_timesteps == config.get("num_train_timesteps", 1000)


PLAYGROUND = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "prediction_type": "epsilon"}
COSXL = {"sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0, "prediction_type": "v_prediction"}
CONTINUOUS = {**SD, "timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_max": 700.0}
FOREIGN = [
    ("EDMDPMSolverMultistepScheduler", PLAYGROUND, "EDM's noise levels (sigma_data 0.5)"),
    ("EDMEulerScheduler", COSXL, "EDM's noise levels (sigma_data 1.0)"),
    ("EDMEulerScheduler", {}, "EDM's noise levels (sigma_data 0.5)"),
    # made from an EDM scheduler's config, whose keys it keeps
    ("DPMSolverMultistepScheduler", {**SD, **PLAYGROUND}, "EDM's noise levels (sigma_data 0.5)"),
    ("DDIMScheduler", {**SD, "shift": 3.0, "use_dynamic_shifting": False}, "the noise of flow matching (shift)"),
    ("FlowMatchEulerDiscreteScheduler", {}, "the noise of flow matching (shift)"),
    ("UniPCMultistepScheduler", {**SD, "use_flow_sigmas": True}, "the noise of flow matching (use_flow_sigmas)"),
    (
        "DPMSolverMultistepScheduler",
        {"prediction_type": "flow_prediction"},
        "the noise of flow matching (flow_prediction)",
    ),
    ("EulerDiscreteScheduler", CONTINUOUS, "noise levels without steps (timestep_type continuous)"),
    ("EulerDiscreteScheduler", {**SD, "sigma_max": 700.0}, "larger noise than its betas give (sigma_max 700.0)"),
    ("CogVideoXDDIMScheduler", SD, "its own noise levels"),
    ("IPNDMScheduler", {}, "its own noise levels"),
    ("HeunDiscreteScheduler", {"beta_schedule": "exp"}, "its own noise levels"),  # DDPM has no such schedule
    ("PNDMScheduler", ZERO_SNR, "its own noise levels"),  # the class does not rescale, DDPM's does
]


@pytest.mark.parametrize(("class_name", "config", "noise"), FOREIGN)
def test_noise_other_than_ddpms_is_an_error_that_names_it(class_name, config, noise):
    scheduler = own(class_name, config)
    with pytest.raises(UserError) as error:
        scheduler.check_trainable()
    assert str(error.value) == (
        f"--model model: its scheduler ({class_name}) has {noise}; a style token is learned with the noise of DDPM's "
        "betas, as in Stable Diffusion 1.x, 2.x and XL base; choose such a model."
    )
    assert not scheduler.is_replaceable


def test_another_target_is_an_error_that_names_it():
    scheduler = own("EulerDiscreteScheduler", {**SD, "prediction_type": "trigflow"})
    with pytest.raises(UserError, match="^--model model: predicts 'trigflow'; supported: epsilon, v_prediction, samp"):
        scheduler.check_trainable()
    assert not scheduler.is_replaceable


@pytest.mark.parametrize(("class_name", "config", "time_cond_proj_dim", "signs"), [
    ("EulerDiscreteScheduler", SDXL_TURBO, None, "EulerDiscreteScheduler with timestep_spacing 'trailing'"),
    ("EulerAncestralDiscreteScheduler", SDXL_TURBO, None, "EulerAncestralDiscreteScheduler with timestep_spacing"),
    ("LCMScheduler", SD, None, "its scheduler is the LCMScheduler"),
    ("TCDScheduler", SD, None, "its scheduler is the TCDScheduler"),
    ("DDIMScheduler", SD, 256, "time_cond_proj_dim"),
    ("PNDMScheduler", SD, None, None),
    ("HeunDiscreteScheduler", SD, None, None),
    ("EulerDiscreteScheduler", {**SD, "timestep_spacing": "leading"}, None, None),
    ("DDIMScheduler", {**SD, "timestep_spacing": "trailing"}, None, None),
    ("EulerDiscreteScheduler", ZERO_SNR, None, None),  # zero terminal SNR needs trailing steps
    ("DDIMScheduler", {**SD, "prediction_type": "sample"}, None, None),
])  # fmt: skip
def test_only_a_distilled_model_keeps_its_own_scheduler(class_name, config, time_cond_proj_dim, signs):
    scheduler = own(class_name, config, time_cond_proj_dim=time_cond_proj_dim)
    assert scheduler.is_replaceable is (signs is None)
    assert scheduler.signs_of_distillation is None if signs is None else signs in scheduler.signs_of_distillation


def test_a_scheduler_that_would_change_the_noise_is_not_the_default():
    assert not own("HeunDiscreteScheduler", {}).is_replaceable  # without betas the classes differ


@pytest.mark.parametrize(("entry", "name"), [
    (None, "None"),
    (["diffusers", "MyScheduler"], "MyScheduler"),
    (["my_scheduler", "DDIMScheduler"], "my_scheduler"),
    (["diffusers", "UNet2DModel"], "UNet2DModel"),
])  # fmt: skip
def test_a_scheduler_that_diffusers_does_not_have_is_an_error(entry, name):
    with pytest.raises(UserError, match=f"^--x y: its model_index.json names the scheduler .*{name}.*; must be"):
        check_scheduler_class(entry, "--x y:")


def test_a_config_that_the_class_rejects_is_an_error():
    with pytest.raises(UserError, match="^--model model: its DDIMScheduler cannot be made from its config .*my_betas"):
        own("DDIMScheduler", {"beta_schedule": "my_betas"}).check_trainable()


def test_no_scheduler_of_diffusers_ends_in_a_traceback():
    kinds = [getattr(diffusers, name, None) for name in dir(diffusers.schedulers)]
    kinds = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, diffusers.ConfigMixin)]
    trainable = set()
    for kind in kinds:
        try:
            own(kind.__name__, {}).check_trainable()
        except UserError:
            continue
        trainable.add(kind.__name__)
    assert len(kinds) > 40
    assert {"DDIMScheduler", "PNDMScheduler", "TCDScheduler", "KDPM2DiscreteScheduler"} <= trainable
    assert not any("EDM" in name or "Flow" in name for name in trainable)
