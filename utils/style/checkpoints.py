"""Checkpoints of a token's training: all that an exact resume needs, as safetensors and JSON.

What a step trains on is a function of its number (`TrainingSteps`), so no random state is kept.
"""

import copy
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from utils.cli.errors import UserError
from utils.cli.memory import MicroBatching
from utils.cli.options import REVISIONS, differing_options
from utils.cli.records import read_record, write_record
from utils.cli.run_folder import RunFolder, remove_folder
from utils.style.families import LEARNED_EMBEDS
from utils.style.token import load_learned_embeds, save_learned_embeds

TRAINING_STATE, STATE_RECORD = "training_state.safetensors", "training_state.json"
FITTED = "fitted_to_memory"  # in the state's record: what had to change for want of memory, if anything
# what the state's record says of how far training is, and with what
PROGRESS = (
    "options", "inputs", "base_model", "images_per_step", "step", "loss_history", "held_out_losses", "looks",
    "initializer_losses", "num_restarts",
)  # fmt: skip


@dataclass
class TrainingState:
    """A token in training: its rows `(num_vectors, dim)` of each text encoder, what moves them, and how far it is.

    `row_names` are those in the file, `inputs` tells images, prompts and VAE from others, `base_model` its contents,
    `images_per_step` counts all processes, `held_out_losses` has the fixed-noise losses that were measured on the way,
    by step, and `looks` those of each image. `initializer_losses` maps the words that the token may begin from to the
    losses with them, the best first; `num_restarts` of them taught it nothing. What `micro_batching` had to change for
    want of memory is part of the state.
    """

    row_names: list[str]
    rows: list[torch.Tensor]
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None
    options: dict
    inputs: str
    base_model: str
    images_per_step: int
    micro_batching: MicroBatching
    step: int = 0
    loss_history: list[float] = field(default_factory=list)
    held_out_losses: dict[str, float] = field(default_factory=dict)
    looks: list[list[float]] = field(default_factory=list)
    initializer_losses: dict[str, float] = field(default_factory=dict)
    num_restarts: int = 0

    def __post_init__(self):
        self._at_start = copy.deepcopy((self.optimizer.state_dict(), self.lr_scheduler.state_dict()))

    @property
    def initializer(self) -> str:
        """The word that the token began from."""
        return list(self.initializer_losses)[self.num_restarts]

    @property
    def num_words_left(self) -> int:
        return len(self.initializer_losses) - self.num_restarts - 1

    def describe(self) -> dict:
        """Return what a token's record holds of how it was trained."""
        return {
            "initializer_token": self.initializer, "initializer_losses": self.initializer_losses,
            "num_restarts": self.num_restarts, "num_train_steps": self.step, "held_out_losses": self.held_out_losses,
            **self.micro_batching.state(),
        }  # fmt: skip

    def begin_again(self) -> None:
        """Go back to the first step, for the next word; the rows are the caller's."""
        self.num_restarts += 1
        self.step = 0
        for history in (self.loss_history, self.held_out_losses, self.looks):
            history.clear()
        optimizer_state, scheduler_state = copy.deepcopy(self._at_start)
        self.optimizer.load_state_dict(optimizer_state)
        self.lr_scheduler.load_state_dict(scheduler_state)

    def save(self, folder: RunFolder, total_limit: int | None = None) -> Path:
        """Write `checkpoint-<step>`, whole or not at all, then remove the oldest beyond `total_limit`.

        Its `learned_embeds.safetensors` loads into a pipeline like the finished token.
        """
        final = folder.path / f"checkpoint-{self.step}"
        temporary = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        optimizer_state = self.optimizer.state_dict()
        tensors = {
            f"{parameter}.{name}": torch.as_tensor(value).cpu()
            for parameter, values in optimizer_state["state"].items()
            for name, value in values.items()
        }
        save_learned_embeds(temporary, self.row_names, self.rows)
        save_file(tensors, temporary / TRAINING_STATE)
        record = {
            "progress": {name: getattr(self, name) for name in PROGRESS},
            **self._fitted(),
            "param_groups": optimizer_state["param_groups"],
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }
        write_record(temporary / STATE_RECORD, record)
        if final.exists():
            remove_folder(final)
        temporary.rename(final)
        if total_limit is not None:
            for earlier in folder.find_traces()[:-total_limit]:
                remove_folder(earlier)
        return final

    def _fitted(self) -> dict:
        fitted = self.micro_batching.state()
        return {FITTED: fitted} if fitted else {}

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: it was made from other images or another base model, or with another number of processes.
        """
        record = read_record(checkpoint / STATE_RECORD)
        # earlier versions did not note these
        later = {"base_model": self.base_model, "looks": [], "initializer_losses": {}, "num_restarts": 0}
        progress = later | record["progress"]
        if (progress["inputs"], progress["base_model"]) != (self.inputs, self.base_model):
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: the images, the prompts or the base model have changed; give "
                "the commits of then (--dataset_revision, --revision), or start from scratch with "
                "--overwrite_output_dir."
            )
        if progress["images_per_step"] != self.images_per_step:
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: was made with {progress['images_per_step']} images a step "
                f"over all processes, this run has {self.images_per_step}; start as many processes as before."
            )
        for parameter, saved in zip(self.rows, load_learned_embeds(checkpoint / LEARNED_EMBEDS), strict=True):
            parameter.data.copy_(saved)
        state = {}
        for name, value in load_file(checkpoint / TRAINING_STATE).items():
            parameter, _, key = name.partition(".")
            state.setdefault(int(parameter), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": record["param_groups"]})
        self.lr_scheduler.load_state_dict(record["lr_scheduler"])
        if self.scaler:
            self.scaler.load_state_dict(record["scaler"])
        for name in PROGRESS:
            setattr(self, name, progress[name])
        self.micro_batching.restore(record.get(FITTED, {}))


def find_checkpoint(folder: RunFolder, resume: str | None) -> Path | None:
    """Return the checkpoint to go on from: `resume` is 'latest', a folder, or None for a new run.

    Raises:
        UserError: no such checkpoint, one of a run with other options or inputs, or a new run would bury an unfinished
            one.
    """
    checkpoints = folder.find_traces()
    if resume is None:
        folder.is_resumable(False)  # raises where there is something to bury
        return None
    if resume == "latest":
        folder.warn_if_resume_is_ignored(True)
        if folder.overwrite or not checkpoints:
            return None
        checkpoint = checkpoints[-1]
    else:
        checkpoint = Path(resume)
        if not (checkpoint / STATE_RECORD).is_file():
            have = ", ".join(path.name for path in checkpoints) or "no checkpoint"
            raise UserError(
                f"--resume_from_checkpoint {resume}: is no checkpoint of train_dsi.py; {folder.path} has {have}."
            )
    # its own, whatever the folder notes: it may be another run's, or of an earlier version that noted none at the start
    progress = read_record(checkpoint / STATE_RECORD)["progress"]
    # what names an input may change where its contents are compared
    free = folder.free | REVISIONS | set(folder.inputs) if "base_model" in progress else folder.free
    if differing := differing_options(progress["options"], folder.options, free):
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: was made with other options ({'; '.join(differing)}); give the "
            "same, or start from scratch with --overwrite_output_dir."
        )
    if resume == "latest" and folder.is_begun:
        folder.check_inputs()
    return checkpoint
