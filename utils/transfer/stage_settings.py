"""Flags of train_bridged.py into the settings of its stages. No torch."""

from utils.transfer.methods import StageSettings, steps_per_epoch

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
            per_epoch = steps_per_epoch(num_images, images_per_batch, flags["gradient_accumulation_steps"])
            max_steps = max(1, round(num_train_epochs * per_epoch))
        factor = None if head_learning_rate is None else head_learning_rate / values["learning_rate"]
        return StageSettings(max_steps, head_learning_rate_factor=factor, **values)

    return build(num_images=num_images.get("synthetic", 0), **bridge), build(num_images=num_images[kind], **real)
