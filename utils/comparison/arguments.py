"""The argument groups of compare_transfer.py."""

from dataclasses import dataclass, field

from utils.cli.options import without_effect
from utils.data.arguments import RealDataArguments
from utils.transfer.arguments import default_num_workers
from utils.transfer.methods import AUGMENTATIONS, BATCH_NORM_MODES, METHODS


@dataclass
class ComparedImagesArguments(RealDataArguments):
    """The labelled real images, of which the comparison draws its own subsets; the synthetic set's when not given."""

    num_shots: int | None = field(default=None, init=False)
    few_shot_seed: int = field(default=0, init=False)
    max_train_samples: int | None = field(default=None, init=False)


@dataclass
class ComparisonArguments:
    """What is compared."""

    _argument_group_name = "comparison"

    synthetic_dataset: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Synthetic sets, NAME=PATH or one bare path (folder, or data set id, which may end in @REVISION); "
            "'{seed}' in a path stands for the few-shot seed, as a style token is learned from that seed's images."
        },
    )
    allow_missing_classes: bool = field(
        default=False, metadata={"help": "Accept synthetic sets that lack some of the real set's classes."}
    )
    methods: list[str] = field(
        default_factory=lambda: [
            "vanilla", "vanilla_matched", "mix", "bridged", "bridged_keep", "bridged_imprint", "bridged_no_mixup",
            "synthetic_only",
        ],
        metadata={
            "help": f"Rows of the table: {', '.join(METHODS)}; method@NAME takes another synthetic set than the first."
        },
    )  # fmt: skip
    num_shots: list[int] | None = field(
        default=None, metadata={"help": "Real images per class; all of them when not given."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of shots and training, one run each."}
    )
    volumes: list[int] | None = field(
        default=None,
        metadata={"help": "Synthetic images per class, the smaller among the larger; all of them when not given."},
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use so many validation and test images, evenly spread; all when not given."}
    )
    num_workers: int = field(
        default=1, metadata={"help": "Processes that run cells side by side; they share cores, and GPUs in turn."}
    )
    output_dir: str = field(default="comparison", metadata={"help": "Output folder; finished cells in it are kept."})
    hub_token: str | None = field(
        default=None, metadata={"help": "Access token; HF_TOKEN or `hf auth login` when not given."}
    )


@dataclass
class SearchArguments:
    """Several values are a search on validation images: first of stage 1 alone, then of each method on real images."""

    _argument_group_name = "recipe search"

    search_learning_rate: bool = field(
        default=False,
        metadata={"help": "Search a quarter and four times of both learning rates too, the same for every method."},
    )
    learning_rates: list[float] | None = field(
        default=None,
        metadata={
            "help": "Peak learning rates of AdamW; when not given, 2e-4 for networks with BatchNorm, 2e-5 for others "
            "(ViT, Swin, ConvNeXt)."
        },
    )
    step_counts: list[int] | None = field(
        default=None, metadata={"help": "Steps on real images, in place of epochs; matched methods add stage 1's."}
    )
    num_train_epochs: float = field(default=30.0, metadata={"help": "Epochs over the real images."})
    head_learning_rate_factors: list[float] | None = field(
        default=None, metadata={"help": "Head's learning rate over the rest's; 10 for a fresh head, 1 for another."}
    )
    bridge_learning_rates: list[float] | None = field(
        default=None,
        metadata={"help": "Peak learning rates on synthetic images; when not given, 5e-4 and 5e-5 for these."},
    )
    bridge_step_counts: list[int] | None = field(
        default=None, metadata={"help": "Steps on synthetic images, in place of epochs; the same for every volume."}
    )
    bridge_num_train_epochs: float = field(
        default=5.0, metadata={"help": "Epochs over the synthetic images, of the largest volume."}
    )
    bridge_mixup_alphas: list[float] = field(
        default_factory=lambda: [0.2], metadata={"help": "Mixup on synthetic images; 0 turns it off."}
    )
    search_seeds: list[int] | None = field(
        default=None, metadata={"help": "Few-shot seeds of the search; the first of --seeds when not given."}
    )
    search_shots: list[int] | None = field(
        default=None,
        metadata={
            "help": "Shots of the search, of --num_shots, which are it when not given; others take the next below."
        },
    )
    settings: str | None = field(
        default=None, metadata={"help": "Take the recipes of this chosen_settings.json, search nothing."}
    )


@dataclass
class SharedStageArguments:
    """Both stages of every method, where the method does not say otherwise."""

    _argument_group_name = "training"

    bridge_head_learning_rate_factor: float = field(
        default=10.0, metadata={"help": "Head's learning rate over the rest's, on synthetic images."}
    )
    mixup_alpha: float = field(default=0.0, metadata={"help": "Mixup outside stage 1; 0 turns it off."})
    batch_norm: str = field(default="frozen", metadata={"help": "BatchNorm statistics.", "choices": BATCH_NORM_MODES})
    augmentation: str = field(
        default="robust", metadata={"help": "Augmentation, as in train_bridged.py.", "choices": AUGMENTATIONS}
    )
    label_smoothing_factor: float = field(default=0.0, metadata={"help": "Label smoothing, in [0, 1)."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Images per step."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16 mixed precision."})
    fp16: bool = field(default=False, metadata={"help": "Train in float16 mixed precision."})
    dataloader_num_workers: int = field(
        default_factory=default_num_workers,
        metadata=without_effect("Processes that read images ahead for each cell, as in train_bridged.py."),
    )
