"""The argument groups of compare_transfer.py."""

from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, field
from pathlib import Path

from utils.cli.options import Need, absolute_if_local, option, with_flag, without_flag
from utils.cli.precision import TITLES, choose_precision, device_precision
from utils.cli.records import read_record
from utils.data.arguments import RealDataArguments
from utils.transfer.arguments import ModelArguments, default_num_workers, has_stage_1_steps
from utils.transfer.methods import AUGMENTATIONS, CLASS_WEIGHTS, METHODS, ONE_KIND_NORMS, Method

DEFAULT_METHODS = [
    "vanilla", "vanilla_matched", "vanilla_mixup", "linear_probe", "mix", "bridged", "bridged_keep", "bridged_replay",
    "synthetic_only",
]  # fmt: skip
SEARCHED = (  # several values of these are a search
    "learning_rates", "step_counts", "head_learning_rate_factors", "bridge_learning_rates", "bridge_step_counts",
    "bridge_mixup_alphas",
)  # fmt: skip
# the settings of stage 1 that may be searched
STAGE_1_FLAGS = {
    "learning_rate": "bridge_learning_rates", "max_steps": "bridge_step_counts", "mixup_alpha": "bridge_mixup_alphas",
}  # fmt: skip


def needs_methods(is_suitable: Callable[[Method], bool], lack: str) -> Need:
    """Return the need of a suitable method among those compared; unknown ones are reported elsewhere."""

    def is_met(values: Mapping[str, object]) -> bool:
        rows = [METHODS.get(label.partition("@")[0]) for label in values["methods"]]
        return any(row is None or is_suitable(row) for row in rows)

    return Need(f"with --methods {{methods}}, which {lack}", is_met)


ON_REAL = needs_methods(lambda method: method.trains_on_real, "train on synthetic images alone")
TRAINED = needs_methods(lambda method: method.takes_steps, "take no optimiser step")
STAGE_1_STEPS = needs_methods(has_stage_1_steps, "neither train on synthetic images nor take the steps of such a stage")


def _takes(method: Method, setting: str) -> bool:
    if setting == "max_steps":
        return has_stage_1_steps(method)
    return any(stage.images == "synthetic" and setting not in stage.settings for stage in method.stages)


def needs_stage_1(setting: str) -> Need:
    """Return the need of a method that takes a setting in a stage on synthetic images alone.

    Without one, the setting still matters if stage 1 is searched for another setting that a method takes.
    """

    def is_met(values: Mapping[str, object]) -> bool:
        counting = {setting, *(name for name, flag in STAGE_1_FLAGS.items() if len(values[flag] or []) > 1)}
        if values["search_learning_rate"]:
            counting.add("learning_rate")
        return needs_methods(lambda row: any(_takes(row, name) for name in counting), "").is_met(values)

    return Need("with --methods {methods}, none of which takes it on synthetic images alone", is_met)


OPEN = without_flag("settings")  # a file with the recipes of all stages
SEARCH = Need(
    "without a search",
    lambda values: (
        not values["settings"]
        and (values["search_learning_rate"] or any(len(values[name] or []) > 1 for name in SEARCHED))
    ),
    "add --search_learning_rate, or several values of a flag, or ",
)


ONE_MODEL = Need(
    "with several --model_name_or_path",
    lambda values: len(values["model_name_or_path"]) == 1, "write MODEL@REVISION for each and ",
)  # fmt: skip


@dataclass
class ComparedModelArguments(ModelArguments):
    """The pretrained classifiers; the methods are compared on each of them."""

    _inherited_needs = {"model_revision": [ONE_MODEL]}

    model_name_or_path: list[str] = option(
        [ModelArguments.model_name_or_path],
        "Pretrained image classifiers of transformers or timm: model ids on the Hub, which may end in @REVISION, or "
        "folders.",
    )

    def to_dict(self) -> dict:
        """Return flag -> value for records; a single classifier is just its name."""
        names = [absolute_if_local(name) for name in self.model_name_or_path]
        return asdict(self) | {"model_name_or_path": names if len(names) > 1 else names[0]}


FOLDS = with_flag("num_folds")
PER_FOLD = with_flag("token_per_fold")
NO_FOLDS = without_flag("num_folds")  # folds test on all training images, and need no other images


def without_folds(name: str) -> Field:
    """Return the field of a flag of the real images that has no effect with folds."""
    known = RealDataArguments.__dataclass_fields__[name]
    return field(default=known.default, metadata={**known.metadata, "needs": [NO_FOLDS]})


@dataclass
class ComparedImagesArguments(RealDataArguments):
    """The labelled real images, from which the comparison draws subsets (default: those of the synthetic set)."""

    validation_split: str | None = without_folds("validation_split")
    test_split: str | None = without_folds("test_split")
    train_val_split: float = without_folds("train_val_split")
    fold: str | None = field(default=None, init=False)
    fold_seed: int = field(default=0, init=False)
    num_shots: int | None = field(default=None, init=False)
    few_shot_seed: int = field(default=0, init=False)
    max_train_samples: int | None = field(default=None, init=False)


@dataclass
class ComparisonArguments:
    """What to compare."""

    _argument_group_name = "comparison"

    synthetic_dataset: list[str] = option(
        [],
        "Synthetic sets, as NAME=PATH or a single path (a folder or a dataset id, which may end in @REVISION). In a "
        "path, '{seed}' stands for the few-shot seed (a style token is learned from that seed's images), and "
        "'{fold}' for the number of the fold, from 1.",
    )
    allow_missing_classes: bool = option(False, "Accept synthetic sets that lack some classes of the real set.")
    use_rejected: list[str] = option(
        [], "Names of the sets of which all images are used, also those rejected in a review or left out by their "
        "scores; the same path may have two names, as in --synthetic_dataset kept=A all=A --use_rejected all.",
        nargs="+",
    )  # fmt: skip
    methods: list[str] = option(
        DEFAULT_METHODS,
        f"Rows of the table: {', '.join(METHODS)}; method@NAME uses the synthetic set NAME instead of the first.",
    )
    num_shots: list[int] | None = option(
        None, "Real images per class, one or more values (default: all).", needs=[ON_REAL]
    )
    seeds: list[int] = option(
        [0, 1, 2],
        "Seeds, one run each: a seed decides on the shots and the training. With --num_folds there is one per repeat, "
        "which also draws its folds (default then: 0, 1, ...).",
    )
    num_folds: int | None = option(
        None,
        "Number of folds of a stratified cross-validation, for small sets: every image of the training split is tested "
        "once, by a model that has seen none of its fold, and no part is held out. There is no search: settings come "
        "from the flags or --settings.",
    )
    num_repeats: int = option(1, "Repeats of the folds, each drawn with its own seed.", needs=[FOLDS])
    token_per_fold: bool = option(
        False,
        "First learn a style token from each fold's training part and draw a synthetic set with it, by train_dsi.py "
        "and generate_synthetic.py, into the paths of --synthetic_dataset: 'syn-{fold}', with repeats "
        "'syn-{seed}-{fold}'.",
        needs=[FOLDS],
    )
    dsi_recipe: str | None = option(None, "Recipe file with the other flags of train_dsi.py.", needs=[PER_FOLD])
    synthesis_recipe: str | None = option(
        None, "Recipe file with the other flags of generate_synthetic.py.", needs=[PER_FOLD]
    )
    volumes: list[int] | None = option(
        None, "Synthetic images per class, one or more values; smaller sets are subsets of larger ones (default: all).",
        needs=[STAGE_1_STEPS],
    )  # fmt: skip
    max_eval_samples: int | None = option(
        None, "Use at most this many validation and test images, evenly spaced (default: all).", needs=[NO_FOLDS]
    )
    num_workers: int = option(1, "Processes that train in parallel; they share the cores and take turns with the GPUs.")
    output_dir: str = option("comparison", "Output folder; finished runs in it are kept.")
    hub_token: str | None = option(None, "Access token for the Hub (default: that of HF_TOKEN or `hf auth login`).")


@dataclass
class SearchArguments:
    """Recipes; several values are a search on validation images, first of stage 1, then of each method."""

    _argument_group_name = "search for settings"

    search_learning_rate: bool = option(
        False, "Also try a quarter of both learning rates and four times both, the same for every method.", needs=[OPEN]
    )
    learning_rates: list[float] | None = option(
        None,
        "Peak learning rates of AdamW (default: 2e-4 for networks with BatchNorm, 2e-5 for others, such as ViT, Swin, "
        "ConvNeXt).",
        needs=[ON_REAL, TRAINED, OPEN],
    )
    step_counts: list[int] | None = option(
        None,
        "Steps on real images, instead of epochs; methods with the steps of both stages add those of stage 1.",
        needs=[ON_REAL, TRAINED, OPEN],
    )
    num_train_epochs: float = option(
        30.0, "Epochs over the real images.", needs=[ON_REAL, TRAINED, OPEN, without_flag("step_counts")]
    )
    head_learning_rate_factors: list[float] | None = option(
        None,
        "Learning rate of the head relative to the rest (default: 10 for a fresh head, 1 otherwise).",
        needs=[ON_REAL, TRAINED, OPEN],
    )
    bridge_learning_rates: list[float] | None = option(
        None,
        "Peak learning rates on synthetic images (default: 5e-4 for networks with BatchNorm, 5e-5 for others).",
        needs=[needs_stage_1("learning_rate"), OPEN],
    )
    bridge_step_counts: list[int] | None = option(
        None, "Steps on synthetic images, instead of epochs; the same for every volume.", needs=[STAGE_1_STEPS, OPEN]
    )
    bridge_num_train_epochs: float = option(
        5.0, "Epochs over the synthetic images of the largest volume.",
        needs=[STAGE_1_STEPS, OPEN, without_flag("bridge_step_counts")],
    )  # fmt: skip
    bridge_mixup_alphas: list[float] = option(
        [0.2],
        "Beta parameters of Mixup on synthetic images; 0 turns it off.",
        needs=[needs_stage_1("mixup_alpha"), OPEN],
    )
    search_seeds: list[int] | None = option(
        None, "Few-shot seeds of the search (default: the first of --seeds).", needs=[SEARCH]
    )
    search_shots: list[int] | None = option(
        None, "Subset of --num_shots to search; other shots take the settings of the next smaller one (default: all).",
        needs=[OPEN],
    )  # fmt: skip
    settings: str | None = option(
        None, "Take the settings from this chosen_settings.json instead of a search; other flags still apply."
    )


@dataclass
class SharedStageArguments:
    """Both stages of every method, unless the method sets a value."""

    _argument_group_name = "training"

    bridge_head_learning_rate_factor: float = option(
        10.0, "Learning rate of the head relative to the rest, on synthetic images.",
        needs=[needs_stage_1("head_learning_rate_factor"), OPEN],
    )  # fmt: skip
    mixup_alpha: float = option(
        0.0, "Beta parameter of Mixup outside stage 1; 0 turns it off.", needs=[ON_REAL, TRAINED]
    )
    batch_norm: str = option("frozen", "BatchNorm statistics, as in train_bridged.py.", choices=ONE_KIND_NORMS)
    augmentation: str = option("robust", "Augmentation, as in train_bridged.py.", choices=AUGMENTATIONS)
    label_smoothing_factor: float = option(0.0, "Label smoothing, in [0, 1).")
    class_weights: str | None = option(
        None,
        "Weights of classes in the loss, as in train_bridged.py (default: equal weights).",
        choices=CLASS_WEIGHTS,
        needs=[TRAINED],
    )
    per_device_train_batch_size: int = option(32, "Images per step.")
    weight_decay: float = option(0.01, "Weight decay.")
    use_cpu: bool = option(False, "Train on the CPU, even if there is a GPU.")
    bf16: bool = option(
        False, "Train in bfloat16 mixed precision; by default on GPUs that support it; --no_bf16 is float32."
    )
    fp16: bool = option(False, "Train in float16 mixed precision; by default on other GPUs.")
    dataloader_num_workers: int = option(
        default_num_workers,
        "Worker processes that load images for each run, as in train_bridged.py.",
        affects_result=False,
    )
    cache_images: bool | None = option(
        None,
        "Decode all training images once, into a memory-mapped file (default: if it saves time and fits into half of "
        "the free memory and disk).",
        affects_result=False,
    )


def set_precision(shared_args: SharedStageArguments, output_dir: str, given: set[str]) -> str | None:
    """Set the precision of all cells if no flag does, and return the line that says what was chosen.

    `given` are the names of the flags on the command line or in the recipe. A comparison with cells in `output_dir`
    keeps their precision, except on a CPU, which uses float32.

    Raises:
        UserError: a cell's record cannot be read.
    """
    if given & {"bf16", "fp16"}:
        return None
    cells = Path(output_dir, "cells").glob("*.json")
    there = sorted({read_record(cell)["settings"].get("mixed_precision", "no") for cell in cells})
    own = device_precision(shared_args.use_cpu)
    recorded = there[0] if there and own not in ("no", *there) else None
    precision, line = choose_precision(
        None, recorded, output_dir, use_cpu=shared_args.use_cpu, to_change="--no_bf16 is float32"
    )
    if line is not None and precision != "no":
        setattr(shared_args, precision, True)
    if there and precision not in there:
        before, now = (TITLES.get(name, name) for name in (there[0], precision))
        return f"The runs in {output_dir} used {before}: they are made again in {now}."
    return line


# in the order of --help
GROUPS = (ComparedModelArguments, ComparedImagesArguments, ComparisonArguments, SearchArguments, SharedStageArguments)
