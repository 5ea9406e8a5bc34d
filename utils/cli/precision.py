"""Precision by the device: bfloat16 where a CUDA GPU computes in it, float16 on another one, float32 on a CPU."""

import os
from pathlib import Path

from utils.cli.records import RUN_CONFIG, read_record

# values of --mixed_precision
TITLES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


def choose_precision(
    given: str | None, recorded: str | None = None, folder: str | Path = "", *, use_cpu: bool = False,
    to_change: str = "--mixed_precision no is float32",
) -> tuple[str, str | None]:  # fmt: skip
    """Return a value of `--mixed_precision`, and the line that says what was chosen, None where nothing was.

    The user's comes first, `given` by a flag or `accelerate launch`; its "no" is what it says without being asked, and
    counts as not given. Then comes that with which the run in `folder` was begun, `recorded`, as two precisions do not
    go together in one run; last that of the device. `to_change` names the flag for another one.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if given is not None or launched != "no":
        return given or launched, None
    own = device_precision(use_cpu)
    if recorded not in (None, own):
        return recorded, (
            f"Precision: {TITLES.get(recorded, recorded)}, with which the run in {folder} was begun; a new one on this "
            f"device would take {TITLES[own]}."
        )
    if own == "no":
        return own, None
    return own, f"Precision: {TITLES[own]}, as suits this GPU ({to_change})."


def device_precision(use_cpu: bool = False) -> str:
    """Return the value of `--mixed_precision` that suits the device which accelerate takes."""
    import torch  # takes seconds
    from accelerate.utils import parse_flag_from_env

    if use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        return "no"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # accelerate has not yet made this process's GPU the current one
    with torch.cuda.device(local_rank % torch.cuda.device_count()):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def recorded_precision(folder: str | Path) -> str | None:
    """Return the precision with which the run in a folder was begun, by its `run_config.json`; None where unknown."""
    path = Path(folder) / RUN_CONFIG
    return precision_of(read_record(path).get("options", {})) if path.is_file() else None


def precision_of(options: dict) -> str | None:
    """Return the precision in recorded options, of `--mixed_precision` or the Trainer's `--bf16` and `--fp16`."""
    if "bf16" in options:
        return next((name for name in ("bf16", "fp16") if options[name]), "no")
    return options.get("mixed_precision")


def allow_tf32(device) -> None:
    """Let a CUDA GPU multiply what stays in float32 in TF32, which has the range of float32 and float16's precision.

    On a CPU nothing changes.
    """
    import torch

    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 is on for convolutions as torch comes
