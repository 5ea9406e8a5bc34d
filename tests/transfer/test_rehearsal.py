import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from transformers import TrainingArguments

from tests.transfer.architectures import SQUARE, TRANSFORMER, save_timm
from utils.cli.errors import UserError
from utils.transfer.adapters import LoraSettings
from utils.transfer.classifiers import load_image_processor
from utils.transfer.methods import StageSettings
from utils.transfer.rehearsal import rehearse
from utils.transfer.stage import Pretrained

pytest_plugins = ["tests.transfer.fixtures"]
SETTINGS = StageSettings(3, 1e-3, head_learning_rate_factor=None, mixup_alpha=0.2)


@pytest.fixture
def run(tmp_path):
    def run(folder, settings=SETTINGS, lora=None, imprint=False, **flags):
        args = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, **({"report_to": "none"} | flags))
        pretrained = Pretrained(str(folder), load_image_processor(str(folder)), {}, lora)
        rehearse(pretrained, settings, args, imprint)

    return run


def save_odd_model(name: str, folder) -> None:
    """Write one of the models that are image classifiers to transformers, and none that ours trains."""
    sizes = {"num_hidden_layers": 1, "intermediate_size": 16}
    processor = {"size": SQUARE, "crop_size": SQUARE}
    vit = TRANSFORMER | sizes
    if name == "timm of one channel":
        return save_timm(folder, "resnet10t", {"channels": [8, 8, 16, 16], "in_chans": 1})
    family, config, image_processor, processor = {
        "ViT of one channel": ("ViT", vit | {"num_channels": 1}, "ViT", processor),
        "another size": ("ViT", vit, "ViT", {"size": {"height": 48, "width": 48}}),
        "five dimensions": ("ViT", vit, "LlavaNext", processor | {"image_grid_pinpoints": [[32, 32], [32, 64]]}),
        "ImageGPT": (
            "ImageGPT",
            {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 1024, "vocab_size": 513},
            "ImageGPT",
            {"clusters": [[0, 0, 0], [1, 1, 1]], "size": SQUARE},
        ),
        "naflex": (
            "Siglip2",
            {"vision_config": vit | {"num_patches": 16}, "text_config": TRANSFORMER | sizes},
            "Siglip2",
            {"patch_size": 8, "max_num_patches": 16},
        ),
    }[name]
    config = getattr(transformers, f"{family}Config")(**config, num_labels=7)
    getattr(transformers, f"{family}ForImageClassification")(config).save_pretrained(folder)
    getattr(transformers, f"{image_processor}ImageProcessor")(**processor).save_pretrained(folder)
    return None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("timm of one channel", "RuntimeError: .* to have 1 channels, but got 3"),
        ("ViT of one channel", "Expected 1 but got 3"),
        ("another size", r"Input image size \(48\*48\) doesn't match model \(32\*32\)"),
    ],
)
def test_a_model_that_does_not_take_the_pixels_is_one_line_that_names_it(run, tmp_path, name, reason):
    save_odd_model(name, tmp_path / "odd")
    with pytest.raises(UserError, match=f"^--model_name_or_path .*odd: a trial run of two RGB images fails .*{reason}"):
        run(tmp_path / "odd")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("five dimensions", "1 x 3 x 3 x 32 x 32"), ("ImageGPT", "input_ids"), ("naflex", "1 x 16 x 192")],
)
def test_a_processor_that_makes_no_images_is_one_line_before_the_model_loads(run, tmp_path, name, reason):
    save_odd_model(name, tmp_path / "odd")
    with pytest.raises(UserError, match=f"^--model_name_or_path .*odd: its image processor makes .*{reason}"):
        run(tmp_path / "odd")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "adamw_8bit"}, "^--optim adamw_8bit: ImportError: .*bitsandbytes"),
        ({"optim_args": "betas"}, "^--optim adamw_torch_fused: ValueError"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "^--lr_scheduler_type warmup_stable_decay .*num_decay_steps"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "x"}}, "--lr_scheduler_kwargs {'power"),
        ({"lr_scheduler_kwargs": "power"}, "^--lr_scheduler_type linear .--lr_scheduler_kwargs power.: TypeError"),
        ({"report_to": "wandb"}, "^--report_to wandb: RuntimeError: .*to be installed"),
        ({"report_to": "diary"}, "^--report_to diary: ValueError: diary is not supported"),
        ({"batch_eval_metrics": True, "eval_strategy": "steps"}, "^training flags: ValueError: .*`batch_eval_metrics`"),
        ({"gradient_checkpointing": True, "name": "resnet"}, "^--model_name_or_path .*not support activation checkp"),
        ({"lora": LoraSettings(target_modules=("nowhere",))}, "^--lora_target_modules nowhere: there is no such layer"),
    ],
)
def test_what_the_trainer_cannot_do_is_one_line_that_names_the_flag(run, classifiers, options, message):
    with pytest.raises(UserError, match=message):
        run(classifiers[options.get("name", "vit")], **{key: options[key] for key in options if key != "name"})


def test_a_dropout_that_the_model_has_not_is_found(run, classifiers):
    with pytest.raises(UserError, match="^--dropout 0.5: .* has no dropout"):
        run(classifiers["resnet"], settings=replace(SETTINGS, dropout=0.5))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "vit",
            {"imprint": True, "eval_strategy": "epoch", "save_strategy": "best", "metric_for_best_model": "accuracy"},
        ),
        ("vit", {"lora": LoraSettings(r=2), "bf16": True, "gradient_accumulation_steps": 4}),
        ("resnet", {"settings": replace(SETTINGS, batch_norm="train"), "lr_scheduler_type": "cosine"}),
        ("timm", {"settings": replace(SETTINGS, learning_rate=1e30), "dataloader_drop_last": True}),
    ],
)
def test_a_rehearsal_leaves_random_states_and_folders_as_they_were(run, classifiers, tmp_path, name, options):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    run(classifiers[name], **options)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert not list(tmp_path.iterdir())
