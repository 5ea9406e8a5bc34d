"""The argument groups of train_bridged.py: synthetic images, method, stages, LoRA. Stage 1's begin with bridge_."""

from dataclasses import dataclass, field

from utils.transfer.methods import AUGMENTATIONS, BATCH_NORM_MODES, HEAD_INITS, METHODS


@dataclass
class SyntheticDataArguments:
    """The labelled synthetic images."""

    _argument_group_name = "synthetic images"

    synthetic_dataset: str | None = field(
        default=None, metadata={"help": "Synthetic set, as generate_synthetic.py wrote it: a folder or a data set id."}
    )
    synthetic_dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the synthetic set on the Hub."}
    )
    max_synthetic_samples_per_class: int | None = field(
        default=None, metadata={"help": "Use the first so many synthetic images of each class; all when not given."}
    )
    allow_missing_classes: bool = field(
        default=False, metadata={"help": "Accept a synthetic set that lacks some of the real set's classes."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the synthetic images from the Hub as they are needed, not to the disk."}
    )


@dataclass
class MethodArguments:
    """What is trained on what, in which order."""

    _argument_group_name = "method"

    method: str = field(
        default="bridged",
        metadata={
            "help": "bridged: synthetic, then real images; vanilla: real only; mix: both together in one stage; "
            "synthetic_only: the first stage alone.",
            "choices": METHODS,
        },
    )
    head_init: str = field(
        default="reset",
        metadata={
            "help": "Head at the start of the second stage: fresh (the paper's), that of the first stage, or the class "
            "means of the real images' features.",
            "choices": HEAD_INITS,
        },
    )
    match_steps: bool = field(
        default=False, metadata={"help": "Give vanilla and mix as many steps as both stages together."}
    )
    mix_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Synthetic images per real image in mix, above 0; those of the kind that is too few are repeated. "
            "Each image once when not given."
        },
    )


@dataclass
class StageArguments:
    """How the model is trained on real images (on both kinds, for mix), beside the Trainer's own flags."""

    _argument_group_name = "training on real images"

    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the head; 10 x --learning_rate for a fresh head, 1 x for another."},
    )
    head_warmup_steps: int = field(
        default=0, metadata={"help": "Steps that train the head alone first (LP-FT), 0 or more."}
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "Train the head only."})
    mixup_alpha: float = field(default=0.0, metadata={"help": "Mixup's Beta parameter; 0 turns it off."})
    augmentation: str = field(
        default="robust",
        metadata={
            "help": "robust: crop, flip, colour and fine detail; basic: crop and flip, as run_image_classification.py; "
            "trivialaugment and randaugment: these after crop and flip.",
            "choices": AUGMENTATIONS,
        },
    )
    batch_norm: str = field(
        default="frozen",
        metadata={
            "help": "BatchNorm statistics: those of the start, of each batch, or measured anew on the stage's images.",
            "choices": BATCH_NORM_MODES,
        },
    )
    dropout: float | None = field(
        default=None, metadata={"help": "Dropout in both stages, in [0, 1); the model's own when not given."}
    )
    drop_path_rate: float | None = field(
        default=None, metadata={"help": "Drop path in both stages, in [0, 1); the model's own when not given."}
    )


@dataclass
class BridgeStageArguments:
    """How the model is trained on synthetic images."""

    _argument_group_name = "training on synthetic images"

    bridge_num_train_epochs: float = field(
        default=5.0,
        metadata={"help": "Epochs (over both kinds of images for mix); few, as there are many images."},
    )
    bridge_max_steps: int | None = field(default=None, metadata={"help": "Optimiser steps, in place of epochs."})
    bridge_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate; --learning_rate when not given."}
    )
    bridge_head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the head, always a fresh one; 10 x when not given."}
    )
    bridge_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay; --weight_decay when not given."}
    )
    bridge_warmup_steps: float | None = field(
        default=None, metadata={"help": "Warm-up, as --warmup_steps, which it is when not given."}
    )
    bridge_per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Images per device and step; --per_device_train_batch_size when not given."}
    )
    bridge_head_warmup_steps: int = field(
        default=0, metadata={"help": "Steps that train the head alone first, 0 or more."}
    )
    bridge_freeze_backbone: bool = field(default=False, metadata={"help": "Train the head only."})
    bridge_mixup_alpha: float = field(
        default=0.2, metadata={"help": "Mixup's Beta parameter; 0 turns it off. On by default, as in the paper."}
    )
    bridge_label_smoothing_factor: float = field(default=0.0, metadata={"help": "Label smoothing, in [0, 1)."})
    bridge_augmentation: str = field(
        default="robust",
        metadata={"help": "As --augmentation; robust, as synthetic images differ in these.", "choices": AUGMENTATIONS},
    )
    bridge_batch_norm: str = field(
        default="frozen",
        metadata={
            "help": "As --batch_norm; frozen, as statistics of synthetic images harm on real ones.",
            "choices": BATCH_NORM_MODES,
        },
    )


@dataclass
class LoraArguments:
    """Train an adapter in place of all weights; flags as in TRL."""

    _argument_group_name = "LoRA"

    use_peft: bool = field(default=False, metadata={"help": "One LoRA adapter through both stages, and the head."})
    lora_r: int = field(default=16, metadata={"help": "Rank, above 0."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale: the adapter counts alpha / rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter, in [0, 1)."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Ends of layers' names to adapt; every linear layer and convolution but the head when not given."
        },
    )

    @property
    def settings(self) -> dict:
        """The values without their prefix."""
        targets = self.lora_target_modules
        return {
            "r": self.lora_r,
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout,
            "target_modules": None if targets is None else tuple(targets),
        }
