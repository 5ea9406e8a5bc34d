"""One fine-tuning stage, called for synthetic and for real images: the only place that builds a Trainer."""

import dataclasses
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from utils.transfer.classifiers import head_parameter_names, load_classifier
from utils.transfer.image_datasets import Collator, EvalImages, TrainImages, train_transform
from utils.transfer.methods import StagePlan, StageSettings
from utils.transfer.metrics import classification_metrics


@dataclass(frozen=True)
class StageResult:
    """What one stage did; `log_history` is the Trainer's."""

    num_steps: int
    num_images_seen: int
    seconds: float
    log_history: list[dict]

    def summary(self) -> dict:
        return {"steps": self.num_steps, "images_seen": self.num_images_seen, "seconds": self.seconds}


def run_stage(
    stage: StagePlan,
    start: str | Path,
    class_names: list[str],
    images: Dataset,
    image_processor,
    training_args: TrainingArguments,
    output_dir: str | Path,
    validation: Dataset | None = None,
    **hub_options,
) -> tuple[nn.Module, StageResult]:
    """Load the checkpoint `start`, with a fresh or a kept head as the plan says, and fine-tune it on `images`.

    Raises:
        UserError: the checkpoint is no image classifier.
    """
    model = load_classifier(str(start), class_names, stage.head_init == "reset", training_args.seed, **hub_options)
    return model, fine_tune(model, images, image_processor, stage.settings, training_args, output_dir, validation)


def fine_tune(
    model: nn.Module,
    images: Dataset,
    image_processor,
    settings: StageSettings,
    training_args: TrainingArguments,
    output_dir: str | Path,
    validation: Dataset | None = None,
) -> StageResult:
    """Train `model` in place on labelled images (columns `image`, `label`) and return what was done.

    `training_args` gives batch size, schedule, optimiser, logging and seed; steps and learning rate come from
    `settings`. `validation` is evaluated when `training_args.eval_strategy` asks for it.
    """
    # the stage never talks to the Hub, and a saved training_args.bin would hold the token
    stage_args = dataclasses.replace(
        training_args,
        output_dir=str(output_dir),
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        remove_unused_columns=False,
        label_smoothing_factor=0.0,  # ours: the Trainer's does not go with a loss of one's own
        dataloader_pin_memory=training_args.dataloader_pin_memory and torch.accelerator.is_available(),
        push_to_hub=False,
        hub_token=None,
    )
    # channels last: 1.8 times as fast for convolutions on a CPU, without effect on other layers
    model.to(memory_format=torch.channels_last)
    train_dataset = TrainImages(images, train_transform(image_processor), stage_args.seed, settings.mixup_alpha)
    trainer = StageTrainer(
        model=model,
        args=stage_args,
        train_dataset=train_dataset,
        eval_dataset=EvalImages(validation, image_processor) if validation is not None else None,
        data_collator=Collator(model.config.num_labels),
        compute_loss_func=partial(soft_cross_entropy, label_smoothing=training_args.label_smoothing_factor),
        compute_metrics=_metrics,
        callbacks=[_EpochCallback(train_dataset)],
        freeze_batch_norm=settings.batch_norm == "frozen",
        head_learning_rate=settings.learning_rate * settings.head_learning_rate_factor,
    )
    if stage_args.logging_strategy == "no":
        trainer.remove_callback(PrinterCallback)  # it prints a summary even so
    started = time.perf_counter()
    trainer.train()
    seconds = round(time.perf_counter() - started, 2)
    num_images = _num_images_seen(len(images), trainer.state.global_step, stage_args)
    trainer.accelerator.free_memory()
    return StageResult(trainer.state.global_step, num_images, seconds, trainer.state.log_history)


class StageTrainer(Trainer):
    """A Trainer with frozen BatchNorm statistics and a learning rate of its own for the head."""

    def __init__(self, *args, freeze_batch_norm: bool, head_learning_rate: float, **kwargs):
        self.freeze_batch_norm = freeze_batch_norm
        self.head_learning_rate = head_learning_rate
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.freeze_batch_norm and model.training:
            # here, because training_step calls model.train() after every callback
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def create_optimizer(self, model=None):
        model = model or self.model
        head = set(head_parameter_names(self.model))
        decayed = set(self.get_decay_parameter_names(model))
        groups = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((name in head, name in decayed), []).append(parameter)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(
            [
                {
                    "params": parameters,
                    "lr": self.head_learning_rate if is_head else self.args.learning_rate,
                    "weight_decay": self.args.weight_decay if is_decayed else 0.0,
                }
                for (is_head, is_decayed), parameters in groups.items()
            ],
            **options,
        )
        return self.optimizer


def soft_cross_entropy(
    outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Return the cross-entropy summed over the batch, divided by the number of images of the whole optimiser step.

    `labels` are `(batch,)` int or `(batch, classes)` probabilities. The Trainer counts label elements, so soft labels
    count once a class; it multiplies by the number of processes itself.
    """
    logits = outputs["logits"].float()
    total = nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    if num_items_in_batch is None:
        return total / len(labels)
    return total / (num_items_in_batch / (labels.shape[1] if labels.ndim == 2 else 1))


class _EpochCallback(TrainerCallback):
    """Tell the data set its epoch; accelerate does so in a single process only."""

    def __init__(self, dataset: TrainImages):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(round(state.epoch))


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    return classification_metrics(prediction.predictions, prediction.label_ids)


def steps_per_epoch(num_images: int, training_args: TrainingArguments) -> int:
    """Return the optimiser steps of one epoch, over all processes."""
    batches = math.ceil(num_images / (training_args.per_device_train_batch_size * training_args.world_size))
    return math.ceil(batches / training_args.gradient_accumulation_steps)


def _num_images_seen(num_images: int, num_steps: int, training_args: TrainingArguments) -> int:
    epochs, rest = divmod(num_steps, steps_per_epoch(num_images, training_args))
    batch = training_args.per_device_train_batch_size * training_args.world_size
    return epochs * num_images + min(num_images, rest * batch * training_args.gradient_accumulation_steps)
