import pytest

from utils.cli.errors import UserError
from utils.transfer.methods import StageSettings, plan_stages
from utils.transfer.stage_settings import check_stages, stage_settings

STAGE = {
    "num_train_epochs": 30.0, "max_steps": -1, "head_learning_rate": None, "head_warmup_steps": 0,
    "freeze_backbone": False, "mixup_alpha": 0.0, "label_smoothing_factor": 0.0, "augmentation": "robust",
    "batch_norm": "frozen",
}  # fmt: skip
FLAGS = {
    "method": "bridged", "match_steps": False, "gradient_accumulation_steps": 1, "dataloader_drop_last": False,
    "streaming": False, "eval_strategy": "no", "eval_delay": 0, "metric_for_best_model": None, "learning_rate": 2e-4,
    "weight_decay": 0.01, "warmup_steps": 0.1, "per_device_train_batch_size": 32, "dropout": None,
    "drop_path_rate": None, "random_flip": True, **STAGE, "bridge_learning_rate": None, "bridge_weight_decay": None,
    "bridge_warmup_steps": None, "bridge_per_device_train_batch_size": None,
    **{f"bridge_{name}": value for name, value in STAGE.items()}, "bridge_num_train_epochs": 5.0,
    "bridge_max_steps": None, "bridge_mixup_alpha": 0.2,
}  # fmt: skip
NUM_IMAGES = {"real": 40, "synthetic": 1000, "both": 1040}


def settings_of(num_processes=1, **flags):
    return stage_settings(FLAGS | flags, NUM_IMAGES, num_processes)


def test_epochs_become_steps_over_all_processes_and_accumulated_batches():
    bridge, real = settings_of()
    assert (bridge.max_steps, real.max_steps) == (5 * 32, 30 * 2)
    bridge, real = settings_of(num_processes=2, gradient_accumulation_steps=2)
    assert (bridge.max_steps, real.max_steps) == (5 * 8, 30 * 1)
    assert [settings.max_steps for settings in settings_of(bridge_max_steps=7, max_steps=3)] == [7, 3]


def test_stage_1_takes_over_what_has_no_flag_of_its_own_and_nothing_else():
    bridge, real = settings_of(
        learning_rate=1e-3, weight_decay=0.1, warmup_steps=5, dropout=0.3, mixup_alpha=0.4, augmentation="basic",
        label_smoothing_factor=0.1, batch_norm="train", head_warmup_steps=2, freeze_backbone=True,
        per_device_train_batch_size=8, max_steps=3, random_flip=False,
    )  # fmt: skip
    shared = {"weight_decay": 0.1, "warmup_steps": 5, "dropout": 0.3, "per_device_train_batch_size": 8}
    shared["random_flip"] = False
    factor = {"head_learning_rate_factor": None}
    assert bridge == StageSettings(5 * 125, 1e-3, mixup_alpha=0.2, **shared, **factor)
    assert real == StageSettings(
        3, 1e-3, mixup_alpha=0.4, augmentation="basic", label_smoothing_factor=0.1, batch_norm="train",
        head_warmup_steps=2, freeze_backbone=True, **shared, **factor,
    )  # fmt: skip
    bridge, _ = settings_of(bridge_learning_rate=5e-4, bridge_weight_decay=0.0, bridge_per_device_train_batch_size=64)
    assert (bridge.learning_rate, bridge.weight_decay, bridge.max_steps) == (5e-4, 0.0, 5 * 16)


def test_a_heads_learning_rate_is_told_as_a_factor():
    bridge, real = settings_of(bridge_head_learning_rate=1e-3, head_learning_rate=4e-4)
    assert (bridge.head_learning_rate_factor, real.head_learning_rate_factor) == (pytest.approx(5), pytest.approx(2))


def test_mix_takes_the_epochs_of_stage_1_over_both_kinds_and_where_steps_are_matched_those_of_the_real_images():
    assert settings_of(method="mix")[1].max_steps == 5 * 33
    assert settings_of(method="mix", match_steps=True)[1].max_steps == 30 * 2


def test_epochs_of_whole_batches_have_fewer_steps():
    bridge, real = settings_of(dataloader_drop_last=True)
    assert (bridge.max_steps, real.max_steps) == (5 * 31, 30 * 1)


@pytest.mark.parametrize(
    ("flags", "num_processes", "message"),
    [
        ({"dataloader_drop_last": True}, 2, "--dataloader_drop_last: stage2 would take no step, its 40 images"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 41, "streaming": True},
            1,
            "stage2 .* 40 images",
        ),
        ({"eval_strategy": "steps", "eval_delay": 161}, 1, "--eval_delay 161: .*; the longest stage has 160 steps"),
        ({"metric_for_best_model": "top5_accuracy"}, 1, "top5_accuracy: needs more than 5 classes, there are 5"),
    ],
)
def test_what_numbers_of_images_steps_and_classes_do_not_allow_is_found_before_a_stage(flags, num_processes, message):
    stages = plan_stages("bridged", *settings_of(num_processes, **flags))
    with pytest.raises(UserError, match=message):
        check_stages(stages, FLAGS | flags, NUM_IMAGES, 5, num_processes)
    check_stages(stages, FLAGS, NUM_IMAGES, 5, num_processes)


def test_a_stage_that_is_all_warm_up_is_an_error():
    message = "--warmup_steps 160: stage1 has 160 steps, so the learning rate never reaches its peak"
    with pytest.raises(UserError, match=message):
        check_stages(plan_stages("bridged", *settings_of(warmup_steps=160)), FLAGS, NUM_IMAGES, 5, 1)
    check_stages(plan_stages("vanilla", *settings_of(warmup_steps=59)), FLAGS, NUM_IMAGES, 5, 1)
