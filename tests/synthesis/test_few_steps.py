"""Sampling settings of models and adapters distilled for few steps, from their names, and their use."""

import pytest

from utils.synthesis.few_steps import FewSteps, find_few_steps


@pytest.mark.parametrize(("name", "scheduler", "steps", "scale", "spacing"), [
    ("latent-consistency/lcm-lora-sdv1-5", "LCMScheduler", 4, 1.0, None),
    ("latent-consistency/lcm-lora-sdxl", "LCMScheduler", 4, 1.0, None),
    ("sdxl_lightning_8step_lora.safetensors", "EulerDiscreteScheduler", 8, 1.0, "trailing"),
    ("Hyper-SD15-2steps-lora.safetensors", "DDIMScheduler", 2, 1.0, "trailing"),
    ("Hyper-SD15-12steps-CFG-lora.safetensors", "DDIMScheduler", 12, 5.0, "trailing"),
    ("Hyper-SDXL-1step-lora.safetensors", "TCDScheduler", 1, 1.0, None),
    ("h1t/TCD-SD15-LoRA", "TCDScheduler", 4, 1.0, None),
    ("dmd2_sdxl_4step_lora_fp16.safetensors", "LCMScheduler", 4, 1.0, None),
    ("pcm_sd15_smallcfg_2step_converted.safetensors", "DDIMScheduler", 2, 1.0, "trailing"),
    ("sd_xl_turbo_lora_v1.safetensors", "EulerAncestralDiscreteScheduler", 4, 1.0, "trailing"),
    ("black-forest-labs/FLUX.1-schnell", "default", 4, 1.0, None),
])  # fmt: skip
def test_names_of_published_models_give_their_sampling(name, scheduler, steps, scale, spacing):
    found = find_few_steps(name)
    assert (found.scheduler, found.num_inference_steps, found.guidance_scale) == (scheduler, steps, scale)
    assert found.scheduler_config.get("timestep_spacing") == spacing
    assert name in found.why


@pytest.mark.parametrize("name", ["user/watercolour-lora", "pytorch_lora_weights.safetensors", "sd-legacy/sd-v1-5"])
def test_other_names_give_no_sampling(name):
    assert find_few_steps(name) is None


LCM = FewSteps("it says", "LCMScheduler")


def test_flags_that_are_not_given_get_suitable_values_and_a_report():
    flags, line = LCM.choose({})
    assert flags == {"num_inference_steps": 4, "guidance_scale": [1.0]}
    assert line == "--scheduler LCMScheduler --num_inference_steps 4 --guidance_scale 1, as it says"
    chosen, line = LCM.choose({"num_inference_steps": 8, "seed": 3})
    assert (chosen, line) == (
        {"guidance_scale": [1.0]}, "--scheduler LCMScheduler --guidance_scale 1, as it says"
    )  # fmt: skip
    assert LCM.choose({"num_inference_steps": 2, "guidance_scale": [1.0], "scheduler": "LCMScheduler"}) == ({}, "")
    assert "guidance_scale" not in FewSteps("it says", guidance_scale=None).choose({})[0]


@pytest.mark.parametrize(("given", "line"), [
    ({"guidance_scale": [1.0, 7.5]}, "--guidance_scale 1 7.5: known to draw noise or oversaturated images, as it says; "
     "try --guidance_scale 1"),
    ({"num_inference_steps": 25}, "--num_inference_steps 25: known"),
    ({"scheduler": "DDIMScheduler"}, "--scheduler DDIMScheduler: known to draw noise or oversaturated images, as it "
     "says; try --scheduler LCMScheduler"),
])  # fmt: skip
def test_given_flags_win_and_a_bad_combination_is_one_warning(given, line):
    chosen, said = LCM.choose(given)
    assert not chosen.keys() & given.keys()
    assert f". WARNING: {line}" in said and said.count("WARNING") == 1
    assert "\n" not in said
