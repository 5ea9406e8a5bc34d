import copy
import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, default_collate
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput

from tests.conftest import CLASS_NAMES
from tests.transfer.builders import OPTIONS, run_plan
from utils.transfer.adapters import LoraSettings
from utils.transfer.augmentation import BatchAugmentation, TrainImages, TrainItems
from utils.transfer.classifiers import load_classifier, load_image_processor
from utils.transfer.fine_tuning import StageResult, fine_tune, soft_cross_entropy
from utils.transfer.image_format import EvalImages, read_image_format
from utils.transfer.methods import StagePlan, StageSettings
from utils.transfer.model_parts import head_parameter_names

pytest_plugins = ["tests.transfer.fixtures"]


def train(path, images, tmp_path, settings, **arguments):
    model = load_classifier(path, CLASS_NAMES, True, seed=0)
    before = copy.deepcopy(model.state_dict())
    training_args = TrainingArguments(output_dir=str(tmp_path), **(OPTIONS | arguments))
    result = fine_tune(model, images, load_image_processor(path), settings, training_args, tmp_path)
    return before, model.state_dict(), result


def test_soft_cross_entropy_matches_hand_computation_counts_images_and_smooths_as_torch_does():
    logits, soft = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.7, 0.3], [0.0, 1.0]])
    log_probabilities, outputs = logits.log_softmax(1), ImageClassifierOutput(logits=logits)
    expected = -(soft * log_probabilities).sum().item()
    assert soft_cross_entropy(outputs, soft, torch.tensor(4)) == pytest.approx(expected / 4)  # two of a step's four
    expected = -log_probabilities[[0, 1], [0, 1]].mean().item()
    assert soft_cross_entropy(outputs, torch.tensor([0, 1])) == pytest.approx(expected)
    expected = -((0.8 * soft + 0.1) * log_probabilities).sum().item() / 2
    assert soft_cross_entropy(outputs, soft, label_smoothing=0.2) == pytest.approx(expected)


@pytest.mark.parametrize("mixup_alpha", [0.0, 0.4])
def test_accumulated_small_batches_train_like_the_big_batch(classifiers, images, tmp_path, mixup_alpha, monkeypatch):
    # Mixup pairs images within a batch: pair each with itself, so that only the soft labels remain
    monkeypatch.setattr(torch.Tensor, "roll", lambda tensor, *args: tensor)
    options = {"optim": "sgd", "max_grad_norm": 0.0}
    settings = StageSettings(2, 1e-2, mixup_alpha=mixup_alpha, per_device_train_batch_size=6)
    _, big, _ = train(classifiers["vit"], images, tmp_path, settings, **options)
    settings = replace(settings, per_device_train_batch_size=2)
    _, small, _ = train(classifiers["vit"], images, tmp_path, settings, gradient_accumulation_steps=3, **options)
    for name in big:
        torch.testing.assert_close(big[name], small[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet", "timm"])
def test_frozen_batch_norm_keeps_statistics_and_trained_changes_them(classifiers, images, tmp_path, name):
    for batch_norm, unchanged in (("frozen", True), ("train", False)):
        settings = StageSettings(2, 1e-2, batch_norm=batch_norm, per_device_train_batch_size=4)
        before, after, _ = train(classifiers[name], images, tmp_path, settings)
        statistics = [key for key in before if key.endswith("running_mean")]
        assert statistics
        assert all(torch.equal(before[key], after[key].contiguous()) for key in statistics) is unchanged


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "num_steps", "expected"), [(4, 1, 5, 18), (4, 2, 3, 18), (16, 1, 2, 20)]
)
def test_fine_tune_counts_steps_images_and_gpu_hours(
    classifiers, images, tmp_path, batch_size, accumulation, num_steps, expected
):
    settings = StageSettings(num_steps, 1e-2, per_device_train_batch_size=batch_size)
    options = {"gradient_accumulation_steps": accumulation}
    _, _, result = train(classifiers["vit"], images.take(10), tmp_path, settings, **options)
    assert (result.num_steps, result.num_images_seen) == (num_steps, expected)
    costs = {"steps": num_steps, "images_seen": expected, "seconds": result.seconds, "gpu_hours": None}
    costs["seconds_waiting"] = result.seconds_waiting
    assert result.summary() == costs
    assert StageResult(1, 1, 1800.0, 4, []).summary()["gpu_hours"] == 2.0


@pytest.mark.parametrize(("name", "optim", "smoothing"), [("vit", "adamw_torch", 0.0), ("resnet", "sgd", 0.2)])
def test_a_stage_trains_as_the_plain_trainer_does(classifiers, images, tmp_path, name, optim, smoothing):
    settings = StageSettings(
        3, 1e-2, batch_norm="train", label_smoothing_factor=smoothing, per_device_train_batch_size=4
    )
    _, ours, _ = train(classifiers[name], images, tmp_path, settings, optim=optim)
    image_processor = load_image_processor(classifiers[name])
    augmentation = BatchAugmentation(read_image_format(image_processor), 3, seed=42)
    trainer = Trainer(
        model=load_classifier(classifiers[name], CLASS_NAMES, True, seed=0).to(memory_format=torch.channels_last),
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, learning_rate=1e-2, per_device_train_batch_size=4, weight_decay=0.01,
            warmup_steps=0.1, optim=optim, label_smoothing_factor=smoothing, remove_unused_columns=False,
            dataloader_pin_memory=False, **OPTIONS,
        ),
        train_dataset=TrainImages(images, TrainItems(image_processor), seed=42),
        data_collator=lambda items: augmentation(default_collate(items)),
    )  # fmt: skip
    trainer.train()
    plain = trainer.model.state_dict()
    for key in plain:  # the Trainer's smoothing sums in another order
        torch.testing.assert_close(ours[key], plain[key], rtol=0, atol=1e-6 if smoothing else 0)


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_a_frozen_backbone_leaves_all_but_the_head(classifiers, images, tmp_path, name):
    settings = StageSettings(2, 1e-2, batch_norm="train", freeze_backbone=True, per_device_train_batch_size=4)
    before, after, _ = train(classifiers[name], images, tmp_path, settings)
    head = set(head_parameter_names(load_classifier(classifiers[name], CLASS_NAMES, True, seed=0)))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == head


def test_the_settings_of_a_stage_reach_the_optimizer(classifiers, images, tmp_path, monkeypatch):
    groups = []
    create = Trainer.create_scheduler

    def create_scheduler(self, *args, **kwargs):
        create(self, *args, **kwargs)
        groups.extend(self.optimizer.param_groups)

    monkeypatch.setattr(Trainer, "create_scheduler", create_scheduler)
    settings = StageSettings(4, 1e-2, 5.0, weight_decay=0.3, warmup_steps=0.5, per_device_train_batch_size=3)
    _, _, result = train(classifiers["vit"], images, tmp_path, settings, logging_strategy="steps", logging_steps=1)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert {group["initial_lr"] for group in groups} == {1e-2, 5e-2}
    # half of the steps are warm-up, from 0
    assert result.log_history[1]["learning_rate"] == pytest.approx(result.log_history[0]["learning_rate"] + 5e-3)
    assert result.num_images_seen == 12


def make_plan(settings, name="stage1", **options) -> StagePlan:
    return StagePlan(name, "real", options.pop("head_init", "reset"), settings, **options)


@pytest.mark.parametrize(("name", "head_inits"), [("vit", ("reset", "keep", "imprint", "probe")), ("timm", ("reset",))])
def test_the_second_stage_starts_from_the_firsts_features_and_a_fresh_head(
    classifiers, images, tmp_path, name, head_inits
):
    settings = StageSettings(2, 1e-2, per_device_train_batch_size=4)
    first, _ = run_plan(make_plan(settings), classifiers[name], images, tmp_path / "stage1")
    still = replace(settings, max_steps=1, learning_rate=0.0)  # the model of step 0
    heads = []
    for head_init in head_inits:
        plan = make_plan(still, "stage2", start="stage1", head_init=head_init)
        second, _ = run_plan(plan, classifiers[name], images, tmp_path / head_init, tmp_path / "stage1")
        changed = {key for key, value in second.state_dict().items() if not torch.equal(value, first.state_dict()[key])}
        assert changed <= set(head_parameter_names(first))
        assert bool(changed) == (head_init != "keep")
        heads.append(second.get_parameter(head_parameter_names(second)[0]))
    # and the fresh head differs from that of the first stage
    begun = load_classifier(classifiers[name], CLASS_NAMES, True, seed=42)
    heads.append(begun.get_parameter(head_parameter_names(begun)[0]))
    assert all(not torch.equal(first, second) for first, second in itertools.combinations(heads, 2))


def test_the_second_stage_of_an_adapter_starts_from_the_first_and_a_fresh_head(classifiers, images, tmp_path):
    path, settings = classifiers["vit"], StageSettings(2, 1e-2, per_device_train_batch_size=4)
    lora = LoraSettings(r=2)
    first, _ = run_plan(make_plan(settings), path, images, tmp_path / "stage1", lora=lora)
    plan = make_plan(replace(settings, max_steps=1, learning_rate=0.0), "stage2", start="stage1")
    second, _ = run_plan(plan, path, images, tmp_path / "stage2", tmp_path / "stage1", lora)
    changed = {key for key, value in second.state_dict().items() if not torch.equal(value, first.state_dict()[key])}
    # the base model's own head is there too, but is not used
    assert {key for key in changed if "original_module" not in key} == set(head_parameter_names(first))
    assert any(value.any() for key, value in second.state_dict().items() if "lora_B" in key)  # 0 in a fresh adapter


def test_recalibrated_statistics_are_those_of_the_images_and_then_frozen(classifiers, images, tmp_path):
    settings = StageSettings(1, 0.0, batch_norm="recalibrate", per_device_train_batch_size=4)
    path = classifiers["resnet"]
    model, _ = run_plan(make_plan(settings), path, images, tmp_path)
    expected = load_classifier(path, CLASS_NAMES, True, seed=42)
    loader = DataLoader(EvalImages(images, load_image_processor(path)), batch_size=12)
    update_bn((batch["pixel_values"] for batch in loader), expected)
    for key, value in expected.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(model.state_dict()[key], value)


def test_a_stage_is_saved_with_its_record_and_without_the_token(classifiers, images, tmp_path):
    settings = StageSettings(2, 1e-2, per_device_train_batch_size=4)
    options = {"hub_token": "hf_secret", "push_to_hub": True, "save_strategy": "steps", "save_steps": 1}
    model, result = run_plan(make_plan(settings), classifiers["vit"], images, tmp_path, **options)
    saved = load_classifier(str(tmp_path), CLASS_NAMES, False, seed=0).state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    record = json.loads((tmp_path / "stage.json").read_text())
    assert StageResult(**record["result"]) == result
    assert record["settings"]["learning_rate"] == 1e-2 and record["settings"]["seed"] == 42
    assert (tmp_path / "checkpoint-1" / "training_args.bin").exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
