"""Pushing: preupload, LFS batch, upload and verify, commit."""

import base64
import json
from urllib.parse import urlencode

from tests.local_hub.accounts import find_writable_repo
from tests.local_hub.messages import Answer, HubError, Request, json_answer
from tests.local_hub.reading import check_signature, sign
from tests.local_hub.repositories import repo_url
from tests.local_hub.xet import fetch_from_xet


def validate_card(hub, request: Request) -> Answer:
    return json_answer({"errors": [], "warnings": []})


def preupload(hub, request: Request, repo_type: str, repo_id: str, revision: str) -> Answer:
    """Tell for each file whether it goes to LFS, and its current hash: clients skip unchanged files."""
    repo = find_writable_repo(hub, request, repo_type, repo_id)
    there = repo.find_commit(revision).files
    rows = []
    for file in request.json()["files"]:
        path = file["path"]
        mode = "lfs" if repo.goes_to_lfs(path, file["size"]) else "regular"
        row = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        rows.append(row | ({"oid": there[path].etag} if path in there else {}))
    return json_answer({"files": rows})


def start_lfs_upload(hub, request: Request, repo_type: str, repo_id: str) -> Answer:
    """Answer the LFS batch call: an address for each object that is not stored yet."""
    repo = find_writable_repo(hub, request, repo_type, repo_id)
    objects = []
    for asked in request.json()["objects"]:
        row = {"oid": asked["oid"], "size": asked["size"]}
        if not repo.blobs.path(asked["oid"]).is_file():
            upload = f"{hub.url}/lfs-upload/{asked['oid']}?{urlencode({'signature': sign(hub, asked['oid'])})}"
            verify = f"{repo_url(hub, repo)}.git/info/lfs/objects/verify"
            row["actions"] = {"upload": {"href": upload, "header": {}}, "verify": {"href": verify}}
        objects.append(row)
    return json_answer({"transfer": "basic", "objects": objects})


def receive_lfs_object(hub, request: Request, sha256: str) -> Answer:
    """Store an object. It comes without a token: the signature in its address permits it."""
    check_signature(hub, request, sha256)
    hub.blobs.add(request.body.chunks(), expected_sha256=sha256)
    return Answer(200, {"ETag": f'"{sha256}"'})


def verify_lfs_object(hub, request: Request, repo_type: str, repo_id: str) -> Answer:
    repo, asked = find_writable_repo(hub, request, repo_type, repo_id), request.json()
    path = repo.blobs.path(asked["oid"])
    if not path.is_file() or path.stat().st_size != asked["size"]:
        raise HubError(404, f"LFS object {asked['oid']} is not here, or has another size.")
    return json_answer({})


def commit(hub, request: Request, repo_type: str, repo_id: str, revision: str) -> Answer:
    repo = find_writable_repo(hub, request, repo_type, repo_id)
    operations = [json.loads(line) for line in request.content().splitlines()]
    _require_lfs_objects(hub, [op["value"]["oid"] for op in operations if op["key"] == "lfsFile"])
    header, additions, deletions = {}, {}, []
    for operation in operations:
        key, value = operation["key"], operation["value"]
        if key == "header":
            header = value
        elif key == "file":
            sha256 = repo.blobs.add([base64.b64decode(value["content"])])
            additions[value["path"]] = repo.blobs.stored_file(sha256, is_lfs=False)
        elif key == "lfsFile":
            additions[value["path"]] = repo.blobs.stored_file(value["oid"], is_lfs=True)
        else:
            deletions.append(value["path"])
    title, parent = header.get("summary", ""), header.get("parentCommit")
    added = repo.add_commit(additions, deletions, title, branch=revision, parent=parent)
    url = f"{repo_url(hub, repo)}/commit/{added.id}"
    return json_answer({"success": True, "commitOid": added.id, "commitUrl": url, "hookOutput": ""})


def _require_lfs_objects(hub, oids: list[str]) -> None:
    """Check that contents have been uploaded, by LFS or by Xet."""

    def missing() -> set[str]:
        return {oid for oid in oids if not hub.blobs.path(oid).is_file()}

    if missing():
        fetch_from_xet(hub, missing())
    if missing():
        raise HubError(400, f"LFS objects were never uploaded: {sorted(missing())}")
