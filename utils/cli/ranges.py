"""The ranges of the numeric flags of all scripts, in one table that every command line is held against."""

from collections.abc import Mapping

from utils.cli.errors import UserError

# what a value must be, the test, and the flags; what is not given passes
RANGES = (
    ("above 0", lambda value: value > 0, (
        # real and synthetic images
        "num_shots", "max_train_samples", "max_synthetic_samples_per_class", "mix_ratio", "max_eval_samples", "volumes",
        "search_shots", "max_images_per_class", "num_pairs",
        # training
        "learning_rate", "bridge_learning_rate", "head_learning_rate", "bridge_head_learning_rate", "learning_rates",
        "bridge_learning_rates", "head_learning_rate_factors", "bridge_head_learning_rate_factor", "num_train_epochs",
        "bridge_num_train_epochs", "bridge_max_steps", "step_counts", "bridge_step_counts", "max_train_steps",
        "per_device_train_batch_size", "bridge_per_device_train_batch_size", "per_device_eval_batch_size",
        "train_batch_size", "batch_size", "gradient_accumulation_steps", "eval_accumulation_steps", "lora_r",
        "lora_alpha", "num_vectors", "resolution",
        # logging, checkpoints and processes
        "logging_steps", "eval_steps", "save_steps", "save_total_limit", "checkpointing_steps",
        "checkpoints_total_limit", "validation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor",
        "ddp_bucket_cap_mb", "ddp_timeout", "num_workers",
        # drawing
        "num_images_per_class", "guidance_scale", "num_inference_steps", "images_per_shard",
    )),
    ("0 or above", lambda value: value >= 0, (
        "mixup_alpha", "bridge_mixup_alpha", "bridge_mixup_alphas", "weight_decay", "bridge_weight_decay",
        "warmup_steps", "bridge_warmup_steps", "head_warmup_steps", "bridge_head_warmup_steps", "lr_warmup_steps",
        "adam_epsilon", "max_grad_norm", "neftune_noise_alpha", "eval_delay", "dataloader_num_workers",
        "num_validation_images", "max_redraws",
    )),
    ("0 or above, and below 1", lambda value: 0 <= value < 1, (
        "label_smoothing_factor", "bridge_label_smoothing_factor", "dropout", "drop_path_rate", "lora_dropout",
        "adam_beta1", "adam_beta2",
    )),
    ("above 0 and below 1", lambda value: 0 < value < 1, ("train_val_split",)),
    ("0 or above, and below 2**32", lambda value: 0 <= value < 2**32, (  # what NumPy takes as a seed
        "seed", "data_seed", "few_shot_seed", "seeds", "search_seeds",
    )),
    ("above 0, or left out to train for epochs", lambda value: value > 0 or value == -1, ("max_steps",)),
    ("from 1 to 100", lambda value: 1 <= value <= 100, ("image_quality",)),
)  # fmt: skip


def check_ranges(values: Mapping[str, object]) -> None:
    """Check the numbers, or lists of numbers, in a mapping of flags to values.

    Raises:
        UserError: one is out of range.
    """
    for wanted, is_within, names in RANGES:
        for name in names:
            value = values.get(name)
            for number in value if isinstance(value, list) else [value]:
                if number is not None and not is_within(number):
                    raise UserError(f"--{name} {number}: must be {wanted}.")
