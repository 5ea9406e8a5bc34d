"""The output folder: which settings its set was made with, and whether a run may add to it."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.cli.errors import UserError
from utils.cli.options import absolute_if_local
from utils.cli.processes import warn_once
from utils.cli.records import GENERATION_CONFIG, RUN_CONFIG, package_versions, read_record
from utils.cli.run_folder import RunFolder, check_writable
from utils.synthesis.plan import GenerationPlan
from utils.synthesis.sources import Sources

DATA_DIR = "data"
SHARD_FILES = f"{DATA_DIR}/train-*.parquet"
FOOTER_KEY = b"bridged-transfer"  # in the metadata of a shard
STATE_DIR = ".shards"  # what is known of the shards in it; not published
CHECKSUMS = "SHA256SUMS"  # as `sha256sum -c` reads it
PREVIEW = "preview.png"
CLASS_NAMES = "class_names.yaml"
QUALITY_RECORD, QUALITY_PLOTS = "quality.json", "quality.png"
DUPLICATE_PAIRS = "duplicates.png"  # not published: it shows real images
RECORDS = (CHECKSUMS, PREVIEW, CLASS_NAMES, QUALITY_RECORD, QUALITY_PLOTS, GENERATION_CONFIG, RUN_CONFIG)
PUBLISHED_FILES = (SHARD_FILES, *RECORDS, "README.md")


def open_output_folder(output_dir: str, settings: dict, num_images_per_class: int, overwrite: bool) -> RunFolder:
    """Return the folder, after a check that images of these settings may be added: it is new, or was made with them.

    A folder without its record counts as made with these settings if its shards were. One that was begun, but in which
    no image has been drawn, is taken.

    Raises:
        UserError: it was made with other settings (unless `overwrite`), holds more images, or is no synthetic set.
    """
    folder = RunFolder(
        Path(output_dir), "a synthetic set", settings, RUN_CONFIG, (GENERATION_CONFIG, "settings"), overwrite=overwrite
    )
    if folder.path.is_file():
        raise UserError(f"--output_dir {folder.path}: is a file; name a folder.")
    check_writable(folder.path)
    if not folder.is_begun and folder.path.is_dir() and any(folder.path.iterdir()):
        num_there = 0 if overwrite else _count_without_record(folder.path, settings)
        if num_there == 0:
            raise UserError(
                f"--output_dir {folder.path}: is not empty and has no {GENERATION_CONFIG}, so it is no synthetic set; "
                "name another folder (--overwrite_output_dir does not delete this one)."
            )
    elif overwrite or not folder.is_begun:
        return folder
    else:
        differing = folder.differing_options()
        if is_without_images(folder.path):
            if differing:
                warn_once(
                    f"--output_dir {folder.path}: no image was drawn in it yet; from now on it has other settings "
                    f"({'; '.join(differing)})."
                )
            return folder
        if differing:
            raise UserError(
                f"--output_dir {folder.path}: was made with other settings ({'; '.join(differing)}); "
                "name another folder, or replace it with --overwrite_output_dir."
            )
        num_there = read_record(folder.path / GENERATION_CONFIG)["num_images_per_class"]
    if num_images_per_class < num_there:
        raise UserError(
            f"--num_images_per_class {num_images_per_class}: '{folder.path}' is a set of {num_there} a class, which "
            "can only grow; name another folder."
        )
    return folder


def is_without_images(output_dir: str | Path) -> bool:
    """Return whether a set was begun in a folder, and ended before its first shard was there."""
    path = Path(output_dir)
    return not (path / RUN_CONFIG).exists() and not any(path.glob(SHARD_FILES))


def _count_without_record(folder: Path, settings: dict) -> int:
    """Return of how many images per class a folder's shards are, by their footers; 0 if one is of other settings."""
    num_images = 0
    for footer, num_rows in filter(None, map(read_footer, folder.glob(SHARD_FILES))):  # torn ones are drawn again
        if footer.get("fingerprint") != settings_fingerprint(settings):
            return 0
        num_images = max(num_images, footer["shard"] * settings["images_per_shard"] + num_rows)
    return math.ceil(num_images / len(settings["classes"]))


def read_footer(path: Path) -> tuple[dict, int] | None:
    """Return what a shard's footer says of it, {} for a file of others, and its number of rows; None if it is torn."""
    import pyarrow as pa  # imported late: it takes a moment
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowException):
        return None
    return json.loads((metadata.metadata or {}).get(FOOTER_KEY, b"{}")), metadata.num_rows


def began_without(setting: str, output_dir: str, overwrite: bool) -> bool:
    """Return whether a set is there to go on with of an earlier version, which had no such setting."""
    path = Path(output_dir) / GENERATION_CONFIG
    is_there = not overwrite and path.exists() and not is_without_images(output_dir)
    return is_there and setting not in read_record(path)["settings"]


def recorded_setting(setting: str, output_dir: str, overwrite: bool) -> object:
    """Return a setting of the set that is there to go on with, None where there is none."""
    path = Path(output_dir) / GENERATION_CONFIG
    return None if overwrite or not path.exists() else read_record(path)["settings"].get(setting)


def settings_fingerprint(settings: dict) -> str:
    """Return the hash of all that decides what an image is."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def begin_set(folder: RunFolder, plan: GenerationPlan, sources: Sources) -> None:
    """Make the set's folders and write `generation_config.json`, in the main process.

    First remove the temporary files of an interrupted run, with `overwrite` all that a former run has made, and nothing
    else. The card stays until the new one is merged with it: a person may have written in it. All processes call this,
    and each sees what was written.

    Raises:
        UserError: it does not: it is on another machine, whose folder is another one.
    """
    from accelerate import PartialState

    state, generator = PartialState(), sources.generator.source
    fingerprint = settings_fingerprint(folder.options)
    state.wait_for_everyone()  # every process has checked the folder before the main one changes it
    if state.is_main_process:
        if folder.overwrite and folder.is_begun:
            shutil.rmtree(folder.path / STATE_DIR, ignore_errors=True)
            for name in (*RECORDS, DUPLICATE_PAIRS, SHARD_FILES):
                for path in folder.path.glob(name):
                    path.unlink()
        make_folders(folder.path)
        for path in (folder.path / DATA_DIR).glob(".*.tmp"):
            path.unlink()
        folder.begin(
            fingerprint=fingerprint, num_images_per_class=plan.num_images_per_class, num_images=plan.num_images,
            generator={"id": absolute_if_local(generator.name), "revision": generator.revision},
            token=sources.token and sources.token.to_dict(), real_images=sources.real_images,
            class_names=sources.class_names, train_indices=sources.train_indices, package_versions=package_versions(),
        )  # fmt: skip
    state.wait_for_everyone()
    if not folder.is_begun or read_record(folder.path / GENERATION_CONFIG)["fingerprint"] != fingerprint:
        raise UserError(
            f"--output_dir {folder.path}: not all processes see the same folder; on several machines it must be on a "
            "disk that they share."
        )


def make_folders(output_dir: Path) -> None:
    """Make the folders of a set. What writes into them later does not, so that a removed set stays away."""
    for name in (DATA_DIR, STATE_DIR):
        (output_dir / name).mkdir(parents=True, exist_ok=True)


@contextmanager
def report_removed(output_dir: Path) -> Iterator[None]:
    """Turn an error within the block that comes from a set's folder having been removed into one line.

    Raises:
        UserError: the folder is not there, or has lost those of its shards.
    """
    try:
        yield
    except OSError:
        if all((output_dir / name).is_dir() for name in (DATA_DIR, STATE_DIR)):
            raise
        raise UserError(
            f"--output_dir {output_dir}: was removed, or part of it, while images were drawn; run the same command "
            "again to draw what is missing."
        ) from None
