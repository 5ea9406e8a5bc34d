"""Checkpoints of a token's training: all that an exact resume needs, as safetensors and JSON.

The data of a step is a function of its number (`TrainingSteps`), so no random state is saved.
"""

import copy
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils.cli.errors import UserError
from utils.cli.memory import MicroBatching
from utils.cli.options import REVISIONS, differing_options
from utils.cli.records import read_record, write_record
from utils.cli.run_folder import RunFolder, remove_folder
from utils.style.learned import LearnedWeights

TRAINING_STATE, STATE_RECORD = "training_state.safetensors", "training_state.json"
BEST_WEIGHTS, BEST = "best_weights.safetensors", "best"  # file, and key in the state's record; once there are any
FITTED = "fitted_to_memory"  # in the state's record: what changed because memory ran out, if anything
# the progress of training in the state's record
PROGRESS = (
    "options", "inputs", "base_model", "images_per_step", "step", "loss_history", "held_out_losses", "looks",
    "initializer_losses", "num_restarts",
)  # fmt: skip


@dataclass(frozen=True)
class BestWeights:
    """Weights as `LearnedWeights.copy` returns them, their step, and each image's fixed-noise loss with them."""

    step: int
    losses: list[float]
    weights: list[torch.Tensor]

    def save(self, folder: Path) -> dict:
        """Write the weights; return the entry in the state's record."""
        save_file({str(number): value for number, value in enumerate(self.weights)}, folder / BEST_WEIGHTS)
        return {BEST: {"step": self.step, "losses": self.losses}}

    @classmethod
    def load(cls, folder: Path, entry: dict) -> "BestWeights":
        saved = load_file(folder / BEST_WEIGHTS)
        return cls(entry["step"], entry["losses"], [saved[str(number)] for number in range(len(saved))])


@dataclass
class TrainingState:
    """A token in training: its weights, with those of class tokens and adapters, their optimizer, and the progress.

    `inputs` is a hash of images, prompts and VAE, `base_model` the identity of its contents; `images_per_step` counts
    all processes. `held_out_losses` maps steps to fixed-noise losses, and `looks` holds those of each image.
    `initializer_losses` maps the words that the token may start from to their losses, the best first; `num_restarts` of
    them taught it nothing. `best` are the weights with the lowest fixed-noise loss, if they are kept, and `overfitted`
    says that training returned to them. What `micro_batching` changed because memory ran out is part of the state.
    """

    weights: LearnedWeights
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
    best: BestWeights | None = None
    overfitted: dict | None = None

    def __post_init__(self):
        self._at_start = copy.deepcopy((self.optimizer.state_dict(), self.lr_scheduler.state_dict()))

    @property
    def initializer(self) -> str:
        """The word that the token started from."""
        return list(self.initializer_losses)[self.num_restarts]

    @property
    def num_words_left(self) -> int:
        return len(self.initializer_losses) - self.num_restarts - 1

    def describe(self) -> dict:
        """Return the facts about training in a token's record."""
        return {
            "initializer_token": self.initializer, "initializer_losses": self.initializer_losses,
            "num_restarts": self.num_restarts, "num_train_steps": self.step, "held_out_losses": self.held_out_losses,
            **self.micro_batching.state(), **({"overfitted": self.overfitted} if self.overfitted else {}),
        }  # fmt: skip

    def keep_best(self, losses: list[float]) -> None:
        """Keep the current weights as the best; `losses` has the fixed-noise loss of each image."""
        self.best = BestWeights(self.step, losses, self.weights.copy())

    def return_to_best(self, rise: float) -> None:
        """Set the weights to the best; `rise` is how much the loss has risen since."""
        self.weights.restore(self.best.weights)
        self.overfitted = {"best_step": self.best.step, "last_step": self.step, "rise": round(rise, 5)}

    def restart(self) -> None:
        """Go back to the first step, for the next word, with fresh adapters; the caller resets the rows."""
        self.weights.reset_adapters()
        self.best = None
        self.num_restarts += 1
        self.step = 0
        for history in (self.loss_history, self.held_out_losses, self.looks):
            history.clear()
        optimizer_state, scheduler_state = copy.deepcopy(self._at_start)
        self.optimizer.load_state_dict(optimizer_state)
        self.lr_scheduler.load_state_dict(scheduler_state)

    def save(self, folder: RunFolder, total_limit: int | None = None) -> Path:
        """Write `checkpoint-<step>`, whole or not at all, then remove the oldest beyond `total_limit`.

        What is learned loads into a pipeline from it like from the finished token's folder.
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
        self.weights.save(temporary)
        save_file(tensors, temporary / TRAINING_STATE)
        record = {
            "progress": {name: getattr(self, name) for name in PROGRESS},
            **self._fitted(),
            **(self.best.save(temporary) if self.best else {}),
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
        """Resume from a checkpoint.

        Raises:
            UserError: its images, base model or number of processes differ; a file is damaged.
        """
        record = read_record(checkpoint / STATE_RECORD)
        # earlier versions did not record these
        later = {"base_model": self.base_model, "looks": [], "initializer_losses": {}, "num_restarts": 0}
        progress = later | record["progress"]
        if (progress["inputs"], progress["base_model"]) != (self.inputs, self.base_model):
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: images, prompts or base model have changed; give their "
                "commits of that time (--dataset_revision, --revision), or start from scratch with "
                "--overwrite_output_dir."
            )
        if progress["images_per_step"] != self.images_per_step:
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: was made with {progress['images_per_step']} images per step "
                f"over all processes, this run has {self.images_per_step}; start the same number of processes."
            )
        state = {}
        try:
            self.weights.load(checkpoint)
            self.best = BestWeights.load(checkpoint, record[BEST]) if BEST in record else None
            for name, value in load_file(checkpoint / TRAINING_STATE).items():
                parameter, _, key = name.partition(".")
                state.setdefault(int(parameter), {})[key] = value
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: is damaged ({error}); resume from an earlier one, by its "
                "folder."
            ) from None
        self.optimizer.load_state_dict({"state": state, "param_groups": record["param_groups"]})
        self.lr_scheduler.load_state_dict(record["lr_scheduler"])
        if self.scaler:
            self.scaler.load_state_dict(record["scaler"])
        for name in PROGRESS:
            setattr(self, name, progress[name])
        self.micro_batching.restore(record.get(FITTED, {}))


def find_checkpoint(folder: RunFolder, resume: str | None) -> Path | None:
    """Return the checkpoint to resume from: `resume` is 'latest', a folder, or None for a new run.

    Raises:
        UserError: there is no such checkpoint, its run had other options or inputs, or a new run would overwrite an
            unfinished one.
    """
    checkpoints = folder.find_traces()
    if resume is None:
        folder.is_resumable(False)  # raises if there is an unfinished run
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
                f"--resume_from_checkpoint {resume}: not a checkpoint of train_dsi.py; {folder.path} has {have}."
            )
    # the checkpoint's own options: it may be another run's, or the folder may have none, as in earlier versions
    progress = read_record(checkpoint / STATE_RECORD)["progress"]
    # an input may have another name if its contents are compared
    free = folder.free | REVISIONS | set(folder.inputs) if "base_model" in progress else folder.free
    if differing := differing_options(progress["options"], folder.options, free):
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: was made with other options ({'; '.join(differing)}); give the "
            "same, or start from scratch with --overwrite_output_dir."
        )
    if resume == "latest" and folder.is_begun:
        folder.check_inputs()
    return checkpoint
