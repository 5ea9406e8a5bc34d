"""The output folder of a set: its settings, and whether a run may add images to it."""

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
from utils.data.left_out import FILTER_PICTURE, REVIEW, SCORES
from utils.synthesis.counts import BALANCE
from utils.synthesis.plan import GenerationPlan
from utils.synthesis.sources import Sources

DATA_DIR = "data"
SHARD_FILES = f"{DATA_DIR}/train-*.parquet"
FOOTER_KEY = b"bridged-transfer"  # in the metadata of a shard
STATE_DIR = ".shards"  # notes about the shards; not published
CHECKSUMS = "SHA256SUMS"  # in the format of `sha256sum -c`
PREVIEW = "preview.png"
CLASS_NAMES = "class_names.yaml"
QUALITY_RECORD, QUALITY_PLOTS = "quality.json", "quality.png"
DUPLICATE_PAIRS = "duplicates.png"  # not published: it shows real images
RECORDS = (CHECKSUMS, PREVIEW, CLASS_NAMES, QUALITY_RECORD, QUALITY_PLOTS, GENERATION_CONFIG, RUN_CONFIG)
VERDICTS = (REVIEW, SCORES, FILTER_PICTURE)
PUBLISHED_FILES = (SHARD_FILES, *RECORDS, *VERDICTS, "README.md")


def open_output_folder(output_dir: str, settings: dict, num_images_per_class: int, overwrite: bool) -> RunFolder:
    """Return the folder, after a check that images with these settings may be added: it is new, or has the same ones.

    Without a record, the settings in the shards count. A set that was begun, but has no image yet, may change.

    Raises:
        UserError: it has other settings (unless `overwrite`), more images, or is not a synthetic set.
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
                f"--output_dir {folder.path}: is not empty and has no {GENERATION_CONFIG}, so it is not a synthetic "
                "set; choose another folder (--overwrite_output_dir does not delete this one)."
            )
    elif overwrite or not folder.is_begun:
        return folder
    else:
        differing = folder.differing_options()
        if has_no_images(folder.path):
            if differing:
                warn_once(
                    f"--output_dir {folder.path}: has no images yet; its settings change ({'; '.join(differing)})."
                )
            return folder
        if differing:
            raise UserError(
                f"--output_dir {folder.path}: was made with other settings ({'; '.join(differing)}); "
                "choose another folder, or replace it with --overwrite_output_dir."
            )
        num_there = read_record(folder.path / GENERATION_CONFIG)["num_images_per_class"]
    if num_images_per_class < num_there:
        balance, least = (f"{BALANCE}:", "at least ") if settings.get(BALANCE) else ("", "")
        raise UserError(
            f"--num_images_per_class {balance}{num_images_per_class}: '{folder.path}' already has {least}{num_there} "
            "per class, and a set can only grow; choose another folder."
        )
    return folder


def has_no_images(output_dir: str | Path) -> bool:
    """Return whether a set was begun in a folder, but has no shard yet."""
    path = Path(output_dir)
    return not (path / RUN_CONFIG).exists() and not any(path.glob(SHARD_FILES))


def _count_without_record(folder: Path, settings: dict) -> int:
    """Return the images per class in a folder's shards, from their footers; 0 if one has other settings."""
    num_images = 0
    for footer, num_rows in filter(None, map(read_footer, folder.glob(SHARD_FILES))):  # incomplete ones are drawn again
        if footer.get("fingerprint") != settings_fingerprint(settings):
            return 0
        num_images = max(num_images, footer["shard"] * settings["images_per_shard"] + num_rows)
    num_extra = sum(settings.get(BALANCE, []))  # they come first
    return math.ceil((num_images - num_extra) / len(settings["classes"])) if num_images else 0


def read_footer(path: Path) -> tuple[dict, int] | None:
    """Return a shard's footer ({} for a foreign file) and its number of rows; None if the file is incomplete."""
    import pyarrow as pa  # imported late: it takes a moment
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowException):
        return None
    return json.loads((metadata.metadata or {}).get(FOOTER_KEY, b"{}")), metadata.num_rows


def lacks_setting(setting: str, output_dir: str, overwrite: bool) -> bool:
    """Return whether the folder has a set to continue from an earlier version without this setting."""
    path = Path(output_dir) / GENERATION_CONFIG
    is_there = not overwrite and path.exists() and not has_no_images(output_dir)
    return is_there and setting not in read_record(path)["settings"]


def has_setting(setting: str, output_dir: str, overwrite: bool) -> bool:
    """Return whether the folder has a set to continue that was begun with this setting."""
    is_recorded = recorded_setting(setting, output_dir, overwrite) is not None
    return is_recorded and not has_no_images(output_dir)


def recorded_setting(setting: str, output_dir: str, overwrite: bool) -> object:
    """Return a setting of the set to continue; None without one."""
    path = Path(output_dir) / GENERATION_CONFIG
    return None if overwrite or not path.exists() else read_record(path)["settings"].get(setting)


def settings_fingerprint(settings: dict) -> str:
    """Return the hash of all settings that decide the images."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def begin_set(folder: RunFolder, plan: GenerationPlan, sources: Sources) -> None:
    """Make the set's folders and write `generation_config.json`, in the main process.

    First remove the temporary files of an interrupted run and, with `overwrite`, all files of the former run, but no
    others. The card stays until the new one is merged with it, as a person may have edited it. All processes call this.

    Raises:
        UserError: a process does not see what was written, as its machine has another folder.
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
            fingerprint=fingerprint, **plan.to_dict(sources.class_names),
            generator={"id": absolute_if_local(generator.name), "revision": generator.revision},
            token=sources.token and sources.token.to_dict(), real_images=sources.real_images,
            class_names=sources.class_names, train_indices=sources.train_indices, package_versions=package_versions(),
        )  # fmt: skip
    state.wait_for_everyone()
    if not folder.is_begun or read_record(folder.path / GENERATION_CONFIG)["fingerprint"] != fingerprint:
        raise UserError(
            f"--output_dir {folder.path}: not all processes see the same folder; with several machines, it must be on "
            "a shared disk."
        )


def make_folders(output_dir: Path) -> None:
    """Make the folders of a set. Nothing else makes them, so a removed set is not recreated."""
    for name in (DATA_DIR, STATE_DIR):
        (output_dir / name).mkdir(parents=True, exist_ok=True)


@contextmanager
def report_removed(output_dir: Path) -> Iterator[None]:
    """Turn an error within the block into one line if the set's folder was removed.

    Raises:
        UserError: the folder, or the subfolders of its shards, are gone.
    """
    try:
        yield
    except OSError:
        if all((output_dir / name).is_dir() for name in (DATA_DIR, STATE_DIR)):
            raise
        raise UserError(
            f"--output_dir {output_dir}: all or part of it was removed while images were drawn; run the same command "
            "again to draw the missing images."
        ) from None
