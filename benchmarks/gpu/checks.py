"""Whether a GPU computes the same as a CPU, and what happens when memory is too small or a run is resumed."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

import train_dsi
from benchmarks.commands import our_command
from benchmarks.drawing import NOUNS
from benchmarks.fine_tuning_cases import save_model
from benchmarks.gpu.bench import Bench, LeftOutError
from benchmarks.gpu.lines import FAILED
from benchmarks.image_sets import write_textures
from benchmarks.pipelines import TINY, save_pipeline
from tests.short_memory import limit_memory
from utils.cli.memory import GRADIENT_CHECKPOINTING, MICRO_BATCH_SIZE
from utils.cli.records import DSI_CONFIG, read_record
from utils.data.prompts import DSI_TEMPLATE, render_prompt
from utils.style.base_models import open_base_model
from utils.style.families import LEARNED_EMBEDS
from utils.style.token import Denoiser, PromptEncoder, PromptIds, add_placeholder_tokens, find_initializers
from utils.synthesis.sampling import Sampler

PARITY_PIXELS = 256  # image size; with a batch of two, seconds on a CPU
CARDS = {8: 7.5, 12: 11.5}  # GB of a card: GiB for the allocator, half a GiB less for the CUDA context
NUM_STEPS = 10
PLACEHOLDER = "<dsi-style>"

# tensors by name, on the CPU in float32
Results = dict[str, torch.Tensor]


@contextmanager
def exact_products(is_exact: bool) -> Iterator[None]:
    """Compute float32 products in full float32 if `is_exact`, else in TF32 like the scripts."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if is_exact else "high")
    torch.backends.cudnn.allow_tf32 = not is_exact
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def relative_error(results: Results, expected: Results) -> float:
    """Return the largest difference of any tensor relative to its largest value; NaN if any value is NaN."""
    errors = [(results[name] - value).abs().max() / value.abs().max() for name, value in expected.items()]
    return torch.stack(errors).max().item()


def parity(bench: Bench) -> None:
    """Compute the same step on the CPU and on the device, for a token, an image and a classifier."""
    for name, prepare in (
        ("DSI step", dsi_step),
        ("sampling step", sampling_step),
        ("classifier step", classifier_step),
    ):
        with bench.measuring(name):
            compare_devices(bench, name, prepare(bench))


def compare_devices(bench: Bench, name: str, compute: Callable[[str, torch.dtype], Results]) -> None:
    """Report how much a step differs between CPU and device, and between float32 and bfloat16 on the device."""
    on_cpu = compute("cpu", torch.float32)
    with exact_products(True):
        exact = compute(bench.device, torch.float32)
    error = relative_error(exact, on_cpu)
    shown = ", ".join(exact)
    bench.report(
        f"{name}, CPU against {bench.device} in float32", f"{error:.1e} ({shown})", target="parity", parity=error
    )
    with exact_products(False):
        in_tf32 = compute(bench.device, torch.float32)
    bench.report(f"{name}, float32 in TF32 against float32", f"{relative_error(in_tf32, exact):.1e}")
    in_bf16 = compute(bench.device, torch.bfloat16)
    bench.report(f"{name}, bfloat16 against float32", f"{relative_error(in_bf16, exact):.1e}")


def dsi_step(bench: Bench) -> Callable[[str, torch.dtype], Results]:
    """Return what computes the loss of a token and the gradient of its rows."""
    base_model = open_base_model(str(bench.pipeline_dir), "--pretrained_model_name_or_path")
    resolution = min(PARITY_PIXELS, bench.shape.resolution)
    a_side = resolution // base_model.vae_scale
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, a_side, a_side, generator=generator)
    batch = {
        "latents": latents, "noise": noise, "timesteps": torch.tensor([300, 700]), "labels": torch.tensor([0, 1]),
        "templates": torch.tensor([0, 0]),
    }  # fmt: skip

    def compute(device: str, dtype: torch.dtype) -> Results:
        tokenizers = base_model.load_tokenizers()
        [*_, word] = find_initializers(tokenizers, "auto").values()
        add_placeholder_tokens(tokenizers, PLACEHOLDER, 1)
        encoder = PromptEncoder(base_model.load_text_encoders(dtype), tokenizers, 1, word).to(device)
        prompts = [render_prompt(DSI_TEMPLATE, noun, PLACEHOLDER) for noun in NOUNS[:2]]
        ids = PromptIds.tokenize(tokenizers, prompts, prompts, torch.device(device))
        unet = base_model.load_unet(dtype).to(device)
        denoiser = Denoiser(
            base_model, unet, base_model.load_noise_scheduler(), encoder, ids, resolution, dtype
        )  # fmt: skip
        loss = train_dsi.denoising_loss(batch, denoiser)
        loss.backward()
        return {"loss": loss.detach().cpu(), "gradient of the token": encoder.rows[0].grad.float().cpu()}

    return compute


def sampling_step(bench: Bench) -> Callable[[str, torch.dtype], Results]:
    """Return what computes the latents after two steps with guidance, and the image of given latents."""
    resolution = min(PARITY_PIXELS, bench.shape.resolution)

    def compute(device: str, dtype: torch.dtype) -> Results:
        pipe = StableDiffusionPipeline.from_pretrained(bench.pipeline_dir, dtype=dtype, safety_checker=None).to(device)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        latents = pipe(
            f"A photo of a {NOUNS[0]}", height=resolution, width=resolution, num_inference_steps=2, guidance_scale=3.0,
            generator=generator, output_type="latent",
        ).images  # fmt: skip
        given = torch.randn(latents.shape, generator=generator).to(device, dtype)
        with torch.no_grad():
            image = pipe.vae.decode(given).sample
        return {"latents": latents.float().cpu(), "image": image.float().cpu()}

    return compute


def classifier_step(bench: Bench) -> Callable[[str, torch.dtype], Results]:
    """Return a function for the loss and gradients of a classifier; in bfloat16 it uses autocast."""
    folder = save_model(bench.own_dir("classifier"), "tiny" if bench.is_tiny else "resnet18")
    size = 64 if bench.is_tiny else 224
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))

    def compute(device: str, dtype: torch.dtype) -> Results:
        model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).to(device).train()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(pixel_values=images.to(device)).logits
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.arange(8, device=device))
        loss.backward()
        gradients = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        return {"loss": loss.detach().cpu(), "gradients": gradients.float().cpu()}

    return compute


def run_dsi(bench: Bench, pipeline_dir: Path, resolution: int, output_dir: Path, **flags) -> Path:
    """Learn a token in this process and return its folder."""
    work_dir = bench.work_dir / f"{bench.part}-images"
    if not work_dir.exists():
        write_textures(work_dir / "set", 32, resolution)
    argv = our_command(pipeline_dir, work_dir / "set", work_dir, resolution=resolution, **flags)
    with redirect_stdout(sys.stderr):
        train_dsi.main([*argv[2:], f"--output_dir={output_dir}"])
    return output_dir


def small_cards(bench: Bench) -> None:
    """Learn a token with the defaults, and draw a large batch, with the memory of smaller cards."""
    for card, gib in list(CARDS.items())[: 1 if bench.is_tiny else None]:
        with bench.measuring(f"train_dsi.py, {card} GB"), limited_memory(bench, gib):
            bench.require_seconds(25)
            folder = run_dsi(
                bench, bench.pipeline_dir, bench.shape.resolution, bench.work_dir / f"card-{card}", max_train_steps=3
            )
            record = read_record(folder / DSI_CONFIG)
            size, is_checkpointed = record.get(MICRO_BATCH_SIZE, 8), record.get(GRADIENT_CHECKPOINTING, False)
            bench.report(
                f"train_dsi.py, {card} GB", f"{size} of 8 images at a time"
                f"{', checkpointed' if is_checkpointed else ''}; {peak(bench)}",
                micro_batch_size=size, is_checkpointed=is_checkpointed,
            )  # fmt: skip
    with bench.measuring("drawing, 8 GB"):
        if not bench.is_cuda:
            raise LeftOutError("the memory of a CPU cannot be limited")
        with limited_memory(bench, CARDS[8]):
            bench.require_seconds(15)
            draw_large_batch(bench)


def draw_large_batch(bench: Bench, num_images: int = 64) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(bench.pipeline_dir, dtype=bench.dtype, safety_checker=None)
    sampler = Sampler(
        pipe.to(bench.device), resolution=bench.shape.resolution, num_inference_steps=2, num_at_a_time=num_images
    )
    sampler.draw([f"A photo of a {NOUNS[0]}"] * num_images, list(range(num_images)), 3.0)
    bench.report("drawing, 8 GB", f"{sampler.num_at_a_time} of {num_images} images at a time; {peak(bench)}")


@contextmanager
def limited_memory(bench: Bench, gib: float) -> Iterator[None]:
    """Limit the device's memory to `gib` GiB; on a CPU, let models run out of memory above one image instead."""
    if not bench.is_cuda:
        with limit_memory(UNet2DConditionModel, 1):
            yield
        return
    total = torch.cuda.get_device_properties(0).total_memory
    if total <= gib * 2**30:
        raise LeftOutError(f"this GPU has at most {gib} GiB")
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def peak(bench: Bench) -> str:
    """Return the peak of allocated and reserved memory since the last reset, in words."""
    if not bench.is_cuda:
        return "peak unknown on a CPU"
    numbers = (number() / 2**30 for number in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved))
    return "peak {:.1f} GiB allocated, {:.1f} GiB reserved".format(*numbers)


def resume(bench: Bench) -> None:
    """Learn a token, then resume from the checkpoint in the middle: the rows must be equal."""
    with bench.measuring("train_dsi.py"):
        pipeline_dir = save_pipeline(TINY, bench.work_dir / f"{bench.part}-pipeline")
        run = partial(
            run_dsi, bench, pipeline_dir, TINY.resolution, max_train_steps=NUM_STEPS, train_batch_size=4,
            checkpointing_steps=NUM_STEPS // 2, learning_rate=0.01,
        )  # fmt: skip
        whole = run(output_dir=bench.work_dir / "whole")
        again = run(
            output_dir=bench.work_dir / "resumed", resume_from_checkpoint=whole / f"checkpoint-{NUM_STEPS // 2}"
        )
        rows, expected = (load_file(folder / LEARNED_EMBEDS) for folder in (again, whole))
        if all(torch.equal(rows[name], value) for name, value in expected.items()):
            bench.report("train_dsi.py", "resumed from the middle, the token is bit-identical")
        else:
            error = relative_error(rows, expected)
            bench.report("train_dsi.py", f"resumed from the middle, the token differs by {error:.1e}", FAILED)
