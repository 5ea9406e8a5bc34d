"""The methods as plans: which stages, from which weights, on which images, for how many steps. No torch."""

import math
from dataclasses import dataclass, replace

METHODS = ("bridged", "vanilla", "mix", "synthetic_only")
HEAD_INITS = ("reset", "keep", "imprint")
BATCH_NORM_MODES = ("frozen", "train", "recalibrate")
AUGMENTATIONS = ("robust", "basic", "trivialaugment", "randaugment")
STAGE_NAMES = tuple(f"{name}{part}" for name in ("stage1", "stage2", "vanilla", "mix") for part in ("_head", ""))
HEAD_FACTOR = 10.0  # a fresh head's learning rate over the rest's


@dataclass(frozen=True)
class StageSettings:
    """How one stage trains.

    `head_learning_rate_factor` multiplies the learning rate for the head; to `plan_stages`, None is `HEAD_FACTOR` for a
    fresh head and 1 for another. `head_warmup_steps` train the head alone before all the rest (LP-FT, Kumar et al.
    2022); `warmup_steps` below 1 are a share of all steps. `dropout` and `drop_path_rate` are the checkpoint's own when
    None.
    """

    max_steps: int
    learning_rate: float
    head_learning_rate_factor: float | None = 1.0
    mixup_alpha: float = 0.0
    batch_norm: str = "frozen"
    label_smoothing_factor: float = 0.0
    augmentation: str = "robust"
    random_flip: bool = True
    head_warmup_steps: int = 0
    freeze_backbone: bool = False
    dropout: float | None = None
    drop_path_rate: float | None = None
    per_device_train_batch_size: int = 32
    weight_decay: float = 0.01
    warmup_steps: float = 0.1


@dataclass(frozen=True)
class StagePlan:
    """One stage: `images` is `real`, `synthetic` or `both`, `start` the stage whose weights it takes.

    A `start` of None is the pretrained checkpoint.
    """

    name: str
    images: str
    head_init: str
    settings: StageSettings
    start: str | None = None


def plan_stages(
    method: str,
    bridge_settings: StageSettings,
    settings: StageSettings,
    head_init: str = "reset",
    match_steps: bool = False,
) -> list[StagePlan]:
    """Return the stages of a method, in order; the last is the result.

    `bridge_settings` go with synthetic images, `settings` with real ones; with both kinds together the steps are
    `settings`'. `match_steps` gives vanilla and mix the steps of both stages together. A head warm-up is a stage of
    its own, `<name>_head`.
    """
    if match_steps and method in ("vanilla", "mix"):
        num_bridge_steps = bridge_settings.max_steps + bridge_settings.head_warmup_steps
        settings = replace(settings, max_steps=settings.max_steps + num_bridge_steps)
    plans = {
        "bridged": [
            StagePlan("stage1", "synthetic", "reset", bridge_settings),
            StagePlan("stage2", "real", head_init, settings, start="stage1"),
        ],
        "synthetic_only": [StagePlan("stage1", "synthetic", "reset", bridge_settings)],
        "vanilla": [StagePlan("vanilla", "real", "reset", settings)],
        "mix": [StagePlan("mix", "both", "reset", settings)],
    }
    return [_with_head_factor(stage) for plan in plans[method] for stage in _split_head_warmup(plan)]


def _with_head_factor(stage: StagePlan) -> StagePlan:
    if stage.settings.head_learning_rate_factor is not None:
        return stage
    factor = HEAD_FACTOR if stage.head_init == "reset" else 1.0
    return replace(stage, settings=replace(stage.settings, head_learning_rate_factor=factor))


def _split_head_warmup(stage: StagePlan) -> list[StagePlan]:
    num_steps = stage.settings.head_warmup_steps
    if num_steps == 0:
        return [stage]
    name = f"{stage.name}_head"
    settings = replace(stage.settings, max_steps=num_steps, head_warmup_steps=0, freeze_backbone=True)
    rest = replace(stage.settings, head_warmup_steps=0)
    return [replace(stage, name=name, settings=settings), replace(stage, head_init="keep", start=name, settings=rest)]


def steps_per_epoch(num_images: int, images_per_batch: int, accumulation: int = 1, drop_last: bool = False) -> int:
    """Return the optimiser steps of one epoch, of `accumulation` batches each; a batch is that of all processes.

    With `drop_last`, an epoch has whole batches only.
    """
    num_batches = num_images // images_per_batch if drop_last else math.ceil(num_images / images_per_batch)
    return math.ceil(num_batches / accumulation)


def mix_indices(num_real: int, num_synthetic: int, ratio: float | None) -> list[int]:
    """Return the rows of one epoch over real images followed by synthetic ones, `ratio` synthetic for each real one.

    Images of the kind that is too few for the ratio are repeated; a ratio of None takes each image once.
    """
    num_real_rows, num_synthetic_rows = num_real, num_synthetic
    if ratio is not None:
        num_real_rows = max(num_real, round(num_synthetic / ratio))
        num_synthetic_rows = max(num_synthetic, round(num_real * ratio))
    real_rows = [row % num_real for row in range(num_real_rows)]
    return real_rows + [num_real + row % num_synthetic for row in range(num_synthetic_rows)]
