"""Where a folder is published: a repository that the user may write to, looked up before any work."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from utils.cli.errors import UserError
from utils.hub.retries import with_retries


@dataclass(frozen=True)
class Target:
    """A repository of the user's, checked to be writable; `revision` is a branch, made when it is not there."""

    repo_id: str
    repo_type: str
    private: bool = False
    revision: str | None = None
    token: str | None = None

    @property
    def api(self) -> HfApi:
        return HfApi(token=self.token or None)

    @property
    def place(self) -> dict:
        """What every call about the repository's files takes."""
        return {"repo_id": self.repo_id, "repo_type": self.repo_type, "revision": self.revision}


def open_target(
    output_dir: str | Path,
    hub_id: str | None,
    repo_type: str,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> Target:
    """Return where a folder is to be published, by default under its name in the user's account.

    Called before any work, so that a missing token costs no training.

    Raises:
        UserError: no token, a bad one, one that may not write there, or the Hub cannot be reached.
    """
    what = "--push_to_hub"
    try:
        account = with_retries(lambda: HfApi(token=token or None).whoami(), f"{what}: who am I")
    except LocalTokenNotFoundError:
        raise UserError(f"{what}: no access token; log in with `hf auth login` or set HF_TOKEN.") from None
    except OfflineModeIsEnabled:
        raise UserError(f"{what}: HF_HUB_OFFLINE=1 is set; unset it or leave {what} out.") from None
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise UserError(f"{what}: the Hub does not know this access token; log in with `hf auth login`.") from None
        raise UserError(f"{what}: the Hub refuses this access token ({error.response.status_code}).") from None
    repo_id = hub_id or Path(output_dir).resolve().name
    if "/" not in repo_id:
        repo_id = f"{account['name']}/{repo_id}"
    namespaces = [account["name"], *(organisation["name"] for organisation in account.get("orgs", []))]
    if repo_id.split("/")[0] not in namespaces:
        raise UserError(f"{what}: '{repo_id}' is not yours to write; you are {' and '.join(namespaces)}.")
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"{what}: this access token only reads; make one with the role 'write'.")
    return Target(repo_id, repo_type, private, revision, token)
