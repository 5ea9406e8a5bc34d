"""The Trainer's flags as train_bridged.py takes them, with defaults of ours."""

import os
from dataclasses import dataclass, field

from transformers import TrainingArguments

from utils.cli.errors import UserError

MAX_WORKERS = 16
# what is measured in an evaluation while a stage trains; top-5 above 5 classes only
METRICS = (
    "loss", "accuracy", "mean_per_class_accuracy", "macro_f1", "expected_calibration_error", "top5_accuracy",
)  # fmt: skip


def default_num_workers() -> int:
    """Return how many processes read images ahead: on a CPU none, which would take its cores away."""
    import torch

    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, min(MAX_WORKERS, cores - 1)) if torch.accelerator.is_available() else 0


@dataclass
class BridgedTrainingArguments(TrainingArguments):
    """Trainer's own flags, for both stages; `num_train_epochs`, `max_steps` and `learning_rate` are the second's."""

    _argument_group_name = "training"

    output_dir: str | None = field(
        default=None, metadata={"help": "Output folder; '<synthetic set>-bridged' (the method's name) when not given."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Start from scratch where there is a result."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Look for damaged images, copies and leaks between splits; train and write nothing."},
    )
    do_train: bool = field(default=True, metadata={"help": "Train, then evaluate on the test images once."})
    do_eval: bool = field(
        default=False, metadata={"help": "With --no_do_train: evaluate the finished classifier in --output_dir."}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Images per device and step."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Images per device in evaluation."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of AdamW."})
    num_train_epochs: float = field(default=30.0, metadata={"help": "Epochs over the real images."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up: steps, or below 1 a share of all steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    logging_steps: float = field(default=0.05, metadata={"help": "Log every so many steps, or below 1 this share."})
    save_strategy: str = field(default="steps", metadata={"help": "When to save checkpoints in the stages' folders."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints that are kept in each stage."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "'latest': go on with an unfinished run, in whichever stage it is."}
    )
    dataloader_num_workers: int = field(
        default_factory=default_num_workers,
        metadata={"help": "Processes that read images ahead, 0 or more; with a GPU one less than a process has cores."},
    )
    report_to: str = field(default="none", metadata={"help": "Experiment tracker, as in transformers."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use so many validation and test images, evenly spread; all when not given."}
    )


def check_training_arguments(training_args: TrainingArguments) -> None:
    """Check those of the Trainer's flags that it looks at late, or that our stages do not know.

    Raises:
        UserError: one cannot be done.
    """
    resume, metric = training_args.resume_from_checkpoint, training_args.metric_for_best_model
    if training_args.load_best_model_at_end:
        raise UserError("--load_best_model_at_end: not offered; a stage ends with its last step.")
    if resume not in (None, "latest"):
        raise UserError(
            f"--resume_from_checkpoint {resume}: must be latest; a run goes on from its newest checkpoint, in "
            "whichever stage that is."
        )
    backend = training_args.torch_compile_backend
    if training_args.torch_compile and backend is not None:
        import torch._dynamo  # takes seconds

        if backend not in torch._dynamo.list_backends(exclude_tags=()):
            listed = ", ".join(torch._dynamo.list_backends())
            raise UserError(f"--torch_compile_backend {backend}: unknown; there are {listed}.")
    known = METRICS[:1] if training_args.prediction_loss_only else METRICS
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise UserError(f"--metric_for_best_model {metric}: is not measured; choose one of {', '.join(known)}.")
    if training_args.save_strategy == "best" and (metric is None or training_args.eval_strategy == "no"):
        raise UserError("--save_strategy best: needs --metric_for_best_model, and --eval_strategy steps or epoch.")
