"""Did the token learn? The denoising loss on fixed images, noise and timesteps, with it and without."""

import math

import torch
from torch.nn import functional as F

NUM_TIMESTEPS = 8


def prediction_target(noise_scheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor):
    """Return what the U-Net is trained to predict, after the scheduler's `prediction_type`."""
    if noise_scheduler.config.prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    return noise


@torch.no_grad()
def fixed_noise_losses(
    unet, noise_scheduler, latents: torch.Tensor, encoder_hidden_states: torch.Tensor
) -> torch.Tensor:
    """Return each image's denoising loss `(images,)`, the mean over evenly spread timesteps, with fixed noise.

    `latents` are scaled, `(images, channels, height, width)`; `encoder_hidden_states` is `(images, length, dim)`.
    """
    generator = torch.Generator().manual_seed(0)
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    losses = []
    for position in range(NUM_TIMESTEPS):
        timestep = int((position + 0.5) * num_train_timesteps / NUM_TIMESTEPS)
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        model_pred = unet(noisy_latents.to(unet.dtype), timesteps, encoder_hidden_states.to(unet.dtype)).sample
        target = prediction_target(noise_scheduler, latents, noise, timesteps)
        losses.append(F.mse_loss(model_pred.float(), target.float(), reduction="none").mean((1, 2, 3)))
    return torch.stack(losses).mean(0).cpu()


def judge(losses: dict[str, torch.Tensor]) -> dict:
    """Return mean losses of the arms `trained_token`, `untrained_token` and `no_token`, and whether the token learned.

    It learned when the images' losses fall, against the untrained token, by more than two standard errors.
    """
    gain = losses["untrained_token"] - losses["trained_token"]
    standard_error = gain.std().item() / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
    return {
        **{f"loss_{arm}": round(values.mean().item(), 5) for arm, values in losses.items()},
        "gain_standard_error": round(standard_error, 5),
        "token_learned": gain.mean().item() > 2 * standard_error,
    }
