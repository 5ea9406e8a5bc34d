"""Stages for tests, also in separate processes: independent of `conftest.py`."""

import torch
from transformers import TrainingArguments

from utils.transfer.classifiers import load_image_processor
from utils.transfer.fine_tuning import StageTrainer
from utils.transfer.replay import ImagePair
from utils.transfer.stage import Pretrained, run_stage

OPTIONS = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no",
           "per_device_eval_batch_size": 128}  # fmt: skip


def run_plan(plan, path, images, folder, start=None, lora=None, resume=False, **options) -> tuple:
    """Run a stage of a classifier on labelled images; return the model and what was done."""
    args = TrainingArguments(output_dir=str(folder), **(OPTIONS | options))
    pretrained = Pretrained(path, load_image_processor(path), {}, lora)
    class_names = (images.own if isinstance(images, ImagePair) else images).features["label"].names
    return run_stage(plan, start, images, pretrained, class_names, args, folder, resume=resume)


class Killed(Exception):
    """Raised instead of a signal: nothing is written after it."""


def kill_in_step(monkeypatch, number: int) -> None:
    """Kill the next training in the given step, counted from 1."""
    train = StageTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == number - 1:
            monkeypatch.setattr(StageTrainer, "training_step", train)
            raise Killed
        return train(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", training_step)


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
