"""Monitoring of a token in training: losses, its health at fixed noise, pictures, trackers, checkpoints."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from diffusers import DPMSolverMultistepScheduler
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from utils.cli.errors import DivergedError
from utils.cli.memory import run_in_parts
from utils.cli.run_folder import RunFolder, remove_folder
from utils.data.images import centre_square
from utils.style.card import ARMS, STYLE_PICTURE, TRAINING_PICTURE, label_arms
from utils.style.checkpoints import TrainingState
from utils.style.latents import Latents
from utils.style.style_images import StyleImages
from utils.style.token import PIPELINE_NAMES, Conditioning, Denoiser, norm_in_vocabulary

LOGGING_STEPS = 10  # each time, the CPU waits for a GPU
NUM_TIMESTEPS = 8
# checks whether the token still learns: their number, and the minimum of steps between two
NUM_LOOKS, MIN_STEPS_BETWEEN_LOOKS = 20, 10
LOOKS_OF_A_WORD = 2  # before the next word is tried
WINDOW = 3  # checks without a gain before training ends
MIN_GAIN = 0.02  # as a fraction of the gain so far
# the defaults of generate_synthetic.py
NUM_INFERENCE_STEPS = 25
GUIDANCE_SCALE = 3.0
TOO_LARGE = "--resolution: out of memory with one image at a time, without gradients; lower it."
# arguments for the trackers that accept pictures
PICTURE_OPTIONS = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}


@dataclass
class Monitor:
    """The training loop's monitor: it checks, shows, logs and saves.

    `before_after` is drawn in the main process only. Steps are the optimizer's. `words` are those that the token may
    start from, with their ids: of several, the one with the lowest loss is used, and the next one if the token learned
    nothing in a tenth of the steps. With `early_stopping`, training ends when `has_plateaued` returns True.
    """

    accelerator: Accelerator
    folder: RunFolder
    state: TrainingState
    health_check: "HealthCheck"
    before_after: "BeforeAfter | None"
    learning_rate: float
    max_train_steps: int
    validation_steps: int
    checkpointing_steps: int
    checkpoints_total_limit: int | None
    words: dict[str, list[int]]
    early_stopping: bool
    is_over: bool = field(default=False, init=False)
    health: dict = field(default_factory=dict, init=False)
    _losses: list[torch.Tensor] = field(default_factory=list, init=False)  # since they were last collected
    _bar: tqdm | None = field(default=None, init=False)

    def begin(self, checkpoint: Path | None) -> None:
        """Resume from a checkpoint, or start from a word; prepare the folder and the trackers.

        Raises:
            UserError: from `TrainingState.load`, before anything is written.
        """
        if checkpoint is not None:
            self.state.load(checkpoint)
        weights = self.state.weights.copy()
        self.state.initializer_losses = self.state.initializer_losses or self._rank_words()
        self._start_from_word()
        if checkpoint is not None:
            self.state.weights.restore(weights)
        if self.accelerator.is_main_process:
            self.folder.begin(keep_traces=checkpoint is not None)
        options = {name: str(value) for name, value in self.folder.options.items()}
        self.accelerator.init_trackers("train_dsi", options)

    def _rank_words(self) -> dict[str, float]:
        """Return the loss with each word instead of the token, the lowest first."""
        losses = {}
        for word, ids in self.words.items():
            self.health_check.encoder.start_from(ids)
            losses[word] = round(self.health_check.measure_token().mean().item(), 5)
        [ranked] = broadcast_object_list([dict(sorted(losses.items(), key=lambda item: item[1]))])
        if len(ranked) > 1:
            listed = ", ".join(f"{word} {loss:.4f}" for word, loss in ranked.items())
            self._say(f"The token starts from '{next(iter(ranked))}' (losses: {listed}).")
        return ranked

    def _start_from_word(self) -> None:
        self.health_check.encoder.start_from(self.words[self.state.initializer])
        self.health_check.measure_start()

    def watch(self, loader: DataLoader) -> tqdm:
        """Return the steps of `loader` with a progress bar."""
        self._bar = tqdm(
            loader, total=self.max_train_steps, initial=self.state.step, desc="style token", unit="step",
            disable=not self.accelerator.is_local_main_process,
        )  # fmt: skip
        return self._bar

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add the loss of a step, without waiting for the GPU."""
        self._losses.append(loss.detach())

    def end_step(self) -> bool:
        """Count a step, and do what is due after it; return whether the next step follows.

        If not, training is over, or starts again from another word.

        Raises:
            DivergedError: a loss or the token is no longer finite.
        """
        self.state.step += 1
        step = self.state.step
        self.is_over = step == self.max_train_steps
        looks = not self.is_over and step % self._steps_between_looks == 0
        validates, saves = step % self.validation_steps == 0, step % self.checkpointing_steps == 0
        if self.is_over or looks or validates or saves or step % LOGGING_STEPS == 0:
            self._collect_losses()
        if looks and not self._look():
            return False
        if self.is_over:
            self._return_to_best()
        if self.is_over or validates:
            self._validate()
        if saves and not self.is_over and self.accelerator.is_main_process:
            self.state.save(self.folder, self.checkpoints_total_limit)
        return not self.is_over

    @property
    def _steps_between_looks(self) -> int:
        return max(MIN_STEPS_BETWEEN_LOOKS, self.max_train_steps // NUM_LOOKS)

    def _look(self) -> bool:
        """Check whether the token still learns; return False if it starts again from another word."""
        may_begin_again = len(self.state.looks) < LOOKS_OF_A_WORD and self.state.num_words_left > 0
        keeps_best = self.state.weights.can_overfit
        if not (self.early_stopping or may_begin_again or keeps_best):
            return True
        start, step = self.health_check.losses["untrained_token"], self.state.step
        losses = self.health_check.measure_token()
        self.state.looks.append(losses.tolist())
        self.state.held_out_losses[str(step)] = round(losses.mean().item(), 5)
        has_learned = is_clear_gain(start - losses)
        is_again = may_begin_again and len(self.state.looks) == LOOKS_OF_A_WORD
        if is_again:  # unless the token learned something; an adapter's gain would hide that it did not
            alone = losses if self.state.weights.lora is None else self.health_check.measure_token(with_lora=False)
            is_again = not is_clear_gain(start - alone)
        is_level = self.early_stopping and has_learned and has_plateaued([start.tolist(), *self.state.looks])
        is_best = keeps_best and (self.state.best is None or losses.mean() < np.mean(self.state.best.losses))
        # all processes must agree
        [(is_again, self.is_over, is_best)] = broadcast_object_list([(is_again, is_level, bool(is_best))])
        if is_best:
            self.state.keep_best(losses.tolist())
        if is_again:
            self._restart()
        elif self.is_over:
            self._say(
                f"Training ends at step {step} of {self.max_train_steps}: the loss on {self.health_check.name} has not "
                f"improved beyond its standard error for {WINDOW * self._steps_between_looks} steps "
                "(--no_early_stopping trains for all steps)."
            )
        return not is_again

    def _return_to_best(self) -> None:
        """Return to the best weights if the loss has risen since by more than its standard error: overfitted."""
        best, step = self.state.best, self.state.step
        if best is None or best.step == step:
            return
        losses = self.health_check.measure_token()
        self.state.held_out_losses[str(step)] = round(losses.mean().item(), 5)
        rise = losses - torch.tensor(best.losses)
        is_risen = rise.mean().item() > _standard_error(rise)
        [(is_risen, mean)] = broadcast_object_list([(is_risen, rise.mean().item())])
        if is_risen:
            self.state.return_to_best(mean)
            self._say(
                f"The loss on {self.health_check.name} has risen by {mean:.4f} since step {best.step}, by more than "
                f"its standard error (overfitted): the weights of step {best.step} are kept."
            )

    def _restart(self) -> None:
        word, step = self.state.initializer, self.state.step
        self.state.restart()
        self._start_from_word()
        if self.accelerator.is_main_process:
            for checkpoint in self.folder.find_traces():  # of the previous word
                remove_folder(checkpoint)
        self._say(
            f"The token learned nothing from '{word}' in {step} steps; it starts again from '{self.state.initializer}'."
        )

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(line)  # above the bar

    def _collect_losses(self) -> None:
        """Average the losses since the last call over all processes; check, show and log them."""
        history = self.state.loss_history
        per_step = torch.stack(self._losses)
        self._losses.clear()
        losses = self.accelerator.reduce(per_step, "mean").tolist()
        history += losses
        self._check_finite(losses)
        recent = history[-50:]
        self._bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
        lr = self.state.lr_scheduler.get_last_lr()[0]
        self.accelerator.log({"loss": history[-1], "lr": lr}, self.state.step)

    def _validate(self) -> None:
        """Measure the current token, and draw its picture."""
        self.health = self.health_check.measure()
        loss, step = self.health["loss_trained_token"], self.state.step
        if not self.state.overfitted:  # else the loss is an earlier step's, and known
            self.state.held_out_losses[str(step)] = loss
        self._check_finite([loss])
        self.accelerator.log({"held_out_loss": loss}, step)
        if self.before_after is not None:
            path = self.folder.path / STYLE_PICTURE
            self.before_after.write(path)
            for tracker in self.accelerator.trackers:
                if tracker.name in PICTURE_OPTIONS:
                    pixels = np.asarray(Image.open(path).convert("RGB"))[None]
                    tracker.log_images({"style": pixels}, step, **PICTURE_OPTIONS[tracker.name])

    def _check_finite(self, losses: list[float]) -> None:
        step, weights = self.state.step, self.state.weights
        what = next((f"the loss is {loss}" for loss in losses if not math.isfinite(loss)), None)
        if what is None and not all(torch.isfinite(value).all() for value in weights.parameters):
            what = "the token's embedding is not finite" if weights.lora is None else "a trained weight is not finite"
        if what is not None:
            other = "" if weights.lora is None else " or --lora_learning_rate"
            raise DivergedError(
                f"--learning_rate {self.learning_rate:g}: {what} at step {step} or shortly before; try a lower rate"
                f"{other}, or, in half precision, --mixed_precision no. Earlier checkpoints are kept."
            )

    def plot_training(self) -> None:
        """Plot the training loss, the fixed-noise loss over the steps, and the losses of the arms."""
        losses, health = self.state.loss_history, self.health
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        curve, bars = figure.subplots(1, 2, width_ratios=[2, 1])
        window = min(len(losses), max(5, len(losses) // 40))
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        curve.plot(np.arange(1, len(losses) + 1), losses, color="0.8", linewidth=0.8)
        curve.plot(np.arange(window, len(losses) + 1), smooth, color="tab:blue", label=f"mean of {window} steps")
        measured = {0: health["loss_untrained_token"]}
        measured |= {int(step): loss for step, loss in self.state.held_out_losses.items()}
        label = f"{health['images']}, fixed noise"
        curve.plot(list(measured), list(measured.values()), "o-", color="tab:red", label=label)
        curve.set(xlabel="step", ylabel="denoising loss", title="training")
        curve.legend()
        arms = label_arms(health)
        values = [health[f"loss_{arm}"] for arm in arms]
        colors = ["0.8", "0.6", *["tab:cyan"] * (len(arms) - 3), "tab:blue"]
        bars.bar([label.replace(" ", "\n") for label in arms.values()], values, color=colors)
        bars.bar_label(bars.containers[0], fmt="%.3f")
        bars.margins(y=0.12)  # room for the numbers above the bars
        bars.set(title=f"{health['num_images']} {health['images']},\nfixed noise", ylabel="denoising loss")
        figure.savefig(self.folder.path / TRAINING_PICTURE, dpi=120)


class HealthCheck:
    """Did the token learn? Its denoising loss on fixed images, timesteps and noise: only prompts differ between arms.

    The loss without a token is measured at once, that of the untrained token by `measure_start`, both without adapters.
    `latents` are those of the held-out images.
    """

    def __init__(self, denoiser: Denoiser, images: StyleImages, latents: Latents, batch_size: int):
        labels = images.held_out["label"]
        self.denoiser = denoiser
        self.encoder = denoiser.encoder
        self.latents = denoiser.base_model.scale_latents(latents.mean(torch.arange(len(labels))))
        self.name = images.held_out_name
        self.batch_size = batch_size
        self.ids_with_token = denoiser.prompt_ids.training[labels]  # the first template's
        with self._without_lora():
            self.losses = {"no_token": self._losses(denoiser.prompt_ids.plain[labels])}

    def measure_token(self, with_lora: bool = True) -> torch.Tensor:
        """Return each image's loss `(images,)` with the current token, and with the adapters if there are any."""
        with nullcontext() if with_lora else self._without_lora():
            return self._losses(self.ids_with_token)

    def measure_start(self) -> None:
        """Measure the current token as the untrained one."""
        self.losses["untrained_token"] = self.measure_token(with_lora=False)

    def measure(self) -> dict:
        """Return the current token's figures for `dsi_config.json`."""
        losses = self.losses | {"trained_token": self.measure_token()}
        if self.denoiser.lora is not None:
            losses["token_without_lora"] = self.measure_token(with_lora=False)
        return {
            **judge(losses),
            "images": self.name,
            "num_images": len(self.latents),
            "embeddings": [norm_in_vocabulary(style_token) for style_token in self.denoiser.encoder.style_tokens],
        }

    def _without_lora(self) -> AbstractContextManager:
        return nullcontext() if self.denoiser.lora is None else self.denoiser.lora.turned_off()

    @torch.no_grad()
    def _losses(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return each image's loss `(images,)` with its prompt, averaged over evenly spaced timesteps.

        `input_ids` is `(images, encoders, length)`. An image's noise is the same at any batch size.
        """
        num_train_timesteps = self.denoiser.noise_scheduler.config.num_train_timesteps
        generator, device = torch.Generator().manual_seed(0), self.denoiser.device
        noise = [torch.randn(self.latents.shape, generator=generator) for _ in range(NUM_TIMESTEPS)]

        def measure(part: slice) -> torch.Tensor:
            latents, conditioning = self.latents[part].to(device), self.denoiser.encoder(input_ids[part])
            losses = torch.empty(NUM_TIMESTEPS, len(latents))
            for i in range(NUM_TIMESTEPS):
                timestep = int((i + 0.5) * num_train_timesteps / NUM_TIMESTEPS)
                timesteps = torch.full((len(latents),), timestep, device=device)
                model_pred, target = self.denoiser.predict(latents, noise[i][part].to(device), timesteps, conditioning)
                losses[i] = F.mse_loss(model_pred, target, reduction="none").mean((1, 2, 3)).cpu()
            return losses

        losses, self.batch_size = run_in_parts(measure, len(self.latents), self.batch_size, TOO_LARGE)
        return torch.cat(losses, dim=1).mean(0)


def judge(losses: dict[str, torch.Tensor]) -> dict:
    """Return the mean losses of the `ARMS` that were measured, and whether the token, with adapters if any, learned.

    It learned if its loss is lower than that of the untrained token by more than two standard errors over images.
    """
    gain = losses["untrained_token"] - losses["trained_token"]
    return {
        **{f"loss_{arm}": round(losses[arm].mean().item(), 5) for arm in ARMS if arm in losses},
        "gain_standard_error": round(_standard_error(gain), 5),
        "token_learned": is_clear_gain(gain),
    }


def is_clear_gain(gain: torch.Tensor) -> bool:
    """Return whether the mean gain of images `(images,)` is more than two standard errors."""
    return gain.mean().item() > 2 * _standard_error(gain)


def has_plateaued(looks: list[list[float]]) -> bool:
    """Return whether the last `WINDOW` looks gained nothing relevant over the best earlier one.

    A look has the loss of each image; the first look is of the untrained token. A gain is relevant if it exceeds two
    standard errors over images, and `MIN_GAIN` of the gain so far: with very many images, any gain is significant.
    """
    if len(looks) <= WINDOW:
        return False
    looks = torch.tensor(looks)
    means = looks.mean(1)
    before, now = looks[means[:-WINDOW].argmin()], looks[len(looks) - WINDOW + means[-WINDOW:].argmin()]
    gain, so_far = before - now, looks[0] - before
    return not is_clear_gain(gain) or gain.mean() <= MIN_GAIN * so_far.mean()


def _standard_error(gain: torch.Tensor) -> float:
    return gain.std().item() / math.sqrt(len(gain)) if len(gain) > 1 else 0.0


class BeforeAfter:
    """The picture of a token: real images, and the same classes drawn from the same seeds without and with the token.

    It shows at most `num_images` classes, evenly spaced. The rows that do not change are drawn once, in advance.
    """

    def __init__(self, denoiser: Denoiser, images: Dataset, nouns: list[str], num_images: int):
        self.denoiser = denoiser
        present, first_rows = np.unique(images["label"], return_index=True)
        chosen = np.unique(np.linspace(0, len(present) - 1, num_images).astype(int))
        labels = present[chosen].tolist()
        self.titles = [nouns[label] for label in labels]
        self.ids_with_token = denoiser.prompt_ids.training[labels]  # the first template's
        self.rows = {
            "real": [centre_square(images[int(row)]["image"], denoiser.resolution) for row in first_rows[chosen]],
            "without token": self._draw(denoiser.prompt_ids.plain[labels]),
        }

    def write(self, path: str | Path) -> None:
        """Draw with the current token, and write the picture."""
        draw_rows(path, self.rows | {"with token": self._draw(self.ids_with_token)}, self.titles)

    @torch.no_grad()
    def _draw(self, input_ids: torch.Tensor) -> list[Image.Image]:
        """Draw an image for each prompt; the noise of image n does not depend on its prompt."""
        base_model, encoder, resolution = self.denoiser.base_model, self.denoiser.encoder, self.denoiser.resolution
        pipe = base_model.load_pipeline(self.denoiser.unet)
        pipe.vae.to(self.denoiser.device)
        pipe.set_progress_bar_config(disable=True)
        if base_model.scheduler.is_replaceable:
            pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        unconditional = encoder(self.denoiser.prompt_ids.empty)
        if pipe.config.get("force_zeros_for_empty_prompt"):
            unconditional = {name: torch.zeros_like(value) for name, value in unconditional.items()}
        images = []
        for number, ids in enumerate(tqdm(input_ids, desc="pictures", unit="image", leave=False)):
            latents = pipe(
                **self._pipeline_arguments("", encoder(ids[None])),
                **self._pipeline_arguments("negative_", unconditional),
                height=resolution, width=resolution, num_inference_steps=NUM_INFERENCE_STEPS,
                guidance_scale=GUIDANCE_SCALE, generator=torch.Generator().manual_seed(number), output_type="latent",
            ).images  # fmt: skip
            # the VAE is always float32
            pixels = pipe.vae.decode(base_model.unscale_latents(latents.float())).sample
            images += pipe.image_processor.postprocess(pixels)
        return images

    def _pipeline_arguments(self, prefix: str, conditioning: Conditioning) -> dict[str, torch.Tensor]:
        return {prefix + PIPELINE_NAMES[name]: value.to(self.denoiser.dtype) for name, value in conditioning.items()}


@rc_context({"text.parse_math": False})  # no formulas: names can have dollar signs
def draw_rows(path: str | Path, rows: dict[str, list[Image.Image]], titles: list[str]) -> None:
    """Write a picture with one named row per entry of `rows`, and `titles` above the columns."""
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
