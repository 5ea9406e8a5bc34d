"""Checkpoints of a token's training: all that an exact resume needs, as safetensors and JSON.

What a step trains on is a function of its number (`utils/style/steps.py`), so no random state is kept.
"""

import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from utils.cli.errors import UserError
from utils.cli.options import differing_options
from utils.cli.records import read_record, write_record
from utils.style.token import LEARNED_EMBEDS, load_learned_embeds, save_learned_embeds
from utils.style.token_folder import checkpoint_folders

TRAINING_STATE = "training_state.safetensors"
STATE_RECORD = "training_state.json"


@dataclass
class TrainingProgress:
    """How far training is; written into the checkpoint as JSON.

    `inputs` tells images, prompts and VAE from others, `images_per_step` counts all processes, `held_out_losses`
    has the fixed-noise losses that were measured on the way, by step.
    """

    options: dict
    inputs: str
    images_per_step: int
    step: int = 0
    loss_history: list[float] = field(default_factory=list)
    held_out_losses: dict[str, float] = field(default_factory=dict)


def find_checkpoint(
    output_dir: str | Path, resume: str | None, options: dict, overwrite: bool, free: Iterable[str] = ()
) -> Path | None:
    """Return the checkpoint to go on from: `resume` is 'latest', a folder, or None for a new run.

    Raises:
        UserError: no such checkpoint, one of a run with other options, or a new run would bury an unfinished one.
    """
    folders = checkpoint_folders(output_dir)
    if resume is None:
        if folders and not overwrite:
            raise UserError(
                f"--output_dir {output_dir}: holds {folders[-1].name} of an unfinished run; give "
                "--resume_from_checkpoint latest to go on, or --overwrite_output_dir to start from scratch."
            )
        return None
    if resume == "latest":
        if not folders:
            return None
        checkpoint = folders[-1]
    else:
        checkpoint = Path(resume)
        if not (checkpoint / STATE_RECORD).is_file():
            have = ", ".join(folder.name for folder in folders) or "no checkpoint"
            raise UserError(
                f"--resume_from_checkpoint {resume}: is no checkpoint of train_dsi.py; {output_dir} has {have}."
            )
    differing = differing_options(read_record(checkpoint / STATE_RECORD)["progress"]["options"], options, free)
    if differing:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: was made with other options ({'; '.join(differing)}); give the "
            "same, or start from scratch with --overwrite_output_dir."
        )
    return checkpoint


def save_checkpoint(
    output_dir: str | Path, progress: TrainingProgress, row_names: list[str], rows: list[torch.Tensor], optimizer,
    lr_scheduler, scaler, total_limit: int | None,
) -> Path:  # fmt: skip
    """Write `checkpoint-<step>`, whole or not at all, then remove the oldest beyond `total_limit`.

    Its `learned_embeds.safetensors` loads into a pipeline like the finished token.
    """
    final = Path(output_dir) / f"checkpoint-{progress.step}"
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    optimizer_state = optimizer.state_dict()
    tensors = {
        f"{parameter}.{name}": torch.as_tensor(value).cpu()
        for parameter, values in optimizer_state["state"].items()
        for name, value in values.items()
    }
    save_learned_embeds(temporary, row_names, rows)
    save_file(tensors, temporary / TRAINING_STATE)
    record = {
        "progress": asdict(progress),
        "param_groups": optimizer_state["param_groups"],
        "lr_scheduler": lr_scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler else None,
    }
    write_record(temporary / STATE_RECORD, record)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    if total_limit is not None:
        for folder in checkpoint_folders(output_dir)[:-total_limit]:
            shutil.rmtree(folder)
    return final


def load_checkpoint(
    checkpoint: Path, start: TrainingProgress, rows: list[torch.Tensor], optimizer, lr_scheduler, scaler
) -> TrainingProgress:
    """Put a checkpoint's state into rows, optimizer, learning rate schedule and gradient scaler; return its progress.

    Raises:
        UserError: it was made from other images or another base model, or with another number of processes than
            `start`, the progress of a new run.
    """
    record = read_record(checkpoint / STATE_RECORD)
    progress = TrainingProgress(**record["progress"])
    if progress.inputs != start.inputs:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: the images, the prompts or the base model have changed; give "
            "the commits of then (--dataset_revision, --revision), or start from scratch with --overwrite_output_dir."
        )
    if progress.images_per_step != start.images_per_step:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: was made with {progress.images_per_step} images a step over all "
            f"processes, this run has {start.images_per_step}; start as many processes as before."
        )
    for parameter, saved in zip(rows, load_learned_embeds(checkpoint / LEARNED_EMBEDS), strict=True):
        parameter.data.copy_(saved)
    state = {}
    for name, value in load_file(checkpoint / TRAINING_STATE).items():
        parameter, _, key = name.partition(".")
        state.setdefault(int(parameter), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": record["param_groups"]})
    lr_scheduler.load_state_dict(record["lr_scheduler"])
    if scaler:
        scaler.load_state_dict(record["scaler"])
    return progress
