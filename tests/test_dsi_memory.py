"""train_dsi.py with too little memory: the same steps in smaller parts, reported, recorded and resumed."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from tests.conftest import read_rows
from tests.processes import start_script
from tests.short_memory import limit_memory
from utils.cli.errors import UserError
from utils.cli.records import read_record
from utils.style import checkpoints
from utils.style.monitor import Monitor

pytest_plugins = ["tests.style.fixtures"]
FLAGS = {"max_train_steps": 4, "train_batch_size": 6, "checkpointing_steps": 2}
# `train_dsi.py`, with enough memory in the first process only
CHILD = """
import os, sys
from diffusers import UNet2DConditionModel
import train_dsi
from tests.short_memory import limit_memory
limit = float(sys.argv.pop(1))
with limit_memory(UNet2DConditionModel, limit if os.environ["RANK"] == "1" else 99) as sizes:
    train_dsi.main()
sys.stdout.write(f"sizes {sorted(set(sizes))}\\n")
"""


@pytest.fixture
def memory(monkeypatch):
    """Limit the memory of the U-Net with gradients for the rest of a test; return its batch sizes."""

    def limit(*args, **options) -> list[int]:
        context = limit_memory(UNet2DConditionModel, *args, **options)
        sizes = context.__enter__()
        opened.append(context)
        return sizes

    opened = []
    yield limit
    for context in reversed(opened):
        context.__exit__(None, None, None)


def assert_close(first, second) -> None:
    for rows in zip(read_rows(first), read_rows(second), strict=True):
        assert torch.allclose(*rows, atol=1e-3)  # steps of about 0.1


@pytest.mark.parametrize(("flags", "limit", "from_call", "sizes"), [
    ({}, 2, 1, [6, 3, 1]),  # in the first step
    ({}, 3, 3, [6, 6, 6, 3]),  # in the third step
    ({"train_batch_size": 5}, 2, 1, [5, 2, 2, 1]),  # into parts of different size
    ({"train_batch_size": 3, "gradient_accumulation_steps": 2}, 1, 4, [3, 3, 3, 3, 1]),  # in the middle of one
])  # fmt: skip
def test_a_step_is_the_same_in_smaller_parts_and_that_is_told_and_recorded(
    run_dsi, memory, tmp_path, caplog, flags, limit, from_call, sizes
):
    whole = run_dsi(output_dir=tmp_path / "whole", **FLAGS | flags)
    assert "micro_batch_size" not in read_record(tmp_path / "whole" / "dsi_config.json")
    state = read_record(tmp_path / "whole" / "checkpoint-2" / checkpoints.STATE_RECORD)
    assert checkpoints.FITTED not in state
    called = memory(limit, from_call=from_call)
    divided = run_dsi(**FLAGS | flags)
    assert called[: len(sizes)] == sizes and max(called[len(sizes) :]) <= limit
    assert_close(tmp_path / "whole", tmp_path / "style")
    assert divided["loss_history"] == pytest.approx(whole["loss_history"], rel=1e-3)
    final = max(called[-3:])
    told = [line for line in caplog.messages if "out of memory" in line]
    assert told[-1].endswith(f"from now on {final}, with gradients accumulated: a step stays the same.")
    assert read_record(tmp_path / "style" / "dsi_config.json")["micro_batch_size"] == final


def test_one_image_that_does_not_fit_is_taken_with_gradient_checkpointing(run_dsi, memory, tmp_path, caplog):
    run_dsi(output_dir=tmp_path / "whole", **FLAGS)
    called = memory(0.5)
    run_dsi(**FLAGS)
    assert called[:4] == [6, 3, 1, 1]
    assert_close(tmp_path / "whole", tmp_path / "style")
    assert "from now on with gradient checkpointing" in caplog.text
    record = read_record(tmp_path / "style" / "dsi_config.json")
    assert (record["micro_batch_size"], record["gradient_checkpointing"]) == (1, True)


def test_what_does_not_fit_at_all_ends_in_a_line_that_says_what_to_do(run_dsi, memory):
    memory(0)
    with pytest.raises(UserError, match="^--train_batch_size 6: out of memory .* even with gradient .* --resolution"):
        run_dsi(**FLAGS)
    with pytest.raises(UserError, match="^--train_batch_size 2: out of memory with one image at a time; lower --res"):
        run_dsi(**FLAGS | {"train_batch_size": 2, "gradient_checkpointing": True})


@pytest.mark.parametrize("limit", [3, 0.5])
def test_a_killed_run_goes_on_with_what_worked(run_dsi, memory, monkeypatch, tmp_path, limit):
    memory(limit)
    whole = run_dsi(output_dir=tmp_path / "whole", **FLAGS)
    end_step = Monitor.end_step

    def kill(self):
        if self.state.step == 2:
            raise KeyboardInterrupt
        return end_step(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Monitor, "end_step", kill)
        run_dsi(**FLAGS)
    state = read_record(tmp_path / "style" / "checkpoint-2" / checkpoints.STATE_RECORD)
    assert state[checkpoints.FITTED] == {"micro_batch_size": 3} if limit == 3 else {
        "micro_batch_size": 1, "gradient_checkpointing": True,
    }  # fmt: skip
    called = memory(limit)
    resumed = run_dsi(**FLAGS, resume_from_checkpoint="latest")
    assert set(called) == {3 if limit == 3 else 1}
    assert resumed == whole
    for rows in zip(read_rows(tmp_path / "whole"), read_rows(tmp_path / "style"), strict=True):
        assert torch.equal(*rows)


def test_images_are_encoded_and_measured_in_smaller_parts_with_the_same_outcome(run_dsi, memory, monkeypatch, tmp_path):
    whole = run_dsi(output_dir=tmp_path / "whole", **FLAGS)
    encode, sizes = AutoencoderKL.encode, []

    def limited(self, images, *args, **kwargs):
        sizes.append(len(images))
        if len(images) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(self, images, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "encode", limited)
    called = memory(2, applies=lambda: not torch.is_grad_enabled())
    parts = run_dsi(**FLAGS, latent_cache_dir=tmp_path / "others")
    assert sizes[0] == 16 and sizes[2] == 4
    assert called[:3] == [6, 3, 1] and max(called[3:]) == 1
    assert parts["loss_no_token"] == pytest.approx(whole["loss_no_token"], rel=1e-3)
    assert_close(tmp_path / "whole", tmp_path / "style")


@pytest.mark.soak  # the same of train_bridged.py is in tests/transfer/test_micro_batches.py
def test_of_two_processes_both_take_smaller_parts_where_one_is_short_of_memory(
    run_dsi, tiny_pipeline_dir, real_images_dir, tmp_path
):
    flags = {
        "pretrained_model_name_or_path": tiny_pipeline_dir, "dataset_name": real_images_dir, "learning_rate": 0.1,
        "num_validation_images": 0, "latent_cache_dir": tmp_path / "latents", **FLAGS, "train_batch_size": 4,
    }  # fmt: skip
    argv = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    for name, limit in (("whole", 99), ("divided", 2)):
        child = start_script(CHILD, [limit, *argv, "--output_dir", tmp_path / name], tmp_path, 2)
        output, errors = child.communicate()
        assert child.returncode == 0, errors[-3000:]
        assert output.count(f"sizes {[4] if name == 'whole' else [2, 4]}\n") == 2, output
        assert errors.count("out of memory with 4 images at a time; from now on 2") == (name == "divided")
    assert_close(tmp_path / "whole", tmp_path / "divided")
    assert json.loads((tmp_path / "divided" / "dsi_config.json").read_text())["micro_batch_size"] == 2
