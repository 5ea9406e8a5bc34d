"""The only place that writes to the Hub: publishes a folder, with retries until it is complete.

What is on the Hub is not sent again, so an interrupted push resumes when it is repeated. Only files that a script names
are sent, without access tokens or the path of the home folder.

The client's `upload_folder` is not used (tested with 1.33 and 2.4): only its first commit has a parent, so it silently
reverts commits that others make in between, and it holds a gigabyte of 50 MB shards in memory.
"""

import fnmatch
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash
from tqdm.auto import tqdm

from utils.cli.errors import UserError
from utils.cli.processes import is_main_process
from utils.hub.cards import merge_cards, read_card
from utils.hub.targets import MAX_TRIES, HubUnavailable, Target, check_privacy

CARD = "README.md"
KEPT = {CARD, ".gitattributes"}  # a person's text, and the Hub's own file
TEXT_SUFFIXES = (".json", ".md", ".txt", ".yaml")
CONFLICT_STATUSES = (409, 412)
MAX_FILES_PER_COMMIT = 50
MAX_BYTES_PER_COMMIT = 5 * 2**30
# the client may hold a whole call in memory (hf_xet does): one shard and a margin
MAX_BYTES_AT_A_TIME = 128 * 2**20


@dataclass(frozen=True)
class Upload:
    """A file to publish: its path in the repository, and a local path or bytes."""

    path: str
    content: Path | bytes

    @property
    def num_bytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def is_stored_as(self, remote: RepoFile) -> bool:
        """Return whether a file in a repository has this content."""
        addition = CommitOperationAdd(self.path, self.content)
        if remote.lfs is not None:
            return addition.upload_info.sha256.hex() == remote.lfs.sha256
        with addition.as_file() as file:
            return git_hash(file.read()) == remote.blob_id


def publish_folder(folder: str | Path, target: Target, patterns: Sequence[str]) -> str:
    """Publish the files of `folder` that match `patterns` (relative, `*` also matches `/`); return the commit's URL.

    Data comes first, records and card last, so that a dataset with a card is complete. Files on the Hub that match
    `patterns` but are not in the folder are deleted, as leftovers of an earlier run. An existing card is merged, not
    replaced.

    Raises:
        UserError: a file contains the access token; the repository is public although `target.private` is set; someone
            else changed the same files; the Hub failed until the limit of tries.
    """
    uploads = _collect_uploads(folder, patterns, known_tokens(target.token))
    what = f"publishing {target.repo_id}"
    try:
        prepare_repository(target)
        head, before = read_branch(target)
        if uploads[-1].path == CARD and CARD in before:
            ours, theirs = uploads[-1].content.decode("utf-8"), read_card(download(target, CARD, head))
            merged = merge_cards(ours, theirs, f"the card of {target.repo_id}")
            uploads[-1] = Upload(CARD, merged.encode("utf-8"))
        gone = sorted(before.keys() - {upload.path for upload in uploads} - KEPT)
        stale = [path for path in gone if _matches(path, patterns)]
        with tqdm(total=sum(upload.num_bytes for upload in uploads), desc=what, unit="B", unit_scale=True) as progress:
            for batch in split(uploads, MAX_BYTES_PER_COMMIT):
                is_last = batch[-1] is uploads[-1]
                commit = _commit_batch(target, batch, stale if is_last else [], before, progress)
    except HubUnavailable as error:
        raise UserError(
            f"{error} Everything is in {folder}; run the same command again to resume: what is on the Hub is not sent "
            "again."
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code == 403:
            raise UserError(f"{what}: this access token has no write access (403).") from None
        raise
    print(f"Published: {commit.commit_url}")
    return commit.commit_url


def publish_finished(folder: str | Path, target: Target | None, patterns: Sequence[str]) -> None:
    """Report that a folder is finished, and publish it if there is a target, to resume an interrupted push."""
    if is_main_process():
        print(f"{folder} is already finished, nothing to do (--overwrite_output_dir starts from scratch).")
        if target is not None:
            publish_folder(folder, target, patterns)


def known_tokens(token: str | None) -> list[str]:
    """Return the access tokens that no published file may contain."""
    return [value for value in {token, get_token(), os.environ.get("HF_TOKEN")} if value]


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


def _collect_uploads(folder: str | Path, patterns: Sequence[str], tokens: Sequence[str]) -> list[Upload]:
    """Return the files to publish, texts cleaned: data before records, the card last."""
    uploads = []
    for path in Path(folder).rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and _matches(name, patterns):
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


def prepare_repository(target: Target) -> None:
    """Create the repository and the branch if they do not exist.

    Raises:
        UserError: the repository is public although a private one is wanted.
    """
    target.call(HfApi.create_repo, private=target.private or None, exist_ok=True)
    check_privacy(target)  # again: the work may have taken days
    if target.revision not in (None, "main"):
        target.call(HfApi.create_branch, branch=target.revision, exist_ok=True)


def read_branch(target: Target) -> tuple[str, dict[str, RepoFile]]:
    """Return the current commit of the branch, and its files by path."""

    def list_files(api: HfApi, **where) -> dict[str, RepoFile]:
        entries = api.list_repo_tree(recursive=True, **where)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    commit = target.call(HfApi.repo_info, revision=target.revision).sha
    return commit, target.call(list_files, revision=commit)


def download(target: Target, path: str, commit: str) -> Path:
    """Return the local path of a repository's file at a commit."""
    return Path(target.call(HfApi.hf_hub_download, filename=path, revision=commit))


def split(uploads: Sequence[Upload], max_bytes: int) -> Iterator[list[Upload]]:
    """Yield the uploads in order, in parts of at most `MAX_FILES_PER_COMMIT` files and, except for single files,
    `max_bytes`."""
    part, num_bytes = [], 0
    for upload in uploads:
        if part and (len(part) == MAX_FILES_PER_COMMIT or num_bytes + upload.num_bytes > max_bytes):
            yield part
            part, num_bytes = [], 0
        part.append(upload)
        num_bytes += upload.num_bytes
    if part:
        yield part


def _commit_batch(
    target: Target, batch: list[Upload], stale: list[str], before: dict[str, RepoFile], progress: tqdm
) -> CommitInfo:
    """Send and commit a batch, and delete `stale` files; if another commit comes first, retry on top of it."""
    num_bytes_before = progress.n
    for _ in range(MAX_TRIES):
        head, there = read_branch(target)
        _check_no_collision(target, batch, before, there)
        # new operations for every try: the client stores its progress in them
        operations = [CommitOperationDelete(path) for path in stale if there.get(path) == before[path]]
        progress.n = num_bytes_before
        try:
            for part in split(batch, MAX_BYTES_AT_A_TIME):
                operations += send_contents(target, part)
                progress.update(sum(upload.num_bytes for upload in part))
            return make_commit(target, batch, operations, head)
        except HfHubHTTPError as error:
            if error.response.status_code not in CONFLICT_STATUSES:
                raise
    raise HubUnavailable(f"publishing {target.repo_id}: other commits keep coming first.")


def _check_no_collision(
    target: Target, batch: list[Upload], before: dict[str, RepoFile], there: dict[str, RepoFile]
) -> None:
    """Check that the batch's files are unchanged, or already as in the batch (our commit, its answer lost)."""
    changed = [upload for upload in batch if there.get(upload.path) not in (None, before.get(upload.path))]
    collisions = [upload.path for upload in changed if not upload.is_stored_as(there[upload.path])]
    if collisions:
        raise UserError(
            f"publishing {target.repo_id}: someone else has just changed {', '.join(collisions)}; check "
            "it, then run the same command again to replace it, or choose another repository."
        )


def send_contents(target: Target, part: Sequence[Upload]) -> list[CommitOperationAdd]:
    """Send contents that are not on the Hub; return the operations that commit them."""
    additions = [CommitOperationAdd(upload.path, upload.content) for upload in part]
    target.call(HfApi.preupload_lfs_files, additions=additions, free_memory=False, revision=target.revision)
    return additions


def make_commit(
    target: Target, batch: Sequence[Upload], operations: list[CommitOperationAdd | CommitOperationDelete], parent: str
) -> CommitInfo:
    """Commit a batch, whose contents have been sent, on top of `parent`, the branch's head."""
    message = f"Publish {batch[-1].path}" + f" and {len(batch) - 1} more" * (len(batch) > 1)
    return target.call(
        HfApi.create_commit, operations=operations, commit_message=message, parent_commit=parent,
        revision=target.revision,
    )  # fmt: skip
