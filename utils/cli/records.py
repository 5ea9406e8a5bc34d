"""The JSON records that connect the steps; only this module reads and writes them."""

import json
import math
import os
import platform
import re
import resource
import subprocess
import time
from importlib import metadata
from pathlib import Path

from utils.cli.errors import UserError
from utils.cli.threads import chosen_num_threads

SCHEMA_VERSION = 1

DSI_CONFIG = "dsi_config.json"
GENERATION_CONFIG = "generation_config.json"
BRIDGED_CONFIG = "bridged_config.json"
RUN_CONFIG = "run_config.json"
ALL_RESULTS = "all_results.json"
EVAL_RESULTS = "eval_results.json"
COMPARISON = "comparison.json"

PACKAGES = ("torch", "torchvision", "transformers", "diffusers", "datasets", "accelerate", "huggingface_hub", "timm")


def write_record(path: str | Path, record: dict) -> None:
    """Write `record` with its schema version as JSON, whole or not at all.

    JSON has neither NaN nor infinity: such numbers become null, like unknown values.
    """
    record = {"schema_version": SCHEMA_VERSION, **record}
    try:
        text = json.dumps(record, indent=2, allow_nan=False)
    except ValueError:
        text = json.dumps(_replace_nan(json.loads(json.dumps(record))), indent=2, allow_nan=False)
    write_text(path, text + "\n")


def _replace_nan(value: object) -> object:
    """Return JSON values with None for each number that is not finite."""
    if isinstance(value, dict):
        return {key: _replace_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: str | Path, text: str) -> None:
    """Write a text file with its line endings unchanged, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)


def read_record(path: str | Path) -> dict:
    """Return a record without its schema version; NaN from earlier versions is read too.

    Raises:
        UserError: the file is not a record, or was written by a newer version of these scripts.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a record ({error}).") from None
    version = record.pop("schema_version", None) if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version must be {SCHEMA_VERSION} for these scripts, got {version}.")
    return record


def image_set_name(real_images: dict) -> str:
    """Return the name of a record's real images: their dataset, else their folder of class folders."""
    return real_images.get("dataset_name") or real_images["train_dir"]


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that affect results."""
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
    # a process inherits ru_maxrss from its parent, such as `accelerate launch`
    return round(int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20, 2)


def write_run_config(output_dir: str | Path, options: dict, started: float, **facts) -> dict:
    """Write `run_config.json`: options (of `resolve_options`), versions, hardware, seconds, peak memory, and `facts`.

    `started` is the `time.time()` at the start of the script.
    """
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    threads = {} if chosen_num_threads() is None else {"num_threads": chosen_num_threads()}
    record = {
        **facts,
        "options": options,
        "versions": package_versions(),
        "code_commit": code_commit(),
        "hardware": {"device": device, "num_cpus": os.cpu_count(), "platform": platform.platform()} | threads,
        "seconds": round(time.time() - started, 1),
        "peak_memory_gib": peak_memory_gib(),
    }
    write_record(Path(output_dir) / RUN_CONFIG, record)
    return record
