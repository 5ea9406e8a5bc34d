import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from tests.transfer.architectures import SQUARE, TRANSFORMER, save_native, save_timm
from utils.cli.errors import UserError
from utils.transfer.adapters import LoraSettings
from utils.transfer.classifiers import load_image_processor
from utils.transfer.methods import Alignment, StageSettings
from utils.transfer.rehearsal import rehearse
from utils.transfer.stage import Pretrained

pytest_plugins = ["tests.transfer.fixtures"]
BEST = {"save_strategy": "best", "metric_for_best_model": "accuracy"}
SETTINGS = StageSettings(3, 1e-3, head_learning_rate_factor=None, mixup_alpha=0.2)


@pytest.fixture
def run(tmp_path):
    def run(folder, settings=SETTINGS, lora=None, head_inits=(), alignment=None, **flags):
        args = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, **({"report_to": "none"} | flags))
        pretrained = Pretrained(str(folder), load_image_processor(str(folder)), {}, lora)
        rehearse(pretrained, settings, args, head_inits, alignment)

    return run


SIZES = {"num_hidden_layers": 1, "intermediate_size": 16}
VIT, PROCESSOR = TRANSFORMER | SIZES, {"size": SQUARE, "crop_size": SQUARE}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (("resnet10t", {"channels": [8, 8, 16, 16], "in_chans": 1}),
         "a trial run of two RGB images fails .*RuntimeError: .* to have 1 channels, but got 3"),
        (("ViT", VIT | {"num_channels": 1}, "ViT", PROCESSOR),
         "a trial run of two RGB images fails .*Expected 1 but got 3"),
        (("ViT", VIT, "ViT", {"size": {"height": 48, "width": 48}}),
         r"a trial run .*Input image size \(48\*48\) doesn't match model \(32\*32\)"),
        # before the model loads
        (("ViT", VIT, "LlavaNext", PROCESSOR | {"image_grid_pinpoints": [[32, 32], [32, 64]]}),
         "its image processor returns .*1 x 3 x 3 x 32 x 32"),
        (("ImageGPT", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 1024, "vocab_size": 513},
          "ImageGPT", {"clusters": [[0, 0, 0], [1, 1, 1]], "size": SQUARE}),
         "its image processor returns .*input_ids"),
        (("Siglip2", {"vision_config": VIT | {"num_patches": 16}, "text_config": VIT},
          "Siglip2", {"patch_size": 8, "max_num_patches": 16}),
         "its image processor returns .*1 x 16 x 192"),
    ],
)  # fmt: skip
def test_a_classifier_that_does_not_take_the_pixels_is_a_one_line_error_that_names_it(run, tmp_path, model, message):
    save = save_native if len(model) > 2 else save_timm
    save(tmp_path / "odd", *model)
    with pytest.raises(UserError, match=f"^--model_name_or_path .*odd: {message}"):
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
        ({"lora": LoraSettings(target_modules=("nowhere",))}, "^--lora_target_modules nowhere: no such layer"),
        ({"settings": replace(SETTINGS, dropout=0.5), "name": "resnet"}, "^--dropout 0.5: .* has no dropout"),
    ],
)
def test_options_that_the_trainer_cannot_use_are_a_one_line_error_that_names_the_flag(
    run, classifiers, options, message
):
    classifier = classifiers[options.pop("name", "vit")]
    with pytest.raises(UserError, match=message):
        run(classifier, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit", {"head_inits": ("imprint", "probe"), "eval_strategy": "epoch"} | BEST),
        ("vit", {"lora": LoraSettings(r=2), "bf16": True, "gradient_accumulation_steps": 4}),
        ("timm", {"alignment": Alignment("adversarial"), "bf16": True}),
        ("vit", {"alignment": Alignment("coral"), "lora": LoraSettings(r=2)}),
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
