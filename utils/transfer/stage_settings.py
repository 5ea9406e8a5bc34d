"""Flags of train_bridged.py into the settings of its stages. No torch."""

from utils.cli.errors import UserError
from utils.transfer.methods import StagePlan, StageSettings, steps_per_epoch

OF_BOTH_STAGES = (
    "learning_rate", "weight_decay", "warmup_steps", "per_device_train_batch_size", "dropout", "drop_path_rate",
    "random_flip",
)  # fmt: skip
OF_EACH_STAGE = (
    "num_train_epochs", "max_steps", "head_learning_rate", "head_warmup_steps", "freeze_backbone", "mixup_alpha",
    "label_smoothing_factor", "augmentation", "batch_norm",
)  # fmt: skip


def stage_settings(flags: dict, num_images: dict[str, int], num_processes: int) -> tuple[StageSettings, StageSettings]:
    """Return the settings on synthetic and on real images (on both kinds, for mix), epochs turned into steps.

    `flags` maps names to values; a `bridge_` flag of None that is for both stages has the value of the flag without
    that prefix. `num_images` counts the images by kind: `real`, `synthetic`, `both`.
    """
    real = {name: flags[name] for name in (*OF_BOTH_STAGES, *OF_EACH_STAGE)}
    bridge = {name: flags[f"bridge_{name}"] for name in OF_EACH_STAGE}
    for name in OF_BOTH_STAGES:
        value = flags.get(f"bridge_{name}")
        bridge[name] = real[name] if value is None else value
    kind = "real"
    if flags["method"] == "mix" and not flags["match_steps"]:
        kind = "both"
        real |= {name: bridge[name] for name in ("num_train_epochs", "max_steps")}

    def build(num_train_epochs, max_steps, head_learning_rate, num_images: int, **values) -> StageSettings:
        if max_steps is None or max_steps <= 0:
            images_per_batch = values["per_device_train_batch_size"] * num_processes
            per_epoch = steps_per_epoch(
                num_images, images_per_batch, flags["gradient_accumulation_steps"], flags["dataloader_drop_last"]
            )
            max_steps = max(1, round(num_train_epochs * per_epoch))
        factor = None if head_learning_rate is None else head_learning_rate / values["learning_rate"]
        return StageSettings(max_steps, head_learning_rate_factor=factor, **values)

    return build(num_images=num_images.get("synthetic", 0), **bridge), build(num_images=num_images[kind], **real)


def check_stages(
    stages: list[StagePlan], flags: dict, num_images: dict[str, int], num_classes: int, num_processes: int
) -> None:
    """Check, before the first stage trains, what depends on the numbers of images, steps and classes.

    Raises:
        UserError: a stage has no whole batch or is all warm-up, nothing would be evaluated, or a metric is not there
            for so few classes.
    """
    for stage in stages:
        batch_size, number = stage.settings.per_device_train_batch_size, num_images[stage.images]
        is_stream = flags["streaming"] and stage.images == "synthetic"  # every batch of which is full
        if flags["dataloader_drop_last"] and not is_stream and number < batch_size * num_processes:
            raise UserError(
                f"--dataloader_drop_last: {stage.name} would take no step, its {number} images are less than a batch "
                f"({batch_size} on each of {num_processes} processes); give a smaller --per_device_train_batch_size."
            )
        warmup_steps, max_steps = stage.settings.warmup_steps, stage.settings.max_steps
        if 1 < max_steps <= warmup_steps:
            raise UserError(
                f"--warmup_steps {warmup_steps:g}: {stage.name} has {max_steps} steps, so the learning rate never "
                "reaches its peak; give fewer, or a share below 1."
            )
    most_steps = max(stage.settings.max_steps for stage in stages)
    if flags["eval_strategy"] == "steps" and flags["eval_delay"] > most_steps:
        raise UserError(
            f"--eval_delay {flags['eval_delay']}: nothing would be evaluated; the longest stage has {most_steps} steps."
        )
    metric = flags["metric_for_best_model"]
    if metric is not None and metric.endswith("top5_accuracy") and num_classes <= 5:
        raise UserError(f"--metric_for_best_model {metric}: needs more than 5 classes, there are {num_classes}.")
