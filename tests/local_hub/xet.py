"""Xet: clients chunk into a local store (`local://`), from which the server reads the contents at the commit."""

import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.local_hub.accounts import find_writable_repo
from tests.local_hub.messages import Answer, Request, json_answer

NUM_ATTEMPTS = 5
PAUSE = 0.2  # seconds
RECORD_SIZE = 48  # bytes, of a shard's header and of all records after it
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30


class XetFolders:
    """A fresh store for each write token: the index of one can be open in one process only."""

    def __init__(self, root: Path):
        self.root = root
        self.numbers = itertools.count()

    def new(self) -> Path:
        folder = self.root / f"{next(self.numbers):04}"
        folder.mkdir(parents=True)
        return folder

    def stores(self) -> list[Path]:
        return sorted(self.root.glob("[0-9]*"))

    def clear(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def give_write_token(hub, request: Request, repo_type: str, repo_id: str, revision: str) -> Answer:
    find_writable_repo(hub, request, repo_type, repo_id)
    url, expiry = f"local://{hub.xet_folders.new()}", int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet-token", "X-Xet-Token-Expiration": str(expiry)}
    return json_answer({"casUrl": url, "accessToken": "xet-token", "exp": expiry}, headers=headers)


def fetch_from_xet(hub, wanted: set[str]) -> None:
    """Add to the blobs the contents `wanted` (by sha256) that the stores have."""
    for store in hub.xet_folders.stores():
        listed = {}
        for shard in store.rglob("shards/*.mdb"):
            listed |= list_shard(shard.read_bytes())
        missing = [sha256 for sha256 in wanted if not hub.blobs.path(sha256).is_file()]
        if found := {sha256: listed[sha256] for sha256 in missing if sha256 in listed}:
            _read_store(hub, store, found)


def list_shard(shard: bytes) -> dict[str, tuple[str, int]]:
    """Return, by sha256, the Xet hash and the size of each file of a shard.

    A header, then for each file: a record (hash, flags, number of segments), the segments, as many verifications if
    a flag says so, and a record with the sha256 if another does. A hash of ones ends it.
    """
    files, position = {}, RECORD_SIZE
    while shard[position : position + 32] != b"\xff" * 32:
        xet_hash = _hash_name(shard, position)
        flags, num_segments = struct.unpack_from("<II", shard, position + 32)
        segments = range(position + RECORD_SIZE, position + RECORD_SIZE * (1 + num_segments), RECORD_SIZE)
        size = sum(struct.unpack_from("<I", shard, segment + 36)[0] for segment in segments)
        position += RECORD_SIZE * (1 + num_segments * (2 if flags & HAS_VERIFICATION else 1))
        if flags & HAS_SHA256:
            files[_hash_name(shard, position)] = (xet_hash, size)
            position += RECORD_SIZE
    return files


def _hash_name(shard: bytes, position: int) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", shard, position))


def _read_store(hub, store: Path, found: dict[str, tuple[str, int]]) -> None:
    """Read files of a store through a copy, in a child: the client still has the store open, and hf_xet writes to
    the HF_HOME of its process.

    Raises:
        RuntimeError: the store cannot be read.
    """
    with tempfile.TemporaryDirectory(dir=hub.xet_folders.root, prefix="reading-") as scratch:
        asked = {sha256: [*file, f"{scratch}/{sha256}"] for sha256, file in found.items()}
        env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        for attempt in range(NUM_ATTEMPTS):
            copy = Path(scratch, f"copy-{attempt}")
            shutil.copytree(store, copy, copy_function=_link_or_copy)
            done = subprocess.run(
                [sys.executable, Path(__file__).with_name("read_xet_store.py"), f"local://{copy}"],
                input=json.dumps(list(asked.values())), env=env | {"HF_HOME": f"{scratch}/hf-home"},
                capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode == 0:
                break
            time.sleep(PAUSE)  # the index may have been copied while the client, at its next files, wrote to it
        else:
            raise RuntimeError(f"the Xet store {store} cannot be read: {done.stderr}")
        for sha256, (_, _, path) in asked.items():
            with open(path, "rb") as file:
                hub.blobs.add(iter(lambda file=file: file.read(1 << 20), b""), expected_sha256=sha256)


def _link_or_copy(source: str, destination: str) -> None:
    if source.endswith(".redb"):
        shutil.copyfile(source, destination)  # the index, which opening changes
    else:
        os.link(source, destination)
