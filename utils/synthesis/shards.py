"""Parquet shards for `load_dataset`: written whole or not at all, and verified on a restart."""

import hashlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image, Value
from PIL import Image as PILImage

from utils.cli.errors import UserError
from utils.cli.records import write_text
from utils.cli.threads import num_cores
from utils.synthesis.output_folder import CHECKSUMS, DATA_DIR, FOOTER_KEY, STATE_DIR, read_footer
from utils.synthesis.plan import GenerationPlan

logger = logging.getLogger(__name__)

ROW_GROUP_SIZE = 100  # rows that a streaming reader must load at once
NUM_THREADS = min(16, num_cores())


def synthetic_features(class_names: list[str], has_init_images: bool = False) -> Features:
    """Return the columns of a synthetic set; labels have the real set's names, in its order.

    A set that is made from real images also has the strength, and the row of the image in the real training split.
    """
    from_images = {"strength": Value("float32"), "init_image": Value("int64")} if has_init_images else {}
    return Features({
        "image": Image(), "label": ClassLabel(names=list(class_names)), "prompt": Value("string"),
        "seed": Value("int64"), "guidance_scale": Value("float32"), "class_index": Value("int64"), **from_images,
    })  # fmt: skip


def shard_name(number: int) -> str:
    """Return a shard's path in the set's folder, without the total number, so that a set can grow."""
    return f"{DATA_DIR}/train-{number:05d}.parquet"


@dataclass(frozen=True)
class Shards:
    """The shards of a plan in a folder. `fingerprint` is that of all settings, and is in every shard's footer."""

    output_dir: Path
    plan: GenerationPlan
    fingerprint: str
    class_names: list[str]

    def path(self, number: int) -> Path:
        return self.output_dir / shard_name(number)

    def write(self, number: int, rows: Iterable[dict], num_redraws: dict[str, int], images_at_a_time: int) -> None:
        """Write a shard under a temporary name, flush it to disk, note its checksum and rename it.

        `num_redraws` counts the redraws of each class; `images_at_a_time` is the actual batch size.
        """
        path = self.path(number)
        temporary = path.with_name(f".{path.name}.tmp")
        # the schema's metadata has the features; without them load_dataset gives dicts and plain integers
        schema = synthetic_features(self.class_names, self.plan.has_init_images).arrow_schema
        footer = {
            "fingerprint": self.fingerprint, "shard": number, "num_redraws": num_redraws,
            "images_at_a_time": images_at_a_time,
        }  # fmt: skip
        rows = list(rows)
        try:
            with open(temporary, "wb") as file:
                with pq.ParquetWriter(file, schema) as writer:
                    for start in range(0, len(rows), ROW_GROUP_SIZE):
                        writer.write_table(pa.Table.from_pylist(rows[start : start + ROW_GROUP_SIZE], schema=schema))
                    writer.add_key_value_metadata({FOOTER_KEY: json.dumps(footer, sort_keys=True)})
                file.flush()
                os.fsync(file.fileno())
            # the note is written first, so that every shard has one
            self._note(number, temporary, _sha256(temporary))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def find_missing(self) -> list[int]:
        """Return the numbers of the shards to draw: missing, incomplete, or not of this plan."""
        with ThreadPoolExecutor(NUM_THREADS) as threads:  # hashing releases the interpreter
            if num_taken_up := sum(threads.map(self._adopt, range(self.plan.num_shards))):
                logger.warning("%d shard(s) without a checksum are intact and are kept.", num_taken_up)
            finished = threads.map(self.is_finished, range(self.plan.num_shards))
            return [number for number, is_finished in enumerate(finished) if not is_finished]

    def is_finished(self, number: int) -> bool:
        """Return whether a shard holds exactly the plan's images, byte for byte as written.

        A file whose size and time match its note is not read again.
        """
        path = self.path(number)
        try:
            stat = path.stat()
        except FileNotFoundError:
            return False
        noted = self._read_note(number)
        if noted is None or noted["num_bytes"] not in (None, stat.st_size):
            return False
        if noted["mtime_ns"] != stat.st_mtime_ns:
            if _sha256(path) != noted["sha256"]:
                return False
            self._note(number, path, noted["sha256"])
        return self._is_of_plan(number)

    def find_finished(self) -> list[str]:
        """Return the relative paths of the finished shards."""
        return [shard_name(number) for number in range(self.plan.num_shards) if self.is_finished(number)]

    def describe_progress(self) -> str:
        """Describe how many shards are finished."""
        return f"{len(self.find_finished())} of {self.plan.num_shards} shards are finished and kept"

    def check_no_foreign_files(self) -> None:
        """Check that the folder has no other files that `load_dataset` would add to the set.

        Raises:
            UserError: it does; the message names the first.
        """
        ours = {self.path(number) for number in range(self.plan.num_shards)}
        for path in sorted((self.output_dir / DATA_DIR).glob("train-*")):
            if path not in ours:
                raise UserError(
                    f"--output_dir {self.output_dir}: {path} is not a shard of this set and would be loaded with it; "
                    "move it away."
                )

    def summarise(self) -> dict:
        """Return the redraws of each class and the actual batch size, from the footers of the finished shards.

        `images_at_a_time` is smaller than the plan's batch size if memory ran out.
        """
        redraws, images_at_a_time = Counter(), self.plan.batch_size
        for number in range(self.plan.num_shards):
            footer = json.loads(pq.read_metadata(self.path(number)).metadata[FOOTER_KEY])
            redraws.update(footer["num_redraws"])
            images_at_a_time = min(images_at_a_time, footer["images_at_a_time"])
        names = [self.class_names[label] for label in self.plan.labels]
        return {"num_redraws": {name: redraws[name] for name in names}, "images_at_a_time": images_at_a_time}

    def write_checksums(self) -> None:
        """Write the checksum list of all shards."""
        notes = [json.loads(self._note_path(number).read_bytes()) for number in range(self.plan.num_shards)]
        lines = [f"{note['sha256']}  {shard_name(number)}\n" for number, note in enumerate(notes)]
        write_text(self.output_dir / CHECKSUMS, "".join(lines))

    def _is_of_plan(self, number: int) -> bool:
        """Return whether a file has the footer and the number of rows of this plan's shard."""
        footer, num_rows = read_footer(self.path(number)) or ({}, 0)
        expected = self.fingerprint, number, len(self.plan.shard(number))
        return (footer.get("fingerprint"), footer.get("shard"), num_rows) == expected

    def _adopt(self, number: int) -> bool:
        """Note the checksum of an intact shard without one; return whether there was such a shard."""
        path = self.path(number)
        if self._read_note(number) is not None or not self._is_of_plan(number) or not _is_whole(path):
            return False
        self._note(number, path, _sha256(path))
        return True

    def _note(self, number: int, path: Path, sha256: str) -> None:
        stat, note_path = path.stat(), self._note_path(number)
        temporary = note_path.with_name(f".{note_path.name}.tmp")
        # not with write_text, which would make the folder
        temporary.write_text(json.dumps({"sha256": sha256, "num_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}))
        os.replace(temporary, note_path)

    def _read_note(self, number: int) -> dict | None:
        try:
            return json.loads(self._note_path(number).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            # a folder that was downloaded or copied without hidden files has only the list
            sha256 = self._listed_checksums.get(shard_name(number))
            return None if sha256 is None else {"sha256": sha256, "num_bytes": None, "mtime_ns": None}

    def _note_path(self, number: int) -> Path:
        return self.output_dir / STATE_DIR / f"{number:05d}.json"

    @cached_property
    def _listed_checksums(self) -> dict[str, str]:
        path = self.output_dir / CHECKSUMS
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}


def _is_whole(path: Path) -> bool:
    """Return whether all rows of a shard, and all their images, can be read."""
    try:
        for rows in pq.ParquetFile(path).iter_batches(batch_size=10):  # few, as each thread holds this many
            for row in rows.to_pylist():
                PILImage.open(io.BytesIO(row["image"]["bytes"])).load()
    except (OSError, pa.ArrowException, SyntaxError):  # SyntaxError comes from Pillow, for PNG files
        return False
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
