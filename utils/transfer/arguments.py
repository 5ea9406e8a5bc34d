"""The argument groups of train_bridged.py; flags of stage 1 start with bridge_."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers import TrainingArguments

from utils.cli.errors import UserError
from utils.cli.options import Need, option, with_flag, with_value, without_flag
from utils.cli.precision import choose_precision, recorded_precision
from utils.cli.threads import num_cores, num_local_processes
from utils.data.arguments import RealDataArguments
from utils.hub.targets import WITH_PUSH_TO_HUB
from utils.transfer.methods import (
    ALIGNMENTS,
    AUGMENTATIONS,
    BATCH_NORM_MODES,
    CLASS_WEIGHTS,
    DEFAULT_METHOD,
    HEAD_INITS,
    METHODS,
    ONE_KIND_NORMS,
    Method,
)

MAX_WORKERS = 16
FOLLOWING_A_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules
WITHOUT_WARMUP = ("constant", *FOLLOWING_A_METRIC)
# optimisers to which the Trainer passes neither betas nor epsilon
WITHOUT_ADAM = (
    "adafactor", "sgd", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
    "galore_adafactor", "galore_adafactor_layerwise", "lomo", "adalomo", "grokadamw", "schedule_free_sgd",
)  # fmt: skip
LIONS = ("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit")  # to which it passes no epsilon
# the Trainer's arguments that affect the weights of every stage and that a stage does not set itself
OF_EACH_STAGE = (
    "seed", "data_seed", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "lr_scheduler_type", "lr_scheduler_kwargs", "gradient_accumulation_steps", "dataloader_drop_last", "bf16", "fp16",
    "full_determinism",
)  # fmt: skip
# measured in an evaluation during a stage; top-5 only with more than 5 classes
METRICS = (
    "loss", "accuracy", "mean_per_class_accuracy", "macro_f1", "expected_calibration_error", "top5_accuracy",
)  # fmt: skip


def needs_method(is_suitable: Callable[[Method], bool], lack: str, remedy: str = "") -> Need:
    """Return the need of a suitable method; `lack` says why another is not, after "--method x, which"."""

    def is_met(values: Mapping[str, object]) -> bool:
        changes = {name: values[name] for name in ("match_steps", "bridge_alignment") if values[name] is not None}
        return is_suitable(METHODS[values["method"]].with_flags(changes))

    return Need(f"with --method {{method}}, which {lack}", is_met, remedy)


def has_stage_1_steps(method: Method) -> bool:
    """Return whether the steps of stage 1 matter: it is trained, or another stage takes its steps."""
    return method.uses_synthetic or method.flags["match_steps"]


def needs_shared_flag(name: str) -> Need:
    """Return the need of a stage that takes the flag `name` and not `bridge_<name>`."""

    def is_met(values: Mapping[str, object]) -> bool:
        return METHODS[values["method"]].trains_on_real or values[f"bridge_{name}"] is None

    return Need(f"with --method {{method}}, which trains on synthetic images alone, and --bridge_{name}", is_met)


def needs_optim_except(*without: str) -> Need:
    """Return the need of an optimiser other than these, which do not take a flag."""
    return Need("with --optim {optim}, which does not take it", lambda values: values["optim"] not in without)


def unsupported(lack: str) -> Need:
    """Return the need of a flag of the Trainer that has no effect in our stages; it is never met."""
    return Need(lack, lambda values: False)


ON_REAL = needs_method(lambda method: method.trains_on_real, "trains on synthetic images alone")
OWN_STEPS = needs_method(
    lambda method: (
        bool(method.kinds & {"real", "replayed"}) or ("both" in method.kinds and method.flags["match_steps"])
    ),
    "takes the steps of --bridge_num_train_epochs or --bridge_max_steps",
)
TRAINED = needs_method(lambda method: method.takes_steps, "takes no optimiser step")
OWN_HEAD = needs_method(
    lambda method: method.stages[-1].start is not None or method.stages[-1].head_init == "reset",
    "starts from the head of a probe",
)
ON_SYNTHETIC = needs_method(lambda method: "synthetic" in method.kinds, "has no stage on synthetic images alone")
ALIGNED = needs_method(
    lambda method: method.alignment is not None, "aligns no features", "add --bridge_alignment adversarial or coral or "
)
STAGE_1_STEPS = needs_method(has_stage_1_steps, "takes no steps of a stage on synthetic images")
MATCHED_OR_STAGE_1 = needs_method(
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
# the metric decides which checkpoint is kept, or the learning rate
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
    trust_remote_code: bool = option(False, "Run code from the model's repository.")


@dataclass
class SyntheticDataArguments:
    """The labelled synthetic images."""

    _argument_group_name = "synthetic images"

    synthetic_dataset: str | None = option(
        None, "Synthetic set written by generate_synthetic.py: a folder or a dataset id."
    )
    synthetic_dataset_revision: str | None = option(
        None, "Branch, tag or commit of the synthetic set on the Hub.", needs=[WITH_SYNTHETIC]
    )
    max_synthetic_samples_per_class: int | None = option(
        None, "Use this many synthetic images per class, the first ones (default: all).",
        needs=[WITH_SYNTHETIC, STAGE_1_STEPS],
    )  # fmt: skip
    allow_missing_classes: bool = option(
        False, "Accept a synthetic set that lacks some classes of the real set.", needs=[WITH_SYNTHETIC]
    )
    streaming: bool = option(
        False, "Read the synthetic images from the Hub during training, without storing them.", needs=[WITH_SYNTHETIC]
    )
    use_rejected: bool | None = option(
        None, "Train on all synthetic images, also on those rejected in a review or left out by their scores.",
        needs=[WITH_SYNTHETIC],
    )  # fmt: skip


@dataclass
class MethodArguments:
    """The method: which stages train on which images."""

    _argument_group_name = "method"

    method: str = option(
        DEFAULT_METHOD,
        "Which stages are trained on which images, see the table above. Other flags override its rows.",
        choices=METHODS,
    )
    head_init: str | None = option(
        None,
        "Head at the start of the second stage: reset is a fresh one (as in the paper), keep that of the first stage, "
        "imprint the class means of the real images' features, probe a logistic regression on these (default: the "
        "method's).",
        choices=HEAD_INITS,
        needs=[
            OWN_HEAD,
            needs_method(lambda method: method.stages[-1].start is not None, "has a fresh head in its only stage"),
        ],
    )
    match_steps: bool | None = option(
        None, "Give methods with one stage the steps of both stages together (default: the method's).",
        needs=[
            TRAINED,
            needs_method(lambda method: "synthetic" not in method.kinds, "has a stage on synthetic images alone"),
        ],
    )  # fmt: skip
    mix_ratio: float | None = option(
        None,
        "Synthetic images per real image in mix, above 0; images of the kind with too few are repeated (default: the "
        "method's, which is each image once except in mix_balanced).",
        needs=[needs_method(lambda method: "both" in method.kinds, "has no stage on both kinds of images")],
    )
    average: float | None = option(
        None,
        "Average the weights of both stages: the share of the second, above 0 and below 1 (WiSE-FT). The second must "
        "keep the head of the first (default: the method's, which is no average except in wise_ft).",
    )


@dataclass
class StageArguments:
    """Training on real images (for mix, on both kinds), in addition to the Trainer's flags."""

    _argument_group_name = "training on real images"

    head_learning_rate: float | None = option(
        None, "Learning rate of the head (default: 10 x --learning_rate for a fresh head, 1 x otherwise).",
        needs=[ON_REAL, TRAINED],
    )  # fmt: skip
    head_warmup_steps: float = option(
        0, "Steps that first train the head alone (LP-FT), 0 or more; below 1, a share of the steps.",
        needs=[ON_REAL, TRAINED],
    )  # fmt: skip
    freeze_backbone: bool = option(False, "Train only the head.", needs=[ON_REAL, TRAINED])
    mixup_alpha: float = option(0.0, "Beta parameter of Mixup, 0 or more; 0 turns it off.", needs=[ON_REAL, TRAINED])
    augmentation: str = option(
        "robust",
        "robust: crop, flip, color and fine detail; basic: crop and flip, as in run_image_classification.py; "
        "trivialaugment and randaugment: these policies after crop and flip.",
        choices=AUGMENTATIONS,
        needs=[ON_REAL, TRAINED],
    )
    batch_norm: str = option(
        "frozen",
        "BatchNorm statistics: frozen keeps those at the start, train uses those of each batch, recalibrate measures "
        "them on the stage's images; domain, with bridged_replay, measures them for each kind of images.",
        choices=BATCH_NORM_MODES,
        needs=[ON_REAL],
    )
    dropout: float | None = option(None, "Dropout in both stages, in [0, 1) (default: the model's).", needs=[TRAINED])
    drop_path_rate: float | None = option(
        None, "Drop path in both stages, in [0, 1) (default: the model's).", needs=[TRAINED]
    )
    class_weights: str | None = option(
        None,
        "balanced: each stage weights the loss of an image by the inverse frequency of its class among the images of "
        "the stage, so that rare classes count as much as common ones (default: equal weights).",
        choices=CLASS_WEIGHTS,
        needs=[TRAINED],
    )
    ema_decay: float | None = option(
        None,
        "Decay of an exponential moving average of the weights, above 0 and below 1, lower in the first steps; the "
        "last stage is evaluated and ends with it (default: the method's, which is none except in ema).",
        needs=[ON_REAL, TRAINED],
    )


@dataclass
class BridgeStageArguments:
    """Training on synthetic images."""

    _argument_group_name = "training on synthetic images"

    bridge_num_train_epochs: float = option(
        5.0, "Epochs (for mix, over both kinds of images); few, as there are many images.",
        needs=[STAGE_1_STEPS, without_flag("bridge_max_steps")],
    )  # fmt: skip
    bridge_max_steps: int | None = option(
        None,
        "Optimizer steps, instead of epochs. Methods with replay (bridged_replay and its variants) add the steps on "
        "real images, and divide the sum between the stages by their own rule.",
        needs=[STAGE_1_STEPS],
    )
    bridge_learning_rate: float | None = option(
        None,
        "Peak learning rate (default: --learning_rate if given, else 5e-4 for networks with BatchNorm, adapters and "
        "heads alone, 5e-5 for all weights of others).",
        needs=[ON_SYNTHETIC],
    )
    bridge_head_learning_rate: float | None = option(
        None,
        "Learning rate of the head, which is always fresh (default: 10 x --bridge_learning_rate).",
        needs=[ON_SYNTHETIC],
    )
    bridge_weight_decay: float | None = option(None, "Weight decay (default: --weight_decay).", needs=[ON_SYNTHETIC])
    bridge_warmup_steps: float | None = option(
        None,
        "Warm-up: steps, or below 1 a share of all steps (default: --warmup_steps).",
        needs=[ON_SYNTHETIC, WITH_WARMUP],
    )
    bridge_per_device_train_batch_size: int | None = option(
        None, "Images per device and step (default: --per_device_train_batch_size).", needs=[MATCHED_OR_STAGE_1]
    )
    bridge_head_warmup_steps: float = option(
        0, "Steps that first train the head alone, 0 or more; below 1, a share of the steps.",
        needs=[MATCHED_OR_STAGE_1],
    )  # fmt: skip
    bridge_freeze_backbone: bool = option(False, "Train only the head.", needs=[ON_SYNTHETIC])
    bridge_mixup_alpha: float = option(
        0.2, "Beta parameter of Mixup, 0 or more; 0 turns it off. On by default, as in the paper.", needs=[ON_SYNTHETIC]
    )
    bridge_label_smoothing_factor: float = option(0.0, "Label smoothing, in [0, 1).", needs=[ON_SYNTHETIC])
    bridge_augmentation: str = option(
        "robust",
        "As --augmentation; robust by default, as synthetic images differ in color and fine detail.",
        choices=AUGMENTATIONS,
        needs=[ON_SYNTHETIC],
    )
    bridge_batch_norm: str = option(
        "frozen",
        "As --batch_norm; frozen by default, as statistics of synthetic images do not suit real ones. With "
        "--bridge_alignment, train uses those of both kinds together.",
        choices=ONE_KIND_NORMS,
        needs=[ON_SYNTHETIC],
    )
    bridge_alignment: str | None = option(
        None,
        "Align the features of synthetic images with those of the real training images, used without labels: "
        "adversarial, by a domain classifier (Ganin et al. 2016), or coral, by covariances (Sun and Saenko 2016) "
        "(default: the method's).",
        choices=ALIGNMENTS,
        needs=[ON_SYNTHETIC],
    )
    bridge_alignment_weight: float | None = option(
        None, "Weight of the alignment relative to the classification loss, above 0 (default: 1).", needs=[ALIGNED]
    )


@dataclass
class LoraArguments:
    """Train an adapter instead of all weights; flags as in TRL."""

    _argument_group_name = "LoRA"

    use_peft: bool = option(False, "Train one LoRA adapter and the head, in both stages.", needs=[TRAINED])
    lora_r: int = option(16, "Rank, above 0.", needs=[WITH_PEFT])
    lora_alpha: int = option(32, "Scale: the adapter is multiplied by alpha / rank.", needs=[WITH_PEFT])
    lora_dropout: float = option(0.05, "Dropout before the adapter, in [0, 1).", needs=[WITH_PEFT])
    lora_target_modules: list[str] | None = option(
        None, "Endings of the names of layers to adapt (default: all linear layers and convolutions except the head).",
        needs=[WITH_PEFT],
    )  # fmt: skip


def default_num_workers() -> int:
    """Return the default number of loader workers: none on a CPU, where they would compete for its cores."""
    import torch

    cores = num_cores() // num_local_processes()
    return max(0, min(MAX_WORKERS, cores - 1)) if torch.accelerator.is_available() else 0


@dataclass
class BridgedTrainingArguments(TrainingArguments):
    """The Trainer's flags, for both stages; `num_train_epochs`, `max_steps` and `learning_rate` are for the second."""

    _argument_group_name = "training"
    _inherited_free_options = (
        "push_to_hub", "hub_*", "log_*", "logging_*", "eval_*", "save_*", "trackio_*", "project", "run_name", "debug",
        "disable_tqdm", "skip_memory_metrics", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics",
        "metric_for_best_model", "greater_is_better", "dataloader_pin_memory", "dataloader_persistent_workers",
        "dataloader_prefetch_factor", "torch_empty_cache_steps", "ddp_timeout", "local_rank", "auto_find_batch_size",
    )  # fmt: skip
    _inherited_needs = {
        **dict.fromkeys(("hub_model_id", "hub_private_repo", "hub_revision"), WITH_PUSH_TO_HUB),
        **dict.fromkeys(
            ("hub_strategy", "hub_always_push"),
            [unsupported("here, where only the finished classifier is published")],
        ),
        "push_to_hub": PUBLISHED, "max_steps": [OWN_STEPS, TRAINED], "label_smoothing_factor": [ON_REAL, TRAINED],
        "eval_steps": [with_value("eval_strategy", "steps")], "eval_delay": [EVALUATED],
        "save_steps": [with_value("save_strategy", "steps")],
        "metric_for_best_model": [EVALUATED, JUDGED], "greater_is_better": [WITH_METRIC],
        "adam_beta1": [needs_optim_except(*WITHOUT_ADAM)], "adam_beta2": [needs_optim_except(*WITHOUT_ADAM)],
        "adam_epsilon": [needs_optim_except(*WITHOUT_ADAM, *LIONS)],
        "run_name": [WITH_TRACKER],
        "auto_find_batch_size": [unsupported("here, where a batch goes through the model in parts when out of memory")],
        "project": [with_value("report_to", "trackio", "all")],
        "dataloader_persistent_workers": [unsupported("here, where workers persist for a whole stage")],
        "dataloader_prefetch_factor": [WITH_WORKERS],
    }  # fmt: skip

    output_dir: str | None = option(None, "Output folder (default: '<synthetic set>-<method>').", affects_result=False)
    overwrite_output_dir: bool = option(False, "Start from scratch if there is a result.", affects_result=False)
    audit: bool = option(
        False, "Look for damaged images, copies, leaks between splits and doubtful class names; train nothing.",
        affects_result=False,
    )  # fmt: skip
    write_class_names: str | None = option(
        None, "Write the nouns of the classes to this YAML file, to edit and pass as --class_names_file to the other "
        "scripts; an existing file is kept.", affects_result=False, needs=[with_flag("audit")],
    )  # fmt: skip
    dry_run: bool = option(
        False, "Show what --audit finds, and the memory, time and disk space that the run needs, from two steps with "
        "random weights; train and write nothing.",
    )  # fmt: skip
    do_train: bool = option(True, "Train, then evaluate once on the test images.")
    do_eval: bool = option(
        False, "With --no_do_train: evaluate the finished classifier in --output_dir.", affects_result=False,
        needs=[Need("without --no_do_train", lambda values: not values["do_train"], "add it or ")],
    )  # fmt: skip
    per_device_train_batch_size: int = option(
        32, "Images per device and step.", needs=[needs_shared_flag("per_device_train_batch_size"), TRAINED]
    )
    per_device_eval_batch_size: int = option(128, "Images per device in evaluation.", affects_result=False)
    learning_rate: float | None = option(
        None,
        "Peak learning rate of AdamW (default: 2e-4 for networks with BatchNorm, adapters and heads alone, 2e-5 for "
        "all weights of others, such as ViT, Swin, ConvNeXt).",
        needs=[needs_shared_flag("learning_rate"), TRAINED],
    )
    num_train_epochs: float = option(
        30.0, "Epochs over the real images.",
        needs=[OWN_STEPS, TRAINED, Need("with --max_steps", lambda values: values["max_steps"] == -1)],
    )  # fmt: skip
    weight_decay: float = option(0.01, "Weight decay.", needs=[needs_shared_flag("weight_decay"), TRAINED])
    warmup_steps: float = option(
        0.1,
        "Warm-up: steps, or below 1 a share of all steps.",
        needs=[WITH_WARMUP, needs_shared_flag("warmup_steps"), TRAINED],
    )
    lr_scheduler_type: str = option("cosine", "Learning rate schedule.")
    logging_steps: float = option(
        0.05, "Log every this many steps, or below 1, every this share of all steps.", affects_result=False
    )
    save_strategy: str = option("steps", "When to save checkpoints in the folders of the stages.", affects_result=False)
    save_total_limit: int | None = option(
        1, "Number of checkpoints to keep in each stage.", affects_result=False,
        needs=[with_value("save_strategy", "steps", "epoch", "best")],
    )  # fmt: skip
    resume_from_checkpoint: str | None = option(
        None, "'latest': resume an unfinished run, in the stage where it stopped.", affects_result=False
    )
    dataloader_num_workers: int = option(
        default_num_workers,
        "Worker processes that load images, 0 or more; with a GPU, by default the cores per process minus one.",
        affects_result=False,
    )
    cache_images: bool = option(
        False, "Decode all training images once, into a memory-mapped file whose size is printed first.",
        affects_result=False, needs=[without_flag("streaming")],
    )  # fmt: skip
    leep: bool | None = option(
        None,
        "Measure LEEP before and after stage 1, on the real training images (default: if there is such a stage).",
    )
    report_to: str = option("none", "Experiment tracker, as in transformers.", affects_result=False)
    max_eval_samples: int | None = option(
        None, "Use at most this many validation and test images, evenly spaced (default: all)."
    )


def set_precision(training_args: BridgedTrainingArguments, given: set[str]) -> str | None:
    """Set the precision if no flag does, and return the line that says what was chosen.

    `given` are the names of the flags on the command line or in the recipe.

    Raises:
        UserError: the record in the output folder cannot be read.
    """
    if given & {"bf16", "fp16"}:
        return None
    folder, start = training_args.output_dir, training_args.overwrite_output_dir
    recorded = None if start else recorded_precision(folder)
    precision, line = choose_precision(
        None, recorded, folder, use_cpu=training_args.use_cpu, to_change="--no_bf16 is float32"
    )
    if line is not None and precision != "no":  # else from a flag or accelerate launch, or float32
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
    """Check the flags of the Trainer that it checks late, or that our stages do not support.

    Raises:
        UserError: a value is not possible.
    """
    resume, metric = training_args.resume_from_checkpoint, training_args.metric_for_best_model
    if training_args.load_best_model_at_end:
        raise UserError("--load_best_model_at_end: not supported; a stage ends with its last step.")
    if resume not in (None, "latest"):
        raise UserError(
            f"--resume_from_checkpoint {resume}: must be latest; a run resumes from its newest checkpoint, in "
            "the stage where it stopped."
        )
    backend = training_args.torch_compile_backend
    if training_args.torch_compile and backend is not None:
        import torch._dynamo  # takes seconds

        if backend not in torch._dynamo.list_backends(exclude_tags=()):
            listed = ", ".join(torch._dynamo.list_backends())
            raise UserError(f"--torch_compile_backend {backend}: unknown; choose from {listed}.")
    known = METRICS[:1] if training_args.prediction_loss_only else METRICS
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise UserError(f"--metric_for_best_model {metric}: not measured; choose from {', '.join(known)}.")
    if training_args.save_strategy == "best" and (metric is None or training_args.eval_strategy == "no"):
        raise UserError("--save_strategy best: needs --metric_for_best_model, and --eval_strategy steps or epoch.")
