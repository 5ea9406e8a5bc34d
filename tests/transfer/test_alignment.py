"""Alignment: its losses against independent computations, the images it sees, and exact resume of a stage."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file

from tests.transfer.architectures import save_timm
from tests.transfer.builders import Killed, assert_same, kill_in_step, run_plan
from tests.transfer.two_processes import SETTINGS, contiguous
from utils.cli.errors import UserError
from utils.transfer.adapters import LoraSettings
from utils.transfer.alignment import (
    AlignedImages,
    AlignedItems,
    DomainClassifier,
    StreamedAlignedItems,
    build_alignment,
    coral_distance,
    reversal_factor,
)
from utils.transfer.augmentation import TrainItems
from utils.transfer.classifiers import load_image_processor
from utils.transfer.fine_tuning import StageTrainer
from utils.transfer.methods import METHODS, Alignment, StagePlan, StageSettings, plan_stages
from utils.transfer.stage import stage_inputs

pytest_plugins = ["tests.transfer.fixtures"]
PLAN = StagePlan("stage1", "synthetic", "reset", SETTINGS)
KINDS = ("adversarial", "coral")


def test_the_gradient_of_the_domain_loss_reaches_features_reversed_and_the_classifier_as_it_is():
    classifier = DomainClassifier(num_features=5, weight=0.5, seed=0)
    synthetic, real = torch.randn(2, 4, 5).requires_grad_().unbind()
    loss = classifier(synthetic, real, progress=0.3)
    ours = torch.autograd.grad(loss, [synthetic, real, *classifier.parameters()])
    is_real = torch.tensor([0.0] * 4 + [1.0] * 4)
    probabilities = classifier.layers(torch.cat([synthetic, real])).squeeze(1).sigmoid()
    plain = -(is_real * probabilities.log() + (1 - is_real) * (1 - probabilities).log()).mean()
    theirs = torch.autograd.grad(plain, [synthetic, real, *classifier.parameters()])
    torch.testing.assert_close(loss, plain)
    factor = 0.5 * (2 / (1 + np.exp(-3)) - 1)
    for one, other in zip(ours[:2], theirs[:2]):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, -factor * other)
    for one, other in zip(ours[2:], theirs[2:]):
        torch.testing.assert_close(one, other)


def test_the_reversal_grows_with_the_steps_from_0_to_1():
    factors = [reversal_factor(progress) for progress in (0, 0.1, 0.5, 1)]
    assert factors == pytest.approx([0, 0.46212, 0.98661, 0.99991], abs=1e-5)


def test_the_coral_distance_matches_numpys_covariances():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(7, 4)), 3 * rng.normal(size=(9, 4)) + 5
    centred = [features - features.mean(0) for features in (first, second)]
    covariances = [features.T @ features / (len(features) - 1) for features in centred]
    expected = ((covariances[0] - covariances[1]) ** 2).sum() / (4 * 4**2)
    assert coral_distance(torch.tensor(first), torch.tensor(second)).item() == pytest.approx(expected)
    assert coral_distance(torch.tensor(first), torch.tensor(first) + 8).item() == pytest.approx(0, abs=1e-12)
    of_one = torch.randn(1, 4, requires_grad=True)
    coral_distance(of_one, of_one).backward()
    assert (of_one.grad == 0).all()
    weighted = build_alignment(Alignment("coral", 2.5), 4, 0)(torch.tensor(first), torch.tensor(second), 0.0)
    assert weighted.item() == pytest.approx(2.5 * expected, rel=1e-5)


@pytest.fixture(scope="module")
def synthetic(real_images_dir):
    return load_dataset(str(real_images_dir), split="test").select(range(0, 30, 3))


@pytest.fixture
def items(classifiers):
    return TrainItems(load_image_processor(classifiers["vit"]), mixup_alpha=0.2)


def test_each_synthetic_image_is_paired_with_an_unlabelled_real_one_and_each_kind_has_epochs(images, synthetic, items):
    aligned = AlignedImages(images, synthetic, Alignment("coral"))
    all_items = AlignedItems(aligned, items, seed=0, num_items=40)
    seen = [all_items[position] for position in range(len(all_items))]
    assert len(seen) == 40
    assert Counter(item["labels"] for item in seen) == {
        label: 4 * count for label, count in Counter(synthetic["label"]).items()
    }
    assert all("labels" not in item["real"] and "mixup_weight" in item["real"] for item in seen)
    real_only = AlignedItems(replace(aligned, synthetic=images), items, seed=0, num_items=1)
    expected = [real_only.make(0, position) for position in range(40)]
    assert all(torch.equal(a["real"]["pixel_values"], b["pixel_values"]) for a, b in zip(seen, expected))
    assert Counter(item["labels"] for item in expected[:12]) == Counter(images["label"])
    other = AlignedItems(aligned, items, seed=1, num_items=40)
    assert not torch.equal(other[7]["real"]["pixel_values"], seen[7]["real"]["pixel_values"])


def test_readers_of_a_stream_divide_the_real_images(images, synthetic, items):
    aligned = AlignedImages(images, synthetic.to_iterable_dataset(num_shards=2), Alignment("coral"))
    readers = [StreamedAlignedItems(aligned, items, 0, 2, process) for process in range(2)]
    seen = [item["real"] for reader in readers for item in islice(reader, 6)]
    assert all("labels" not in item for item in seen)
    rank = AlignedItems(replace(aligned, synthetic=images), items, 0, 1)
    expected = [rank.make(0, position) for position in (*range(0, 12, 2), *range(1, 12, 2))]
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(seen, expected))


@pytest.fixture
def run(classifiers, images, synthetic, tmp_path):
    def run(folder, alignment, name="vit", plan=PLAN, lora=None, resume=False, **options):
        plan = replace(plan, alignment=alignment)
        seen = synthetic if alignment is None else AlignedImages(images, synthetic, alignment)
        options = {"save_strategy": "steps", "save_steps": 2} | options
        model, result = run_plan(plan, classifiers[name], seen, tmp_path / folder, None, lora, resume, **options)
        return contiguous(model.state_dict()), result

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_an_alignment_changes_features_by_its_weight_and_leaves_nothing_in_the_classifier(run, classifiers, kind):
    plan = replace(PLAN, settings=replace(SETTINGS, dropout=None))
    options = {"save_strategy": "no", "plan": plan}
    light, result = run("light", Alignment(kind, 1e-9), **options)
    heavy, _ = run("heavy", Alignment(kind, 1e4), **options)
    other, alone = run("alone", None, **options)
    assert light.keys() == heavy.keys() == other.keys()
    backbone = [key for key in light if "weight" in key and "classifier" not in key]
    assert all(not torch.equal(light[key], heavy[key]) for key in backbone)
    assert (result.num_images_seen, alone.num_images_seen) == (
        2 * 28,
        24,
    )  # an epoch of ten images ends with a batch of two


@pytest.mark.parametrize("name", ["resnet", "timm"])
def test_frozen_statistics_stay_and_trained_ones_are_those_of_both_kinds(run, name):
    frozen, _ = run("frozen", Alignment("coral"), name, replace(PLAN, settings=replace(SETTINGS, dropout=None)))
    trained, _ = run(
        "trained", Alignment("coral"), name,
        replace(PLAN, settings=replace(SETTINGS, dropout=None, batch_norm="train", max_steps=1)),
    )  # fmt: skip
    means = [key for key in frozen if key.endswith("running_mean")]
    assert means and all(torch.equal(frozen[key], torch.zeros_like(frozen[key])) for key in means)
    assert all(not torch.equal(trained[key], frozen[key]) for key in means)


@pytest.mark.parametrize(
    ("kind", "name", "num_workers", "lora"),
    [("adversarial", "vit", 0, False), ("coral", "resnet", 2, False), ("adversarial", "timm", 0, False),
     ("adversarial", "vit", 0, True), ("coral", "vit", 0, True)],
)  # fmt: skip
def test_a_killed_stage_resumes_to_the_same_weights(run, monkeypatch, kind, name, num_workers, lora):
    plan = PLAN if name == "vit" and not lora else replace(PLAN, settings=replace(SETTINGS, dropout=None))
    options = {"name": name, "plan": plan, "dataloader_num_workers": num_workers, "logging_strategy": "steps"}
    options |= {"logging_steps": 1, "lora": LoraSettings(r=2, alpha=4, dropout=0.3) if lora else None}
    alignment = Alignment(kind, 3.0)
    alone, result = run("alone", alignment, **options)
    kill_in_step(monkeypatch, 6)
    with pytest.raises(Killed):
        run("killed", alignment, **options)
    resumed, resumed_result = run("killed", alignment, **options, resume=True)
    assert_same(alone, resumed)
    losses = [[entry["loss"] for entry in one.log_history if "loss" in entry] for one in (result, resumed_result)]
    assert losses[0] == losses[1] and len(losses[0]) == 7
    assert result.num_images_seen == resumed_result.num_images_seen == 2 * 28


def test_the_domain_classifier_learns_at_the_heads_rate_and_is_only_in_checkpoints(run, tmp_path, monkeypatch):
    groups = []
    create = StageTrainer.create_optimizer

    def noted(self, *args):
        optimizer = create(self, *args)
        own = {id(parameter) for parameter in self.alignment.parameters()}
        groups.extend(
            (group["lr"], parameter.ndim == 2, group["weight_decay"] > 0)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in own
        )
        return optimizer

    monkeypatch.setattr(StageTrainer, "create_optimizer", noted)
    before = DomainClassifier(16, 1.0, 42).state_dict()
    run("stage", Alignment("adversarial"))
    rate = SETTINGS.learning_rate * SETTINGS.head_learning_rate_factor
    assert sorted(groups) == [(rate, False, False)] * 2 + [(rate, True, True)] * 2
    saved = tmp_path / "stage" / "checkpoint-7" / "alignment.safetensors"
    weights = load_file(saved)
    assert not (tmp_path / "stage" / "alignment.safetensors").exists()
    assert weights.keys() == before.keys()
    assert all(not torch.equal(weights[key], before[key]) for key in weights)


def test_another_alignment_or_other_real_images_are_not_resumed(run, images):
    run("stage", Alignment("coral"))
    with pytest.raises(UserError, match=r"other options \(alignment was .*'weight': 1.0.*now .*'weight': 2.0"):
        run("stage", Alignment("coral", 2.0), resume=True)
    inputs = {"model_name_or_path": "m", "synthetic_dataset": "s", "train_dir": "r"}
    assert stage_inputs(PLAN, None, inputs) == {"model_name_or_path": "m", "synthetic_dataset": "s"}
    assert stage_inputs(replace(PLAN, alignment=Alignment("coral")), None, inputs) == inputs


def test_a_nonlinear_head_or_several_gpus_in_one_process_is_a_one_line_error(
    run, images, synthetic, tmp_path, monkeypatch
):
    aligned = AlignedImages(images, synthetic, Alignment("coral"))
    plan = replace(PLAN, settings=StageSettings(1, 1e-2), alignment=aligned.alignment)
    convolution = str(tmp_path / "convolution")
    save_timm(convolution, "resnetv2_50", {"layers": [1, 1, 1, 1], "channels": [32] * 4, "stem_chs": 8})
    with pytest.raises(UserError, match="^--bridge_alignment: the head of .* is not linear on one feature vector; ch"):
        run_plan(plan, convolution, aligned, tmp_path / "stage")
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 2)
    with pytest.raises(UserError, match="^--bridge_alignment coral: not possible on 2 GPUs in one process; start w"):
        run("stage", Alignment("coral"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_bridged_keep_with_the_alignment_in_stage_1(kind):
    settings = StageSettings(90, 5e-4, mixup_alpha=0.2, head_warmup_steps=5), StageSettings(30, 1e-4)
    keep, aligned = (plan_stages(METHODS[name], *settings) for name in ("bridged_keep", f"bridged_{kind}"))
    assert [stage.alignment for stage in aligned] == [None, Alignment(kind), None]  # the head's warm-up first
    assert [replace(stage, alignment=None) for stage in aligned] == keep
    assert "alignment" not in keep[1].to_dict()
    assert aligned[1].to_dict()["alignment"] == {"kind": kind, "weight": 1.0}
    without = METHODS[f"bridged_{kind}"].with_flags({"bridge_alignment": "none", "bridge_alignment_weight": 2.0})
    assert plan_stages(without, *settings) == keep
    given = METHODS["bridged_keep"].with_flags({"bridge_alignment": kind, "bridge_alignment_weight": 2.0})
    assert given.alignment == Alignment(kind, 2.0)
    only = METHODS["synthetic_only"].with_flags({"bridge_alignment": kind})
    assert (only.kinds, only.uses_real, only.trains_on_real) == ({"synthetic"}, True, False)
    assert not METHODS["synthetic_only"].uses_real
