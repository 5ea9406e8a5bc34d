"""Inputs: local folders, or Hub repositories at a commit, with one-line errors."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import shorten

from huggingface_hub import HfApi, constants, errors, get_token, hf_hub_download, snapshot_download
from huggingface_hub import try_to_load_from_cache as find_in_cache

from utils.cli.contents import describe_files
from utils.cli.errors import UserError

MAX_REASON = 400  # characters of a library's message, which may list all known models
REPO_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
COMMIT = re.compile(r"^[0-9a-f]{40}$")
HUB_TOKEN, HF_TOKEN, LOGIN = "--hub_token", "HF_TOKEN", "from `hf auth login`"
NEITHER = "neither an existing folder nor a repository id like 'user/name'"
TYPE_NAMES = {"model": "model", "dataset": "dataset", "space": "space"}
SAVED_SPLITS, SAVED_SPLIT = ["dataset_dict.json"], ["state.json", "dataset_info.json"]
# HTTPError is the base class of the HTTP client's errors (httpx or httpx2, as huggingface_hub uses); OSError covers
# connection errors and those of the cache on disk
CLIENT_ERRORS = (
    errors.HTTPError, OSError, errors.EntryNotFoundError, errors.HFValidationError, errors.RevisionResolutionError,
    errors.XetDownloadError,
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """An input: a local folder, or a repository at a revision. `flag` is the flag that names it, for messages.

    `open_source` sets the revision to a commit, so that all files are of one version.
    """

    name: str
    flag: str
    repo_type: str = "model"
    revision: str | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def is_local(self) -> bool:
        return bool(self.name) and Path(self.name).is_dir()  # Path("") is the working directory

    def file(self, filename: str, expected: str | None = None) -> Path:
        """Return the local path of one file, downloaded if needed. `expected` says what an input with this file is.

        Raises:
            UserError: the repository or file does not exist, is not accessible or not reachable.
        """
        if self.is_local:
            path = Path(self.name) / filename
            if not path.is_file():
                raise self._error(self._no_file("folder", filename, expected))
            return path
        with self.reading(f"{filename} cannot be downloaded", filename, expected):
            return Path(hf_hub_download(self.name, filename, **self._where))

    def has_one_of(self, filenames: list[str]) -> bool:
        """Return whether one of these files exists, without downloading it; offline, whether the cache has it.

        Raises:
            UserError: the repository cannot be read.
        """
        if self.is_local:
            return any((Path(self.name) / filename).is_file() for filename in filenames)
        place = {"repo_type": self.repo_type, "revision": self.revision}
        if any(isinstance(find_in_cache(self.name, filename, **place), str) for filename in filenames):
            return True
        with self.reading("its files cannot be listed"):
            return not constants.HF_HUB_OFFLINE and any(
                HfApi().file_exists(self.name, filename, **self._where) for filename in filenames
            )

    def list_files(self) -> list[str]:
        """Return the names of the files at the top and one folder below; offline, those in the cache.

        Raises:
            UserError: the repository cannot be read.
        """
        folder = Path(self.name)
        if not self.is_local:
            with self.reading("its files cannot be listed"):
                if self.is_reachable():
                    return HfApi().list_repo_files(self.name, **self._where)
                folder = Path(snapshot_download(self.name, **self._where, local_files_only=True))
        paths = [*folder.glob("*"), *folder.glob("*/*")]
        return sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file())

    def commit(self) -> str | None:
        """Return the commit of a repository, None for a local folder; offline, the commit in the cache.

        Raises:
            UserError: the repository or revision does not exist, is not accessible or not reachable.
        """
        if self.is_local:
            return None
        if self.revision and COMMIT.match(self.revision):
            return self.revision
        with self.reading("its commit cannot be found"):
            # it warns when it uses the cache, which is expected with HF_HUB_OFFLINE
            return str(
                HfApi().resolve_revision(self.name, **self._where, local_files_only=constants.HF_HUB_OFFLINE).resolved
            )

    def identity(self, list_meant: Callable[[str], Iterable[str]] = list_files) -> str:
        """Return the identity of the contents: the commit, or a hash of a folder's files.

        `list_meant` lists the paths in the folder that belong to the input.

        Raises:
            UserError: a file cannot be read.
        """
        if not self.is_local:
            return f"commit {self.revision}"
        with self.reading("cannot be read"):
            return describe_files(self.name, list_meant(self.name))

    def is_reachable(self) -> bool:
        """Return whether the Hub answers, without the clients' half minute of retries.

        Raises:
            UserError: it answers that the repository or revision does not exist or is not accessible.
        """
        if constants.HF_HUB_OFFLINE:
            return False
        try:
            HfApi().repo_info(self.name, **self._where, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except CLIENT_ERRORS as error:
            if isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 500:
                raise self._error(self._describe(error, "cannot be read")) from None
            return False
        return True

    def check_access(self) -> None:
        """Check with the Hub that the files are accessible.

        Raises:
            UserError: they are not, or the Hub is not reachable.
        """
        with self.reading("cannot be read"):
            HfApi().auth_check(self.name, repo_type=self.repo_type, token=self.token)

    def load_options(self) -> dict:
        """Return the options with which `from_pretrained` loads exactly this version."""
        options = {"revision": self.revision, "token": self.token}
        return options if self.is_local or self.is_reachable() else {**options, "local_files_only": True}

    @contextmanager
    def reading(
        self, problem: str, filename: str | None = None, expected: str | None = None,
        also: tuple[type[Exception], ...] = (),
    ) -> Iterator[None]:  # fmt: skip
        """Turn a client's failure within the block into one line, by default with `problem`.

        `also` are further errors that mean the input is unusable.
        """
        try:
            yield
        except UserError:
            raise
        except (*CLIENT_ERRORS, *also) as error:
            raise self._error(self._describe(error, problem, filename, expected)) from None

    @property
    def _where(self) -> dict:
        return {"repo_type": self.repo_type, "revision": self.revision, "token": self.token}

    def _error(self, reason: str) -> UserError:
        return UserError(f"{self.flag} {self.name}: {reason}.")

    def _no_file(self, place: str, filename: str, expected: str | None) -> str:
        return f"the {place} has no {filename}{f', so it is not {expected}' if expected else ''}"

    def _describe(
        self, error: Exception, problem: str, filename: str | None = None, expected: str | None = None
    ) -> str:
        causes = list(_causes(error))

        def caused_by(*kinds: type) -> bool:
            return any(isinstance(cause, kinds) for cause in causes)

        if caused_by(errors.GatedRepoError):
            origin = _token_origin(self.token)
            how = f"with the account of the token ({origin})" if origin else f"then {_login_advice(None)}"
            page = f"{constants.ENDPOINT}/{'' if self.repo_type == 'model' else f'{self.repo_type}s/'}{self.name}"
            return f"is gated; accept its conditions at {page}, {how}"
        if caused_by(errors.RepositoryNotFoundError):
            return self._not_found()
        if caused_by(errors.RevisionNotFoundError):
            return f"the repository has no branch, tag or commit '{self.revision}'"
        if caused_by(errors.RemoteEntryNotFoundError) and filename:
            return self._no_file("repository", filename, expected)
        if caused_by(errors.HFValidationError):
            return NEITHER
        answers = [cause for cause in causes if isinstance(cause, errors.HfHubHTTPError) and cause.response is not None]
        if answers:
            return self._refusal(answers[0].response.status_code, answers[0].server_message)
        if caused_by(errors.FileMetadataError):
            return f"{constants.ENDPOINT} does not answer like a Hub; check HF_ENDPOINT and the proxy"
        if caused_by(errors.HTTPError, ConnectionError, errors.LocalEntryNotFoundError, errors.RevisionResolutionError):
            missing = f"{filename} of it" if filename else "it"
            at_revision = f" at revision '{self.revision}'" if self.revision else ""
            cache = f"the cache ({constants.HF_HUB_CACHE}) does not have {missing}{at_revision}"
            if constants.HF_HUB_OFFLINE:
                return f"no such folder here, and {cache}; unset HF_HUB_OFFLINE to download it"
            reason = f"the Hub ({constants.ENDPOINT}) cannot be reached ({_first_line(causes[-1])})"
            return f"no such folder here, {reason}, and {cache}"
        return f"{problem} ({shorten(str(error), MAX_REASON, placeholder=' ...')})"

    def _not_found(self) -> str:
        for repo_type in [other for other in TYPE_NAMES if other != self.repo_type]:
            try:
                HfApi().repo_info(self.name, repo_type=repo_type, token=self.token)
            except CLIENT_ERRORS:
                continue
            return f"must be a {TYPE_NAMES[self.repo_type]}, but is a {TYPE_NAMES[repo_type]} repository"
        kind = TYPE_NAMES[self.repo_type]
        origin = _token_origin(self.token)
        seen = f"a {kind} repository that the token ({origin}) can read" if origin else f"a public {kind} repository"
        return f"neither a folder nor {seen}; for a private one, {_login_advice(origin)}"

    def _refusal(self, status: int, server_message: str | None) -> str:
        if status == 401:
            origin = _token_origin(self.token)
            return f"the Hub rejects the token ({origin}) as wrong or expired; {_login_advice(origin)}"
        detail = f": {server_message}" if server_message else ""
        if status == 403:
            return f"the token ({_token_origin(self.token)}) has no read access{detail}"
        later = "; try again later" if status == 429 or status >= 500 else ""
        return f"the Hub ({constants.ENDPOINT}) returned error {status}{detail}{later}"


def open_source(
    name: str, flag: str, repo_type: str = "model", revision: str | None = None, token: str | None = None
) -> Source:
    """Return the input `name`, a local folder or a repository id, at the current commit of `revision`.

    Raises:
        UserError: `name` is neither, a folder has a revision, or `Source.commit` fails.
    """
    source = Source(name, flag, repo_type, revision, token or None)  # an empty token would make an invalid header
    if source.is_local:
        if revision is not None:
            raise source._error(f"is a local folder; a revision ('{revision}') needs a repository")
    elif not REPO_ID.match(name):
        raise source._error(NEITHER)
    return replace(source, revision=source.commit())


def is_saved_to_disk(folder: str) -> bool:
    """Return whether a folder was written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return any(all((Path(folder) / name).is_file() for name in names) for names in (SAVED_SPLITS, SAVED_SPLIT))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _token_origin(token: str | None) -> str | None:
    """Return where the token comes from, or None."""
    if token:
        return HUB_TOKEN
    if os.environ.get(HF_TOKEN, "").strip():
        return HF_TOKEN
    return LOGIN if get_token() else None


def _login_advice(origin: str | None) -> str:
    # each token takes precedence over those below it
    return {
        HUB_TOKEN: "give another --hub_token",
        HF_TOKEN: "set another HF_TOKEN or give --hub_token",
        LOGIN: "log in again with `hf auth login` or give --hub_token",
        None: "log in with `hf auth login` or give --hub_token",
    }[origin]
