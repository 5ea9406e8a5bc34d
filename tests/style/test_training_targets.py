"""train_dsi.py on models with other targets and scales of latents: the loss computed another way."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

import train_dsi
from utils.cli.errors import UserError

pytest_plugins = ["tests.style.fixtures"]
MEAN, STD, SCALE = [-0.4, 0.3, 0.2, -0.1], [0.8, 1.2, 0.5, 2.0], 0.5


@pytest.fixture
def changed_xl(tiny_xl_pipeline_dir, tmp_path):
    """Return a function that copies Stable Diffusion XL, with another scheduler and a VAE with statistics."""

    def change(scheduler: str, **config):
        folder = shutil.copytree(tiny_xl_pipeline_dir, tmp_path / "changed")
        changes = {"model_index.json": {"scheduler": ["diffusers", scheduler]}}
        changes["vae/config.json"] = {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": SCALE}
        for name, settings in changes.items():
            (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | settings))
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config | {"_class_name": scheduler}))
        return folder

    return change


def test_first_loss_of_a_model_of_the_image_in_normalised_latents(run_dsi, changed_xl, monkeypatch):
    """The loss of a prediction of the image, weighted by the signal-to-noise ratio, in the latents the U-Net sees."""
    folder = changed_xl("DDIMScheduler", prediction_type="sample", beta_start=0.01, beta_end=0.1)
    batches = []
    original = train_dsi.denoising_loss
    monkeypatch.setattr(train_dsi, "denoising_loss", lambda *args: (batches.append(args[0]), original(*args))[1])
    [loss] = run_dsi(pretrained_model_name_or_path=folder, max_train_steps=1, train_batch_size=6)["loss_history"]
    [batch] = batches
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    nouns = ["red square", "green circle", "blue-stripe"]
    prompts = [f"A {nouns[label]} photo in the style of style" for label in batch["labels"]]
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (MEAN, STD))
    latents = (batch["latents"] - mean) / std * SCALE
    alphas = pipe.scheduler.alphas_cumprod[batch["timesteps"]].view(-1, 1, 1, 1)
    noisy_latents = alphas.sqrt() * latents + (1 - alphas).sqrt() * batch["noise"]
    with torch.no_grad():
        prompt_embeds, _, text_embeds, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
        conditions = {"text_embeds": text_embeds, "time_ids": torch.tensor([[32, 32, 0, 0, 32, 32]] * 6)}
        prediction = pipe.unet(noisy_latents, batch["timesteps"], prompt_embeds, added_cond_kwargs=conditions).sample
    predicted_noise = (noisy_latents - alphas.sqrt() * prediction) / (1 - alphas).sqrt()
    assert loss == pytest.approx((predicted_noise - batch["noise"]).square().mean().item(), rel=1e-3)


def test_a_model_of_other_noise_ends_in_a_line_before_images_are_read(run_dsi, changed_xl, tmp_path):
    folder = changed_xl("EDMDPMSolverMultistepScheduler", sigma_data=0.5, prediction_type="epsilon")
    with pytest.raises(UserError, match="^--pretrained_model_name_or_path .*changed: its scheduler .*EDM's noise"):
        run_dsi(pretrained_model_name_or_path=folder, dataset_name="nowhere/at-all")
    assert not (tmp_path / "style").exists()
