"""The work of two real processes for `test_stage_resume`; they write their results into a folder."""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from safetensors.torch import save_file
from transformers import TrainingArguments

from tests.transfer.builders import OPTIONS, run_plan
from utils.transfer.alignment import AlignedImages
from utils.transfer.augmentation import TrainItems
from utils.transfer.classifiers import load_classifier, load_image_processor
from utils.transfer.fine_tuning import StageTrainer, fine_tune
from utils.transfer.image_format import EvalImages
from utils.transfer.methods import Alignment, StagePlan, StageSettings
from utils.transfer.probe import probe_head
from utils.transfer.replay import ReplayedImages
from utils.transfer.synthetic_images import load_synthetic, open_synthetic

ACCUMULATED = "accumulated"
SEEN = ("real", "replayed", "aligned")
# dropout, so that a random state that is not restored shows
SETTINGS = StageSettings(7, 1e-2, 3.0, mixup_alpha=0.4, dropout=0.2, per_device_train_batch_size=4)
BIG_BATCH = StageSettings(2, 1e-1, mixup_alpha=0.4, label_smoothing_factor=0.1, per_device_train_batch_size=8)


def contiguous(state_dict: dict) -> dict:
    """Return weights as safetensors takes them."""
    return {key: value.contiguous() for key, value in state_dict.items()}


def names_of(images: Dataset) -> list[str]:
    return images.features["label"].names


def pair_with_itself(setattr) -> None:
    """Make Mixup, which pairs images within a batch, pair each with itself, so that only the soft labels remain."""
    setattr(torch.Tensor, "roll", lambda tensor, *args: tensor)


def train_big_batch(
    path: str, images_dir: str, folder: Path, batch_size: int = 8, accumulation: int = 1, seen: str = "real",
    ema_decay: float | None = None,
) -> dict:  # fmt: skip
    """Train two steps (aligned: four) on eight images in all, by SGD without clipping, and return the weights."""
    images = load_dataset(images_dir, split="train").take(8)
    model = load_classifier(path, names_of(images), True, seed=0)
    if seen == "replayed":
        images = ReplayedImages(images, load_dataset(images_dir, split="test"), share=0.3)
    elif seen == "aligned":
        images = AlignedImages(images, load_dataset(images_dir, split="test"), Alignment("adversarial", 20.0))
    args = TrainingArguments(
        output_dir=str(folder), optim="sgd", max_grad_norm=0.0,
        gradient_accumulation_steps=accumulation, **OPTIONS,
    )  # fmt: skip
    settings = StageSettings(**(vars(BIG_BATCH) | {"per_device_train_batch_size": batch_size, "ema_decay": ema_decay}))
    if seen == "aligned":
        # the first step has a rate of 0, so the third is the first on which a changed domain classifier acts
        settings = replace(settings, max_steps=4, head_learning_rate_factor=10.0)
    fine_tune(model, images, load_image_processor(path), settings, args, folder)
    return model.state_dict()


def kill_and_resume(path: str, images_dir: str, folder: Path) -> None:
    """Train a stage, and one that is killed in the middle of its second epoch and resumed."""
    images = load_dataset(images_dir, split="train").take(10)
    plan = StagePlan("stage1", "real", "reset", StageSettings(**(vars(SETTINGS) | {"max_steps": 5})))
    train = StageTrainer.training_step

    def training_step(self, *arguments, **options):
        if self.state.global_step == 4:
            raise InterruptedError
        return train(self, *arguments, **options)

    def run(name: str, resume: bool = False):
        options = {"save_strategy": "steps", "save_steps": 3}
        return run_plan(plan, path, images, folder / name, resume=resume, **options)

    answers = {"alone": run("alone")}
    StageTrainer.training_step = training_step
    try:
        run("resumed")
    except InterruptedError:
        StageTrainer.training_step = train
    PartialState().wait_for_everyone()
    answers["resumed"] = run("resumed", resume=True)
    if PartialState().is_main_process:
        for name, (model, _) in answers.items():
            save_file(contiguous(model.state_dict()), folder / f"{name}.safetensors")
        counted = [[result.num_steps, result.num_images_seen] for _, result in answers.values()]
        (folder / "counted.json").write_text(json.dumps(counted))


def probe(path: str, images_dir: str) -> dict:
    """Set a head to a probe's, whose features two processes share, and return the weights."""
    images = load_dataset(images_dir, split="train").take(9)
    model = load_classifier(path, names_of(images), True, seed=0)
    probe_head(model, EvalImages(images, load_image_processor(path)), batch_size=2)
    return model.state_dict()


def stream(path: str, class_names: list[str], synthetic_dir: str, folder: Path) -> None:
    """Train one epoch of 18 streamed images, nine per process, and record which ones this process read."""
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # 5 s at the end of every epoch, against hanging remote files
    images = load_synthetic(open_synthetic(synthetic_dir), class_names, streaming=True)
    taken = []
    make = TrainItems.make

    def make_and_note(self, row, *seeds):
        taken.append(hashlib.sha256(row["image"]["bytes"]).hexdigest())
        return make(self, row, *seeds)

    TrainItems.make = make_and_note
    args = TrainingArguments(output_dir=str(folder), **OPTIONS)
    settings = StageSettings(3, 1e-2, per_device_train_batch_size=3)
    model = load_classifier(path, class_names, True, seed=0)
    fine_tune(model, images, load_image_processor(path), settings, args, folder)
    TrainItems.make = make
    (folder / f"stream-{PartialState().process_index}.json").write_text(json.dumps(taken))


def main(path: str, images_dir: str, synthetic_dir: str, folder: str) -> None:
    state = PartialState()
    folder = Path(folder)
    kill_and_resume(path, images_dir, folder)
    stream(path, names_of(load_dataset(images_dir, split="train")), synthetic_dir, folder)
    pair_with_itself(setattr)
    for seen in SEEN:
        weights = train_big_batch(path, images_dir, folder, batch_size=2, accumulation=2, seen=seen)
        if state.is_main_process:
            save_file(contiguous(weights), folder / f"{ACCUMULATED}-{seen}.safetensors")
    averaged, probed = train_big_batch(path, images_dir, folder, 2, 2, ema_decay=0.9), probe(path, images_dir)
    save_file(contiguous(averaged), folder / f"averaged-{state.process_index}.safetensors")
    save_file(contiguous(probed), folder / f"probed-{state.process_index}.safetensors")
    if state.is_main_process:
        (folder / "world.json").write_text(json.dumps([state.distributed_type.name, state.num_processes]))


if __name__ == "__main__":
    main(*sys.argv[1:])
