"""The argument groups of compare_transfer.py."""

from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, field
from pathlib import Path

from utils.cli.options import Need, absolute_if_local, option, with_flag, without_flag
from utils.cli.precision import TITLES, choose_precision, device_precision
from utils.cli.records import read_record
from utils.data.arguments import RealDataArguments
from utils.transfer.arguments import ModelArguments, default_num_workers, has_stage_1_steps
from utils.transfer.methods import AUGMENTATIONS, METHODS, ONE_KIND_NORMS, Method

DEFAULT_METHODS = [
    "vanilla", "vanilla_matched", "vanilla_mixup", "linear_probe", "mix", "bridged", "bridged_keep", "bridged_replay",
    "synthetic_only",
]  # fmt: skip
SEARCHED = (  # of which several values are a search
    "learning_rates", "step_counts", "head_learning_rate_factors", "bridge_learning_rates", "bridge_step_counts",
    "bridge_mixup_alphas",
)  # fmt: skip
# the settings of stage 1 that may be searched
STAGE_1_FLAGS = {
    "learning_rate": "bridge_learning_rates", "max_steps": "bridge_step_counts", "mixup_alpha": "bridge_mixup_alphas",
}  # fmt: skip


def of_methods(is_right: Callable[[Method], bool], lack: str) -> Need:
    """Return the need of a method of a kind among those compared; unknown ones are told elsewhere."""

    def is_met(values: Mapping[str, object]) -> bool:
        rows = [METHODS.get(label.partition("@")[0]) for label in values["methods"]]
        return any(row is None or is_right(row) for row in rows)

    return Need(f"with --methods {{methods}}, which {lack}", is_met)


ON_REAL = of_methods(lambda method: method.trains_on_real, "train on synthetic images alone")
TRAINED = of_methods(lambda method: method.takes_steps, "take no optimiser step")
STAGE_1_STEPS = of_methods(has_stage_1_steps, "neither train on synthetic images nor take the steps of such a stage")


def _takes(method: Method, setting: str) -> bool:
    if setting == "max_steps":
        return has_stage_1_steps(method)
    return any(stage.images == "synthetic" and setting not in stage.settings for stage in method.stages)


def of_stage_1(setting: str) -> Need:
    """Return the need of a method that takes a setting in a stage on synthetic images alone.

    Without one, it still counts where stage 1 is searched, always with it, for another setting that a method takes.
    """

    def is_met(values: Mapping[str, object]) -> bool:
        counting = {setting, *(name for name, flag in STAGE_1_FLAGS.items() if len(values[flag] or []) > 1)}
        if values["search_learning_rate"]:
            counting.add("learning_rate")
        return of_methods(lambda row: any(_takes(row, name) for name in counting), "").is_met(values)

    return Need("with --methods {methods}, none of which takes it on synthetic images alone", is_met)


OPEN = without_flag("settings")  # which holds the recipes of all stages
SEARCH = Need(
    "where nothing is searched",
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
        """Return flag -> value as records hold them: one classifier as its name."""
        names = [absolute_if_local(name) for name in self.model_name_or_path]
        return asdict(self) | {"model_name_or_path": names if len(names) > 1 else names[0]}


FOLDS = with_flag("num_folds")
PER_FOLD = with_flag("token_per_fold")
NO_FOLDS = without_flag("num_folds")  # which test on all training images, and choose nothing on others


def without_folds(name: str) -> Field:
    """Return the field of a flag on real images that does nothing where there are folds."""
    known = RealDataArguments.__dataclass_fields__[name]
    return field(default=known.default, metadata={**known.metadata, "needs": [NO_FOLDS]})


@dataclass
class ComparedImagesArguments(RealDataArguments):
    """The labelled real images, of which the comparison draws its own subsets; the synthetic set's when not given."""

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
    """What is compared."""

    _argument_group_name = "comparison"

    synthetic_dataset: list[str] = option(
        [],
        "Synthetic sets, NAME=PATH or one bare path (folder, or data set id, which may end in @REVISION); "
        "'{seed}' in a path stands for the few-shot seed, as a style token is learned from that seed's images, and "
        "'{fold}' for the number of the fold, from 1.",
    )
    allow_missing_classes: bool = option(False, "Accept synthetic sets that lack some of the real set's classes.")
    methods: list[str] = option(
        DEFAULT_METHODS,
        f"Rows of the table: {', '.join(METHODS)}; method@NAME takes another synthetic set than the first.",
    )
    num_shots: list[int] | None = option(None, "Real images per class; all of them when not given.", needs=[ON_REAL])
    seeds: list[int] = option(
        [0, 1, 2],
        "Seeds of shots and training, one run each; with --num_folds one for each repeat, which also draws its folds "
        "(0, 1, ... when not given).",
    )
    num_folds: int | None = option(
        None,
        "Folds of a stratified cross-validation, for few images: every image of the training split is tested once, by "
        "a model that has seen none of its fold, and no part is held out. Nothing is searched: recipes come from the "
        "flags or from --settings.",
    )
    num_repeats: int = option(1, "Repeats of the folds, each drawn by its own seed.", needs=[FOLDS])
    token_per_fold: bool = option(
        False,
        "First learn a style token of each fold's training part, and draw its synthetic set, by train_dsi.py and "
        "generate_synthetic.py; --synthetic_dataset names where: 'syn-{fold}', with repeats 'syn-{seed}-{fold}'.",
        needs=[FOLDS],
    )
    dsi_recipe: str | None = option(None, "Recipe of train_dsi.py, for its other flags.", needs=[PER_FOLD])
    synthesis_recipe: str | None = option(
        None, "Recipe of generate_synthetic.py, for its other flags.", needs=[PER_FOLD]
    )
    volumes: list[int] | None = option(
        None, "Synthetic images per class, the smaller among the larger; all of them when not given.",
        needs=[STAGE_1_STEPS],
    )  # fmt: skip
    max_eval_samples: int | None = option(
        None, "Use so many validation and test images, evenly spread; all when not given.", needs=[NO_FOLDS]
    )
    num_workers: int = option(1, "Processes that run cells side by side; they share cores, and GPUs in turn.")
    output_dir: str = option("comparison", "Output folder; finished cells in it are kept.")
    hub_token: str | None = option(None, "Access token; HF_TOKEN or `hf auth login` when not given.")


@dataclass
class SearchArguments:
    """Several values are a search on validation images: first of stage 1 alone, then of each method on real images."""

    _argument_group_name = "recipe search"

    search_learning_rate: bool = option(
        False, "Search a quarter and four times of both learning rates too, the same for every method.", needs=[OPEN]
    )
    learning_rates: list[float] | None = option(
        None,
        "Peak learning rates of AdamW; when not given, 2e-4 for networks with BatchNorm, 2e-5 for others "
        "(ViT, Swin, ConvNeXt).",
        needs=[ON_REAL, TRAINED, OPEN],
    )
    step_counts: list[int] | None = option(
        None, "Steps on real images, in place of epochs; matched methods add stage 1's.", needs=[ON_REAL, TRAINED, OPEN]
    )
    num_train_epochs: float = option(
        30.0, "Epochs over the real images.", needs=[ON_REAL, TRAINED, OPEN, without_flag("step_counts")]
    )
    head_learning_rate_factors: list[float] | None = option(
        None,
        "Head's learning rate over the rest's; 10 for a fresh head, 1 for another.",
        needs=[ON_REAL, TRAINED, OPEN],
    )
    bridge_learning_rates: list[float] | None = option(
        None,
        "Peak learning rates on synthetic images; when not given, 5e-4 for networks with BatchNorm, 5e-5 for others.",
        needs=[of_stage_1("learning_rate"), OPEN],
    )
    bridge_step_counts: list[int] | None = option(
        None, "Steps on synthetic images, in place of epochs; the same for every volume.", needs=[STAGE_1_STEPS, OPEN]
    )
    bridge_num_train_epochs: float = option(
        5.0, "Epochs over the synthetic images, of the largest volume.",
        needs=[STAGE_1_STEPS, OPEN, without_flag("bridge_step_counts")],
    )  # fmt: skip
    bridge_mixup_alphas: list[float] = option(
        [0.2], "Mixup on synthetic images; 0 turns it off.", needs=[of_stage_1("mixup_alpha"), OPEN]
    )
    search_seeds: list[int] | None = option(
        None, "Few-shot seeds of the search; the first of --seeds when not given.", needs=[SEARCH]
    )
    search_shots: list[int] | None = option(
        None, "Shots of the search, of --num_shots, which are it when not given; others take the next below.",
        needs=[OPEN],
    )  # fmt: skip
    settings: str | None = option(
        None, "Take the recipes of this chosen_settings.json, search nothing; all else is as the flags say."
    )


@dataclass
class SharedStageArguments:
    """Both stages of every method, where the method does not say otherwise."""

    _argument_group_name = "training"

    bridge_head_learning_rate_factor: float = option(
        10.0, "Head's learning rate over the rest's, on synthetic images.",
        needs=[of_stage_1("head_learning_rate_factor"), OPEN],
    )  # fmt: skip
    mixup_alpha: float = option(0.0, "Mixup outside stage 1; 0 turns it off.", needs=[ON_REAL, TRAINED])
    batch_norm: str = option("frozen", "BatchNorm statistics.", choices=ONE_KIND_NORMS)
    augmentation: str = option("robust", "Augmentation, as in train_bridged.py.", choices=AUGMENTATIONS)
    label_smoothing_factor: float = option(0.0, "Label smoothing, in [0, 1).")
    per_device_train_batch_size: int = option(32, "Images per step.")
    weight_decay: float = option(0.01, "Weight decay.")
    use_cpu: bool = option(False, "Train on the CPU, even where there is a GPU.")
    bf16: bool = option(
        False, "Train in bfloat16 mixed precision; when neither is given, on a GPU that has it; --no_bf16 is float32."
    )
    fp16: bool = option(False, "Train in float16 mixed precision; when neither is given, on other GPUs.")
    dataloader_num_workers: int = option(
        default_num_workers,
        "Processes that read images ahead for each cell, as in train_bridged.py.",
        affects_result=False,
    )
    cache_images: bool | None = option(
        None,
        "Decode all training images once, into a memory-mapped file (default: where it fits in half of the free memory "
        "and disk, and would take more than a moment each time).",
        affects_result=False,
    )


def set_precision(shared_args: SharedStageArguments, output_dir: str, given: set[str]) -> str | None:
    """Set the precision of all cells where no flag does, and return the line that says what was chosen.

    `given` are the names of the flags that are given. Cells in `output_dir` are gone on with in their precision,
    except on a CPU, which takes float32.

    Raises:
        UserError: what is there is no record.
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
        return f"The cells in {output_dir} are of {before}: they are run again in {now}."
    return line


# in the order of --help
GROUPS = (ComparedModelArguments, ComparedImagesArguments, ComparisonArguments, SearchArguments, SharedStageArguments)
