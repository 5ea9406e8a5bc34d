"""Stages that run out of memory: the same steps in smaller parts, reported, recorded and resumed."""

import json
import re
from dataclasses import replace

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file
from transformers import ResNetForImageClassification, TimmWrapperForImageClassification, ViTForImageClassification

from tests.processes import start_script
from tests.short_memory import limit_memory
from tests.transfer.builders import Killed, assert_same, kill_in_step, run_plan
from tests.transfer.two_processes import contiguous
from utils.cli.errors import UserError
from utils.transfer import fine_tuning
from utils.transfer.alignment import AlignedImages
from utils.transfer.fine_tuning import FITTED, StageTrainer
from utils.transfer.methods import Alignment, StagePlan, StageSettings
from utils.transfer.replay import ReplayedImages

pytest_plugins = ["tests.transfer.fixtures"]
CLASSES = {
    "vit": ViTForImageClassification, "resnet": ResNetForImageClassification, "timm": TimmWrapperForImageClassification,
}  # fmt: skip
SETTINGS = StageSettings(4, 1e-2, mixup_alpha=0.4, per_device_train_batch_size=6)
PLAN = StagePlan("stage1", "real", "reset", SETTINGS)
# plain steps, in which a wrong gradient shows
SGD = {"optim": "sgd", "max_grad_norm": 0.0, "logging_strategy": "steps", "logging_steps": 1}
CHILD = """
import os, sys
from pathlib import Path
from accelerate import PartialState
from datasets import load_dataset
from safetensors.torch import save_file
from tests.short_memory import limit_memory
from tests.transfer.builders import run_plan
from tests.transfer.test_micro_batches import CLASSES, PLAN, SGD, contiguous, replace
limit, path, images_dir, folder = sys.argv[1:]
images = load_dataset(images_dir, split="train").take(12)
plan = replace(PLAN, settings=replace(PLAN.settings, per_device_train_batch_size=4))
with limit_memory(CLASSES["vit"], float(limit) if os.environ["RANK"] == "1" else 99) as sizes:
    model, result = run_plan(plan, path, images, Path(folder), **SGD)
if PartialState().is_main_process:
    save_file(contiguous(model.state_dict()), Path(folder) / "weights.safetensors")
sys.stdout.write(f"sizes {sizes}\\n")
"""


@pytest.fixture
def run(classifiers, images, tmp_path):
    def run(folder, name="vit", plan=PLAN, seen=None, resume=False, **options):
        seen = images if seen is None else seen
        model, result = run_plan(plan, classifiers[name], seen, tmp_path / folder, resume=resume, **(SGD | options))
        return contiguous(model.state_dict()), result

    return run


def losses(result) -> list[float]:
    return [entry["loss"] for entry in result.log_history if "loss" in entry]


def assert_close(first: dict, second: dict) -> None:
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "kind", "options", "limit", "from_call", "in_backward"), [
    ("vit", "real", {}, 3, 1, False),
    ("resnet", "real", {}, 1, 3, True),
    ("timm", "replayed", {}, 2, 2, True),
    ("resnet", "domain", {}, 3, 1, False),  # each part knows which of its images are synthetic
    ("vit", "adversarial", {}, 6, 1, True),  # pairs: twice as many images go through the model
    ("vit", "real", {"gradient_accumulation_steps": 2}, 3, 4, True),  # in the second batch of a step
    ("vit", "real", {}, 0.5, 2, False),  # not without gradient checkpointing
    ("vit", "real", {"max_grad_norm": 0.1}, 3, 3, True),
])  # fmt: skip
def test_a_step_in_smaller_parts_is_the_same_and_is_reported_and_recorded(
    run, images, real_images_dir, tmp_path, caplog, name, kind, options, limit, from_call, in_backward
):
    test_images, seen, plan = load_dataset(str(real_images_dir), split="test"), images, PLAN
    if kind == "domain":
        plan = replace(PLAN, settings=replace(SETTINGS, batch_norm="domain"))
    if kind in ("replayed", "domain"):
        seen = ReplayedImages(images, test_images, share=0.3)
    elif kind == "adversarial":
        seen = AlignedImages(images, test_images, Alignment("adversarial", 1.0))
    whole, whole_result = run("whole", name, plan, seen, **options)
    with limit_memory(CLASSES[name], limit, from_call=from_call, in_backward=in_backward) as sizes:
        divided, result = run("divided", name, plan, seen, **options)
    assert_close(whole, divided)
    assert losses(result) == pytest.approx(losses(whole_result), rel=1e-4)
    assert (result.num_steps, result.num_images_seen) == (whole_result.num_steps, whole_result.num_images_seen)
    expected = {"micro_batch_size": 1 if limit < 3 else 3} | ({"gradient_checkpointing": True} if limit < 1 else {})
    assert result.fitted == expected and whole_result.fitted == {}
    assert max(sizes[-2:]) <= max(limit, 1)
    times = {"seconds": result.seconds, "seconds_waiting": result.seconds_waiting}
    assert result.summary() == whole_result.summary() | expected | times
    assert sum("out of memory" in line for line in caplog.messages) == {3: 1, 6: 1, 2: 2, 1: 2, 0.5: 3}[limit]
    assert "from now on 3, with gradients accumulated: a step stays the same." in caplog.text
    records = [json.loads((tmp_path / one / "stage.json").read_text())["result"] for one in ("whole", "divided")]
    assert "fitted" not in records[0] and records[1]["fitted"] == expected
    loaded, loaded_result = run("divided", name, plan, seen, resume=True, **options)
    assert_same(divided, loaded)
    assert loaded_result == result


@pytest.mark.parametrize(("name", "batch_norm", "dropout"), [("vit", "frozen", 0.2), ("resnet", "train", None)])
def test_a_failed_step_changes_nothing(run, monkeypatch, caplog, name, batch_norm, dropout):
    """Random states and statistics are restored: the run is bit-identical to one with that size from the start.

    With BatchNorm's statistics per part it differs from a run with enough memory, and a warning says so.
    """
    plan = replace(PLAN, settings=replace(SETTINGS, batch_norm=batch_norm, dropout=dropout))
    whole, _ = run("whole", name, plan)
    with limit_memory(CLASSES[name], 3, in_backward=True):
        divided, _ = run("divided", name, plan)
    kept = "BatchNorm's statistics are those of each part" in caplog.text
    assert kept == (batch_norm == "train")
    original = fine_tuning.MicroBatching
    monkeypatch.setattr(fine_tuning, "MicroBatching", lambda size, *args: original(3, *args))
    known, _ = run("known", name, plan)
    assert_same(known, divided)
    assert any(not torch.allclose(whole[key], divided[key], atol=1e-4) for key in whole)


def test_covariances_are_computed_per_part_with_a_warning(run, images, caplog):
    with limit_memory(CLASSES["vit"], 6):
        run("stage", seen=AlignedImages(images, images, Alignment("coral", 1.0)))
    assert "a step has the same images, but the covariances of the alignment are those of each part." in caplog.text


def test_a_killed_stage_resumes_with_the_size_that_fitted(run, monkeypatch, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    with limit_memory(CLASSES["vit"], 0.5):
        alone, _ = run("alone", **options)
        kill_in_step(monkeypatch, 4)
        with pytest.raises(Killed):
            run("killed", **options)
    state = json.loads((tmp_path / "killed" / "checkpoint-2" / "trainer_state.json").read_text())
    fitted = {"micro_batch_size": 1, "gradient_checkpointing": True}
    assert state["stateful_callbacks"]["StageProgress"]["attributes"][FITTED] == fitted
    with limit_memory(CLASSES["vit"], 0.5) as sizes:
        resumed, result = run("killed", resume=True, **options)
    assert set(sizes) == {1} and result.fitted == fitted
    assert_same(alone, resumed)


def test_with_enough_memory_checkpoints_record_nothing_about_it(run, tmp_path):
    run("stage", save_strategy="steps", save_steps=2)
    state = json.loads((tmp_path / "stage" / "checkpoint-2" / "trainer_state.json").read_text())
    assert set(state["stateful_callbacks"]["StageProgress"]["attributes"]) == {
        "num_images", "seconds_before", "seconds_waiting",
    }  # fmt: skip


def test_if_not_even_one_image_fits_the_error_says_what_to_do(run):
    flag = "^--per_device_train_batch_size 6: out of memory "
    with limit_memory(CLASSES["vit"], 0), pytest.raises(UserError, match=f"{flag}.*, even with gradient .*--use_peft"):
        run("vit")
    with limit_memory(CLASSES["resnet"], 0), pytest.raises(UserError, match=f"{flag}with one image at a time; choose"):
        run("resnet", "resnet")  # has no gradient checkpointing


def test_an_optimiser_that_does_not_fit_is_not_blamed_on_the_images(run, monkeypatch):
    def step(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(UserError, match="out of memory outside the forward and backward pass: in the optimiser"):
        run("stage")


def test_both_processes_take_smaller_parts_if_one_is_out_of_memory(classifiers, real_images_dir, tmp_path):
    weights = {}
    for name, limit in (("whole", 99), ("divided", 2)):
        argv = [limit, classifiers["vit"], real_images_dir, tmp_path / name]
        output, errors = (child := start_script(CHILD, argv, tmp_path, 2)).communicate()
        assert child.returncode == 0, errors[-3000:]
        sizes = [json.loads(found) for found in re.findall(r"sizes (.*)", output)]
        weights[name] = load_file(tmp_path / name / "weights.safetensors")
        # two trials, then the steps themselves
        assert len(sizes) == 2 and all(one[-8:] == ([2] * 8 if name == "divided" else [4] * 6) for one in sizes)
        assert errors.count("out of memory with 4 images at a time; from now on 2") == (name == "divided")
    assert_close(weights["whole"], weights["divided"])


def test_a_process_that_runs_out_of_memory_later_says_how_to_resume(run, monkeypatch):
    """Here one process plays one of two, none of which waits for another."""

    def training_step(self, model, inputs, num_items_in_batch):
        self.step_batches.append(inputs)
        self.before_step = self._copy_changing_state()
        return self._training_step_of_several(model, inputs, num_items_in_batch)

    monkeypatch.setattr(StageTrainer, "training_step", training_step)
    with (
        limit_memory(CLASSES["vit"], 3, from_call=6),
        pytest.raises(UserError, match="process 0 is out of memory after step 3, .* --resume_from_checkpoint latest"),
    ):
        run("stage")
