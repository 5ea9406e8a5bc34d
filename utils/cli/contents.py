"""Hashes of local inputs: they tell apart files and folders of the same name."""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants

from utils.cli.records import write_text

# what systems and people put next to data, but is not part of it
HIDDEN_FOLDERS = {"__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information",
                  "lost+found"}  # fmt: skip
IGNORED = re.compile(r"\..*|Thumbs\.db|desktop\.ini|(README|LICENSE|LICENCE)(\..*)?", re.IGNORECASE)
MAX_LINKS = 2  # symbolic links in a row; folders that link to each other would never end
DIGITS = 32  # of a digest, in hexadecimal
SECONDS_TO_SETTLE = 2.0  # clocks of disks are coarse: a new file may be written again in the same tick


def list_files(folder: str | Path, above: tuple = (), num_links: int = 0) -> Iterator[str]:
    """Yield the relative paths of a folder's files, except `IGNORED` and unreadable ones.

    At most `MAX_LINKS` symbolic links are followed on the way to a file.
    """
    try:
        status, entries = os.stat(folder), sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    place = status.st_dev, status.st_ino
    if place in above or num_links > MAX_LINKS:
        return
    for entry in entries:
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in HIDDEN_FOLDERS:
            below = list_files(entry.path, (*above, place), num_links + entry.is_symlink())
            yield from (f"{entry.name}/{name}" for name in below)
        elif entry.is_file() and not IGNORED.fullmatch(entry.name):
            yield entry.name


def content_digest(folder: str | Path, names: Iterable[str]) -> str:
    """Return a hash of the names and bytes of some files in a folder. Unchanged files are not read again."""
    names = list(names)

    def compute() -> Iterator[bytes]:
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                yield os.fsencode(name) + b"\n" + hashlib.file_digest(file, "sha256").digest()

    return cached_digest(folder, names, compute)


def cached_digest(folder: str | Path, names: Iterable[str], read: Callable[[], Iterable[bytes]], what: str = "") -> str:
    """Return a hash of what `read` yields for some files of a folder, cached until one of them changes.

    Files with the paths, sizes, times and inodes of an earlier call are not read again: 10 GB cost no more than the
    listing. `what` distinguishes this `read` from others. Without a writable cache, everything is read each time.
    """
    names = list(names)
    state, newest = _hash_metadata(folder, names, what)
    noted = Path(constants.HF_HOME, "bridged-transfer", "digests", state)
    with suppress(OSError):
        return noted.read_text(encoding="utf-8")
    contents = hashlib.sha256()
    for part in read():
        contents.update(part)
    digest = contents.hexdigest()[:DIGITS]
    # not for files that were replaced while they were read
    if time.time() - newest > SECONDS_TO_SETTLE and _hash_metadata(folder, names, what)[0] == state:
        with suppress(OSError):
            write_text(noted, digest)
    return digest


def _hash_metadata(folder: str | Path, names: list[str], what: str) -> tuple[str, float]:
    """Return a hash of the files' paths, sizes, times and inodes, and the time of the latest change."""
    facts = hashlib.sha256(os.fsencode(Path(folder).resolve()) + f"\n{what}\n".encode())
    newest = 0.0
    for name in names:
        status = os.stat(os.path.join(folder, name))
        newest = max(newest, status.st_ctime)
        # ctime changes with every write or replacement, whatever mtime says
        numbers = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
        facts.update(os.fsencode(name) + f"\n{numbers}\n".encode())
    return facts.hexdigest(), newest


def describe_files(folder: str | Path, names: Iterable[str]) -> str:
    """Return the identity of a folder's files as records store it: their number and their digest."""
    names = list(names)
    return f"{len(names):,} files, sha256 {content_digest(folder, names)}"
