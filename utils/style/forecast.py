"""Forecast of memory, time and disk for a style token, before its base model is downloaded: memory from tensor shapes,
time with random weights."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from utils.forecast.costs import DiskUse, latent_bytes
from utils.forecast.inputs import model_download
from utils.forecast.memory import count_forward, count_step, shapes_only, state_bytes, weight_bytes
from utils.forecast.report import MemoryForecast, Phase
from utils.style.base_models import BaseModel
from utils.style.latents import BATCH_SIZE
from utils.style.learned import name_parts
from utils.style.lora import LoraSettings, add_adapters
from utils.style.saved_pipelines import list_weights
from utils.style.token import Conditioning, Denoiser, PromptEncoder, PromptIds

NUM_TIMED_STEPS = 2


@dataclass(frozen=True)
class DsiRun:
    """What memory and time depend on. `batch_size` images pass the U-Net at once, whose weights have `dtype`.

    `num_classes` is the number of class tokens, `lora` are the settings of adapters that are trained with the token.
    """

    resolution: int
    batch_size: int
    dtype: torch.dtype
    num_vectors: int = 1
    num_copies: int = 2  # of each image in the latent cache: itself and mirrored
    draws_pictures: bool = True
    num_classes: int = 0
    lora: LoraSettings | None = None


@dataclass(frozen=True)
class BatchDenoiser(Denoiser):
    """A denoiser whose batches have a different prompt for each image: the maximum for a step."""

    def encode_distinct(self, templates: torch.Tensor, labels: torch.Tensor) -> Conditioning:
        return self.encoder(self.prompt_ids.training)


class HalfPrecision(nn.Module):
    """An encoder as accelerate wraps it: under autocast, with float32 results."""

    def __init__(self, encoder: PromptEncoder, dtype: torch.dtype):
        super().__init__()
        self.encoder = encoder
        self.dtype = dtype

    def forward(self, input_ids: torch.Tensor) -> Conditioning:
        with torch.autocast("cpu", self.dtype):
            conditioning = self.encoder(input_ids)
        return {name: value.float() for name, value in conditioning.items()}


def forecast_memory(
    base_model: BaseModel, run: DsiRun, is_checkpointed: bool, compute_loss: Callable
) -> MemoryForecast:
    """Count the peak memory of a run: of a training step, of encoding images, of drawing pictures.

    `compute_loss` takes a batch of `TrainingSteps` and a denoiser, as in training.
    """
    training, other_way = (
        count_training(base_model, run, checkpointed, compute_loss)
        for checkpointed in (is_checkpointed, not is_checkpointed)
    )
    others = [count_encoding(base_model, run)]
    if run.draws_pictures:
        others.append(count_pictures(base_model, run, training.weights))
    return MemoryForecast(training, others, other_way, is_checkpointed, run.batch_size, "--train_batch_size")


def count_training(base_model: BaseModel, run: DsiRun, is_checkpointed: bool, compute_loss: Callable) -> Phase:
    """Return a step's memory: frozen weights in the run's precision, trained ones and their states in float32."""
    unet, encoder, batch, prompt_ids = build_on_meta(base_model, run)
    if is_checkpointed:
        unet.enable_gradient_checkpointing()
    weights, trained = weight_bytes(unet, encoder), weight_bytes(nn.ParameterList(list_trained(unet, encoder)))
    called = encoder if run.dtype == torch.float32 else HalfPrecision(encoder, run.dtype)
    scheduler = base_model.load_noise_scheduler()  # a separate one: its tensors have no values here
    with shapes_only(unet, encoder):
        ids = torch.zeros(prompt_ids, dtype=torch.long)
        denoiser = BatchDenoiser(
            base_model, unet, scheduler, called, PromptIds(ids, ids, ids[:1]), run.resolution, run.dtype
        )
        counted = count_step(lambda: compute_loss(draw_batch(*batch), denoiser), list_trained(unet, encoder))
    return Phase(
        f"training, {run.batch_size} images at a time", weights, counted.peak - counted.gradients, counted.gradients,
        state_bytes(torch.optim.AdamW, trained),
    )  # fmt: skip


def count_encoding(base_model: BaseModel, run: DsiRun, num_images: int = BATCH_SIZE) -> Phase:
    """Return the memory of encoding `num_images` at a time, which is not needed with a full latent cache."""
    with torch.device("meta"):
        vae = build_vae(base_model)

    def encode() -> list:
        pixel_values = torch.zeros(num_images, vae.config.in_channels, run.resolution, run.resolution)
        copies = [pixel_values, pixel_values.flip(-1)][: run.num_copies]
        return [vae.encode(copy).latent_dist for copy in copies]

    weights = weight_bytes(vae)
    with shapes_only(vae):
        return Phase(f"encoding, {num_images} images at a time", weights, count_forward(encode))


def count_pictures(base_model: BaseModel, run: DsiRun, other_weights: int) -> Phase:
    """Return the memory of decoding one picture in float32, in addition to the weights of training."""
    with torch.device("meta"):
        vae = build_vae(base_model)
    a_side = run.resolution // base_model.vae_scale

    def decode() -> torch.Tensor:
        return vae.decode(torch.zeros(1, vae.config.latent_channels, a_side, a_side)).sample

    weights = other_weights + weight_bytes(vae)
    with shapes_only(vae):
        return Phase("before/after pictures, one at a time", weights, count_forward(decode))


def build_on_meta(base_model: BaseModel, run: DsiRun) -> tuple:
    """Return U-Net and prompt encoder without weights, and the shapes of a batch's latents and prompt ids."""
    with torch.device("meta"):
        unet, encoder = build_trained(base_model, run)
    length = base_model.config(base_model.family.text_encoders[0].part).get("max_position_embeddings", 77)
    a_side = run.resolution // base_model.vae_scale
    batch = run.batch_size, unet.config.in_channels, a_side, a_side
    return unet, encoder, batch, (run.batch_size, len(encoder.text_encoders), length)


def build_trained(base_model: BaseModel, run: DsiRun) -> tuple[UNet2DConditionModel, PromptEncoder]:
    """Return U-Net and prompt encoder with random weights and what the run trains, on torch's current device."""
    unet, encoder = build_unet(base_model, run.dtype), build_encoder(base_model, run)
    if run.lora is not None:
        add_adapters(unet, name_parts(base_model, encoder), run.lora, seed=0)
    return unet, encoder


def list_trained(unet: nn.Module, encoder: nn.Module) -> list[nn.Parameter]:
    return [value for model in (encoder, unet) for value in model.parameters() if value.requires_grad]


def build_unet(base_model: BaseModel, dtype: torch.dtype) -> UNet2DConditionModel:
    """Return a U-Net with random weights, on torch's current device."""
    with _default_dtype(dtype):
        return UNet2DConditionModel.from_config(base_model.config("unet")).requires_grad_(False).eval()


def build_vae(base_model: BaseModel) -> AutoencoderKL:
    return AutoencoderKL.from_config(base_model.config("vae")).requires_grad_(False).eval()


def build_encoder(base_model: BaseModel, run: DsiRun) -> PromptEncoder:
    """Return text encoders with random weights and a token's rows."""
    with _default_dtype(run.dtype):
        models = []
        for text_encoder in base_model.family.text_encoders:
            kind = getattr(transformers, text_encoder.class_name)
            models.append(kind(kind.config_class(**base_model.config(text_encoder.part))).eval())
    sizes = [model.get_input_embeddings().num_embeddings for model in models]
    # only the lengths of the tokenizers are used
    tokenizers = [range(size + run.num_vectors + run.num_classes) for size in sizes]
    class_ids = [[None] * run.num_classes] * len(models)
    return PromptEncoder(models, tokenizers, run.num_vectors, [0] * len(models), class_ids)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def draw_batch(*shape: int) -> dict[str, torch.Tensor]:
    """Return a batch like those of `TrainingSteps`, for latents `(batch, channels, height, width)`."""
    numbers = torch.zeros(shape[0], dtype=torch.long)
    return {
        "latents": torch.randn(shape), "noise": torch.randn(shape),
        **dict.fromkeys(("timesteps", "labels", "templates"), numbers),
    }  # fmt: skip


def time_training(
    base_model: BaseModel, run: DsiRun, prepare_unet: Callable, compute_loss: Callable, accelerator
) -> float | None:
    """Return the images per second of training in all processes, timed over two steps; None if memory runs out.

    Weights are random, which takes the same time, so no base model is downloaded. The time to load latents is left out.
    """
    try:
        with accelerator.device:
            unet, encoder = build_trained(base_model, run)
        _, _, batch, prompt_ids = build_on_meta(base_model, run)
        optimizer = torch.optim.AdamW(list_trained(unet, encoder))
        called, optimizer = accelerator.prepare(encoder, optimizer)
        ids = torch.zeros(prompt_ids, dtype=torch.long, device=accelerator.device)
        denoiser = BatchDenoiser(
            base_model, prepare_unet(unet), base_model.load_noise_scheduler(), called, PromptIds(ids, ids, ids[:1]),
            run.resolution, run.dtype,
        )  # fmt: skip

        def step() -> None:
            accelerator.backward(compute_loss(draw_batch(*batch), denoiser))
            optimizer.step()
            optimizer.zero_grad()

        return accelerator.num_processes * run.batch_size / measure_seconds(step)
    except torch.OutOfMemoryError:
        return None


def time_encoding(base_model: BaseModel, run: DsiRun, accelerator) -> float | None:
    """Return how many images per second the VAE encodes in all processes, mirrored ones included; None as above."""
    try:
        with accelerator.device:
            vae = build_vae(base_model)
            pixel_values = torch.zeros(1, vae.config.in_channels, run.resolution, run.resolution)
        with torch.no_grad():
            return accelerator.num_processes / measure_seconds(lambda: vae.encode(pixel_values))
    except torch.OutOfMemoryError:
        return None


def measure_seconds(step: Callable[[], object]) -> float:
    """Return the mean seconds of two steps, after one to warm up."""

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    step()
    wait()
    started = time.perf_counter()
    for _ in range(NUM_TIMED_STEPS):
        step()
    wait()
    return (time.perf_counter() - started) / NUM_TIMED_STEPS


def base_model_disk(base_model: BaseModel) -> list[DiskUse]:
    """Return the download of the base model's weights that are not in the cache."""
    weights = list_weights(base_model.source, base_model.loaded_parts)
    is_complete = all(part in base_model.variants for part in weights)
    names = [
        name for part, (variants, _) in weights.items() for name in variants.get(base_model.variants.get(part), [])
    ]
    return model_download(base_model.source, names if is_complete else [])


def latents_disk(base_model: BaseModel, run: DsiRun, num_images: int, cache_dir) -> DiskUse:
    """Return the size of the latent cache for this many images."""
    channels = base_model.config("vae").get("latent_channels", 4)
    number = latent_bytes(num_images, run.resolution, run.num_copies, channels, base_model.vae_scale)
    return DiskUse("latent cache", number, cache_dir)
