"""Fine-tuning: the Trainer of a stage, with augmentation, soft labels, a head learning rate and exact resume."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, SequentialSampler, default_collate
from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from utils.cli.errors import DivergedError, UserError
from utils.cli.memory import SAME_STEP, MicroBatching, is_out_of_memory
from utils.cli.precision import allow_tf32
from utils.transfer.alignment import AlignedImages, CovarianceDistance, build_alignment
from utils.transfer.augmentation import BatchAugmentation, StreamedTrainImages, TrainImages, TrainItems
from utils.transfer.averaging import start_moving_average, swap_weights
from utils.transfer.class_weights import stage_weights
from utils.transfer.domain_norm import normalising_synthetic
from utils.transfer.evaluation import classification_metrics
from utils.transfer.image_format import EvalImages
from utils.transfer.methods import StageSettings
from utils.transfer.micro_batches import ADVICE, MicroBatchTrainer
from utils.transfer.model_parts import (
    base_classifier,
    batch_norm_modules,
    head_parameter_names,
    linear_heads,
    record_inputs,
)
from utils.transfer.replay import PairedItems, ReplayedImages, StreamedPairedItems
from utils.transfer.training_items import training_items
from utils.transfer.waiting import WaitingTime

INITIAL_SCALE = 2.0**16  # of torch's GradScaler
ALIGNMENT_FILE = "alignment.safetensors"  # in a checkpoint: the domain classifier
NO_ALIGNMENT = "--bridge_alignment: the head of {name} is not linear on one feature vector; choose none."
AVERAGE_NAME = "average.pt"
FITTED = "fitted_to_memory"  # in a checkpoint's state


@dataclass(frozen=True)
class StageResult:
    """What a stage did, in all its runs together; `log_history` is the Trainer's. `num_gpus` is 0 on a CPU.

    `fitted` is `MicroBatching.state`: what changed to save memory. `seconds_waiting` is the part of `seconds` in which
    the main process's device was idle, waiting for images; None for a stage of an earlier version.
    """

    num_steps: int
    num_images_seen: int
    seconds: float
    num_gpus: int
    log_history: list[dict]
    fitted: dict = field(default_factory=dict)
    seconds_waiting: float | None = None

    def to_dict(self) -> dict:
        """Return the entries for records; `fitted` only if something changed."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "fitted" or value}

    def summary(self) -> dict:
        """Return the entries for tables; GPU-hours are None without a GPU."""
        return {
            "steps": self.num_steps, "images_seen": self.num_images_seen, "seconds": self.seconds,
            "seconds_waiting": self.seconds_waiting,
            "gpu_hours": round(self.num_gpus * self.seconds / 3600, 4) if self.num_gpus else None, **self.fitted,
        }  # fmt: skip


def fine_tune(
    model: nn.Module, images: Dataset | IterableDataset, image_processor, settings: StageSettings,
    training_args: TrainingArguments, output_dir: str | Path, validation: Dataset | None = None,
    checkpoint: str | None = None,
) -> StageResult:  # fmt: skip
    """Train `model` in place on labelled images (columns `image`, `label`) and return what was done.

    `settings` override `training_args`, which give the rest: schedule, optimiser, precision, workers, logging, seed.
    `validation` is evaluated as `training_args.eval_strategy` says. Training resumes from a Trainer's `checkpoint` with
    the same settings. With `freeze_backbone`, only the head has gradients afterwards.

    Raises:
        UserError: training diverged, or took fewer steps than planned.
    """
    trainer = build_trainer(model, images, image_processor, settings, training_args, output_dir, validation)
    trainer.train_to_end(checkpoint)
    progress, state = trainer.progress, trainer.state
    result = StageResult(
        state.global_step, int(progress.num_images), round(progress.seconds, 2), count_gpus(trainer.args),
        state.log_history, trainer.micro_batching.state(), round(progress.waiting.seconds, 2),
    )  # fmt: skip
    accelerator = trainer.accelerator
    del trainer  # it has reference cycles and the loader's workers; free_memory collects garbage
    accelerator.free_memory()
    return result


def count_gpus(training_args: TrainingArguments) -> int:
    """Return the number of GPUs of all processes together, 0 on a CPU."""
    return 0 if training_args.device.type == "cpu" else training_args.world_size * max(1, training_args.n_gpu)


def build_trainer(
    model: nn.Module, images: Dataset | IterableDataset, image_processor, settings: StageSettings,
    training_args: TrainingArguments, output_dir: str | Path, validation: Dataset | None = None,
) -> "StageTrainer":  # fmt: skip
    """Return the Trainer of `fine_tune`, and prepare the model for it in place."""
    if settings.freeze_backbone:
        head = set(head_parameter_names(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in head)
    # channels last: convolutions are 1.8 times as fast on a CPU, other layers do not change
    model.to(memory_format=torch.channels_last)
    stage_args = _stage_arguments(settings, training_args, output_dir)
    if stage_args.tf32 is None:
        allow_tf32(stage_args.device)
    items = TrainItems(image_processor, settings.augmentation, settings.mixup_alpha, settings.random_flip)
    alignment = None
    if isinstance(images, AlignedImages):
        if stage_args.n_gpu > 1:
            raise UserError(
                f"--bridge_alignment {images.alignment.kind}: not possible on {stage_args.n_gpu} GPUs in one process; "
                "start with accelerate launch."
            )
        heads = linear_heads(model, NO_ALIGNMENT)
        alignment = build_alignment(images.alignment, sum(head.in_features for head in heads), stage_args.seed)
    trainer = StageTrainer(
        model=model, args=stage_args, train_dataset=training_items(images, items, settings, stage_args),
        eval_dataset=EvalImages(validation, image_processor) if validation is not None else None,
        data_collator=default_collate,
        compute_loss_func=partial(
            soft_cross_entropy, label_smoothing=settings.label_smoothing_factor,
            **({} if settings.class_weights is None else {
                "class_weights": stage_weights(images, model.config.num_labels)
            }),
        ),  # fmt: skip
        compute_metrics=lambda prediction: classification_metrics(prediction.predictions, prediction.label_ids),
        augmentation=BatchAugmentation(items.image_format, model.config.num_labels, stage_args.seed),
        freeze_batch_norm=settings.batch_norm != "train" or settings.freeze_backbone,
        head_learning_rate=settings.learning_rate * settings.head_learning_rate_factor, alignment=alignment,
        synthetic_statistics=images.statistics if isinstance(images, ReplayedImages) else None,
        ema_decay=settings.ema_decay,
    )  # fmt: skip
    if stage_args.logging_strategy == "no":
        trainer.remove_callback(PrinterCallback)  # it prints a summary in any case
    return trainer


def _stage_arguments(
    settings: StageSettings, training_args: TrainingArguments, output_dir: str | Path
) -> TrainingArguments:
    # a stage does not use the Hub, and a saved training_args.bin would contain the token
    return dataclasses.replace(
        training_args, output_dir=str(output_dir), max_steps=settings.max_steps, learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.per_device_train_batch_size, weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps, remove_unused_columns=False, ignore_data_skip=False,
        label_smoothing_factor=0.0,  # in our loss; the Trainer's does not work with a custom loss
        average_tokens_across_devices=True,  # as our loss assumes
        logging_nan_inf_filter=False,  # it hides losses that must end training, and costs GPU time
        dataloader_persistent_workers=training_args.dataloader_num_workers > 0,
        dataloader_pin_memory=training_args.dataloader_pin_memory and torch.accelerator.is_available(),
        push_to_hub=False, hub_token=None,
    )  # fmt: skip


class StageTrainer(MicroBatchTrainer):
    """A Trainer that augments batches, counts the images it trained on in `progress`, and stops when it diverges.

    Losses are checked when they are logged, the model before each checkpoint and at the end. The arguments must turn
    off `logging_nan_inf_filter`, which would replace losses that are not finite.

    When out of memory, a batch is still augmented as a whole, and goes through the model in parts.

    With `ema_decay`, the model ends with the moving average of its weights, which is also what is evaluated during
    training. Checkpoints contain both, the average in `AVERAGE_NAME`.
    """

    def __init__(
        self, *args, augmentation: BatchAugmentation, freeze_batch_norm: bool, head_learning_rate: float,
        alignment: nn.Module | None = None, synthetic_statistics: Mapping[str, torch.Tensor] | None = None,
        ema_decay: float | None = None, **kwargs,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.synthetic_statistics, self.kinds_in_batch = synthetic_statistics, {}
        self.alignment = self.align = alignment
        if alignment is not None:
            self.compute_loss_func = partial(self._aligned_loss, self.compute_loss_func)
            self.watched_heads, self.entered = linear_heads(self.model, NO_ALIGNMENT), {}
            if next(alignment.parameters(), None) is not None:
                self.align = self.accelerator.prepare_model(alignment)  # its gradients are averaged over processes too
                self.add_callback(ZeroGradients(alignment))
        self.augmentation = augmentation
        self.frozen_modules = batch_norm_modules(self.model) if freeze_batch_norm else []
        self.head_learning_rate = head_learning_rate
        self.last_inputs = None
        self.micro_batching = self._plan_micro_batches()
        self.progress = StageProgress(self.args.device, self.micro_batching)
        self.add_callback(self.progress)
        if isinstance(self.train_dataset, TrainImages):  # a stream counts its epochs itself
            self.add_callback(EpochCallback(self.train_dataset))
        # before accelerate wraps the model's forward pass
        self.average = None if ema_decay is None else start_moving_average(self.model, ema_decay)
        if self.average is not None:
            self.add_callback(AverageCallback(self.average))

    def _plan_micro_batches(self) -> MicroBatching:
        model, parts = base_classifier(self.model), []
        enable = None
        if model.supports_gradient_checkpointing and not self.args.gradient_checkpointing:
            enable = partial(model.gradient_checkpointing_enable, {"use_reentrant": False})
        if self._trained_batch_norm:
            parts.append("BatchNorm's statistics are")
            enable = None  # recomputed activations would count twice in them
        if isinstance(self.alignment, CovarianceDistance):
            parts.append("the covariances of the alignment are")
        caveat = f"a step has the same images, but {' and '.join(parts)} those of each part" if parts else SAME_STEP
        flag = f"--per_device_train_batch_size {self.args.per_device_train_batch_size}"
        return MicroBatching(self._train_batch_size, flag, ADVICE, enable, caveat)

    @property
    def _trained_batch_norm(self) -> list[nn.Module]:
        return [module for module in batch_norm_modules(self.model) if module not in self.frozen_modules]

    def train(self, *args, **kwargs):
        with ExitStack() as stack:
            if self.alignment is not None:
                self.entered = stack.enter_context(record_inputs(self.watched_heads))
            if self.synthetic_statistics is not None:
                own = self.synthetic_statistics
                stack.enter_context(normalising_synthetic(self.model, own, self.kinds_in_batch))
            return super().train(*args, **kwargs)

    def train_to_end(self, checkpoint: str | None) -> None:
        """Train all steps, or those after a checkpoint, and take the average of the weights if there is one.

        Raises:
            DivergedError: the loss or the weights are not finite.
            UserError: fewer steps were taken than planned.
        """
        self._train_all_steps(checkpoint)
        if self.average is not None:
            swap_weights(self.model, self.average.module)

    def _train_all_steps(self, checkpoint: str | None) -> None:
        # after the last step, the Trainer would take one more
        if checkpoint is not None:
            state = TrainerState.load_from_json(Path(checkpoint) / TRAINER_STATE_NAME)
            if state.global_step >= self.args.max_steps:
                self._load_from_checkpoint(checkpoint)
                self.state = state
                self.progress.restore(state)
                return
        started_at = self._copy_head()
        try:
            training_loss = self.train(resume_from_checkpoint=checkpoint).training_loss
        except DivergedError:
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # closes progress bar and trackers
            raise
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise self.micro_batching.refuse(
                "outside the forward and backward pass: in the optimiser, or in an evaluation "
                f"(--per_device_eval_batch_size {self.args.per_device_eval_batch_size})"
            ) from None
        except UserError as error:  # workers of the loader put a traceback before the message
            raise UserError(str(error).rpartition("UserError: ")[2]) from None
        self.check_finite(training_loss)
        if self.state.global_step < self.args.max_steps:
            raise UserError(
                f"--per_device_train_batch_size {self.args.per_device_train_batch_size}: only {self.state.global_step} "
                f"of {self.args.max_steps} steps were taken, as there are too few images; give fewer images per step."
            )
        # fp16 skips steps with infinite gradients, and each halves the scale of the loss
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() <= INITIAL_SCALE * 0.5**self.state.global_step:
            raise self._diverged("the gradients of every step are infinite")
        is_still = all(torch.allclose(*pair, rtol=1e-6, atol=1e-10) for pair in zip(started_at, self._copy_head()))
        if is_still and checkpoint is None and self.args.max_steps > 1:  # the first step of a warm-up has rate 0
            raise self._diverged("no weight of the head has moved", "higher")

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super().log(logs, *args, **kwargs)
        if not math.isfinite(logs.get("loss", 0.0)):  # the mean over all processes
            raise self._diverged(f"the loss is {logs['loss']}")

    def check_finite(self, training_loss: float = 0.0) -> None:
        """Check weights and losses of all processes.

        This includes the loss of the last batch with the current weights, as weights of 1e30 are finite.

        Raises:
            DivergedError: one of them is not finite.
        """
        tensors = [*self.model.parameters(), *(buffer for buffer in self.model.buffers() if buffer.is_floating_point())]
        values = {"a weight": get_total_norm(tensors, math.inf), "the loss": torch.tensor(training_loss)}
        if self.last_inputs is not None:  # None if the last step was taken in an earlier run
            self.model.eval()  # training_step sets it back
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = self.model(pixel_values=self.last_inputs["pixel_values"])
                values["the loss after the last step"] = soft_cross_entropy(outputs, self.last_inputs["labels"])
        own = torch.stack([value.to(self.args.device, torch.float32) for value in values.values()])
        for what, value in zip(values, self.accelerator.gather(own[None]).sum(0).tolist()):
            if not math.isfinite(value):
                raise self._diverged(f"{what} is {value}")

    def _copy_head(self) -> list[torch.Tensor]:
        """Return copies of the head's weights, which are small and trained in every stage."""
        head = set(head_parameter_names(self.model))
        return [value.detach().cpu().clone() for name, value in self.model.named_parameters() if name in head]

    def _diverged(self, what: str, right: str = "lower") -> DivergedError:
        advice = f"try a {right} rate (on synthetic images --bridge_learning_rate)"
        if right == "lower":
            advice += " or more --warmup_steps"
            if self.accelerator.scaler is not None:
                advice += ", or --bf16 instead of fp16"
        return DivergedError(
            f"--learning_rate {self.args.learning_rate:g}: {what} at step {self.state.global_step} of "
            f"{self.args.max_steps} in {Path(self.args.output_dir).name}; {advice}. Earlier checkpoints are kept."
        )

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Evaluate the average of the weights if there is one, as the stage ends with it."""
        if self.average is None:
            return super().evaluate(*args, **kwargs)
        swap_weights(self.model, self.average.module)
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            swap_weights(self.model, self.average.module)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        self.check_finite()  # else it might replace a good checkpoint
        super()._save_checkpoint(*args, **kwargs)

    def get_train_dataloader(self):
        # Workers get their seeds from this generator. They start again when a stage is resumed; seeds from torch's
        # global generator would change dropout
        generator = torch.Generator().manual_seed(self.args.seed)
        if not isinstance(self.train_dataset, StreamedTrainImages | StreamedPairedItems):
            loader = super().get_train_dataloader()
            loader.base_dataloader.generator = generator
            return loader
        # not prepared by accelerate, with which the first process would read for all
        num_workers = min(self.args.dataloader_num_workers, self.train_dataset.max_workers)
        return DataLoader(
            self.train_dataset, batch_size=self._train_batch_size, collate_fn=self.data_collator,
            num_workers=num_workers, pin_memory=self.args.dataloader_pin_memory, persistent_workers=num_workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor if num_workers else None, generator=generator,
        )  # fmt: skip

    def _get_train_sampler(self, train_dataset=None):
        if isinstance(self.train_dataset, PairedItems):
            return SequentialSampler(self.train_dataset)
        return super()._get_train_sampler(train_dataset)

    def get_batch_samples(self, *args, **kwargs):
        with self.progress.waiting:
            batches, num_images = super().get_batch_samples(*args, **kwargs)
        if num_images is not None:  # labels in all batches of the step on all processes
            num_seen = num_images if self.alignment is None else 2 * num_images
            self.progress.num_images = self.progress.num_images + num_seen
        return batches, num_images

    def trained_modules(self) -> list[nn.Module]:
        return [self.model] if self.alignment is None else [self.model, self.alignment]

    def changing_buffers(self) -> list[torch.Tensor]:
        return [buffer for module in self._trained_batch_norm for buffer in module.buffers()]

    def try_alone(self, *args) -> None:
        self.align, wrapped = self.alignment, self.align  # its gradients would wait for other processes too
        super().try_alone(*args)
        self.align = wrapped

    def augment(self, batch: dict) -> dict[str, torch.Tensor]:
        inputs = self._prepare_inputs(batch)
        with self.compute_loss_context_manager():
            extra = {"is_synthetic": inputs["is_synthetic"]} if "is_synthetic" in inputs else {}
            if "real" in inputs:
                extra["real"] = self._augment_unlabelled(inputs["real"])
            return self.augmentation(inputs) | extra

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            real, is_synthetic = inputs.pop("real", None), inputs.pop("is_synthetic", None)
            self.kinds_in_batch["is_synthetic"] = is_synthetic
            self.last_inputs = dict(inputs)  # a copy, as labels are removed from the original
            if real is not None:
                inputs["pixel_values"] = torch.cat([inputs["pixel_values"], real])
            # here, as training_step calls model.train() after all callbacks
            for module in self.frozen_modules:
                module.eval()
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.kinds_in_batch.clear()  # evaluation is on real images only

    def _augment_unlabelled(self, real: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the pixels of real images, augmented like the synthetic ones; Mixup is among themselves."""
        no_labels = torch.zeros(len(real["pixel_values"]), dtype=torch.int64, device=real["pixel_values"].device)
        return self.augmentation(real | {"labels": no_labels})["pixel_values"]

    def _aligned_loss(
        self, class_loss: Callable, outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the classification loss on the first images, which have labels, plus the alignment loss on all."""
        loss = class_loss({"logits": outputs["logits"][: len(labels)]}, labels, num_items_in_batch)
        if not self.model.training:
            return loss
        features = [self.entered.pop(head) for head in self.watched_heads]
        if any(one.ndim != 2 for one in features):
            raise UserError(NO_ALIGNMENT.format(name=base_classifier(self.model).config.name_or_path))
        synthetic, real = torch.cat(features, 1).split(len(labels))
        distance = self.align(synthetic, real, self.state.global_step / self.args.max_steps)
        return loss + distance * (1 if num_items_in_batch is None else len(labels) / num_items_in_batch)

    def create_optimizer(self, model=None):
        model = model or self.model
        head = set(head_parameter_names(self.model))
        decayed = set(self.get_decay_parameter_names(model))
        parameters = list(model.named_parameters())
        if self.alignment is not None:  # with the head's learning rate
            own = {name: f"alignment.{name}" for name, _ in self.alignment.named_parameters()}
            head |= set(own.values())
            decayed |= {own[name] for name in self.get_decay_parameter_names(self.alignment)}
            parameters += [(own[name], parameter) for name, parameter in self.alignment.named_parameters()]
        groups = {}
        for name, parameter in parameters:
            if parameter.requires_grad:
                groups.setdefault((name in head, name in decayed), []).append(parameter)
        rates, decays = (self.args.learning_rate, self.head_learning_rate), (0.0, self.args.weight_decay)
        groups = [
            {"params": parameters, "lr": rates[is_head], "weight_decay": decays[is_decayed]}
            for (is_head, is_decayed), parameters in groups.items()
        ]
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)  # before the Trainer's state, which marks a checkpoint as complete
        if self.alignment is not None and self.args.should_save:
            save_file(self.alignment.state_dict(), Path(output_dir) / ALIGNMENT_FILE)
        if self.average is not None and self.args.should_save:
            torch.save(self.average.state_dict(), Path(output_dir) / AVERAGE_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Restore every tensor; the Trainer would skip those whose names `from_pretrained` converts."""
        if self.alignment is not None:
            self.alignment.load_state_dict(load_file(Path(resume_from_checkpoint) / ALIGNMENT_FILE))
        if self.average is not None:
            path = Path(resume_from_checkpoint) / AVERAGE_NAME
            self.average.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        if isinstance(self.model, PeftModel):
            adapter = load_peft_weights(resume_from_checkpoint, device="cpu")
            assert not set_peft_model_state_dict(self.model, adapter).unexpected_keys
            return
        restored, info = type(self.model).from_pretrained(
            resume_from_checkpoint, dtype=self.model.dtype, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["mismatched_keys"], f"{resume_from_checkpoint}: {info}"
        self.model.load_state_dict(restored.state_dict())


class StageProgress(TrainerCallback, ExportableState):
    """Seconds and images of a stage over all its runs, and what fits in memory; saved in checkpoints."""

    def __init__(self, device: torch.device, micro_batching: MicroBatching | None = None):
        self.micro_batching = micro_batching
        self.num_images = 0
        self.seconds_before = 0.0
        self.started = None
        self.waiting = WaitingTime(device)

    @property
    def seconds(self) -> float:
        return self.seconds_before + (time.perf_counter() - self.started if self.started is not None else 0.0)

    def on_train_begin(self, args, state, control, **kwargs):
        self.restore(state)
        self.started = time.perf_counter()

    def restore(self, state: TrainerState) -> None:
        """Restore the values from a checkpoint's state; a fresh state has initial values."""
        earlier = state.stateful_callbacks[type(self).__name__]["attributes"]
        self.num_images, self.seconds_before = earlier["num_images"], earlier["seconds_before"]
        self.waiting.seconds = earlier.get("seconds_waiting", 0.0)
        if self.micro_batching is not None:
            self.micro_batching.restore(earlier.get(FITTED, {}))

    def state(self) -> dict:
        fitted = self.micro_batching.state() if self.micro_batching is not None else {}
        attributes = {
            "num_images": int(self.num_images), "seconds_before": self.seconds, "seconds_waiting": self.waiting.seconds,
        }  # fmt: skip
        return {"args": {}, "attributes": attributes | ({FITTED: fitted} if fitted else {})}


class ZeroGradients(TrainerCallback):
    """Clear the gradients before each step; the Trainer does so only for its model."""

    def __init__(self, module: nn.Module):
        self.module = module

    def on_step_begin(self, args, state, control, **kwargs):
        self.module.zero_grad()


class AverageCallback(TrainerCallback):
    """Update the moving average of the weights after each step, equally in every process."""

    def __init__(self, average: AveragedModel):
        self.average = average

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update_parameters(model)


class EpochCallback(TrainerCallback):
    """Set the epoch of the dataset; accelerate does so only in a single process."""

    def __init__(self, dataset: TrainImages):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch))  # 1.5 if a run is resumed in the middle of epoch 1


def soft_cross_entropy(
    outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None, label_smoothing: float = 0.0,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return the cross-entropy summed over the batch, divided by the number of images of the whole optimiser step.

    `labels` are `(batch,)` int or `(batch, classes)` probabilities. `num_items_in_batch` is the number of images in all
    batches of the step on all processes; the Trainer multiplies by the number of processes. The loss is divided by this
    number also with `class_weights` `(classes,)`, whose mean over all images is 1: so it does not matter how a step is
    divided into batches.
    """
    logits = outputs["logits"].float()
    if class_weights is not None:
        class_weights = class_weights.to(logits.device)
    total = nn.functional.cross_entropy(logits, labels, class_weights, reduction="sum", label_smoothing=label_smoothing)
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
