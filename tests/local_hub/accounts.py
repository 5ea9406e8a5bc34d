"""Users, organisations and tokens: who asks, and what they may read and write."""

from dataclasses import dataclass, field

from tests.local_hub.messages import Answer, HubError, Request, json_answer
from tests.local_hub.storage import Repository


@dataclass(frozen=True)
class Account:
    """A token of a user. Members of an organisation may read; those with the role "contributor" may also create
    repositories and write to these, those with "write" or "admin" write to all.
    """

    name: str
    role: str  # of the token: "read", "write" or "fineGrained"
    organisations: dict[str, str] = field(default_factory=dict)  # the user's role in each
    writable: tuple[str, ...] = ()  # of a fine-grained token: the users, organisations and repositories

    def may_see(self, repo: Repository) -> bool:
        return not repo.private or repo.owner in (self.name, *self.organisations)

    def may_write(self, repo: Repository) -> bool:
        role = "admin" if repo.owner == self.name else self.organisations.get(repo.owner)
        is_allowed = role in ("write", "admin") or (role == "contributor" and repo.creator == self.name)
        return is_allowed and self._token_may_write(repo.owner, repo.id)

    def may_create(self, owner: str) -> bool:
        is_allowed = owner == self.name or self.organisations.get(owner, "read") != "read"
        return is_allowed and self._token_may_write(owner)

    def _token_may_write(self, *names: str) -> bool:
        return self.role == "write" or (self.role == "fineGrained" and not set(self.writable).isdisjoint(names))


def find_account(hub, request: Request) -> Account | None:
    """Return the account that asks, None if anonymous.

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
    if account.role == "read":
        raise HubError(403, "Forbidden: this token may only read.")
    return account


def repo_not_found(account: Account | None) -> HubError:
    """Return the error for missing and hidden repositories, which clients distinguish from a bad token by its code."""
    if account is None:
        return HubError(401, "Invalid username or password.", "RepoNotFound")
    return HubError(404, "Repository not found", "RepoNotFound")


def find_repo(hub, request: Request, repo_type: str, repo_id: str) -> Repository:
    """Return a repository whose name and settings the account may see."""
    account = find_account(hub, request)
    repo = hub.repositories.get((repo_type, repo_id))
    if repo is None or (repo.private if account is None else not account.may_see(repo)):
        raise repo_not_found(account)
    return repo


def find_readable_repo(hub, request: Request, repo_type: str, repo_id: str) -> Repository:
    """Return a repository whose files the account may read."""
    repo = find_repo(hub, request, repo_type, repo_id)
    account = find_account(hub, request)
    if repo.gated and (account is None or account.name != repo.owner):
        message = f"Access to {repo.type} {repo.id} is restricted."
        raise HubError(401 if account is None else 403, message, "GatedRepo")
    return repo


def find_writable_repo(hub, request: Request, repo_type: str, repo_id: str) -> Repository:
    """Return a repository that the account may write."""
    repo = find_repo(hub, request, repo_type, repo_id)
    if not require_writer(hub, request).may_write(repo):
        raise HubError(403, f"Forbidden: you may not write to {repo.id}.")
    return repo


def whoami(hub, request: Request) -> Answer:
    account = find_account(hub, request)
    if account is None:
        raise HubError(401, "Invalid username or password.")
    token = {"displayName": "token", "role": account.role}
    if account.role == "fineGrained":
        permissions = ["repo.content.read", "repo.write"]
        scoped = [{"entity": {"name": name}, "permissions": permissions} for name in account.writable]
        token["fineGrained"] = {"global": [], "scoped": scoped}
    auth = {"type": "access_token", "accessToken": token}
    orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in account.organisations.items()]
    return json_answer({"type": "user", "name": account.name, "fullname": account.name, "orgs": orgs, "auth": auth})


def check_read_access(hub, request: Request, repo_type: str, repo_id: str) -> Answer:
    find_readable_repo(hub, request, repo_type, repo_id)
    return json_answer({})


def check_write_access(hub, request: Request, repo_type: str, repo_id: str) -> Answer:
    find_writable_repo(hub, request, repo_type, repo_id)
    return json_answer({})
