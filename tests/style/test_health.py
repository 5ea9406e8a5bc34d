import torch
from diffusers import DDPMScheduler

from utils.style.health import judge, prediction_scale, prediction_target


def test_prediction_target_is_noise_or_velocity():
    latents, noise, timesteps = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0), torch.tensor([500])
    epsilon = DDPMScheduler(prediction_type="epsilon")
    velocity = DDPMScheduler(prediction_type="v_prediction")
    alpha = velocity.alphas_cumprod[500]
    assert prediction_target(epsilon, latents, noise, timesteps).item() == 2.0
    expected = alpha.sqrt() * 2 - (1 - alpha).sqrt() * 1  # Salimans and Ho 2022
    assert torch.allclose(prediction_target(velocity, latents, noise, timesteps), expected)


def test_the_loss_of_a_model_of_the_image_is_that_of_the_noise():
    scheduler = DDPMScheduler(prediction_type="sample")
    generator = torch.Generator().manual_seed(0)
    latents, noise, predicted = torch.randn(3, 2, 4, 4, 4, generator=generator)
    timesteps = torch.tensor([100, 700])
    assert torch.equal(prediction_target(scheduler, latents, noise, timesteps), latents)
    scale = prediction_scale(scheduler, timesteps)
    alphas = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    predicted_noise = (noisy - alphas.sqrt() * predicted) / (1 - alphas).sqrt()
    torch.testing.assert_close((predicted - latents) * scale, noise - predicted_noise)
    for prediction_type in ("epsilon", "v_prediction"):
        assert prediction_scale(DDPMScheduler(prediction_type=prediction_type), timesteps) == 1.0


def test_a_token_learned_only_when_the_gain_stands_out_of_its_noise():
    untrained = torch.linspace(0.4, 0.6, 16)
    arms = {"no_token": untrained, "untrained_token": untrained}
    assert judge({**arms, "trained_token": untrained - 0.05})["token_learned"]
    assert not judge({**arms, "trained_token": untrained})["token_learned"]
    noisy_gain = torch.tensor([1.0, -1.0] * 8) * 0.1 - 0.001
    assert not judge({**arms, "trained_token": untrained + noisy_gain})["token_learned"]
