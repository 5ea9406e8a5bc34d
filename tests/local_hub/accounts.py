"""Users and tokens: who asks, and what they may see and change."""

from dataclasses import dataclass

from tests.local_hub.messages import Answer, HubError, Request, json_answer
from tests.local_hub.storage import Repository


@dataclass(frozen=True)
class Account:
    name: str
    role: str  # of the token: "read" or "write"


def find_account(hub, request: Request) -> Account | None:
    """Return who asks, None if anonymous.

    Raises:
        HubError: the token is unknown.
    """
    if request.token is None:
        return None
    if request.token not in hub.accounts:
        raise HubError(401, "Invalid credentials in Authorization header")
    return hub.accounts[request.token]


def require_writer(hub, request: Request) -> Account:
    account = find_account(hub, request)
    if account is None:
        raise HubError(401, "Invalid username or password.")
    if account.role != "write":
        raise HubError(403, "Forbidden: this token may only read.")
    return account


def repo_not_found(account: Account | None) -> HubError:
    """Return the error for what is missing or hidden: clients tell it from a bad token by its code."""
    if account is None:
        return HubError(401, "Invalid username or password.", "RepoNotFound")
    return HubError(404, "Repository not found", "RepoNotFound")


def find_repo(hub, request: Request, repo_type: str, repo_id: str) -> Repository:
    """Return a repository whose name and settings the one who asks may see."""
    account = find_account(hub, request)
    repo = hub.repositories.get((repo_type, repo_id))
    if repo is None or (repo.private and (account is None or account.name != repo.owner)):
        raise repo_not_found(account)
    return repo


def find_readable_repo(hub, request: Request, repo_type: str, repo_id: str) -> Repository:
    """Return a repository whose files the one who asks may read."""
    repo = find_repo(hub, request, repo_type, repo_id)
    account = find_account(hub, request)
    if repo.gated and (account is None or account.name != repo.owner):
        message = f"Access to {repo.type} {repo.id} is restricted."
        raise HubError(401 if account is None else 403, message, "GatedRepo")
    return repo


def find_writable_repo(hub, request: Request, repo_type: str, repo_id: str) -> Repository:
    """Return a repository that the one who asks may change."""
    repo = find_repo(hub, request, repo_type, repo_id)
    if require_writer(hub, request).name != repo.owner:
        raise HubError(403, f"Forbidden: {repo.id} belongs to someone else.")
    return repo


def whoami(hub, request: Request) -> Answer:
    account = find_account(hub, request)
    if account is None:
        raise HubError(401, "Invalid username or password.")
    token = {"displayName": "token", "role": account.role}
    auth = {"type": "access_token", "accessToken": token}
    return json_answer({"type": "user", "name": account.name, "fullname": account.name, "orgs": [], "auth": auth})


def check_read_access(hub, request: Request, repo_type: str, repo_id: str) -> Answer:
    find_readable_repo(hub, request, repo_type, repo_id)
    return json_answer({})
