"""What of a folder is published, and in which order: no more than its script names, no token, no home folder's path."""

import fnmatch
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, get_token

from utils.cli.errors import UserError

CARD = "README.md"
TEXT_SUFFIXES = (".json", ".md", ".txt", ".yaml")


@dataclass(frozen=True)
class Upload:
    """A file to publish: its path in the repository, and a local path or the bytes that go in its place."""

    path: str
    content: Path | bytes

    @property
    def num_bytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def operation(self) -> CommitOperationAdd:
        return CommitOperationAdd(self.path, self.content)

    def is_stored_as(self, remote) -> bool:
        """Say whether a repository's file (`RepoFile`) has this content."""
        if remote.lfs is not None and isinstance(self.content, Path):
            with self.content.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == remote.lfs.sha256
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        if remote.lfs is not None:
            return hashlib.sha256(content).hexdigest() == remote.lfs.sha256
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == remote.blob_id


def known_tokens(token: str | None) -> list[str]:
    """Return the access tokens that no published file may hold."""
    return [value for value in {token, get_token(), os.environ.get("HF_TOKEN")} if value]


def collect_uploads(folder: str | Path, patterns: Sequence[str], tokens: Sequence[str]) -> list[Upload]:
    """Return what of a folder is published: data before records, the card last. The home folder becomes `~`.

    Raises:
        UserError: a text file holds one of `tokens`.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    uploads = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            continue
        uploads.append(Upload(name, clean_text(path, tokens) if path.suffix in TEXT_SUFFIXES else path))
    return sorted(uploads, key=lambda upload: (upload.path == CARD, upload.path.endswith(TEXT_SUFFIXES), upload.path))


def clean_text(path: Path, tokens: Sequence[str]) -> bytes:
    """Return a text file's content with the home folder's path as `~`.

    Raises:
        UserError: it holds one of `tokens`.
    """
    content = path.read_bytes()
    if any(token.encode() in content for token in tokens):
        raise UserError(f"--push_to_hub: {path} holds an access token; nothing was published.")
    return content.replace(str(Path.home()).encode() + b"/", b"~/")


def split(uploads: Sequence[Upload], max_files: int, max_bytes: int) -> Iterator[list[Upload]]:
    """Yield the uploads in order, in parts of at most `max_files` and, unless one alone has more, `max_bytes`."""
    part, num_bytes = [], 0
    for upload in uploads:
        if part and (len(part) == max_files or num_bytes + upload.num_bytes > max_bytes):
            yield part
            part, num_bytes = [], 0
        part.append(upload)
        num_bytes += upload.num_bytes
    if part:
        yield part
