"""Did the token learn? The denoising loss on fixed images, noise and timesteps, with it and without."""

import math

import torch
from torch.nn import functional as F

from utils.cli.errors import DivergedError
from utils.style.prompt_encoder import PromptEncoder, PromptIds, unet_arguments
from utils.style.token import norm_in_vocabulary

NUM_TIMESTEPS = 8
ARMS = ("no_token", "untrained_token", "trained_token")


def prediction_target(noise_scheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor):
    """Return what the U-Net is trained to predict, after the scheduler's `prediction_type`."""
    if noise_scheduler.config.prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    return latents if noise_scheduler.config.prediction_type == "sample" else noise


def prediction_scale(noise_scheduler, timesteps: torch.Tensor) -> torch.Tensor | float:
    """Return the factor of prediction and target in the loss: 1, or `(batch, 1, 1, 1)` for a model of the image.

    There the loss is weighted by the signal-to-noise ratio, which makes it that of the noise.
    Source: diffusers, examples/unconditional_image_generation/train_unconditional.py.
    """
    if noise_scheduler.config.prediction_type != "sample":
        return 1.0
    alphas = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
    return (alphas / (1 - alphas)).sqrt()


class HealthCheck:
    """Measures a token on fixed images, timesteps and noise: only the prompts differ from arm to arm.

    `latents` are scaled, `(images, channels, height, width)`; `labels` are their classes; `name` says what they are.
    The loss without a token and that with the untrained token are measured at once.
    """

    def __init__(
        self, unet, noise_scheduler, encoder: PromptEncoder, prompt_ids: PromptIds, latents: torch.Tensor,
        labels: list[int], name: str, resolution: int, batch_size: int,
    ):  # fmt: skip
        self.unet = unet
        self.noise_scheduler = noise_scheduler
        self.encoder = encoder
        self.latents = latents
        self.name = name
        self.resolution = resolution
        self.batch_size = batch_size
        self.ids_with_token = prompt_ids.of_classes(labels)
        self.losses = {
            "no_token": self._losses(prompt_ids.plain[labels]),
            "untrained_token": self._losses(self.ids_with_token),
        }

    def measure(self) -> dict:
        """Return the figures of the token as it is now, as `dsi_config.json` holds them."""
        return {
            **judge(self.losses | {"trained_token": self._losses(self.ids_with_token)}),
            "images": self.name,
            "num_images": len(self.latents),
            "embeddings": [norm_in_vocabulary(style_token) for style_token in self.encoder.style_tokens],
        }

    @torch.no_grad()
    def _losses(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return each image's loss `(images,)` with its prompt, the mean over evenly spread timesteps.

        `input_ids` is `(images, encoders, length)`. An image's noise is the same at any batch size.
        """
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(self.latents.shape, generator=generator) for _ in range(NUM_TIMESTEPS)]
        losses = []
        for start in range(0, len(self.latents), self.batch_size):
            part = slice(start, start + self.batch_size)
            arguments = unet_arguments(self.encoder(input_ids[part]), self.resolution, self.unet.dtype)
            losses.append(torch.stack([self._loss(i, part, noise[i][part], arguments) for i in range(NUM_TIMESTEPS)]))
        return torch.cat(losses, dim=1).mean(0)

    def _loss(self, position: int, part: slice, noise: torch.Tensor, arguments: dict) -> torch.Tensor:
        latents, noise = self.latents[part].to(self.unet.device), noise.to(self.unet.device)
        timestep = int((position + 0.5) * self.noise_scheduler.config.num_train_timesteps / NUM_TIMESTEPS)
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
        model_pred = self.unet(noisy_latents.to(self.unet.dtype), timesteps, **arguments).sample
        target = prediction_target(self.noise_scheduler, latents, noise, timesteps)
        scale = prediction_scale(self.noise_scheduler, timesteps)
        return F.mse_loss(model_pred.float() * scale, target.float() * scale, reduction="none").mean((1, 2, 3)).cpu()


def judge(losses: dict[str, torch.Tensor]) -> dict:
    """Return mean losses of the `ARMS`, and whether the token learned.

    It learned when the images' losses fall, against the untrained token, by more than two standard errors.
    """
    gain = losses["untrained_token"] - losses["trained_token"]
    standard_error = gain.std().item() / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
    return {
        **{f"loss_{arm}": round(losses[arm].mean().item(), 5) for arm in ARMS},
        "gain_standard_error": round(standard_error, 5),
        "token_learned": gain.mean().item() > 2 * standard_error,
    }


def check_finite(step: int, losses: list[float], rows: list[torch.Tensor], learning_rate: float) -> None:
    """Check the losses up to a step, and the token's rows after it.

    Raises:
        DivergedError: one of them is not finite.
    """
    what = next((f"the loss is {loss}" for loss in losses if not math.isfinite(loss)), None)
    if what is None and not all(torch.isfinite(row).all() for row in rows):
        what = "the token's embedding is not finite"
    if what is not None:
        raise DivergedError(
            f"--learning_rate {learning_rate:g}: {what} at step {step} or shortly before; try a lower one or, in half "
            "precision, --mixed_precision no. Earlier checkpoints are kept."
        )
