"""The argument groups of train_bridged.py; flags of stage 1 begin with bridge_."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers import TrainingArguments

from utils.cli.errors import UserError
from utils.cli.options import Need, option, with_flag, with_value, without_flag
from utils.cli.precision import choose_precision, recorded_precision
from utils.cli.threads import num_cores, num_local_processes
from utils.data.arguments import RealDataArguments
from utils.hub.targets import TO_PUBLISH
from utils.transfer.methods import (
    ALIGNMENTS,
    AUGMENTATIONS,
    BATCH_NORM_MODES,
    DEFAULT_METHOD,
    HEAD_INITS,
    METHODS,
    ONE_KIND_NORMS,
    Method,
)

MAX_WORKERS = 16
FOLLOWING_A_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules
WITHOUT_WARMUP = ("constant", *FOLLOWING_A_METRIC)
# optimisers to which the Trainer hands no betas and no epsilon
WITHOUT_ADAM = (
    "adafactor", "sgd", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
    "galore_adafactor", "galore_adafactor_layerwise", "lomo", "adalomo", "grokadamw", "schedule_free_sgd",
)  # fmt: skip
LIONS = ("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit")  # to which it hands no epsilon
# of the Trainer's arguments, those on which the weights of every stage depend and that a stage does not set itself
OF_EACH_STAGE = (
    "seed", "data_seed", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "lr_scheduler_type", "lr_scheduler_kwargs", "gradient_accumulation_steps", "dataloader_drop_last", "bf16", "fp16",
    "full_determinism",
)  # fmt: skip
# what is measured in an evaluation while a stage trains; top-5 above 5 classes only
METRICS = (
    "loss", "accuracy", "mean_per_class_accuracy", "macro_f1", "expected_calibration_error", "top5_accuracy",
)  # fmt: skip


def of_method(is_right: Callable[[Method], bool], lack: str, remedy: str = "") -> Need:
    """Return the need of a method of a kind; `lack` continues "--method x, which"."""

    def is_met(values: Mapping[str, object]) -> bool:
        changes = {name: values[name] for name in ("match_steps", "bridge_alignment") if values[name] is not None}
        return is_right(METHODS[values["method"]].with_flags(changes))

    return Need(f"with --method {{method}}, which {lack}", is_met, remedy)


def has_stage_1_steps(method: Method) -> bool:
    """Return whether the steps of stage 1 count: it is trained, or its steps are given to another stage."""
    return method.uses_synthetic or method.flags["match_steps"]


def of_both_stages(name: str) -> Need:
    """Return the need of a stage that takes a flag, not its `bridge_` one in its place."""

    def is_met(values: Mapping[str, object]) -> bool:
        return METHODS[values["method"]].trains_on_real or values[f"bridge_{name}"] is None

    return Need(f"with --method {{method}}, which trains on synthetic images alone, and --bridge_{name}", is_met)


def of_optim(*without: str) -> Need:
    """Return the need of an optimiser that is none of these, which do not take a flag."""
    return Need("with --optim {optim}, which does not take it", lambda values: values["optim"] not in without)


def never(lack: str) -> Need:
    """Return the need of a flag of the Trainer's that does nothing in our stages."""
    return Need(lack, lambda values: False)


ON_REAL = of_method(lambda method: method.trains_on_real, "trains on synthetic images alone")
OWN_STEPS = of_method(
    lambda method: (
        bool(method.kinds & {"real", "replayed"}) or ("both" in method.kinds and method.flags["match_steps"])
    ),
    "takes the steps of --bridge_num_train_epochs or --bridge_max_steps",
)
TRAINED = of_method(lambda method: method.takes_steps, "takes no optimiser step")
OWN_HEAD = of_method(
    lambda method: method.stages[-1].start is not None or method.stages[-1].head_init == "reset",
    "begins with the head of a probe",
)
ON_SYNTHETIC = of_method(lambda method: "synthetic" in method.kinds, "has no stage on synthetic images alone")
ALIGNED = of_method(
    lambda method: method.alignment is not None, "aligns no features", "add --bridge_alignment adversarial or coral or "
)
STAGE_1_STEPS = of_method(has_stage_1_steps, "takes no steps of a stage on synthetic images")
MATCHED_OR_STAGE_1 = of_method(
    lambda method: "synthetic" in method.kinds or method.flags["match_steps"],
    "has no stage on synthetic images alone, nor its steps",
)
WITH_SYNTHETIC = with_flag("synthetic_dataset")
WITH_PEFT = with_flag("use_peft")
WITH_WARMUP = Need(
    "with --lr_scheduler_type {lr_scheduler_type}, which has no warm-up",
    # these optimisers warm up by themselves
    lambda values: (
        values["lr_scheduler_type"] not in WITHOUT_WARMUP
        or values["optim"] in ("schedule_free_adamw", "schedule_free_sgd")
    ),
)
EVALUATED = with_value("eval_strategy", "steps", "epoch")
# the metric decides which checkpoint is kept, or what the learning rate is
JUDGED = Need(
    "with --save_strategy no and --lr_scheduler_type {lr_scheduler_type}",
    lambda values: values["save_strategy"] != "no" or values["lr_scheduler_type"] in FOLLOWING_A_METRIC,
)
WITH_METRIC = Need(
    "without --metric_for_best_model",
    lambda values: values["metric_for_best_model"] or values["lr_scheduler_type"] in FOLLOWING_A_METRIC,
    "add it or ",
)
WITH_TRACKER = Need("with --report_to none", lambda values: values["report_to"] != "none", "name a tracker or ")
WITH_WORKERS = Need(
    "with --dataloader_num_workers 0", lambda values: values["dataloader_num_workers"] > 0, "give more or "
)
PUBLISHED = [
    without_flag("dry_run"),
    without_flag("audit"),
    Need("with --no_do_train", lambda values: values["do_train"]),
]


@dataclass
class ModelArguments:
    """The pretrained classifier."""

    _argument_group_name = "model"

    model_name_or_path: str = option(
        "timm/resnet18.tv_in1k",
        "Pretrained image classifier of transformers or timm: a model id on the Hub, or a folder.",
    )
    model_revision: str | None = option(None, "Branch, tag or commit of the model.")
    trust_remote_code: bool = option(False, "Run code that comes with the model.")


@dataclass
class SyntheticDataArguments:
    """The labelled synthetic images."""

    _argument_group_name = "synthetic images"

    synthetic_dataset: str | None = option(
        None, "Synthetic set, as generate_synthetic.py wrote it: a folder or a data set id."
    )
    synthetic_dataset_revision: str | None = option(
        None, "Branch, tag or commit of the synthetic set on the Hub.", needs=[WITH_SYNTHETIC]
    )
    max_synthetic_samples_per_class: int | None = option(
        None, "Use the first so many synthetic images of each class; all when not given.",
        needs=[WITH_SYNTHETIC, STAGE_1_STEPS],
    )  # fmt: skip
    allow_missing_classes: bool = option(
        False, "Accept a synthetic set that lacks some of the real set's classes.", needs=[WITH_SYNTHETIC]
    )
    streaming: bool = option(
        False, "Read the synthetic images from the Hub as they are needed, not to the disk.", needs=[WITH_SYNTHETIC]
    )


@dataclass
class MethodArguments:
    """What is trained on what, in which order."""

    _argument_group_name = "method"

    method: str = option(
        DEFAULT_METHOD,
        "Which stages are trained on which images; the table above says it. Other flags win over its rows.",
        choices=METHODS,
    )
    head_init: str | None = option(
        None,
        "Head at the start of the second stage: fresh (the paper's), that of the first stage, the class means of "
        "the real images' features, or a logistic regression on these; the method's own when not given.",
        choices=HEAD_INITS,
        needs=[
            OWN_HEAD,
            of_method(lambda method: method.stages[-1].start is not None, "has a fresh head in its only stage"),
        ],
    )
    match_steps: bool | None = option(
        None, "Give methods of one stage the steps of both stages together; as the method says when not given.",
        needs=[
            TRAINED, of_method(lambda method: "synthetic" not in method.kinds, "has a stage on synthetic images alone"),
        ],
    )  # fmt: skip
    mix_ratio: float | None = option(
        None,
        "Synthetic images per real image in mix, above 0; those of the kind that is too few are repeated. "
        "As the method says when not given: each image once, but in mix_balanced.",
        needs=[of_method(lambda method: "both" in method.kinds, "has no stage on both kinds of images")],
    )
    average: float | None = option(
        None,
        "Average the weights of both stages: the share of the second's, above 0 and below 1 (WiSE-FT). The second has "
        "to keep the head of the first. As the method says when not given: none, but in wise_ft.",
    )


@dataclass
class StageArguments:
    """How the model is trained on real images (on both kinds, for mix), beside the Trainer's own flags."""

    _argument_group_name = "training on real images"

    head_learning_rate: float | None = option(
        None, "Learning rate of the head; 10 x --learning_rate for a fresh head, 1 x for another.",
        needs=[ON_REAL, TRAINED],
    )  # fmt: skip
    head_warmup_steps: float = option(
        0, "Steps that train the head alone first (LP-FT), 0 or more; below 1 a share of the steps.",
        needs=[ON_REAL, TRAINED],
    )  # fmt: skip
    freeze_backbone: bool = option(False, "Train the head only.", needs=[ON_REAL, TRAINED])
    mixup_alpha: float = option(0.0, "Mixup's Beta parameter; 0 turns it off.", needs=[ON_REAL, TRAINED])
    augmentation: str = option(
        "robust",
        "robust: crop, flip, colour and fine detail; basic: crop and flip, as run_image_classification.py; "
        "trivialaugment and randaugment: these after crop and flip.",
        choices=AUGMENTATIONS,
        needs=[ON_REAL, TRAINED],
    )
    batch_norm: str = option(
        "frozen",
        "BatchNorm statistics: those of the start, of each batch, or measured anew on the stage's images; domain, with "
        "bridged_replay: measured on each kind of images, for that kind.",
        choices=BATCH_NORM_MODES,
        needs=[ON_REAL],
    )
    dropout: float | None = option(
        None, "Dropout in both stages, in [0, 1); the model's own when not given.", needs=[TRAINED]
    )
    drop_path_rate: float | None = option(
        None, "Drop path in both stages, in [0, 1); the model's own when not given.", needs=[TRAINED]
    )
    ema_decay: float | None = option(
        None,
        "Decay of an exponential moving average of the weights, above 0 and below 1, less in the first steps; the "
        "last stage is evaluated and ends with it. As the method says when not given: none, but in ema.",
        needs=[ON_REAL, TRAINED],
    )


@dataclass
class BridgeStageArguments:
    """How the model is trained on synthetic images."""

    _argument_group_name = "training on synthetic images"

    bridge_num_train_epochs: float = option(
        5.0, "Epochs (over both kinds of images for mix); few, as there are many images.",
        needs=[STAGE_1_STEPS, without_flag("bridge_max_steps")],
    )  # fmt: skip
    bridge_max_steps: int | None = option(
        None,
        "Optimiser steps, in place of epochs. Methods that replay add those on real images, and share them all out.",
        needs=[STAGE_1_STEPS],
    )
    bridge_learning_rate: float | None = option(
        None,
        "Peak learning rate; --learning_rate when not given, and where that is not given either, 5e-4 for networks "
        "with BatchNorm, adapters and heads alone, 5e-5 for all weights of others.",
        needs=[ON_SYNTHETIC],
    )
    bridge_head_learning_rate: float | None = option(
        None, "Learning rate of the head, always a fresh one; 10 x when not given.", needs=[ON_SYNTHETIC]
    )
    bridge_weight_decay: float | None = option(
        None, "Weight decay; --weight_decay when not given.", needs=[ON_SYNTHETIC]
    )
    bridge_warmup_steps: float | None = option(
        None, "Warm-up, as --warmup_steps, which it is when not given.", needs=[ON_SYNTHETIC, WITH_WARMUP]
    )
    bridge_per_device_train_batch_size: int | None = option(
        None, "Images per device and step; --per_device_train_batch_size when not given.", needs=[MATCHED_OR_STAGE_1]
    )
    bridge_head_warmup_steps: float = option(
        0, "Steps that train the head alone first, 0 or more; below 1 a share of the steps.",
        needs=[MATCHED_OR_STAGE_1],
    )  # fmt: skip
    bridge_freeze_backbone: bool = option(False, "Train the head only.", needs=[ON_SYNTHETIC])
    bridge_mixup_alpha: float = option(
        0.2, "Mixup's Beta parameter; 0 turns it off. On by default, as in the paper.", needs=[ON_SYNTHETIC]
    )
    bridge_label_smoothing_factor: float = option(0.0, "Label smoothing, in [0, 1).", needs=[ON_SYNTHETIC])
    bridge_augmentation: str = option(
        "robust", "As --augmentation; robust, as synthetic images differ in these.", choices=AUGMENTATIONS,
        needs=[ON_SYNTHETIC],
    )  # fmt: skip
    bridge_batch_norm: str = option(
        "frozen",
        "As --batch_norm; frozen, as statistics of synthetic images harm on real ones. With --bridge_alignment, train "
        "takes those of both kinds together.",
        choices=ONE_KIND_NORMS,
        needs=[ON_SYNTHETIC],
    )
    bridge_alignment: str | None = option(
        None,
        "Make the features of synthetic images like those of the real training images, which are seen without labels: "
        "adversarial, by a domain classifier (Ganin et al. 2016), or coral, by covariances (Sun and Saenko 2016); "
        "the method's own when not given.",
        choices=ALIGNMENTS,
        needs=[ON_SYNTHETIC],
    )
    bridge_alignment_weight: float | None = option(
        None, "Weight of the alignment beside the loss of the classes, above 0; 1 when not given.", needs=[ALIGNED]
    )


@dataclass
class LoraArguments:
    """Train an adapter in place of all weights; flags as in TRL."""

    _argument_group_name = "LoRA"

    use_peft: bool = option(False, "One LoRA adapter through both stages, and the head.", needs=[TRAINED])
    lora_r: int = option(16, "Rank, above 0.", needs=[WITH_PEFT])
    lora_alpha: int = option(32, "Scale: the adapter counts alpha / rank.", needs=[WITH_PEFT])
    lora_dropout: float = option(0.05, "Dropout before the adapter, in [0, 1).", needs=[WITH_PEFT])
    lora_target_modules: list[str] | None = option(
        None, "Ends of layers' names to adapt; every linear layer and convolution but the head when not given.",
        needs=[WITH_PEFT],
    )  # fmt: skip


def default_num_workers() -> int:
    """Return how many processes read images ahead: on a CPU none, which would take its cores away."""
    import torch

    cores = num_cores() // num_local_processes()
    return max(0, min(MAX_WORKERS, cores - 1)) if torch.accelerator.is_available() else 0


@dataclass
class BridgedTrainingArguments(TrainingArguments):
    """Trainer's own flags, for both stages; `num_train_epochs`, `max_steps` and `learning_rate` are the second's."""

    _argument_group_name = "training"
    _inherited_free_options = (
        "push_to_hub", "hub_*", "log_*", "logging_*", "eval_*", "save_*", "trackio_*", "project", "run_name", "debug",
        "disable_tqdm", "skip_memory_metrics", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics",
        "metric_for_best_model", "greater_is_better", "dataloader_pin_memory", "dataloader_persistent_workers",
        "dataloader_prefetch_factor", "torch_empty_cache_steps", "ddp_timeout", "local_rank", "auto_find_batch_size",
    )  # fmt: skip
    _inherited_needs = {
        **dict.fromkeys(("hub_model_id", "hub_private_repo", "hub_revision"), TO_PUBLISH),
        **dict.fromkeys(
            ("hub_strategy", "hub_always_push"),
            [never("here, where the finished classifier is published, and nothing before")],
        ),
        "push_to_hub": PUBLISHED, "max_steps": [OWN_STEPS, TRAINED], "label_smoothing_factor": [ON_REAL, TRAINED],
        "eval_steps": [with_value("eval_strategy", "steps")], "eval_delay": [EVALUATED],
        "save_steps": [with_value("save_strategy", "steps")],
        "metric_for_best_model": [EVALUATED, JUDGED], "greater_is_better": [WITH_METRIC],
        "adam_beta1": [of_optim(*WITHOUT_ADAM)], "adam_beta2": [of_optim(*WITHOUT_ADAM)],
        "adam_epsilon": [of_optim(*WITHOUT_ADAM, *LIONS)],
        "run_name": [WITH_TRACKER],
        "auto_find_batch_size": [never("here, where a batch goes through the model in parts when memory is short")],
        "project": [with_value("report_to", "trackio", "all")],
        "dataloader_persistent_workers": [never("here, where workers stay as long as a stage lasts")],
        "dataloader_prefetch_factor": [WITH_WORKERS],
    }  # fmt: skip

    output_dir: str | None = option(
        None, "Output folder; '<synthetic set>-<method>' when not given.", affects_result=False
    )
    overwrite_output_dir: bool = option(False, "Start from scratch where there is a result.", affects_result=False)
    audit: bool = option(
        False, "Look for damaged images, copies and leaks between splits; train and write nothing.",
        affects_result=False,
    )  # fmt: skip
    dry_run: bool = option(
        False, "Show what --audit finds, and what the run needs in memory, time and disk, after two steps with random "
        "weights; train and write nothing.",
    )  # fmt: skip
    do_train: bool = option(True, "Train, then evaluate on the test images once.")
    do_eval: bool = option(
        False, "With --no_do_train: evaluate the finished classifier in --output_dir.", affects_result=False,
        needs=[Need("without --no_do_train", lambda values: not values["do_train"], "add it or ")],
    )  # fmt: skip
    per_device_train_batch_size: int = option(
        32, "Images per device and step.", needs=[of_both_stages("per_device_train_batch_size"), TRAINED]
    )
    per_device_eval_batch_size: int = option(128, "Images per device in evaluation.", affects_result=False)
    learning_rate: float | None = option(
        None,
        "Peak learning rate of AdamW; when not given, 2e-4 for networks with BatchNorm, adapters and heads "
        "alone, 2e-5 for all weights of others (ViT, Swin, ConvNeXt).",
        needs=[of_both_stages("learning_rate"), TRAINED],
    )
    num_train_epochs: float = option(
        30.0, "Epochs over the real images.",
        needs=[OWN_STEPS, TRAINED, Need("with --max_steps", lambda values: values["max_steps"] == -1)],
    )  # fmt: skip
    weight_decay: float = option(0.01, "Weight decay.", needs=[of_both_stages("weight_decay"), TRAINED])
    warmup_steps: float = option(
        0.1,
        "Warm-up: steps, or below 1 a share of all steps.",
        needs=[WITH_WARMUP, of_both_stages("warmup_steps"), TRAINED],
    )
    lr_scheduler_type: str = option("cosine", "Learning rate schedule.")
    logging_steps: float = option(0.05, "Log every so many steps, or below 1 this share.", affects_result=False)
    save_strategy: str = option("steps", "When to save checkpoints in the stages' folders.", affects_result=False)
    save_total_limit: int | None = option(
        1, "Checkpoints that are kept in each stage.", affects_result=False,
        needs=[with_value("save_strategy", "steps", "epoch", "best")],
    )  # fmt: skip
    resume_from_checkpoint: str | None = option(
        None, "'latest': go on with an unfinished run, in whichever stage it is.", affects_result=False
    )
    dataloader_num_workers: int = option(
        default_num_workers,
        "Processes that read images ahead, 0 or more; with a GPU one less than a process has cores.",
        affects_result=False,
    )
    cache_images: bool = option(
        False, "Decode all training images once, into a memory-mapped file whose size is printed first.",
        affects_result=False, needs=[without_flag("streaming")],
    )  # fmt: skip
    leep: bool | None = option(
        None,
        "Measure LEEP before and after stage 1, on the real training images; when not given, where there "
        "is such a stage.",
    )
    report_to: str = option("none", "Experiment tracker, as in transformers.", affects_result=False)
    max_eval_samples: int | None = option(
        None, "Use so many validation and test images, evenly spread; all when not given."
    )


def set_precision(training_args: BridgedTrainingArguments, given: set[str]) -> str | None:
    """Set the precision where no flag does, part of a run's options; return the line that says what was chosen.

    `given` are the names of the flags that are given.

    Raises:
        UserError: what is in the output folder is no record.
    """
    if given & {"bf16", "fp16"}:
        return None
    folder, start = training_args.output_dir, training_args.overwrite_output_dir
    recorded = None if start else recorded_precision(folder)
    precision, line = choose_precision(
        None, recorded, folder, use_cpu=training_args.use_cpu, to_change="--no_bf16 is float32"
    )
    if line is not None and precision != "no":  # else of a flag, of accelerate launch, or float32
        setattr(training_args, precision, True)
        training_args.mixed_precision = precision
    return line


# in the order of --help
GROUPS = {
    "model": ModelArguments, "real": RealDataArguments, "synthetic": SyntheticDataArguments, "method": MethodArguments,
    "stage": StageArguments, "bridge": BridgeStageArguments, "lora": LoraArguments,
    "training": BridgedTrainingArguments,
}  # fmt: skip


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
