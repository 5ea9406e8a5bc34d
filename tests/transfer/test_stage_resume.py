"""A stage that is killed and resumed ends with the weights of an uninterrupted one, in one process and in two."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from tests.transfer.builders import Killed, assert_same, kill_in_step, run_plan
from tests.transfer.two_processes import (
    ACCUMULATED,
    SEEN,
    SETTINGS,
    contiguous,
    pair_with_itself,
    probe,
    train_big_batch,
)
from utils.cli.errors import UserError
from utils.transfer import stage
from utils.transfer.adapters import LoraSettings
from utils.transfer.fine_tuning import StageProgress, StageTrainer
from utils.transfer.methods import StagePlan
from utils.transfer.stage import find_earlier_run, stage_folder

pytest_plugins = ["tests.transfer.fixtures"]
PLAN = StagePlan("stage1", "real", "reset", SETTINGS)


@pytest.fixture
def run(classifiers, images, tmp_path):
    def run(folder, name="vit", plan=PLAN, num_workers=0, lora=None, resume=False, **options):
        options = {"logging_strategy": "steps", "logging_steps": 1, "save_strategy": "steps", "save_steps": 2} | options
        options["dataloader_num_workers"] = num_workers
        model, result = run_plan(plan, classifiers[name], images, tmp_path / folder, None, lora, resume, **options)
        return contiguous(model.state_dict()), result

    return run


@pytest.mark.parametrize(
    ("name", "num_workers", "save_steps", "lora"),
    [("vit", 0, 2, False), ("resnet", 2, 2, False), ("timm", 0, 3, False), ("vit", 2, 2, True)],
)
def test_a_killed_stage_resumes_to_the_same_weights(run, monkeypatch, name, num_workers, save_steps, lora):
    plan = PLAN if name == "vit" and not lora else replace(PLAN, settings=replace(SETTINGS, dropout=None))
    options = {"name": name, "plan": plan, "num_workers": num_workers, "save_steps": save_steps}
    options |= {"lora": LoraSettings(r=2, alpha=4, dropout=0.3) if lora else None}
    alone, result = run("alone", **options)
    kill_in_step(monkeypatch, 6)
    with pytest.raises(Killed):
        run("killed", **options)
    resumed, resumed_result = run("killed", **options, resume=True)
    assert_same(alone, resumed)
    assert (result.num_steps, result.num_images_seen) == (7, 28)
    assert (resumed_result.num_steps, resumed_result.num_images_seen) == (7, 28)
    losses = [[entry["loss"] for entry in one.log_history if "loss" in entry] for one in (result, resumed_result)]
    assert losses[0] == losses[1] and len(losses[0]) == 7


def test_a_stage_counts_the_seconds_of_training_over_all_its_runs():
    progress = StageProgress(torch.device("cpu"))
    time.sleep(0.01)
    state = TrainerState(stateful_callbacks=[progress])
    progress.on_train_begin(None, state, None)
    assert progress.seconds < 0.01
    state.stateful_callbacks["StageProgress"]["attributes"] = {"num_images": 5, "seconds_before": 100.0}
    progress.on_train_begin(None, state, None)
    assert 100 <= progress.seconds < 110 and progress.num_images == 5


def test_a_stage_killed_while_saving_resumes_from_its_last_checkpoint(run, monkeypatch):
    alone, result = run("alone")

    def save(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stage, "save_classifier", save)
        run("killed")
    monkeypatch.setattr(StageTrainer, "training_step", save)
    resumed, resumed_result = run("killed", resume=True)
    assert_same(alone, resumed)
    assert (resumed_result.num_steps, resumed_result.num_images_seen) == (7, result.num_images_seen)
    assert resumed_result.seconds > 0
    # once finished, it is only loaded
    again, again_result = run("killed", resume=True)
    assert_same(alone, again)
    assert again_result == resumed_result


def test_a_finished_stage_with_an_adapter_is_loaded_and_a_damaged_checkpoint_skipped(run, tmp_path, monkeypatch):
    options = {"lora": LoraSettings(r=2), "plan": replace(PLAN, settings=replace(SETTINGS, dropout=None))}
    alone, result = run("stage", **options)
    loaded, loaded_result = run("stage", **options, resume=True)
    assert_same(alone, loaded)
    assert loaded_result == result
    (tmp_path / "stage" / "stage.json").unlink()
    state = tmp_path / "stage" / "checkpoint-7" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    kill_in_step(monkeypatch, 7)  # of those after checkpoint-6
    with pytest.raises(Killed):
        run("stage", **options, resume=True)
    resumed, _ = run("stage", **options, resume=True)
    assert_same(alone, resumed)


def test_the_last_checkpoint_is_the_complete_one_with_most_steps(tmp_path, caplog):
    folder = stage_folder(tmp_path, {"num_processes": 2}, {})
    assert find_earlier_run(folder) == (None, None)
    folder.begin()
    assert find_earlier_run(folder) == (None, None)
    for step, num_processes in ((8, 2), (10, 2), (12, 1), (14, 2), (16, 2)):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text("{}")
        for rank in range(num_processes):
            torch.save({}, checkpoint / f"rng_state_{rank}.pth")
    (tmp_path / "checkpoint-14" / "model.safetensors").write_bytes(b"torn")
    torch.save({"state": torch.zeros(1000)}, tmp_path / "checkpoint-16" / "optimizer.pt")
    os.truncate(tmp_path / "checkpoint-16" / "optimizer.pt", 1000)
    assert find_earlier_run(folder) == (None, str(tmp_path / "checkpoint-10"))
    assert {line.split(": ")[2].split(" is incomplete")[0] for line in caplog.messages} == {
        str(tmp_path / f"checkpoint-{step}") for step in (12, 14, 16)
    }


def test_resuming_with_other_settings_is_refused_and_names_them(run, tmp_path):
    run("stage")
    other = replace(PLAN, settings=replace(SETTINGS, learning_rate=0.5))
    with pytest.raises(UserError, match=r"other options \(learning_rate was 0.01, now 0.5; seed was 42, now 1\)"):
        run("stage", plan=other, seed=1, resume=True)
    with pytest.raises(UserError, match=r"\(lora was None, now"):
        run("stage", lora=LoraSettings(), resume=True)
    assert (tmp_path / "stage" / "stage.json").exists()


def test_without_resume_a_stage_starts_again(run, tmp_path, monkeypatch):
    run("stage")
    kill_in_step(monkeypatch, 1)
    with pytest.raises(Killed):
        run("stage", plan=replace(PLAN, settings=replace(SETTINGS, learning_rate=0.5)))
    left = {path.name for path in (tmp_path / "stage").iterdir()}
    assert "stage.json" not in left and not [name for name in left if name.startswith("checkpoint-")]
    assert json.loads((tmp_path / "stage" / "stage_settings.json").read_text())["settings"]["learning_rate"] == 0.5


@pytest.fixture(scope="module")
def two_processes(classifiers, real_images_dir, make_synthetic_dir, tmp_path_factory):
    """The results of two real processes."""
    folder = tmp_path_factory.mktemp("two-processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", "tests.transfer.two_processes", classifiers["vit"], str(real_images_dir)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    command += [str(make_synthetic_dir()), str(folder)]
    subprocess.run(command, env=environment, cwd=root, check=True, timeout=240)
    return folder


@pytest.mark.parametrize("seen", SEEN)
def test_two_accumulated_batches_on_two_processes_train_as_the_big_batch(
    two_processes, classifiers, real_images_dir, seen, tmp_path, monkeypatch
):
    assert json.loads((two_processes / "world.json").read_text()) == ["MULTI_CPU", 2]
    pair_with_itself(monkeypatch.setattr)
    big = train_big_batch(classifiers["vit"], str(real_images_dir), tmp_path, seen=seen)
    small = load_file(two_processes / f"{ACCUMULATED}-{seen}.safetensors")
    for key in big:
        torch.testing.assert_close(big[key], small[key], atol=1e-6, rtol=1e-4)


def test_averages_and_probes_of_two_processes_equal_those_of_one(
    two_processes, classifiers, real_images_dir, tmp_path, monkeypatch
):
    pair_with_itself(monkeypatch.setattr)
    path, images_dir = classifiers["vit"], str(real_images_dir)
    averaged = train_big_batch(path, images_dir, tmp_path, ema_decay=0.9)
    plain = train_big_batch(path, images_dir, tmp_path / "plain")
    assert (averaged["classifier.weight"] - plain["classifier.weight"]).abs().max() > 1e-4
    for name, alone in (("averaged", averaged), ("probed", probe(path, images_dir))):
        first, second = (load_file(two_processes / f"{name}-{rank}.safetensors") for rank in range(2))
        assert_same(first, second)
        for key, value in alone.items():
            torch.testing.assert_close(value, first[key], atol=1e-6, rtol=1e-4)


def test_a_stage_killed_on_two_processes_resumes_to_the_same_weights(two_processes):
    assert_same(load_file(two_processes / "alone.safetensors"), load_file(two_processes / "resumed.safetensors"))
    # ten images in batches of four: accelerate fills the second step of an epoch up to whole batches
    assert json.loads((two_processes / "counted.json").read_text()) == [[5, 40], [5, 40]]


def test_a_stream_is_divided_between_two_processes(two_processes):
    parts = [json.loads((two_processes / f"stream-{rank}.json").read_text()) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == 9 and len(set(parts[0] + parts[1])) == 18
