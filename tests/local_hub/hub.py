"""The Hub as tests see it: users, repositories, faults, log, and the environment that points a client at it."""

import os
import secrets
import threading
from pathlib import Path

from tests.local_hub.accounts import Account
from tests.local_hub.faults import Fault, FaultPlan, LoggedRequest
from tests.local_hub.routes import CDN_ROUTES, ROUTES, no_route
from tests.local_hub.server import HubServer
from tests.local_hub.storage import BlobStore, Repository
from tests.local_hub.xet import XetFolders


class LocalHub:
    """A Hub on a loopback port, while its `with` block runs.

    With `cdn`, files in LFS come from a second origin, as from the Hub: `resolve` answers 302 to a signed address.
    """

    def __init__(self, root: Path, lfs_threshold: int = 10 * 2**20, cdn: bool = False, port: int = 0):
        self.lfs_threshold = lfs_threshold  # bytes
        self.page_size = 1000  # rows of a listing
        self.blobs = BlobStore(Path(root) / "blobs")
        self.xet_folders = XetFolders(Path(root) / "xet")
        self.signing_key = secrets.token_bytes(16)
        self.lock = threading.RLock()
        self.accounts: dict[str, Account] = {}  # by token
        self.repositories: dict[tuple[str, str], Repository] = {}  # by type and id
        self.faults = FaultPlan()
        self.failures: list[str] = []  # tracebacks of the server itself
        self.num_resets = 0
        self.log: list[LoggedRequest] = []
        self.cdn_log: list[LoggedRequest] = []
        self._server = HubServer(self, ROUTES, no_route, self.log, port)
        self._cdn_server = HubServer(self, CDN_ROUTES, no_route, self.cdn_log)
        self.url = self._server.url
        self.has_cdn = self._had_cdn = cdn

    @property
    def cdn_url(self) -> str | None:
        return self._cdn_server.url if self.has_cdn else None

    def __enter__(self) -> "LocalHub":
        self._server.thread.start()
        self._cdn_server.thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._server.stop()
        self._cdn_server.stop()

    def add_user(self, name: str, token: str, role: str = "write", **options) -> None:
        """Add a token of a user; `role` is "read", "write" or "fineGrained", `options` are those of `Account`."""
        self.accounts[token] = Account(name, role, **options)

    def create_repo(
        self, repo_id: str, repo_type: str = "model", private: bool = False, gated: bool = False,
        creator: str | None = None,
    ) -> Repository:  # fmt: skip
        """Create a repository as its owner or, for an organisation, as one of its members."""
        with self.lock:
            if (repo_type, repo_id) in self.repositories:
                raise ValueError(f"{repo_type} {repo_id} is there already")
            repo = Repository(repo_id, repo_type, private, gated, self.blobs, self.lfs_threshold, creator)
            self.repositories[repo_type, repo_id] = repo
        return repo

    def repo(self, repo_id: str, repo_type: str = "model") -> Repository:
        """Return a repository.

        Raises:
            KeyError: there is none.
        """
        return self.repositories[repo_type, repo_id]

    def repos(self) -> list[Repository]:
        return list(self.repositories.values())

    def inject(self, fault: Fault) -> None:
        self.faults.inject(fault)

    def clear_faults(self) -> None:
        self.faults.clear()

    @property
    def faults_fired(self) -> list[Fault]:
        """The injected faults that occurred, in order, with repetitions."""
        return self.faults.fired

    def clear_log(self) -> None:
        self.log.clear()
        self.cdn_log.clear()

    def reset(self) -> None:
        """Forget repositories, users, faults and log, and set `page_size` and `has_cdn` back.

        A request that was being answered gets no answer and is not logged.
        """
        with self.lock:
            self.num_resets += 1
            self.repositories.clear()
            self.accounts.clear()
            self.blobs.clear()
            self.xet_folders.clear()
        self.clear_faults()
        self.clear_log()
        self.failures.clear()
        self.page_size = 1000
        self.has_cdn = self._had_cdn

    def environment(self, hf_home: Path, token: str | None = None, xet: bool = False) -> dict[str, str]:
        """Return the whole environment for a child process that uses only this Hub."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
        settings = {
            "HF_ENDPOINT": self.url, "HF_HOME": str(hf_home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        if token is not None:
            settings["HF_TOKEN"] = token
        if not xet:
            settings["HF_HUB_DISABLE_XET"] = "1"
        return inherited | settings
