"""The folder of a stage: the settings it began with, its checkpoints, and `stage.json` once it is finished."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from zipfile import is_zipfile

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from utils.cli.errors import UserError
from utils.cli.processes import warn_once
from utils.cli.records import differing_options, read_record, write_record
from utils.transfer.adapters import LoraSettings
from utils.transfer.methods import StagePlan

STAGE_RECORD = "stage.json"
SETTINGS_RECORD = "stage_settings.json"

# of the Trainer's arguments, those on which the trained weights depend and that a stage does not set itself
TRAINER_SETTINGS = (
    "seed", "data_seed", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "lr_scheduler_type", "lr_scheduler_kwargs", "gradient_accumulation_steps", "dataloader_drop_last", "bf16", "fp16",
    "full_determinism",
)  # fmt: skip


def describe_stage(
    stage: StagePlan,
    start: str | Path,
    class_names: list[str],
    num_images: int | None,
    training_args: TrainingArguments,
    lora: LoraSettings | None,
    revision: str | None,
) -> dict:
    """Return all that decides a stage's weights, as JSON holds it; `num_images` is None for a stream."""
    trainer_settings = training_args.to_dict()
    description = {
        "start": stage.start or str(start),
        "revision": None if stage.start else revision,
        "images": stage.images,
        "num_images": num_images,
        "head_init": stage.head_init,
        **dataclasses.asdict(stage.settings),
        "lora": dataclasses.asdict(lora) if lora else None,
        **{name: trainer_settings[name] for name in TRAINER_SETTINGS},
        "num_processes": training_args.world_size,
        "class_names": class_names,
    }
    return json.loads(json.dumps(description))


def find_earlier_run(folder: str | Path, settings: dict) -> tuple[dict | None, str | None]:
    """Return the result of the finished stage that a folder holds, and its last whole checkpoint, None where not.

    Raises:
        UserError: they were made with other settings.
    """
    folder = Path(folder)
    result, checkpoint = None, None
    if (folder / SETTINGS_RECORD).exists():
        _refuse_other_settings(folder, settings)
        if (folder / STAGE_RECORD).exists():
            result = read_record(folder / STAGE_RECORD)["result"]
        else:
            checkpoint = _last_checkpoint(folder, settings["num_processes"])
    PartialState().wait_for_everyone()  # before one of them changes what is there
    return result, checkpoint


def begin_stage(folder: str | Path, settings: dict) -> None:
    """Clear a folder of an earlier run's record and checkpoints, and write the settings."""
    folder = Path(folder)
    if PartialState().is_main_process:
        (folder / STAGE_RECORD).unlink(missing_ok=True)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        write_record(folder / SETTINGS_RECORD, {"settings": settings})
    PartialState().wait_for_everyone()


def finish_stage(folder: str | Path, settings: dict, result: dict, save: Callable[[Path], None]) -> None:
    """Let `save` write the model into the folder, then write the record, whose presence says that all is there."""
    if PartialState().is_main_process:
        save(Path(folder))
        write_record(Path(folder) / STAGE_RECORD, {"settings": settings, "result": result})
    PartialState().wait_for_everyone()


def _refuse_other_settings(folder: Path, settings: dict) -> None:
    differing = differing_options(read_record(folder / SETTINGS_RECORD)["settings"], settings)
    if differing:
        raise UserError(
            f"--resume_from_checkpoint: {folder} was begun with other settings ({'; '.join(differing)}); give the same "
            "ones, or --overwrite_output_dir to train anew."
        )


def _last_checkpoint(folder: Path, num_processes: int) -> str | None:
    """Return the checkpoint of the most steps among those that were written to the end."""
    found = list(folder.glob("checkpoint-*"))
    whole = [path for path in found if _is_whole(path, num_processes)]
    for path in found:
        if path not in whole:
            warn_once(f"Warning: --resume_from_checkpoint: {path} is not whole, or torn; it is passed over.")
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _is_whole(checkpoint: Path, num_processes: int) -> bool:
    """Say whether a checkpoint has its last file, the Trainer's state, all random states, and no torn file."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, json.JSONDecodeError, SafetensorError):
        return False
    saved = list(checkpoint.glob("rng_state*.pth"))
    # torch saves archives, of which a torn one has no end
    return len(saved) == num_processes and all(map(is_zipfile, [*saved, *checkpoint.glob("*.pt")]))
