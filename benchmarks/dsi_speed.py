"""train_dsi.py compared with diffusers' script for the same job, examples/textual_inversion/textual_inversion.py.

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers
    python -m benchmarks.dsi_speed --diffusers diffusers

Weights, images, batch, precision and learning rate are the same; runs alternate, each in its own process. On a GPU the
pipeline has the size of Stable Diffusion 1.5; on a CPU there are the demo's pipeline, and a scaled-down one with the
same share of the VAE. textual_inversion_sdxl.py is not measured.
"""

import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig

from benchmarks.children import Child, gpu_column, median_peaks, run_child
from benchmarks.commands import (
    TRAINING_BAR,
    environment_of,
    make_parser,
    our_command,
    parse_with_checkout,
    python_command,
)
from benchmarks.image_sets import write_demo_images, write_flat_folder, write_textures
from benchmarks.matrix_rate import matrix_rate
from benchmarks.pipelines import SCALED, SD15, TINY, Cost, demo_cost, save_demo_pipeline, save_pipeline
from benchmarks.report import format_table, publish_section

THEIR_SCRIPT = "examples/textual_inversion/textual_inversion.py"
THEIR_BAR = "Steps"
VERSION = "v0.42.1"
LEARNING_RATE = 5e-4
WARMUP_STEPS = 10  # train_dsi.py waits for a GPU only at every tenth step, where its bar is exact


@dataclass(frozen=True)
class Case:
    """The inputs of both scripts; `flat_dir` has the training images of `parquet_dir`."""

    name: str
    pipeline_dir: Path
    cost: Cost
    parquet_dir: Path
    flat_dir: Path
    resolution: int
    batch_size: int
    measured_steps: int  # a multiple of 10
    mixed_precision: str = "no"

    @property
    def num_steps(self) -> int:
        return WARMUP_STEPS + self.measured_steps + 1

    def samples_per_second(self, child: Child, bar: str) -> float:
        """Return a run's speed after the warm-up, without the last step, in which train_dsi.py judges the token."""
        return self.batch_size * child.units_per_second(bar, self.num_steps, WARMUP_STEPS, self.num_steps - 1)


def cpu_cases(work_dir: Path) -> list[Case]:
    # full batches: a short last one would be counted as full
    demo_set = write_demo_images(work_dir / "demo-set", num_images=62 * 32)
    scaled_set = write_textures(work_dir / "scaled-set", 64, SCALED.resolution)
    return [
        Case(
            "The demo's pipeline, 32 px, batch 32, float32", save_demo_pipeline(work_dir / "demo"), demo_cost(),
            demo_set, write_flat_folder(demo_set, work_dir / "demo-flat"), resolution=32, batch_size=32,
            measured_steps=100,
        ),
        Case(
            f"Stable Diffusion 1.5 scaled down, {SCALED.resolution} px, batch 8, float32",
            save_pipeline(SCALED, work_dir / "scaled"), SCALED.cost(), scaled_set,
            write_flat_folder(scaled_set, work_dir / "scaled-flat"), SCALED.resolution, batch_size=8,
            measured_steps=20,
        ),
    ]  # fmt: skip


def gpu_cases(work_dir: Path, small: bool, pipeline_dir: Path | None = None) -> list[Case]:
    """Return the cases for a GPU, with the weights of `pipeline_dir` if given."""
    shape, batch_sizes = (TINY, (2, 4)) if small else (SD15, (8, 16))
    pipeline_dir, cost = pipeline_dir or save_pipeline(shape, work_dir / "pipeline"), shape.cost()
    parquet_dir = write_textures(work_dir / "set", 64, shape.resolution)
    flat_dir = write_flat_folder(parquet_dir, work_dir / "flat")
    return [
        Case(
            f"Size of {'a test' if small else 'Stable Diffusion 1.5'}, {shape.resolution} px, batch {size}, bfloat16",
            pipeline_dir, cost, parquet_dir, flat_dir, shape.resolution, size, measured_steps=50,
            mixed_precision="bf16",
        )
        for size in batch_sizes
    ]  # fmt: skip


def build_our_command(case: Case, work_dir: Path) -> list[str]:
    return our_command(
        case.pipeline_dir, case.parquet_dir, work_dir, resolution=case.resolution, train_batch_size=case.batch_size,
        max_train_steps=case.num_steps, learning_rate=LEARNING_RATE, mixed_precision=case.mixed_precision,
    )  # fmt: skip


def build_their_command(script: Path, case: Case, work_dir: Path) -> list[str]:
    flags = {
        "pretrained_model_name_or_path": case.pipeline_dir, "train_data_dir": case.flat_dir, "repeats": 1,
        "placeholder_token": "<dsi-style>", "initializer_token": "style", "learnable_property": "style",
        "resolution": case.resolution, "train_batch_size": case.batch_size, "max_train_steps": case.num_steps,
        "learning_rate": LEARNING_RATE, "lr_warmup_steps": 0, "mixed_precision": case.mixed_precision, "seed": 0,
        "save_steps": 10**9, "checkpointing_steps": 10**9, "output_dir": work_dir / "theirs",
        "report_to": "all",  # installed trackers: it has no "none", and its default fails without tensorboard
    }  # fmt: skip
    return python_command(script, flags)


def unet_alone(case: Case, device: str) -> float:
    """Return the samples/s of the U-Net's forward and backward pass, an upper limit for training through it."""
    options = {"device": device, "dtype": torch.bfloat16 if case.mixed_precision == "bf16" else torch.float32}
    unet = UNet2DConditionModel.from_pretrained(case.pipeline_dir, subfolder="unet", torch_dtype=options["dtype"])
    unet.to(device).requires_grad_(False)
    text_config = CLIPTextConfig.from_pretrained(case.pipeline_dir, subfolder="text_encoder")
    config, batch = unet.config, case.batch_size
    latents = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, **options)
    prompts = torch.randn(
        batch, text_config.max_position_embeddings, config.cross_attention_dim, requires_grad=True, **options
    )
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        unet(latents, 500, prompts).sample.square().mean().backward()
        prompts.grad.sum().item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return batch / statistics.median(seconds)


@dataclass(frozen=True)
class Measured:
    """The runs of both scripts, and each round's speed of the U-Net alone and of a large matrix product."""

    our_runs: list[Child]
    their_runs: list[Child]
    unet_rates: list[float]
    matrix_rates: list[float]


def alternate(script: Path, case: Case, rounds: int, device: str) -> Measured:
    """Run both scripts in turn. Each of our runs rebuilds its cache."""
    our_runs, their_runs, unet_rates, rates = [], [], [], []
    for number in range(rounds):
        rates.append(matrix_rate(device, case.mixed_precision))
        unet_rates.append(unet_alone(case, device))
        with tempfile.TemporaryDirectory() as folder:
            work_dir = Path(folder)
            environment = environment_of(work_dir, device)
            our_runs.append(run_child(build_our_command(case, work_dir), work_dir / "ours.log", environment))
            theirs = build_their_command(script, case, work_dir)
            their_runs.append(run_child(theirs, work_dir / "theirs.log", environment))
        print(
            f"{case.name}, round {number + 1} of {rounds}: "
            f"{case.samples_per_second(our_runs[-1], TRAINING_BAR):.1f} and "
            f"{case.samples_per_second(their_runs[-1], THEIR_BAR):.1f} samples/s",
            flush=True,
        )
    return Measured(our_runs, their_runs, unet_rates, rates)


def median_row(name: str, runs: list[Child], speeds: list[float], operations: int, rate: float) -> dict[str, str]:
    """Return a table row: medians over the runs of a script that computes `operations` per sample."""
    speed = statistics.median(speeds)
    peaks = median_peaks(run.peaks for run in runs)
    return {
        "": name,
        "samples/s": f"{speed:.1f}",
        "whole command, s": f"{statistics.median(run.seconds for run in runs):.0f}",
        "memory, GiB": f"{peaks['VmHWM'] / 1024:.2f}",
        **gpu_column(peaks),
        "GFLOP per sample": f"{operations / 1e9:,.2f}",
        "TFLOP/s": f"{speed * operations / 1e12:.3g}",
        "of the matrix rate": f"{speed * operations / rate:.0%}",
    }


def compare(script: Path, case: Case, rounds: int, device: str) -> str:
    """Measure a case; return its part of the report."""
    measured = alternate(script, case, rounds, device)
    our_speeds = [case.samples_per_second(run, TRAINING_BAR) for run in measured.our_runs]
    their_speeds = [case.samples_per_second(run, THEIR_BAR) for run in measured.their_runs]
    ratios = [our_speed / their_speed for our_speed, their_speed in zip(our_speeds, their_speeds)]
    rate, unet_rate = statistics.median(measured.matrix_rates), statistics.median(measured.unet_rates)
    rows = [
        median_row("`train_dsi.py`", measured.our_runs, our_speeds, case.cost.unet, rate),
        median_row("diffusers", measured.their_runs, their_speeds, case.cost.unet + case.cost.vae_encode, rate),
    ]
    bound = unet_rate / statistics.median(their_speeds)
    return (
        f"**{case.name}: {statistics.median(ratios):.2f} times diffusers' samples/s** (in single rounds "
        f"{min(ratios):.2f} to {max(ratios):.2f}). The VAE has {case.cost.vae_share:.3f} of the U-Net's operations; "
        f"a large matrix product reaches {rate / 1e12:.3g} TFLOP/s here. The U-Net alone, forward and backward, does "
        f"{unet_rate:.1f} samples/s, so about {bound:.2f} times diffusers' speed is the limit for any trainer."
        f"\n\n{format_table(rows)}"
    )


def describe_method(script: Path, rounds: int, device: str) -> str:
    version = re.search(r'check_min_version\("(.+)"\)', script.read_text())[1]
    threads = ", on one CPU thread as under `accelerate launch`" if device == "cpu" else ""
    return (
        f"Against `textual_inversion.py` of diffusers {version}, unmodified; `textual_inversion_sdxl.py` is not "
        f"measured. Medians of {rounds} alternating rounds{threads}. Samples/s are for the steps after the warm-up; "
        "the whole command includes the start and, for ours, caching all latents and judging the token. Memory is "
        "VmHWM. Operations (U-Net forward and backward to the text embedding, encoding by the VAE) are counted; in "
        f"Stable Diffusion 1.5 at {SD15.resolution} px, the VAE has {SD15.cost().vae_share:.3f} of the U-Net's."
    )


def main():
    args, script = parse_with_checkout(make_parser(__doc__, rounds=3), "diffusers", VERSION, THEIR_SCRIPT)
    if args.device == "cpu":
        torch.set_num_threads(1)  # as in the scripts
    with tempfile.TemporaryDirectory() as work_dir:
        on_gpu = args.small or args.device == "cuda"
        cases = gpu_cases(Path(work_dir), args.small) if on_gpu else cpu_cases(Path(work_dir))
        parts = [compare(script, case, args.rounds, args.device) for case in cases]
    title = f"Speed compared with diffusers, on a {'GPU' if args.device == 'cuda' else 'CPU'}"
    body = "\n\n".join([describe_method(script, args.rounds, args.device), *parts])
    publish_section("train_dsi", title, body, args.small)


if __name__ == "__main__":
    main()
