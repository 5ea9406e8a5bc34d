"""The JSON records that connect the steps: one module writes and reads all of them."""

import dataclasses
import json
import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from utils.cli.errors import UserError

SCHEMA_VERSION = 1

DSI_CONFIG = "dsi_config.json"
GENERATION_CONFIG = "generation_config.json"
BRIDGED_CONFIG = "bridged_config.json"
RUN_CONFIG = "run_config.json"
ALL_RESULTS = "all_results.json"
EVAL_RESULTS = "eval_results.json"
COMPARISON = "comparison.json"

# options that may differ between two runs with the same result, beside those of publishing
NOT_OF_THE_RESULT = (
    "push_to_hub", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "checkpointing_steps",
    "checkpoints_total_limit", "validation_steps", "report_to", "dataloader_num_workers", "latent_cache_dir",
    "save_strategy", "save_steps", "save_total_limit", "disable_tqdm",
)  # fmt: skip
# options that may name a folder
INPUTS = (
    "dataset_name", "train_dir", "validation_dir", "synthetic_dataset", "learned_embeds", "model_name_or_path",
    "pretrained_model_name_or_path",
)  # fmt: skip
STYLE_TOKEN_OPTIONS = ("placeholder_token", "initializer_token")  # no access tokens

PACKAGES = ("torch", "torchvision", "transformers", "diffusers", "datasets", "accelerate", "huggingface_hub", "timm")


def write_record(path: str | Path, record: dict) -> None:
    """Write `record` with its schema version as JSON, whole or not at all."""
    write_text(path, json.dumps({"schema_version": SCHEMA_VERSION, **record}, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_record(path: str | Path) -> dict:
    """Return a record without its schema version.

    Raises:
        UserError: the file is no record, or was written by a newer version of these scripts.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a record ({error}).") from None
    version = record.pop("schema_version", None) if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version is {version}, this version of the scripts reads {SCHEMA_VERSION}.")
    return record


def absolute_if_local(name: str | None) -> str | None:
    """Return a folder's absolute path, as records are read in other working directories; other names as they are."""
    return os.path.abspath(name) if name is not None and Path(name).is_dir() else name


def image_set_name(real_images: dict) -> str:
    """Return what the real images of a record are called: their data set, else the folder of their class folders."""
    return real_images.get("dataset_name") or real_images["train_dir"]


def resolve_options(groups: Iterable) -> dict:
    """Return flag -> value of argument dataclasses, as JSON holds them; without access tokens, folders absolute."""
    resolved = {}
    for group in groups:
        values = group.to_dict() if hasattr(group, "to_dict") else dataclasses.asdict(group)
        resolved.update(
            {key: value for key, value in values.items() if not key.endswith("token") or key in STYLE_TOKEN_OPTIONS}
        )
    resolved |= {name: absolute_if_local(resolved[name]) for name in INPUTS if isinstance(resolved.get(name), str)}
    return json.loads(json.dumps(resolved))


def differing_options(before: dict, options: dict) -> list[str]:
    """Return 'name was value' for every option on which a result depends and that was another before."""
    names = [name for name in options if not name.startswith("hub_") and name not in NOT_OF_THE_RESULT]
    # records of before folders were noted by their absolute paths
    before = before | {name: absolute_if_local(before[name]) for name in INPUTS if isinstance(before.get(name), str)}
    return [f"{name} was {before.get(name)}" for name in names if before.get(name) != options[name]]


def was_finished(output_dir: str | Path, record_name: str, what: str, options: dict, overwrite: bool) -> bool:
    """Say whether a folder holds the finished result of a run with these options, those of publishing aside.

    Such a run is not done again: the same command goes on with publishing. `overwrite` starts from scratch.

    Raises:
        UserError: it holds the result of a run with other options, or is a file.
    """
    folder = Path(output_dir)
    if folder.is_file():
        raise UserError(f"--output_dir {folder}: is a file; name a folder.")
    if overwrite or not (folder / record_name).exists():
        return False
    differing = differing_options(read_record(folder / RUN_CONFIG)["options"], options)
    if differing:
        raise UserError(
            f"--output_dir {folder}: holds {what} made with other options ({'; '.join(differing)}); choose another "
            "folder or give --overwrite_output_dir."
        )
    return True


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide a result."""
    return {name: metadata.version(name) for name in PACKAGES}


def code_commit() -> str | None:
    """Return the git commit of these scripts, None outside a checkout."""
    result = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None


def peak_memory_gib() -> float:
    """Return the largest resident memory of this process so far, in GiB."""
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    # a process inherits ru_maxrss from the one that started it, as from `accelerate launch`
    return round(int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20, 2)


def write_run_config(output_dir: str | Path, options: dict, started: float) -> dict:
    """Write `run_config.json`: options (of `resolve_options`), versions, commit, hardware, seconds, peak memory.

    `started` is the `time.time()` at which the script began.
    """
    record = {
        "options": options,
        "versions": package_versions(),
        "code_commit": code_commit(),
        "hardware": {"device": _device_name(), "num_cpus": os.cpu_count(), "platform": platform.platform()},
        "seconds": round(time.time() - started, 1),
        "peak_memory_gib": peak_memory_gib(),
    }
    write_record(Path(output_dir) / RUN_CONFIG, record)
    return record


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
