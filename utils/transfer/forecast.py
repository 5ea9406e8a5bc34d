"""Forecast of what training a classifier needs, without its weights: memory from shapes, time with random weights."""

import dataclasses
import time
from collections.abc import Sequence
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from utils.cli.errors import UserError
from utils.data.image_set import RealImages
from utils.forecast.costs import DiskUse
from utils.forecast.inputs import model_download
from utils.forecast.memory import count_forward, count_step, shapes_only, state_bytes, weight_bytes
from utils.forecast.report import MemoryForecast, Phase, TimeForecast
from utils.hub.repositories import Source
from utils.transfer.adapters import add_adapter
from utils.transfer.classifiers import build_classifier
from utils.transfer.fine_tuning import build_trainer, soft_cross_entropy
from utils.transfer.image_format import read_image_format
from utils.transfer.methods import StagePlan, StageSettings
from utils.transfer.model_parts import batch_norm_modules, head_parameter_names
from utils.transfer.rehearsal import naming_flag, trial_arguments
from utils.transfer.stage import Pretrained

NUM_TIMED_STEPS = 2
NUM_TIMED_IMAGES = 32
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def forecast_memory(
    pretrained: Pretrained, num_classes: int, stages: Sequence[StagePlan], training_args: TrainingArguments
) -> MemoryForecast:
    """Count the peak memory of a run: a step of the stage that needs most, and evaluation.

    Weights, gradients and optimiser states are float32, activations as under autocast in the run's precision. With an
    alignment, a step has as many real images in addition to those it trains on.
    """
    is_checkpointed = training_args.gradient_checkpointing
    trained = {  # equal stages are counted once
        (stage.settings.per_device_train_batch_size, stage.settings.freeze_backbone, stage.settings.ema_decay): stage
        for stage in stages
        if stage.settings.max_steps > 0
    }

    def count(checkpointed: bool) -> Phase | None:
        phases = [count_training(pretrained, num_classes, one, training_args, checkpointed) for one in trained.values()]
        return None if None in phases else max(phases, key=lambda phase: phase.needed)

    training = count(is_checkpointed)
    if training is None:
        raise UserError(f"--gradient_checkpointing: {pretrained.name} does not support it; leave the flag out.")
    return MemoryForecast(
        training, [count_evaluation(pretrained, num_classes, training_args)], count(not is_checkpointed),
        is_checkpointed, max(size for size, *_ in trained), "--per_device_train_batch_size",
    )  # fmt: skip


def count_training(
    pretrained: Pretrained, num_classes: int, stage: StagePlan, training_args: TrainingArguments, is_checkpointed: bool
) -> Phase | None:
    """Return a training step's memory, or None if it is to be checkpointed and the model does not support that."""
    settings, num_copies = stage.settings, 1 if stage.alignment is None else 2
    model = build(pretrained, num_classes, settings, "meta").train()
    if is_checkpointed:
        if not model.supports_gradient_checkpointing:
            return None
        model.gradient_checkpointing_enable()
    if settings.batch_norm != "train" or settings.freeze_backbone:
        for module in batch_norm_modules(model):
            module.eval()
    number = settings.per_device_train_batch_size
    height, width = read_image_format(pretrained.image_processor).size
    trained = sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)

    def compute_loss() -> torch.Tensor:
        images = torch.zeros(num_copies * number, 3, height, width)
        with _autocast(training_args):
            logits = model(pixel_values=images)["logits"]
        return soft_cross_entropy({"logits": logits[:number]}, torch.zeros(number, num_classes))

    weights = weight_bytes(model) * (1 if settings.ema_decay is None else 2)  # and their moving average
    with shapes_only(model):
        counted = count_step(compute_loss, list(model.parameters()))
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training_args, model)
    with naming_flag(f"--optim {training_args.optim.value}"):
        states = state_bytes(lambda parameters: optimizer_class(parameters, **options), trained)
    title = f"training, {number} images at a time" + (" and as many real ones" if num_copies > 1 else "")
    return Phase(title, weights, counted.peak - counted.gradients, counted.gradients, states)


def count_evaluation(pretrained: Pretrained, num_classes: int, training_args: TrainingArguments) -> Phase:
    """Return the memory of a batch in evaluation, without gradients or optimiser."""
    model = build(pretrained, num_classes, StageSettings(1, 0.0), "meta").eval()
    number, (height, width) = (
        training_args.per_device_eval_batch_size,
        read_image_format(pretrained.image_processor).size,
    )
    weights = weight_bytes(model)
    with shapes_only(model):
        peak = count_forward(lambda: model(pixel_values=torch.zeros(number, 3, height, width)))
    return Phase(f"evaluation, {number} images at a time", weights, peak)


def build(pretrained: Pretrained, num_classes: int, settings: StageSettings, device: str | torch.device) -> nn.Module:
    """Return the model of a stage with random weights (none on the meta device) and its frozen weights frozen."""
    model = build_classifier(
        pretrained.name, num_classes, device, dropout=settings.dropout, drop_path_rate=settings.drop_path_rate,
        **pretrained.hub_options,
    )  # fmt: skip
    if pretrained.lora is not None:
        with torch.device(device):
            model = add_adapter(model, pretrained.lora, 0, revision=pretrained.hub_options.get("revision"))
    if settings.freeze_backbone:
        head = set(head_parameter_names(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in head)
    return model


def _autocast(training_args: TrainingArguments) -> torch.autocast:
    dtype = DTYPES.get(training_args.mixed_precision)
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


def forecast_time(
    pretrained: Pretrained, real: RealImages, stages: Sequence[StagePlan], training_args: TrainingArguments,
    is_known: bool,
) -> TimeForecast:  # fmt: skip
    """Return how long all stages take at the speed of the last stage that takes steps.

    If the number of steps on synthetic images is unknown, only the speed is returned.

    Raises:
        UserError: what `time_training` raises.
    """
    trained = [stage for stage in stages if stage.settings.max_steps > 0]
    images_per_batch = training_args.world_size * training_args.gradient_accumulation_steps
    number = images_per_batch * sum(
        stage.settings.max_steps * stage.settings.per_device_train_batch_size for stage in trained
    )
    rate = time_training(pretrained, len(real.class_names), real.train, trained[-1].settings, training_args)
    steps = sum(stage.settings.max_steps for stage in trained)
    if not is_known:
        return TimeForecast("images: how many depends on the synthetic set", None, rate)
    return TimeForecast(f"images in {steps:,} steps of {', '.join(stage.name for stage in trained)}", number, rate)


def time_training(
    pretrained: Pretrained, num_classes: int, images: Dataset, settings: StageSettings, training_args: TrainingArguments
) -> float | None:
    """Return the training speed in images per second, all processes together, from two steps; None if out of memory.

    The steps use a stage's settings and images, with random weights. The time to read an image is measured too: with
    `--dataloader_num_workers`, images are read while steps run.

    Raises:
        UserError: an image is damaged, or the model cannot be trained.
    """
    batch_size, num_workers = settings.per_device_train_batch_size, training_args.dataloader_num_workers
    rows = [row % len(images) for row in range((NUM_TIMED_STEPS + 1) * batch_size * training_args.world_size)]
    settings = dataclasses.replace(
        settings, max_steps=NUM_TIMED_STEPS + 1, warmup_steps=0, head_learning_rate_factor=1.0, ema_decay=None
    )
    try:
        with TemporaryDirectory() as folder, naming_flag(f"--model_name_or_path {pretrained.name}", "two steps fail"):
            model = build(pretrained, num_classes, settings, "cpu")
            trainer = build_trainer(
                model, images.select(rows), pretrained.image_processor, settings, trial_arguments(training_args), folder
            )
            clock = StepClock()
            trainer.add_callback(clock)
            trainer.train()
            seconds = clock.seconds
            started = time.perf_counter()
            for index in range(min(NUM_TIMED_IMAGES, len(rows))):
                trainer.train_dataset[index]
            reading = batch_size * (time.perf_counter() - started) / min(NUM_TIMED_IMAGES, len(rows))
    except torch.OutOfMemoryError:
        return None
    if num_workers:
        seconds = max(seconds - reading, reading / num_workers)
    return training_args.world_size * batch_size / seconds


class StepClock(TrainerCallback):
    """Measures the seconds per step, without the first step, which warms up."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


def classifier_disk(source: Source) -> list[DiskUse]:
    """Return the download of a checkpoint's weights that are not in the cache."""
    names = source.list_files() if not source.is_local else []
    chosen = [name for name in names if name.endswith(".safetensors")] or [
        name for name in names if name.endswith(".bin")
    ]
    return model_download(source, [name for name in chosen if "/" not in name])


def outputs_disk(training: Phase, num_stages: int, training_args: TrainingArguments) -> DiskUse:
    """Return the disk space of the classifier, the stages' models and the kept checkpoints with optimiser states."""
    number = (num_stages + 1) * training.weights
    if training_args.save_strategy != "no":
        number += num_stages * (training_args.save_total_limit or 1) * (training.weights + training.optimizer)
    return DiskUse("classifier, stages and checkpoints", number, training_args.output_dir)
