"""The folder of a stage: the settings it began with, its checkpoints, and `stage.json` once it is finished."""

import dataclasses
import json
from pathlib import Path
from zipfile import is_zipfile

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from utils.cli.processes import warn_once
from utils.cli.records import read_record
from utils.cli.run_folder import RunFolder
from utils.transfer.adapters import LoraSettings
from utils.transfer.arguments import OF_EACH_STAGE
from utils.transfer.methods import StagePlan

STAGE_RECORD = "stage.json"
SETTINGS_RECORD = "stage_settings.json"


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
        **{name: trainer_settings[name] for name in OF_EACH_STAGE},
        "num_processes": training_args.world_size,
        "class_names": class_names,
    }
    return json.loads(json.dumps(description))


def stage_folder(folder: str | Path, settings: dict) -> RunFolder:
    """Return the folder of a stage with these settings, of `describe_stage`."""
    return RunFolder(
        Path(folder), "a stage", settings, STAGE_RECORD, noted_in=(SETTINGS_RECORD, "settings"),
        traces=("checkpoint-*",),
    )  # fmt: skip


def find_earlier_run(folder: RunFolder) -> tuple[dict | None, str | None]:
    """Return the result of the finished stage that a folder holds, and its last whole checkpoint, None where not.

    Raises:
        UserError: they were made with other settings.
    """
    result, checkpoint = None, None
    if folder.is_begun:
        folder.check_options()
        if (folder.path / STAGE_RECORD).exists():
            result = read_record(folder.path / STAGE_RECORD)["result"]
        else:
            checkpoint = _last_checkpoint(folder.path, folder.options["num_processes"])
    PartialState().wait_for_everyone()  # before one of them changes what is there
    return result, checkpoint


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
