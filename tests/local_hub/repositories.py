"""Creating and describing repositories: create, info, branches."""

from tests.local_hub.accounts import find_repo, find_writable_repo, require_writer
from tests.local_hub.messages import Answer, HubError, Request, json_answer
from tests.local_hub.reading import lfs_fields
from tests.local_hub.storage import Repository


def repo_url(hub, repo: Repository) -> str:
    return f"{hub.url}/{'datasets/' if repo.type == 'dataset' else ''}{repo.id}"


def create(hub, request: Request) -> Answer:
    account = require_writer(hub, request)
    asked = request.json()
    owner, repo_type = asked.get("organization") or account.name, asked.get("type") or "model"
    if not account.may_create(owner):
        raise HubError(403, f"You don't have the rights to create a {repo_type} under the namespace '{owner}'.")
    repo_id = f"{owner}/{asked['name']}"
    with hub.lock:
        if (repo_type, repo_id) in hub.repositories:
            # With exist_ok the client continues, and reads the address from this body.
            url = repo_url(hub, hub.repositories[repo_type, repo_id])
            raise HubError(409, f"You already created this {repo_type} repo: {repo_id}", url=url)
        repo = hub.create_repo(repo_id, repo_type, private=asked.get("visibility") == "private", creator=account.name)
    return json_answer({"url": repo_url(hub, repo), "name": repo.id, "id": repo.id})


def info(hub, request: Request, repo_type: str, repo_id: str, revision: str | None = None) -> Answer:
    repo = find_repo(hub, request, repo_type, repo_id)
    commit = repo.find_commit(revision or "main")
    siblings = [
        {"rfilename": path, "size": file.size, "blobId": file.git_oid} | lfs_fields(file, "sha256")
        for path, file in sorted(commit.files.items())
    ]
    return json_answer({
        "_id": repo.id, "id": repo.id, "author": repo.owner, "sha": commit.id, "siblings": siblings, "tags": [],
        "private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False, "downloads": 0,
        "likes": 0, "lastModified": commit.date, "createdAt": repo.commits(commit.id)[-1].date,
    })  # fmt: skip


def create_branch(hub, request: Request, repo_type: str, repo_id: str, branch: str) -> Answer:
    repo = find_writable_repo(hub, request, repo_type, repo_id)
    start = repo.find_commit(request.json().get("startingPoint") or "main")
    with repo.lock:
        if branch in repo.branches:
            raise HubError(409, f"The reference '{branch}' is there already.")
        repo.branches[branch] = start
    return json_answer({})
