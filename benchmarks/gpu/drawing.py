"""Generation on a GPU: the script compared with a plain loop, and variants that might be faster."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from diffusers import StableDiffusionPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.drawing import NOUNS, Case, sd15_case
from benchmarks.generate_speed import Program, Run, run_program
from benchmarks.gpu.bench import Bench, LeftOutError
from benchmarks.pipelines import drawing_cost
from utils.synthesis.sampling import Sampler

OURS, LOOP = Program("generate_synthetic.py"), Program("the loop", is_loop=True)
NO_GUIDANCE = 1.0
NO_KERNEL = ("No available kernel", "No viable backend")  # torch's messages for an unsuitable backend
BATCH_SIZES = (8, 16, 32)
BACKENDS = (
    SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
)  # fmt: skip
SECONDS_TO_COMPILE = 75  # including an image or two


def make_cases(bench: Bench) -> dict[str, Case]:
    """Return the cases by name of their target; both programs write JPEG, which is faster than PNG."""
    if bench.is_tiny:
        return {"generation_25": Case("", bench.pipeline_dir, 2, 2, 2, 3.0, image_format="jpeg")}
    case = replace(sd15_case(16, bench.work_dir, bench.pipeline_dir), image_format="jpeg")
    few = replace(case, num_images_per_class=32, num_inference_steps=4, guidance_scale=NO_GUIDANCE)
    return {"generation_25": case, "generation_4": few}


def generation(bench: Bench) -> None:
    """Draw a set with generate_synthetic.py, then with the loop: images/s after the first batch."""
    cases, speeds = make_cases(bench), {}
    for name, case in cases.items():
        title = describe(case)
        with bench.measuring(title):
            bench.require_seconds(30)
            run = run_program(OURS, case, bench.device)
            speeds[name] = speed = run.later_images_per_second
            bench.report(title, f"{speed:.1f} images/s; {describe_run(run)}", target=name, **{name: speed})
            cost = drawing_cost(case.pipeline_dir, case.num_inference_steps, case.guidance_scale)
            share = 100 * speed * cost / bench.rate
            bench.report(
                f"{title}, of the matrix rate", f"{share:.0f} % of {bench.rate / 1e12:.3g} TFLOP/s", share=share
            )
    for name, case in cases.items():
        title = f"{describe(case)}, compared with the loop"
        with bench.measuring(title):
            if name not in speeds:
                raise LeftOutError("our script failed")
            bench.require_seconds(30)
            loop = run_program(LOOP, case, bench.device)
            ratio = speeds[name] / loop.later_images_per_second
            text = f"{ratio:.2f} times its {loop.later_images_per_second:.1f} images/s; {describe_run(loop)}"
            bench.report(title, text, target=f"{name}_loop", **{f"{name}_loop": ratio})


def describe(case: Case) -> str:
    guidance = "no guidance" if case.guidance_scale == NO_GUIDANCE else f"guidance {case.guidance_scale:g}"
    return f"{case.num_inference_steps} steps, {guidance}, batch {case.batch_size}"


def describe_run(run: Run) -> str:
    device = f", {run.peaks['device'] / 1024:.1f} GiB on the GPU" if run.peaks["device"] else ""
    return f"start {run.start:.0f} s, first batch {run.first_batch:.1f} s{device}"


def variants(bench: Bench) -> None:
    """Draw batches in this process, changing one thing at a time."""
    dtype = bench.dtype
    pipe = StableDiffusionPipeline.from_pretrained(bench.pipeline_dir, dtype=dtype, safety_checker=None)
    pipe.to(bench.device)
    sizes = (2,) if bench.is_tiny else BATCH_SIZES
    usual = sizes[len(sizes) // 2]
    for size in sizes:
        time_variant(bench, pipe, f"batch {size}", size)
    time_variant(bench, pipe, f"4 steps, no guidance, batch {usual}", usual, num_steps=4, guidance_scale=NO_GUIDANCE)
    for name, change in (("contiguous, not channels last", contiguous), ("fused QKV", fused)):
        with bench.measuring(f"{name}, batch {usual}"), change(pipe):
            time_variant(bench, pipe, f"{name}, batch {usual}", usual, is_prepared=True)
    for backend in BACKENDS:
        with bench.measuring(f"U-Net alone, {backend.name}"):
            time_attention(bench, pipe.unet, backend, usual)
    time_compiled(bench, pipe, usual)


def time_variant(
    bench: Bench, pipe, name: str, batch_size: int, num_steps: int = 25, guidance_scale: float = 3.0,
    is_prepared: bool = False,
) -> None:  # fmt: skip
    """Draw a batch with two steps to warm up, then one with all steps, and report its images/s.

    `is_prepared` keeps the memory format of the pipeline.
    """
    with bench.measuring(name):
        bench.require_seconds(10)
        sampler = make_sampler(bench, pipe, batch_size, is_prepared=is_prepared)
        seconds_of_batch(sampler, batch_size, 2, guidance_scale)
        seconds = seconds_of_batch(sampler, batch_size, 2 if bench.is_tiny else num_steps, guidance_scale)
        if sampler.num_at_a_time < batch_size:
            raise LeftOutError(f"only {sampler.num_at_a_time} images at a time fit in memory")
        bench.report(name, f"{batch_size / seconds:.1f} images/s", images_per_second=batch_size / seconds)


def make_sampler(bench: Bench, pipe, batch_size: int, is_prepared: bool = False, **options) -> Sampler:
    formats = {name: memory_format_of(getattr(pipe, name)) for name in ("unet", "vae")}
    sampler = Sampler(
        pipe, resolution=bench.shape.resolution, num_inference_steps=2, num_at_a_time=batch_size, **options
    )
    if is_prepared:
        for name, memory_format in formats.items():
            getattr(pipe, name).to(memory_format=memory_format)
    return sampler


def memory_format_of(model: torch.nn.Module) -> torch.memory_format:
    weight = next(value for value in model.parameters() if value.dim() == 4 and value.shape[2] > 1)
    is_last = weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def seconds_of_batch(sampler: Sampler, batch_size: int, num_steps: int, guidance_scale: float) -> float:
    """Return the seconds from prompts to pixels on the CPU."""
    prompts = [f"A photo of a {NOUNS[number % len(NOUNS)]}" for number in range(batch_size)]
    sampler.settings["num_inference_steps"] = num_steps
    started = time.perf_counter()
    sampler.draw(prompts, list(range(batch_size)), guidance_scale)
    return time.perf_counter() - started


@contextmanager
def contiguous(pipe) -> Iterator[None]:
    """Use the contiguous memory format for the convolutional parts, and restore theirs at the end."""
    formats = {name: memory_format_of(getattr(pipe, name)) for name in ("unet", "vae")}
    for name in formats:
        getattr(pipe, name).to(memory_format=torch.contiguous_format)
    try:
        yield
    finally:
        for name, memory_format in formats.items():
            getattr(pipe, name).to(memory_format=memory_format)


@contextmanager
def fused(pipe) -> Iterator[None]:
    """Compute queries, keys and values of the U-Net's attention in one product."""
    pipe.unet.fuse_qkv_projections()
    try:
        yield
    finally:
        pipe.unet.unfuse_qkv_projections()


@torch.inference_mode()
def time_attention(bench: Bench, unet, backend: SDPBackend, batch_size: int, num_passes: int = 5) -> None:
    """Time passes of the U-Net for a batch with guidance, with one attention backend."""
    bench.require_seconds(5)
    options = {"device": bench.device, "dtype": bench.dtype}
    size, length = unet.config.sample_size, bench.shape.prompt_length
    latents = torch.randn(2 * batch_size, unet.config.in_channels, size, size, **options)
    prompts = torch.randn(2 * batch_size, length, unet.config.cross_attention_dim, **options)
    try:
        with sdpa_kernel(backend):
            unet(latents, 500, prompts)
            started = bench.wait()
            for _ in range(num_passes):
                unet(latents, 500, prompts)
            seconds = (bench.wait() - started) / num_passes
    except RuntimeError as error:
        if not any(text in str(error) for text in NO_KERNEL):
            raise
        raise LeftOutError("this backend has no kernel for it here") from None
    name = f"U-Net alone, {backend.name}"
    bench.report(name, f"{1000 * seconds:.1f} ms per pass of 2 x {batch_size} images", seconds=seconds)


def time_compiled(bench: Bench, pipe, batch_size: int) -> None:
    """Compile the denoiser; report how long that takes, and the speed afterwards."""
    with bench.measuring("--torch_compile"):
        bench.require_seconds(SECONDS_TO_COMPILE)
        options = {"compile_backend": "eager"} if bench.is_tiny else {}  # compiling takes too long for a test
        sampler = make_sampler(bench, pipe, batch_size, compile_model=True, **options)
        first, second = (seconds_of_batch(sampler, batch_size, 2, 3.0) for _ in range(2))
        seconds = seconds_of_batch(sampler, batch_size, 2 if bench.is_tiny else 25, 3.0)
        bench.report(
            f"--torch_compile, batch {batch_size}", f"{batch_size / seconds:.1f} images/s; compiling takes "
            f"{first - second:.0f} s", images_per_second=batch_size / seconds, compile_seconds=first - second,
        )  # fmt: skip
