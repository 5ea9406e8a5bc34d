"""Training on a GPU: a style token and classifiers compared with others' scripts, and measured and counted memory."""

import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

import train_bridged
import train_dsi
from benchmarks import dsi_speed, fine_tuning_cases, fine_tuning_speed
from benchmarks.children import Child, run_child
from benchmarks.commands import TRAINING_BAR
from benchmarks.gpu.bench import Bench, LeftOutError
from utils.forecast.report import gib
from utils.style import forecast
from utils.style.base_models import open_base_model

NUM_DISTINCT = 256  # photographs that are drawn and repeated; decoding takes the same time
WARMUP_SHARE = 0.2  # of the steps, not counted in the GPU's use
MILLISECONDS_BETWEEN_LOOKS = 100
BATCH_SIZES = (4, 8, 16)


def dsi(bench: Bench) -> None:
    """Learn a token with train_dsi.py, and with diffusers' script if its checkout is given."""
    cases = dsi_speed.gpu_cases(bench.work_dir, bench.is_tiny, bench.pipeline_dir)
    if bench.is_tiny:
        cases = [replace(cases[0], measured_steps=10)]
    measured = {}
    for case in cases:
        with bench.measuring(f"train_dsi.py, batch {case.batch_size}"):
            bench.require_seconds(20)
            measured[case] = time_dsi(bench, case, is_first=case == cases[0])
    if bench.diffusers is None:
        bench.report("diffusers' script", "needs --diffusers CHECKOUT", "left out")
    for case in cases if bench.diffusers else []:
        with bench.measuring(f"diffusers' script, batch {case.batch_size}"):
            bench.require_seconds(30)
            compare_dsi(bench, case, measured.get(case), is_first=case == cases[0])
    for case in cases:
        with bench.measuring(f"--dry_run of train_dsi.py, batch {case.batch_size}"):
            bench.require_seconds(20)
            argv = dsi_speed.build_our_command(case, bench.own_dir(f"forecast-{case.batch_size}"))
            compare_forecast(
                bench, f"--dry_run of train_dsi.py, batch {case.batch_size}", train_dsi.main, argv, measured.get(case)
            )


def compare_forecast(
    bench: Bench, name: str, main: Callable, command: list[str], measured: tuple[float, Child] | None
) -> None:
    """Report the forecast of a script's `--dry_run`, and the measured speed and memory."""
    with redirect_stdout(sys.stderr):
        needs = main([*command[2:], "--dry_run=True"])
    rate = "unknown" if needs["images_per_second"] is None else f"{needs['images_per_second']:.1f}"
    text = f"needs {gib(needs['needed_bytes'])} GiB with its margin, {rate} images/s"
    if measured is not None:
        speed, child = measured
        device = f"{child.peaks['device'] / 1024:.1f} GiB, " if child.peaks["device"] else ""
        text += f"; measured: {device}{speed:.1f} images/s"
    bench.report(name, text, needed_bytes=needs["needed_bytes"], images_per_second=needs["images_per_second"])


def time_dsi(bench: Bench, case: dsi_speed.Case, is_first: bool) -> tuple[float, Child]:
    """Return the samples/s of train_dsi.py, and its process.

    The first of several batch sizes is the default, to which the target applies.
    """
    work_dir, name = bench.own_dir(f"ours-{case.batch_size}"), f"train_dsi.py, batch {case.batch_size}"
    child = run_child(dsi_speed.build_our_command(case, work_dir), work_dir / "ours.log", bench.environment)
    speed = case.samples_per_second(child, TRAINING_BAR)
    bench.report(name, f"{speed:.1f} samples/s; {describe(child)}", samples_per_second=speed, peaks=child.peaks)
    share = 100 * speed * case.cost.unet / bench.rate
    text = f"{share:.0f} % of {bench.rate / 1e12:.3g} TFLOP/s"
    bench.report(f"{name}, of the matrix rate", text, target="dsi_share" if is_first else None, dsi_share=share)
    return speed, child


def compare_dsi(bench: Bench, case: dsi_speed.Case, measured: tuple[float, Child] | None, is_first: bool) -> None:
    script = find_script(bench.diffusers, "--diffusers", dsi_speed.THEIR_SCRIPT)
    work_dir = bench.own_dir(f"theirs-{case.batch_size}")
    child = run_child(dsi_speed.build_their_command(script, case, work_dir), work_dir / "theirs.log", bench.environment)
    theirs = case.samples_per_second(child, dsi_speed.THEIR_BAR)
    if measured is None:
        raise LeftOutError(f"our script failed; theirs has {theirs:.1f} samples/s")
    ratio = measured[0] / theirs
    bench.report(
        f"compared with diffusers' script, batch {case.batch_size}", f"{ratio:.2f} times its {theirs:.1f} samples/s; "
        f"{describe(child)}", target="dsi_diffusers" if is_first else None, dsi_diffusers=ratio,
    )  # fmt: skip


def find_script(checkout: Path, flag: str, name: str) -> Path:
    if not (checkout / name).is_file():
        raise LeftOutError(f"{flag} {checkout}: has no {name}")
    return checkout / name


def describe(child: Child) -> str:
    device = f", {child.peaks['device'] / 1024:.1f} GiB on the GPU" if child.peaks["device"] else ""
    return f"whole command {child.seconds:.0f} s{device}"


def classifiers(bench: Bench) -> None:
    """Train ResNet-18 and ViT-B/16 from JPEG with train_bridged.py, and with transformers' script if given."""
    num_workers = 0 if bench.is_tiny else max(1, len(os.sched_getaffinity(0)) - 2)
    cases = fine_tuning_cases.make_cases(
        bench.work_dir, bench.device, bench.is_tiny, num_workers, 8 if bench.is_tiny else NUM_DISTINCT
    )
    for case in cases:
        name = "resnet18" if case == cases[0] else "vit_b16"
        measured = None
        with bench.measuring(case.name):
            bench.require_seconds(20)
            measured = time_classifier(bench, case, name)
        if bench.transformers is None:
            bench.report(f"{case.name}, run_image_classification.py", "needs --transformers CHECKOUT", "left out")
        else:
            with bench.measuring(f"{case.name}, compared with run_image_classification.py"):
                bench.require_seconds(25)
                compare_classifier(bench, case, name, measured)
        with bench.measuring(f"{case.name}, --dry_run"):
            bench.require_seconds(15)
            argv = fine_tuning_speed.build_our_command(case, bench.own_dir(f"{name}-forecast"))
            compare_forecast(bench, f"{case.name}, --dry_run", train_bridged.main, argv, measured)


def time_classifier(bench: Bench, case: fine_tuning_cases.Case, name: str) -> tuple[float, Child]:
    """Return the images/s of train_bridged.py and its process, and report the share of time the GPU was idle."""
    work_dir = bench.own_dir(name)
    with GpuUse(bench.is_cuda) as use:
        started = time.time()
        speed, child = fine_tuning_speed.train_ours(case, work_dir, bench.environment)
    bench.report(case.name, f"{speed:.0f} images/s; {describe(child)}", images_per_second=speed, peaks=child.peaks)
    with bench.measuring(f"{case.name}, GPU idle"):
        ticks = child.bars["", case.num_steps]
        first = next(tick for tick in ticks if tick.done >= WARMUP_SHARE * case.num_steps)
        idle = use.idle_share(started + first.seconds, started + ticks[-1].seconds)
        target = "resnet18_idle" if name == "resnet18" else None
        bench.report(f"{case.name}, GPU idle", f"{idle:.0f} % of the time, by nvidia-smi", target=target, **{
            f"{name}_idle": idle
        })  # fmt: skip
    return speed, child


def compare_classifier(
    bench: Bench, case: fine_tuning_cases.Case, name: str, measured: tuple[float, Child] | None
) -> None:
    script = find_script(bench.transformers, "--transformers", fine_tuning_speed.THEIR_SCRIPT)
    work_dir = bench.own_dir(f"{name}-theirs")
    script, _ = fine_tuning_speed.current_copy(script, work_dir)
    theirs, child = fine_tuning_speed.train_theirs(script, case, work_dir, bench.environment)
    if measured is None:
        raise LeftOutError(f"our script failed; theirs has {theirs:.0f} images/s")
    ratio = measured[0] / theirs
    bench.report(
        f"{case.name}, compared with run_image_classification.py", f"{ratio:.2f} times its {theirs:.0f} images/s; "
        f"{describe(child)}", target="resnet18_transformers" if name == "resnet18" else None,
        **{f"{name}_transformers": ratio},
    )  # fmt: skip


class GpuUse:
    """The use of a GPU by nvidia-smi, several times per second: the percentage of time with running kernels."""

    def __init__(self, is_cuda: bool):
        self.looks: list[tuple[float, float]] = []  # `time.time()`, percent
        self.process = None
        self.reason = None if is_cuda else "no GPU found"
        if is_cuda and shutil.which("nvidia-smi") is None:
            self.reason = "nvidia-smi not found"

    def __enter__(self) -> "GpuUse":
        if self.reason is None:
            device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0] or "0"
            command = ["nvidia-smi", "--query-gpu=timestamp,utilization.gpu", "--format=csv,noheader,nounits"]
            command += [f"--id={device}", f"--loop-ms={MILLISECONDS_BETWEEN_LOOKS}"]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            threading.Thread(target=self.read, args=[self.process.stdout], daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def read(self, lines) -> None:
        """Read lines such as `2026/11/28 16:20:44.123, 37`."""
        for line in lines:
            moment, _, percent = line.partition(",")
            if percent.strip().isdecimal():  # else "[N/A]", or an error
                seconds = datetime.strptime(moment.strip(), "%Y/%m/%d %H:%M:%S.%f").timestamp()
                self.looks.append((seconds, float(percent)))

    def idle_share(self, start: float, end: float) -> float:
        """Return the percentage of the time between `start` and `end` in which no kernel ran."""
        if self.reason is not None:
            raise LeftOutError(self.reason)
        used = [percent for seconds, percent in self.looks if start <= seconds <= end]
        if not used:
            raise LeftOutError("nvidia-smi reported nothing for this time")
        return 100 - statistics.mean(used)


def memory(bench: Bench) -> None:
    """Run a step of a token's training at several batch sizes; report allocated and counted memory."""
    base_model = open_base_model(str(bench.pipeline_dir), "--pretrained_model_name_or_path")
    for is_checkpointed in (False, True):
        arguments = train_dsi.TrainingArguments(gradient_checkpointing=is_checkpointed)
        for size in (1,) if bench.is_tiny else BATCH_SIZES:
            run = forecast.DsiRun(bench.shape.resolution, size, bench.dtype)
            name = f"DSI step, batch {size}{', checkpointed' if is_checkpointed else ''}"
            step = partial(
                forecast.time_training, base_model, run, partial(train_dsi.prepare_unet, training_args=arguments),
                train_dsi.denoising_loss,
            )  # fmt: skip
            count = partial(forecast.count_training, base_model, run, is_checkpointed, train_dsi.denoising_loss)
            compare_memory(bench, name, step, count)
    run = forecast.DsiRun(bench.shape.resolution, 1, bench.dtype)
    compare_memory(
        bench, "VAE encoding, one image", partial(forecast.time_encoding, base_model, run),
        partial(count_one_encoding, base_model, run),
    )  # fmt: skip


def compare_memory(
    bench: Bench, name: str, compute: Callable[[Accelerator], float | None], count: Callable[[], forecast.Phase]
) -> None:
    """Report the memory of `compute`, and of `count`; `compute` returns images/s, or None if out of memory."""
    with bench.measuring(name):
        bench.require_seconds(8)
        rate = compute(Accelerator(mixed_precision=bench.precision, cpu=not bench.is_cuda))
        phase = count()
        counted = phase.weights + phase.activations + phase.gradients + phase.optimizer
        if rate is None:
            raise LeftOutError(f"out of memory; counted {gib(counted)} GiB")
        if not bench.is_cuda:
            bench.report(
                name, f"counted {gib(counted)} GiB, not measured on a CPU; {rate:.3g} images/s", counted=counted
            )
            return
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        bench.report(
            name, f"allocated {gib(allocated)} GiB, counted {gib(counted)} ({allocated / counted:.2f} times that); "
            f"reserved {gib(reserved)} GiB, forecast with the margin {gib(phase.needed)} GiB; {rate:.3g} images/s",
            allocated=allocated, reserved=reserved, counted=counted, needed=phase.needed, images_per_second=rate,
        )  # fmt: skip


def count_one_encoding(base_model, run: forecast.DsiRun) -> forecast.Phase:
    """Count the memory of `time_encoding`: `count_encoding` with a batch of one, without the mirrored copy."""
    return forecast.count_encoding(base_model, replace(run, num_copies=1), num_images=1)
