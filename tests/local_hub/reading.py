"""Listing and downloading files: tree, paths-info, resolve, and the second origin for large files."""

import hashlib
import hmac
from urllib.parse import parse_qs, quote, urlencode

from tests.local_hub.accounts import find_readable_repo, find_repo
from tests.local_hub.messages import Answer, HubError, Request, file_answer, json_answer
from tests.local_hub.storage import Commit, StoredFile, lfs_pointer


def lfs_fields(file: StoredFile, name_of_oid: str = "oid") -> dict:
    if not file.is_lfs:
        return {}
    pointer_size = len(lfs_pointer(file.sha256, file.size))
    return {"lfs": {name_of_oid: file.sha256, "size": file.size, "pointerSize": pointer_size}}


def page(hub, request: Request, rows: list) -> Answer:
    """Answer with `hub.page_size` rows, and a link to the next ones."""
    start = int(request.parameters.get("cursor", 0))
    end = start + hub.page_size
    if end >= len(rows):
        return json_answer(rows[start:])
    query = urlencode(request.parameters | {"cursor": end})
    return json_answer(rows[start:end], headers={"Link": f'<{hub.url}{request.path}?{query}>; rel="next"'})


def list_tree(hub, request: Request, repo_type: str, repo_id: str, revision: str, folder: str | None = None) -> Answer:
    repo = find_repo(hub, request, repo_type, repo_id)
    commit = repo.find_commit(revision)
    if folder in commit.files:
        return json_answer([_file_row(commit, folder)])
    prefix = f"{folder.rstrip('/')}/" if folder else ""
    inside = [path for path in commit.files if path.startswith(prefix)]
    if prefix and not inside:
        raise entry_not_found(commit, folder)
    recursive = request.parameters.get("recursive", "").lower() in ("true", "1")
    rows = {}
    for path in inside:
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            parent = prefix + "/".join(parts[:depth])
            rows[parent] = _folder_row(parent)
        if recursive or len(parts) == 1:
            rows[path] = _file_row(commit, path)
    return page(hub, request, [rows[path] for path in sorted(rows)])


def list_paths(hub, request: Request, repo_type: str, repo_id: str, revision: str) -> Answer:
    repo = find_repo(hub, request, repo_type, repo_id)
    commit = repo.find_commit(revision)
    form = parse_qs(request.content().decode())
    rows = []
    for path in form.get("paths", []):
        if path in commit.files:
            rows.append(_file_row(commit, path))
        elif any(known.startswith(f"{path}/") for known in commit.files):
            rows.append(_folder_row(path))
    return json_answer(rows)


def _folder_row(path: str) -> dict:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}


def _file_row(commit: Commit, path: str) -> dict:
    file = commit.files[path]
    return {"type": "file", "path": path, "size": file.size, "oid": file.git_oid} | lfs_fields(file)


def entry_not_found(commit: Commit, path: str) -> HubError:
    # With the commit, clients remember that the file is missing.
    return HubError(404, f"Entry not found: {path}", "EntryNotFound", {"X-Repo-Commit": commit.id})


def resolve(hub, request: Request, repo_type: str, repo_id: str, revision: str, path: str) -> Answer:
    """Answer with a file, or with the address of the second origin for one in LFS."""
    repo = find_readable_repo(hub, request, repo_type, repo_id)
    commit = repo.find_commit(revision)
    if path not in commit.files:
        raise entry_not_found(commit, path)
    file = commit.files[path]
    headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.etag}"'}
    if file.is_lfs:
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    if file.is_lfs and hub.cdn_url is not None:
        query = urlencode({"filename": path, "signature": sign(hub, file.sha256)})
        del headers["ETag"]  # the Hub sends the redirect's
        return Answer(302, headers | {"Location": f"{hub.cdn_url}/files/{file.sha256}?{query}"})
    return file_answer(request, repo.blobs.path(file.sha256), headers)


def sign(hub, sha256: str) -> str:
    """Return a signature with which the content is sent or fetched without a token."""
    return hmac.new(hub.signing_key, sha256.encode(), "sha256").hexdigest()


def check_signature(hub, request: Request, sha256: str) -> None:
    if not hmac.compare_digest(request.parameters.get("signature", ""), sign(hub, sha256)):
        raise HubError(403, "The signature is missing or wrong.")


def download_signed(hub, request: Request, sha256: str) -> Answer:
    """Answer with a content on the second origin, which, like S3, refuses a token together with the signature."""
    if request.token is not None:
        raise HubError(400, "Only one auth mechanism allowed")
    check_signature(hub, request, sha256)
    name = quote(request.parameters.get("filename", "").rsplit("/", 1)[-1])
    headers = {"ETag": f'"{sha256}"', "Content-Disposition": f"attachment; filename*=UTF-8''{name}"}
    return file_answer(request, hub.blobs.path(sha256), headers)
