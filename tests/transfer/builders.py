"""Stages as tests run them, also in processes of their own: nothing of `conftest.py` is needed."""

from transformers import TrainingArguments

from utils.transfer.classifiers import load_image_processor
from utils.transfer.stage import Pretrained, run_stage

OPTIONS = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no",
           "per_device_eval_batch_size": 128}  # fmt: skip


def run_plan(plan, path, images, folder, start=None, lora=None, resume=False, **options) -> tuple:
    """Run a stage of a classifier on labelled images; return the model and what was done."""
    args = TrainingArguments(output_dir=str(folder), **(OPTIONS | options))
    pretrained = Pretrained(path, load_image_processor(path), {}, lora)
    class_names = images.features["label"].names
    return run_stage(plan, start, images, pretrained, class_names, args, folder, resume=resume)
