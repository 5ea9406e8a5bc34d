"""Folders and Hub repositories: where an input comes from, and the one place that publishes an output."""

import re
from dataclasses import dataclass
from pathlib import Path

from utils.cli.errors import UserError

REPO_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
COMMIT = re.compile(r"^[0-9a-f]{40}$")
NEVER_PUBLISHED = [
    "**/checkpoint-*",
    "checkpoint-*",
    "**/training_args.bin",
    "training_args.bin",
    "*.tmp",
    ".*",
    "logs/*",
]


@dataclass(frozen=True)
class Source:
    """An input: a local folder, or a repository at a commit. `flag` is the flag that named it, for messages."""

    name: str
    flag: str
    repo_type: str = "model"
    revision: str | None = None
    token: str | None = None

    @property
    def is_local(self) -> bool:
        return bool(self.name) and Path(self.name).is_dir()  # Path("") is the working directory

    def file(self, filename: str) -> Path:
        """Return the local path of one file, downloaded if need be.

        Raises:
            UserError: there is no such repository or file, or it cannot be reached.
        """
        if self.is_local:
            path = Path(self.name) / filename
            if not path.is_file():
                raise UserError(f"{self.flag} {self.name}: the folder has no {filename}.")
            return path
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

        try:
            return Path(
                hf_hub_download(self.name, filename, repo_type=self.repo_type, revision=self.revision, token=self.token)
            )
        except RepositoryNotFoundError:
            raise UserError(
                f"{self.flag} {self.name}: neither a folder nor a {self.repo_type} repository on the Hub."
            ) from None
        except LocalEntryNotFoundError:
            raise UserError(
                f"{self.flag} {self.name}: no such folder here, and the Hub cannot be reached for a repository."
            ) from None
        except EntryNotFoundError:
            raise UserError(f"{self.flag} {self.name}: the repository has no {filename}.") from None

    def commit(self) -> str | None:
        """Return the commit of a repository, None for a local folder."""
        if self.is_local:
            return None
        if self.revision and COMMIT.match(self.revision):
            return self.revision
        from huggingface_hub import HfApi

        return HfApi().repo_info(self.name, repo_type=self.repo_type, revision=self.revision, token=self.token).sha


def open_source(
    name: str, flag: str, repo_type: str = "model", revision: str | None = None, token: str | None = None
) -> Source:
    """Return the input called `name`, a local folder or a repository id.

    Raises:
        UserError: `name` is neither; a revision is given for a folder.
    """
    source = Source(name, flag, repo_type, revision, token)
    if source.is_local:
        if revision is not None:
            raise UserError(f"{flag} {name}: is a local folder, a revision ('{revision}') only goes with a repository.")
    elif not REPO_ID.match(name):
        raise UserError(f"{flag} {name}: neither an existing folder nor a repository id like 'user/name'.")
    return source


def publish_folder(
    folder: str | Path, repo_id: str | None, repo_type: str, private: bool = False, token: str | None = None
) -> str:
    """Upload a folder, all but checkpoints and training state, and return the URL of the commit.

    `repo_id` defaults to the folder's name under the user.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    created = api.create_repo(
        repo_id or Path(folder).resolve().name, repo_type=repo_type, private=private, exist_ok=True
    )
    info = api.upload_folder(
        repo_id=created.repo_id, folder_path=folder, repo_type=repo_type, ignore_patterns=NEVER_PUBLISHED
    )
    return str(info)
