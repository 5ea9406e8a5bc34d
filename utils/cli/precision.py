"""The default precision of a device: bfloat16 on CUDA GPUs that support it, float16 on others, float32 on a CPU."""

import os
from pathlib import Path

from utils.cli.records import RUN_CONFIG, read_record

# values of --mixed_precision
TITLES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


def choose_precision(
    given: str | None, recorded: str | None = None, folder: str | Path = "", *, use_cpu: bool = False,
    to_change: str = "--mixed_precision no is float32",
) -> tuple[str, str | None]:  # fmt: skip
    """Return a value of `--mixed_precision`, and a line that says what was chosen (None: nothing to say).

    The user's choice comes first, `given` by a flag or by `accelerate launch`, whose "no" is its default and counts as
    not given. Next comes `recorded`, the precision of the unfinished run in `folder`, as a run cannot mix two; last the
    device's default. `to_change` tells which flag changes it.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if given is not None or launched != "no":
        return given or launched, None
    own = device_precision(use_cpu)
    if recorded not in (None, own):
        return recorded, (
            f"Precision: {TITLES.get(recorded, recorded)}, as in the run in {folder}; a new run on this device "
            f"would use {TITLES[own]}."
        )
    if own == "no":
        return own, None
    return own, f"Precision: {TITLES[own]}, the default on this GPU ({to_change})."


def device_precision(use_cpu: bool = False) -> str:
    """Return the default `--mixed_precision` of the device that accelerate uses."""
    import torch  # takes seconds
    from accelerate.utils import parse_flag_from_env

    if use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        return "no"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # accelerate has not yet selected this process's GPU
    with torch.cuda.device(local_rank % torch.cuda.device_count()):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def recorded_precision(folder: str | Path) -> str | None:
    """Return the precision of the run in a folder, from its `run_config.json`; None if unknown."""
    path = Path(folder) / RUN_CONFIG
    return precision_from_options(read_record(path).get("options", {})) if path.is_file() else None


def precision_from_options(options: dict) -> str | None:
    """Return the precision in recorded options: `--mixed_precision`, or the Trainer's `--bf16` and `--fp16`."""
    if "bf16" in options:
        return next((name for name in ("bf16", "fp16") if options[name]), "no")
    return options.get("mixed_precision")


def allow_tf32(device) -> None:
    """Let a CUDA GPU multiply float32 matrices in TF32, with the range of float32 and the precision of float16.

    On a CPU nothing changes.
    """
    import torch

    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")  # torch already uses TF32 for convolutions
