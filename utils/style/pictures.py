"""What people look at: the same prompts without the token and with it, and the course of training."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from diffusers import DPMSolverMultistepScheduler
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm

from utils.data.images import centre_square
from utils.style.base_models import BaseModel
from utils.style.health import ARMS
from utils.style.prompt_encoder import Conditioning, PromptEncoder, PromptIds

# those of generate_synthetic.py
NUM_INFERENCE_STEPS = 25
GUIDANCE_SCALE = 3.0
PIPELINE_NAMES = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}


class BeforeAfter:
    """The picture of a token: real images, and the same seeds and classes drawn without the token and with it.

    At most `num_images` classes, evenly spread, are shown. What does not change is drawn at once.
    """

    def __init__(
        self, base_model: BaseModel, unet, encoder: PromptEncoder, prompt_ids: PromptIds, images: Dataset,
        nouns: list[str], resolution: int, num_images: int,
    ):  # fmt: skip
        self.base_model = base_model
        self.unet = unet
        self.encoder = encoder
        self.resolution = resolution
        present, first_rows = np.unique(images["label"], return_index=True)
        chosen = np.unique(np.linspace(0, len(present) - 1, num_images).astype(int))
        labels = present[chosen].tolist()
        self.titles = [nouns[label] for label in labels]
        self.ids_with_token, self.empty_ids = prompt_ids.of_classes(labels), prompt_ids.empty
        self.rows = {
            "real": [centre_square(images[int(row)]["image"], resolution) for row in first_rows[chosen]],
            "without token": self._draw(prompt_ids.plain[labels]),
        }

    def write(self, path: str | Path) -> Path:
        """Draw with the token as it is now, and write the picture."""
        draw_rows(path, self.rows | {"with token": self._draw(self.ids_with_token)}, self.titles)
        return Path(path)

    @torch.no_grad()
    def _draw(self, input_ids: torch.Tensor) -> list[Image.Image]:
        """Draw an image for each prompt; image number n has the same noise whatever its prompt."""
        pipe = self.base_model.load_pipeline(self.unet)
        pipe.vae.to(self.unet.device)
        pipe.set_progress_bar_config(disable=True)
        if self.base_model.is_replaceable:
            pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        unconditional = self.encoder(self.empty_ids)
        if pipe.config.get("force_zeros_for_empty_prompt"):
            unconditional = {name: torch.zeros_like(value) for name, value in unconditional.items()}
        images = []
        for number, ids in enumerate(tqdm(input_ids, desc="pictures", unit="image", leave=False)):
            latents = pipe(
                **self._pipeline_arguments("", self.encoder(ids[None])),
                **self._pipeline_arguments("negative_", unconditional),
                height=self.resolution,
                width=self.resolution,
                num_inference_steps=NUM_INFERENCE_STEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=torch.Generator().manual_seed(number),
                output_type="latent",
            ).images
            # the VAE is float32, whatever the U-Net is
            pixels = pipe.vae.decode(self.base_model.unscale_latents(latents.float())).sample
            images += pipe.image_processor.postprocess(pixels)
        return images

    def _pipeline_arguments(self, prefix: str, conditioning: Conditioning) -> dict[str, torch.Tensor]:
        return {prefix + PIPELINE_NAMES[name]: value.to(self.unet.dtype) for name, value in conditioning.items()}


@rc_context({"text.parse_math": False})  # dollars in a name are no formula
def draw_rows(path: str | Path, rows: dict[str, list[Image.Image]], titles: list[str]) -> None:
    """Write a picture with a named row of images each, `titles` above the columns."""
    figure = Figure(figsize=(1.5 * len(titles) + 1.2, 1.5 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for row_axes, (name, images) in zip(axes, rows.items()):
        for axis, image in zip(row_axes, images, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        row_axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=8)
    figure.savefig(path, dpi=120)


def plot_training(path: str | Path, loss_history: list[float], held_out_losses: dict[str, float], health: dict) -> None:
    """Write a picture with the training loss, the fixed-noise loss over the steps, and that of the three arms."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    curve, bars = figure.subplots(1, 2, width_ratios=[2, 1])
    window = min(len(loss_history), max(5, len(loss_history) // 40))
    smooth = np.convolve(loss_history, np.ones(window) / window, mode="valid")
    curve.plot(np.arange(1, len(loss_history) + 1), loss_history, color="0.8", linewidth=0.8)
    curve.plot(np.arange(window, len(loss_history) + 1), smooth, color="tab:blue", label=f"mean of {window} steps")
    measured = {0: health["loss_untrained_token"]}
    measured |= {int(step): loss for step, loss in held_out_losses.items()}
    curve.plot(list(measured), list(measured.values()), "o-", color="tab:red", label=f"{health['images']}, fixed noise")
    curve.set(xlabel="step", ylabel="denoising loss", title="training")
    curve.legend()
    values = [health[f"loss_{arm}"] for arm in ARMS]
    bars.bar([arm.replace("_", "\n") for arm in ARMS], values, color=["0.8", "0.6", "tab:blue"])
    bars.bar_label(bars.containers[0], fmt="%.3f")
    bars.margins(y=0.12)  # room for the figures above the bars
    bars.set(title=f"{health['num_images']} {health['images']},\nfixed noise", ylabel="denoising loss")
    figure.savefig(path, dpi=120)
