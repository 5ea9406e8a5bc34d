"""A trial run of two images that shows in seconds what the model or the Trainer cannot do."""

import dataclasses
import gc
import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from utils.cli.errors import UserError
from utils.transfer.alignment import AlignedImages
from utils.transfer.evaluation import predict
from utils.transfer.fine_tuning import build_trainer
from utils.transfer.image_format import EvalImages
from utils.transfer.methods import Alignment, StagePlan, StageSettings
from utils.transfer.model_parts import imprint_head
from utils.transfer.probe import probe_head
from utils.transfer.stage import Pretrained, load_start

CLASS_NAMES = ["first", "second"]
NUM_STEPS = 100  # of the schedule that is tried
MAX_REASON = 300  # characters of a library's message
# errors that libraries raise for unsuitable models, packages or values
PROBLEMS = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError, AssertionError, OSError,
)  # fmt: skip


def rehearse(
    pretrained: Pretrained, settings: StageSettings, training_args: TrainingArguments,
    head_inits: Collection[str] = (), alignment: Alignment | None = None,
) -> None:  # fmt: skip
    """Train a checkpoint for one step on two generated images, evaluate it, and discard it.

    It is loaded and trained like a stage: on the same device, in the same precision, with the same optimiser, but not
    compiled. If `head_inits` contains imprint or probe, these are tried too, as is an `alignment`. No random state
    changes, nothing is written.

    Raises:
        UserError: something fails; the message names the flag.
    """
    stage = StagePlan("rehearsal", "real", "reset", dataclasses.replace(settings, max_steps=1))
    with _restored_state(training_args.device), TemporaryDirectory() as folder:
        pictures = _generate_pictures(2 * training_args.world_size)
        with naming_flag(f"--report_to {' '.join(training_args.report_to)}"):
            for callback in get_reporting_integration_callbacks(training_args.report_to):
                callback()
        with naming_flag(f"--model_name_or_path {pretrained.name}", "a trial run of two RGB images fails"):
            model = load_start(stage, None, pretrained, CLASS_NAMES, seed=0)
            images = list(EvalImages(pictures, pretrained.image_processor))
            predict(model, images)
            if "imprint" in head_inits:
                imprint_head(model, images)
            if "probe" in head_inits:
                probe_head(model, images)
            seen = pictures if alignment is None else AlignedImages(pictures, pictures, alignment)
            _train_one_step(model, seen, pictures, pretrained.image_processor, stage.settings, training_args, folder)
            del model


def _train_one_step(
    model, images: Dataset | AlignedImages, pictures: Dataset, image_processor, settings: StageSettings, training_args,
    folder: str,
) -> None:  # fmt: skip
    trial_args = trial_arguments(training_args)
    # the head's learning rate may be None until a stage is planned
    settings = dataclasses.replace(
        settings, per_device_train_batch_size=2, warmup_steps=0, head_learning_rate_factor=1.0
    )
    precision = training_args.mixed_precision  # from a flag or accelerate launch
    with naming_flag("training flags" if precision == "no" else f"--{precision}"):
        trainer = build_trainer(model, images, image_processor, settings, trial_args, folder, pictures)
    with naming_flag(f"--optim {training_args.optim.value}"):
        trainer.create_optimizer()
    schedule = training_args.lr_scheduler_type
    with naming_flag(
        f"--lr_scheduler_type {schedule.value} (--lr_scheduler_kwargs {training_args.lr_scheduler_kwargs})"
    ):
        get_scheduler(
            schedule, trainer.optimizer, num_warmup_steps=0, num_training_steps=NUM_STEPS,
            scheduler_specific_kwargs=training_args.lr_scheduler_kwargs,
        )  # fmt: skip
    trainer.train()
    if training_args.eval_strategy != "no":
        trainer.evaluate()


def trial_arguments(training_args: TrainingArguments) -> TrainingArguments:
    """Return the arguments of a trial run: without saving, evaluation, logging, compilation or prefetching."""
    return dataclasses.replace(
        training_args,
        per_device_eval_batch_size=2, gradient_accumulation_steps=1, dataloader_drop_last=False,
        dataloader_num_workers=0, dataloader_prefetch_factor=None, lr_scheduler_type="constant",
        lr_scheduler_kwargs=None, save_strategy="no", eval_strategy="no", eval_on_start=False, logging_strategy="no",
        logging_first_step=False, metric_for_best_model=None, greater_is_better=None, report_to="none",
        disable_tqdm=True, torch_compile=False, torch_compile_backend=None, torch_compile_mode=None,
    )  # fmt: skip


def _generate_pictures(number: int) -> Dataset:
    """Return noise images that are not square, with every class among them."""
    pixels = np.random.default_rng(0).integers(0, 256, (number, 48, 64, 3), dtype=np.uint8)
    rows = {"image": list(pixels), "label": [index % len(CLASS_NAMES) for index in range(number)]}
    return Dataset.from_dict(rows, Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES)}))


@contextmanager
def naming_flag(flag: str, what: str = "") -> Iterator[None]:
    """Turn an error of a library into one line that names a flag."""
    try:
        yield
    except UserError:
        raise
    except PROBLEMS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_REASON]
        raise UserError(f"{flag}: {what} ({reason})." if what else f"{flag}: {reason}") from error


@contextmanager
def _restored_state(device: torch.device) -> Iterator[None]:
    """Restore random states and free memory at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    freezes = gc.get_freeze_count() == 0
    if freezes:  # else each garbage collection, of which a Trainer makes some, takes seconds
        gc.freeze()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        gc.collect()  # a Trainer has reference cycles
        if freezes:
            gc.unfreeze()
        if device.type == "cuda":
            torch.cuda.empty_cache()
