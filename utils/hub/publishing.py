"""The one place that writes to the Hub: a folder is published as often as need be until it is there whole.

What is there already is not sent again, so an interrupted push goes on when it is started again.
"""

import fnmatch
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
from tqdm.auto import tqdm

from utils.cli.errors import UserError
from utils.hub.merged_card import merge_cards, read_card
from utils.hub.retries import MAX_TRIES, HubUnavailable, with_retries
from utils.hub.targets import Target
from utils.hub.uploads import CARD, Upload, collect_uploads, known_tokens, split

ANOTHER_COMMIT_CAME_FIRST = (409, 412)
MAX_FILES_PER_COMMIT = 50
MAX_BYTES_PER_COMMIT = 5 * 2**30
# the client may hold in memory what it sends at a time (hf_xet does): a shard and a margin
MAX_BYTES_AT_A_TIME = 128 * 2**20


def publish_folder(
    folder: str | Path, target: Target, patterns: Sequence[str], stale_patterns: Sequence[str] = ()
) -> str:
    """Publish the files of `folder` that match `patterns` (relative, `*` also matches `/`) and return the commit's URL.

    Data come first, records and card last, so that a set with a card is whole. Files on the Hub that match
    `stale_patterns` and are no longer in the folder are deleted. An existing card is merged, not replaced.

    Raises:
        UserError: a file holds the access token; the repository is public and `target.private` asked for a private
            one; someone else has changed the same files; the Hub did not answer within the limit of tries.
    """
    uploads = collect_uploads(folder, patterns, known_tokens(target.token))
    what = f"publishing {target.repo_id}"
    try:
        prepare_repository(target)
        uploads = [merge_with_remote_card(target, upload) if upload.path == CARD else upload for upload in uploads]
        stale = find_stale_files(target, uploads, stale_patterns)
        with tqdm(total=sum(upload.num_bytes for upload in uploads), desc=what, unit="B", unit_scale=True) as progress:
            for batch in split_into_commits(uploads):
                is_last = batch[-1] is uploads[-1]
                commit = commit_batch(target, batch, stale if is_last else [], progress)
    except HubUnavailable as error:
        raise UserError(
            f"{error} All of it is in {folder}; run the same command again to go on, what is on the Hub is not sent "
            "again."
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code == 403:
            raise UserError(f"{what}: this access token may not write there (403).") from None
        raise
    print(f"Published: {commit.commit_url}")
    return commit.commit_url


def publish_finished(folder: str | Path, target: Target | None, patterns: Sequence[str]) -> None:
    """Say that nothing is left to do in a folder, and publish it when there is a target: a push goes on so."""
    from accelerate import PartialState  # not at the top: it loads torch, before the arguments are checked

    if PartialState().is_main_process:
        print(f"{folder} is finished, nothing is done again (--overwrite_output_dir starts from scratch).")
        if target is not None:
            publish_folder(folder, target, patterns)


def prepare_repository(target: Target) -> None:
    """Create the repository and the branch where they are not there.

    Raises:
        UserError: the repository is public though a private one was asked for.
    """
    api, what = target.api, f"publishing {target.repo_id}"
    with_retries(
        lambda: api.create_repo(
            target.repo_id, repo_type=target.repo_type, private=target.private or None, exist_ok=True
        ),
        what,
    )
    if target.private:
        info = with_retries(lambda: api.repo_info(target.repo_id, repo_type=target.repo_type), what)
        if not info.private:
            raise UserError(f"--hub_private_repo: '{target.repo_id}' is there already, and public; nothing was sent.")
    if target.revision not in (None, "main"):
        with_retries(
            lambda: api.create_branch(
                target.repo_id, branch=target.revision, repo_type=target.repo_type, exist_ok=True
            ),
            what,
        )


def merge_with_remote_card(target: Target, card: Upload) -> Upload:
    """Return our card merged with the one that is in the repository, if there is one."""
    path = download(target, CARD, current_head(target))
    if path is None:
        return card
    merged = merge_cards(card.content.decode("utf-8"), read_card(path), f"the card of {target.repo_id}")
    return Upload(CARD, merged.encode("utf-8"))


def download(target: Target, path: str, commit: str) -> Path | None:
    """Return the local path of a repository's file as it is at a commit, None when it is not there."""
    try:
        return Path(
            with_retries(
                lambda: target.api.hf_hub_download(target.repo_id, path, repo_type=target.repo_type, revision=commit),
                f"publishing {target.repo_id}: its {path}",
            )
        )
    except RemoteEntryNotFoundError:
        return None


def find_stale_files(target: Target, uploads: list[Upload], patterns: Sequence[str]) -> list[str]:
    """Return the repository's files that match `patterns` and are not among `uploads`."""
    if not patterns:
        return []
    there = with_retries(lambda: target.api.list_repo_files(**target.place), f"publishing {target.repo_id}")
    ours = {upload.path for upload in uploads}
    return [path for path in there if path not in ours and any(fnmatch.fnmatch(path, p) for p in patterns)]


def current_head(target: Target) -> str:
    """Return the commit at which the branch is now."""
    return with_retries(
        lambda: target.api.repo_info(target.repo_id, repo_type=target.repo_type, revision=target.revision).sha,
        f"publishing {target.repo_id}",
    )


def split_into_commits(uploads: Sequence[Upload]) -> Iterator[list[Upload]]:
    """Yield the uploads in order, in batches that are small enough for a commit each."""
    return split(uploads, MAX_FILES_PER_COMMIT, MAX_BYTES_PER_COMMIT)


def commit_batch(target: Target, batch: list[Upload], stale: list[str], progress: tqdm) -> CommitInfo:
    """Commit one batch on the branch's head; when another commit came first, on the new head.

    Raises:
        UserError: the other commit changed the same files, to something else.
        HubUnavailable: the limit of tries is reached.
    """
    head, what = current_head(target), f"publishing {target.repo_id}"
    for _ in range(MAX_TRIES):
        try:
            return with_retries(partial(send, target, batch, stale, head, progress, progress.n), what)
        except HfHubHTTPError as error:
            if error.response.status_code not in ANOTHER_COMMIT_CAME_FIRST:
                raise
        old_head, head = head, current_head(target)
        check_no_collision(target, batch, old_head, head)
        there = set(target.api.list_repo_files(**target.place | {"revision": head}))
        stale = [path for path in stale if path in there]
    raise HubUnavailable(f"{what}: others commit to it all the time.")


def send(
    target: Target, batch: list[Upload], stale: list[str], parent: str, progress: tqdm, num_bytes_before: int
) -> CommitInfo:
    """Send a batch's contents, some at a time, and commit them and the deletions on `parent`, the branch's head."""
    operations, progress.n = [CommitOperationDelete(path) for path in stale], num_bytes_before
    for part in split(batch, len(batch), MAX_BYTES_AT_A_TIME):
        operations += send_contents(target, part)
        progress.update(sum(upload.num_bytes for upload in part))
    return make_commit(target, batch, operations, parent)


def send_contents(target: Target, part: Sequence[Upload]) -> list[CommitOperationAdd]:
    """Send contents that are not on the Hub, and return the operations that make them files in a commit."""
    # new operations for every try: the client marks on them what it has done
    additions = [upload.operation() for upload in part]
    target.api.preupload_lfs_files(additions=additions, free_memory=False, **target.place)
    return additions


def make_commit(
    target: Target,
    batch: Sequence[Upload],
    operations: list[CommitOperationAdd | CommitOperationDelete],
    parent: str,
) -> CommitInfo:
    """Commit a batch whose contents have been sent on `parent`, the branch's head."""
    message = f"Publish {batch[-1].path}" + f" and {len(batch) - 1} more" * (len(batch) > 1)
    return target.api.create_commit(operations=operations, commit_message=message, parent_commit=parent, **target.place)


def check_no_collision(target: Target, batch: list[Upload], old_head: str, new_head: str) -> None:
    """Check that what was committed between two heads leaves our files alone, or is what we were to commit.

    The latter happens when the answer to our own commit was lost.

    Raises:
        UserError: a file was changed to something else.
    """

    def files_at(commit: str) -> dict:
        paths = [upload.path for upload in batch]
        infos = with_retries(
            lambda: target.api.get_paths_info(target.repo_id, paths, repo_type=target.repo_type, revision=commit),
            f"publishing {target.repo_id}",
        )
        return {info.path: info for info in infos}

    old, new = files_at(old_head), files_at(new_head)
    collisions = [
        upload.path
        for upload in batch
        if upload.path in new
        and (upload.path not in old or old[upload.path].blob_id != new[upload.path].blob_id)
        and not upload.is_stored_as(new[upload.path])
    ]
    if collisions:
        raise UserError(
            f"publishing {target.repo_id}: someone else has just changed {', '.join(collisions)} there; look at "
            "it, then run the same command again to replace it, or choose another repository."
        )
