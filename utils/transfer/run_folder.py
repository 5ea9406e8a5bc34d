"""The output folder of train_bridged.py: a finished run's, an unfinished one's, or one to begin in."""

import shutil
from pathlib import Path

from utils.cli.errors import UserError
from utils.cli.records import BRIDGED_CONFIG, RUN_CONFIG, differing_options, read_record, write_record
from utils.transfer.methods import STAGE_NAMES


def find_unfinished(output_dir: str | Path, options: dict, resume: bool, overwrite: bool) -> bool:
    """Say whether `output_dir` holds an unfinished run with these options that is to go on.

    Raises:
        UserError: it holds one with other options, or one that a new run would bury.
    """
    folder = Path(output_dir)
    if overwrite or not any((folder / name).is_dir() for name in STAGE_NAMES):
        return False
    if not resume:
        raise UserError(
            f"--output_dir {folder}: holds stages of an unfinished run; give --resume_from_checkpoint latest to go on, "
            "or --overwrite_output_dir to start from scratch."
        )
    differing = differing_options(read_record(folder / RUN_CONFIG)["options"], options)
    if differing:
        raise UserError(
            f"--resume_from_checkpoint latest: {folder} was begun with other options ({'; '.join(differing)}); give "
            "the same, or start from scratch with --overwrite_output_dir."
        )
    return True


def begin_run(output_dir: str | Path, options: dict) -> None:
    """Remove what an earlier run left of its stages, and note the options of this one."""
    folder = Path(output_dir)
    (folder / BRIDGED_CONFIG).unlink(missing_ok=True)  # from here on, what is there is being replaced
    for name in STAGE_NAMES:
        shutil.rmtree(folder / name, ignore_errors=True)
    write_record(folder / RUN_CONFIG, {"options": options})
