"""One fine-tuning stage, called for synthetic and for real images: the only place that builds a Trainer."""

import dataclasses
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import default_collate
from transformers import PrinterCallback, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from utils.cli.errors import UserError
from utils.transfer.adapters import LoraSettings
from utils.transfer.augmentation import BatchAugmentation, StreamedTrainImages, TrainImages, TrainItems
from utils.transfer.classifiers import load_classifier
from utils.transfer.evaluation import classification_metrics
from utils.transfer.image_format import EvalImages
from utils.transfer.methods import StagePlan, StageSettings
from utils.transfer.model_parts import head_parameter_names, imprint_head, recalibrate_batch_norm
from utils.transfer.stage_folder import describe_stage, find_earlier_run, stage_folder
from utils.transfer.stage_models import load_start, load_trained, save_trained
from utils.transfer.stage_trainer import StageTrainer, soft_cross_entropy


@dataclass(frozen=True)
class StageResult:
    """What one stage did, all its runs together; `log_history` is the Trainer's. `num_gpus` is 0 on a CPU."""

    num_steps: int
    num_images_seen: int
    seconds: float
    num_gpus: int
    log_history: list[dict]

    def summary(self) -> dict:
        """Return what a table shows of it; GPU-hours are None without a GPU."""
        return {
            "steps": self.num_steps,
            "images_seen": self.num_images_seen,
            "seconds": self.seconds,
            "gpu_hours": round(self.num_gpus * self.seconds / 3600, 4) if self.num_gpus else None,
        }


def run_stage(
    stage: StagePlan,
    start: str | Path,
    class_names: list[str],
    images: Dataset | IterableDataset,
    image_processor,
    training_args: TrainingArguments,
    output_dir: str | Path,
    validation: Dataset | None = None,
    *,
    lora: LoraSettings | None = None,
    pretrained: str | None = None,
    resume: bool = False,
    **hub_options,
) -> tuple[nn.Module, StageResult]:
    """Fine-tune `start` on `images` as the plan says, and save the trained stage in `output_dir`, `stage.json` last.

    `start` is the pretrained checkpoint, or the folder of an earlier stage: a checkpoint or, with `lora`, the adapter
    that goes onto `pretrained`. With `resume` it goes on from what `output_dir` holds: a finished stage is loaded, from
    a checkpoint it is trained on with the same outcome as without a break; else the folder is cleared.

    Raises:
        UserError: the checkpoint is no image classifier; what is to be resumed was begun with other settings; the
            settings do not go together; training diverged.
    """
    _check_stream(stage, images)
    num_images = None if isinstance(images, IterableDataset) else len(images)
    settings = describe_stage(stage, start, class_names, num_images, training_args, lora, hub_options.get("revision"))
    folder = stage_folder(output_dir, settings)
    earlier, checkpoint = find_earlier_run(folder) if resume else (None, None)
    # the head of a later stage is not that of the first drawn once more, to which the features have come closer
    head_seed = training_args.seed if stage.start is None else zlib.crc32(f"{training_args.seed} {stage.name}".encode())
    load = partial(
        load_classifier,
        class_names=class_names,
        seed=head_seed,
        dropout=stage.settings.dropout,
        drop_path_rate=stage.settings.drop_path_rate,
        **hub_options,
    )
    if earlier is not None:
        return load_trained(output_dir, pretrained if lora else None, load), StageResult(**earlier)
    model = load_start(stage, start, lora, pretrained, head_seed, load, hub_options.get("revision"))
    if checkpoint is None:
        if PartialState().is_main_process:
            folder.begin()
        PartialState().wait_for_everyone()
        _prepare(model, stage, images, image_processor, training_args)
    result = fine_tune(
        model, images, image_processor, stage.settings, training_args, output_dir, validation, checkpoint=checkpoint
    )
    if PartialState().is_main_process:
        save_trained(model, image_processor, folder.path)
        folder.finish({"settings": settings, "result": dataclasses.asdict(result)})
    PartialState().wait_for_everyone()
    return model, result


def _check_stream(stage: StagePlan, images: Dataset | IterableDataset) -> None:
    if not isinstance(images, IterableDataset):
        return
    for flag, value, rest in (
        ("head_init", "imprint", "choose reset or keep"),
        ("batch_norm", "recalibrate", "choose frozen or train"),
    ):
        if value in (stage.head_init, stage.settings.batch_norm):
            raise UserError(f"--{flag} {value}: needs all images at once, which a stream does not give; {rest}.")


def _prepare(model: nn.Module, stage: StagePlan, images: Dataset, image_processor, training_args) -> None:
    """Set BatchNorm's statistics and the head from the stage's own images, where it asks for that, in place."""
    eval_images = EvalImages(images, image_processor)
    batch_size = training_args.per_device_eval_batch_size
    if stage.settings.batch_norm == "recalibrate":
        recalibrate_batch_norm(model, eval_images, training_args.device, training_args.seed, batch_size)
    if stage.head_init == "imprint":
        imprint_head(model, eval_images, batch_size)


def fine_tune(
    model: nn.Module,
    images: Dataset | IterableDataset,
    image_processor,
    settings: StageSettings,
    training_args: TrainingArguments,
    output_dir: str | Path,
    validation: Dataset | None = None,
    checkpoint: str | None = None,
) -> StageResult:
    """Train `model` in place on labelled images (columns `image`, `label`) and return what was done.

    `settings` go before `training_args`, which give the rest: schedule, optimiser, precision, workers, logging, seed.
    `validation` is evaluated when `training_args.eval_strategy` asks for it. Training goes on from a Trainer's
    `checkpoint` of the same settings. With `freeze_backbone`, all but the head is left without gradients.

    Raises:
        UserError: training diverged, or took fewer steps than planned.
    """
    trainer = build_trainer(model, images, image_processor, settings, training_args, output_dir, validation)
    trainer.train_to_the_end(checkpoint)
    progress, state, stage_args = trainer.progress, trainer.state, trainer.args
    num_gpus = 0 if stage_args.device.type == "cpu" else stage_args.world_size * max(1, stage_args.n_gpu)
    result = StageResult(
        state.global_step, int(progress.num_images), round(progress.seconds, 2), num_gpus, state.log_history
    )
    accelerator = trainer.accelerator
    del trainer  # which is full of cycles and holds the loader's workers: what follows collects garbage
    accelerator.free_memory()
    return result


def build_trainer(
    model: nn.Module,
    images: Dataset | IterableDataset,
    image_processor,
    settings: StageSettings,
    training_args: TrainingArguments,
    output_dir: str | Path,
    validation: Dataset | None = None,
) -> StageTrainer:
    """Return the Trainer of `fine_tune`, and prepare the model for it in place."""
    if settings.freeze_backbone:
        head = set(head_parameter_names(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in head)
    # channels last: 1.8 times as fast for convolutions on a CPU, without effect on other layers
    model.to(memory_format=torch.channels_last)
    stage_args = _stage_arguments(settings, training_args, output_dir)
    items = TrainItems(image_processor, settings.augmentation, settings.mixup_alpha, settings.random_flip)
    trainer = StageTrainer(
        model=model,
        args=stage_args,
        train_dataset=_train_dataset(images, items, stage_args),
        eval_dataset=EvalImages(validation, image_processor) if validation is not None else None,
        data_collator=default_collate,
        compute_loss_func=partial(soft_cross_entropy, label_smoothing=settings.label_smoothing_factor),
        compute_metrics=_metrics,
        augmentation=BatchAugmentation(items.image_format, model.config.num_labels, stage_args.seed),
        freeze_batch_norm=settings.batch_norm != "train" or settings.freeze_backbone,
        head_learning_rate=settings.learning_rate * settings.head_learning_rate_factor,
    )
    if stage_args.logging_strategy == "no":
        trainer.remove_callback(PrinterCallback)  # it prints a summary even so
    return trainer


def _stage_arguments(
    settings: StageSettings, training_args: TrainingArguments, output_dir: str | Path
) -> TrainingArguments:
    # the stage never talks to the Hub, and a saved training_args.bin would hold the token
    return dataclasses.replace(
        training_args,
        output_dir=str(output_dir),
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        remove_unused_columns=False,
        label_smoothing_factor=0.0,  # ours: the Trainer's does not go with a loss of one's own
        average_tokens_across_devices=True,  # so counts the loss
        ignore_data_skip=False,
        logging_nan_inf_filter=False,  # it hides losses that end training; and to look at each one takes a GPU's time
        dataloader_persistent_workers=training_args.dataloader_num_workers > 0,
        dataloader_pin_memory=training_args.dataloader_pin_memory and torch.accelerator.is_available(),
        push_to_hub=False,
        hub_token=None,
    )


def _train_dataset(
    images: Dataset | IterableDataset, items: TrainItems, stage_args: TrainingArguments
) -> TrainImages | StreamedTrainImages:
    if isinstance(images, IterableDataset):
        return StreamedTrainImages(images, items, stage_args.seed, stage_args.world_size, stage_args.process_index)
    return TrainImages(images, items, stage_args.seed)


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    return classification_metrics(prediction.predictions, prediction.label_ids)
