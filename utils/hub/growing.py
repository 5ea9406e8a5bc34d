"""Uploads finished shards while later ones are generated; `publish_folder` then sends the rest, the card last."""

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars

from utils.cli.errors import UserError
from utils.cli.records import GENERATION_CONFIG, read_record
from utils.hub import publishing
from utils.hub.cards import BEGIN, read_card
from utils.hub.publishing import CARD, Upload, known_tokens
from utils.hub.targets import Target, first_line

logger = logging.getLogger(__name__)

# how long an error in the block waits for a pending call to the Hub, which is repeated later
SECONDS_TO_FINISH = 2.0


class GrowingUpload:
    """Upload the finished shards of a synthetic dataset from a thread, while the `with` block runs.

    `find_finished` returns the paths, relative to `folder`, of the complete shards; the thread calls it every `pause`
    seconds. `fingerprint` is that of the folder's `generation_config.json`, which is uploaded with the first shards, so
    that a later run recognizes them. A repository with another dataset is left alone. If it already holds this dataset
    with its card, which counts the images, the contents of new shards are sent but not committed: that is left to
    `publish_folder`.

    A failure of the Hub is one line in the log, and is retried after the next pause. Leaving the block ends the thread
    after its current call; after an error, that is awaited for `SECONDS_TO_FINISH` only.
    """

    def __init__(
        self, folder: str | Path, target: Target, find_finished: Callable[[], Iterable[str]], fingerprint: str,
        pause: float = 60.0,
    ):  # fmt: skip
        self._folder = Path(folder)
        self._target = replace(target, wait=self._wait)
        self._find_finished = find_finished
        self._fingerprint = fingerprint
        self._pause = pause
        self._is_prepared = False
        self._done: set[str] = set()  # shards that need nothing more before the end
        self._failure: tuple | None = None  # the kind of the last failure, until a look succeeds
        self._stop = threading.Event()
        # a daemon: a hanging call must not keep the process alive
        self._thread = threading.Thread(target=self._run, name="growing upload", daemon=True)

    def __enter__(self) -> "GrowingUpload":
        self._thread.start()
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        self._stop.set()
        self._thread.join(None if error_type is None else SECONDS_TO_FINISH)

    def _run(self) -> None:
        with disable_progress_bars():  # only the block's own bar is shown
            while not self._stop.is_set():
                try:
                    self._look()
                    self._failure = None
                except _Stopped:
                    return
                except _AnotherSet as reason:
                    logger.warning(
                        f"{self._target.repo_id} holds another dataset ({reason}): nothing is uploaded until this one "
                        "is complete and replaces it."
                    )
                    return
                except Exception as error:  # of any kind: the work in the block continues, and is published at its end
                    self._report(error)
                self._stop.wait(self._pause)

    def _look(self) -> None:
        """Upload the finished shards that are not on the Hub, in as many commits as they need."""
        finished = [path for path in sorted(self._find_finished()) if path not in self._done]
        if finished and not self._is_prepared:
            publishing.prepare_repository(self._target)
            self._is_prepared = True
        try:
            while left := [Upload(path, self._folder / path) for path in finished if path not in self._done]:
                self._upload_some(left)
        except HfHubHTTPError as error:
            # the next look finds out whose commit came first; it may be our own, whose answer was lost
            if error.response.status_code not in publishing.CONFLICT_STATUSES:
                raise

    def _upload_some(self, shards: list[Upload]) -> None:
        """Upload as many shards as fit in a commit."""
        head, there = publishing.read_branch(self._target)
        self._check_same_set(there, head, shards)
        missing = [shard for shard in shards if not self._is_there(shard, there)]
        self._done.update({shard.path for shard in shards} - {shard.path for shard in missing})
        if not missing:
            return
        if GENERATION_CONFIG not in there:
            record = publishing.clean_text(self._folder / GENERATION_CONFIG, known_tokens(self._target.token))
            missing.insert(0, Upload(GENERATION_CONFIG, record))
        batch, operations = next(publishing.split(missing, publishing.MAX_BYTES_PER_COMMIT)), []
        for upload in batch:  # one at a time, so that leaving the block takes little waiting
            self._check_not_stopped()
            operations += publishing.send_contents(self._target, [upload])
        # `load_dataset` checks the number of images in our card
        is_whole = CARD in there and BEGIN in read_card(publishing.download(self._target, CARD, head))
        if not is_whole:
            publishing.make_commit(self._target, batch, operations, head)
        self._done.update(upload.path for upload in batch)

    def _check_same_set(self, there: dict[str, RepoFile], head: str, shards: list[Upload]) -> None:
        """Check, by fingerprint or content, that the repository holds only this dataset's shards."""
        if GENERATION_CONFIG in there:
            path = publishing.download(self._target, GENERATION_CONFIG, head)
            try:
                fingerprint = read_record(path).get("fingerprint")
            except UserError:
                raise _AnotherSet(f"its {GENERATION_CONFIG} cannot be read") from None
            if fingerprint != self._fingerprint:
                raise _AnotherSet(f"its {GENERATION_CONFIG} has another fingerprint")
            return
        ours = {shard.path: shard for shard in shards}
        for path in there:
            is_ours = path in self._done or (path in ours and self._is_there(ours[path], there))
            if path.endswith(".parquet") and not is_ours:
                raise _AnotherSet(f"it has no {GENERATION_CONFIG}, and a {path} that does not belong to this dataset")

    def _is_there(self, shard: Upload, there: dict[str, RepoFile]) -> bool:
        self._check_not_stopped()  # it may read a whole shard
        return shard.path in there and shard.is_stored_as(there[shard.path])

    def _wait(self, problem: str, pause: float) -> None:
        """Wait silently between two tries of a call: only a final failure is worth a line."""
        self._stop.wait(pause)
        self._check_not_stopped()

    def _check_not_stopped(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _report(self, error: Exception) -> None:
        """Log a failure in one line, once as long as looks fail for the same reason."""
        failure = type(error), error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if failure == self._failure:
            return
        self._failure = failure
        line = str(error) if isinstance(error, UserError) else f"publishing {self._target.repo_id}: {first_line(error)}"
        for token in known_tokens(self._target.token):
            line = line.replace(token, "***")
        logger.warning(f"{line.rstrip('.')}; the work continues, and finished shards are uploaded later.")


class _Stopped(Exception):
    """The block has been left."""


class _AnotherSet(Exception):
    """The repository holds shards of another dataset; the message says how it is recognized."""
