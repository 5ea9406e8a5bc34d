"""Repositories: contents on disk by sha256; commits, branches and tags in memory."""

import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from tests.local_hub.messages import CHUNK_SIZE, HubError

# Files that the Hub's `.gitattributes` send to LFS; `push_to_hub` relies on this for parquet.
LFS_SUFFIXES = {
    ".7z", ".arrow", ".avro", ".bin", ".bmp", ".bz2", ".ckpt", ".flac", ".gif", ".gz", ".h5", ".jpeg", ".jpg",
    ".joblib", ".lz4", ".mp3", ".mp4", ".msgpack", ".npy", ".npz", ".onnx", ".parquet", ".pb", ".pickle", ".pkl",
    ".png", ".pt", ".pth", ".rar", ".safetensors", ".tar", ".tflite", ".tgz", ".tiff", ".wav", ".webm", ".webp", ".xz",
    ".zip", ".zst",
}  # fmt: skip
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES)).encode()


def git_blob_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit. `git_oid` is git's hash of its content, or of its pointer if it is in LFS."""

    sha256: str
    size: int
    is_lfs: bool
    git_oid: str

    @property
    def etag(self) -> str:
        """The hash that clients compare with their local file: sha256 in LFS, else git's sha1."""
        return self.sha256 if self.is_lfs else self.git_oid


class BlobStore:
    """Contents by sha256, on disk: neither an upload nor a download is held in memory."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def add(self, chunks: Iterable[bytes], expected_sha256: str | None = None) -> str:
        """Write a content, renamed only when complete, and return its sha256.

        Raises:
            HubError: the content is not what it was announced to be.
        """
        digest = hashlib.sha256()
        descriptor, temporary_name = tempfile.mkstemp(dir=self.folder, suffix=".incomplete")
        try:
            with os.fdopen(descriptor, "wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            if expected_sha256 not in (None, digest.hexdigest()):
                raise HubError(400, f"The content has sha256 {digest.hexdigest()}, announced was {expected_sha256}.")
            os.replace(temporary_name, self.path(digest.hexdigest()))
        finally:
            Path(temporary_name).unlink(missing_ok=True)
        return digest.hexdigest()

    def add_content(self, content: bytes | Path) -> str:
        if isinstance(content, bytes):
            return self.add([content])
        with content.open("rb") as file:
            return self.add(iter(lambda: file.read(CHUNK_SIZE), b""))

    def clear(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()

    def stored_file(self, sha256: str, is_lfs: bool) -> StoredFile:
        size = self.path(sha256).stat().st_size
        in_git = lfs_pointer(sha256, size) if is_lfs else self.path(sha256).read_bytes()
        return StoredFile(sha256, size, is_lfs, git_blob_sha1(in_git))


@dataclass(frozen=True)
class Commit:
    id: str
    title: str
    date: str
    parent: "Commit | None" = field(repr=False)
    files: dict[str, StoredFile] = field(repr=False)
    paths: list[str]  # changed, added or removed here


class Repository:
    """A model or a dataset with its history, written one commit at a time."""

    def __init__(
        self, repo_id: str, repo_type: str, private: bool, gated: bool, blobs: BlobStore, lfs_threshold: int,
        creator: str | None = None,
    ):  # fmt: skip
        self.id = repo_id
        self.type = repo_type
        self.private = private
        self.gated = gated
        self.creator = creator or self.owner
        self.blobs = blobs
        self.lfs_threshold = lfs_threshold
        self.lock = threading.RLock()
        self.branches: dict[str, Commit] = {}
        self.tags: dict[str, Commit] = {}
        self._commits: dict[str, Commit] = {}
        self.commit({".gitattributes": GIT_ATTRIBUTES}, message="initial commit")

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def goes_to_lfs(self, path: str, size: int) -> bool:
        return size > 0 and (PurePosixPath(path).suffix.lower() in LFS_SUFFIXES or size >= self.lfs_threshold)

    def find_commit(self, revision: str) -> Commit:
        """Return the head of a branch, a tag's commit or a commit.

        Raises:
            HubError: there is no such revision.
        """
        for known in (self.branches, self.tags, self._commits):
            if revision in known:
                return known[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, files: dict[str, bytes | Path], message: str = "Upload", branch: str = "main") -> str:
        """Add or replace files, as if the owner had pushed them, and return the commit's id."""
        additions = {}
        for path, content in files.items():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            sha256 = self.blobs.add_content(content)
            additions[path] = self.blobs.stored_file(sha256, self.goes_to_lfs(path, size))
        return self.add_commit(additions, [], message, branch=branch).id

    def add_commit(
        self, additions: dict[str, StoredFile], deletions: list[str], title: str, branch: str = "main",
        parent: str | None = None,
    ) -> Commit:  # fmt: skip
        """Put a commit on a branch.

        Raises:
            HubError: 412, `parent` is given and no longer the head; 404, no such branch, or no such file to delete.
        """
        with self.lock:
            if branch not in self.branches and self.branches:
                raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            head = self.branches.get(branch)
            if parent is not None and parent != head.id:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            before = {} if head is None else head.files
            if missing := set(deletions) - set(before):
                raise HubError(404, f"A file with this name doesn't exist: {missing}", "EntryNotFound")
            kept = {path: file for path, file in before.items() if path not in deletions}
            # Clients cache file lists by commit: the time makes commit ids unique to a run.
            commit_id = hashlib.sha1(f"{self.id} {head and head.id} {time.time_ns()}".encode()).hexdigest()
            date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
            commit = Commit(commit_id, title, date, head, kept | additions, sorted({*additions, *deletions}))
            self._commits[commit.id] = self.branches[branch] = commit
            return commit

    def commits(self, revision: str = "main") -> list[Commit]:
        """Return the history, newest first."""
        history = [self.find_commit(revision)]
        while history[-1].parent is not None:
            history.append(history[-1].parent)
        return history

    def files(self, revision: str = "main") -> dict[str, bytes]:
        files = self.find_commit(revision).files
        return {path: self.blobs.path(files[path].sha256).read_bytes() for path in sorted(files)}
