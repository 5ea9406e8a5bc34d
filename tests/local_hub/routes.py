"""Routes by the path as received: a quoted slash does not separate."""

import re

from tests.local_hub import accounts, reading, repositories, uploading, xet
from tests.local_hub.messages import Answer, HubError, Request

REPO = "([^/]+/[^/]+)"
REVISION = NAME = "([^/]+)"
SHA256 = "([0-9a-f]{64})"


def _with_types(method: str, api: str, rest: str, function) -> list:
    """Return a repository's route for models and for datasets: `models` and `datasets`, or '' and `datasets/`."""
    prefixes = {"model": "/api/models/", "dataset": "/api/datasets/"}
    if api == "web":
        prefixes = {"dataset": "/datasets/", "model": "/"}  # in this order: `datasets/name` is not a model

    def of_type(repo_type: str):
        return lambda hub, request, *groups: function(hub, request, repo_type, *groups)

    return [(method, re.compile(prefix + rest), of_type(repo_type)) for repo_type, prefix in prefixes.items()]


ROUTES = [
    ("GET", re.compile("/api/whoami-v2"), accounts.whoami),
    ("POST", re.compile("/api/repos/create"), repositories.create),
    ("POST", re.compile("/api/validate-yaml"), uploading.validate_card),
    ("PUT", re.compile(f"/lfs-upload/{SHA256}"), uploading.receive_lfs_object),
    *_with_types("GET", "api", REPO, repositories.info),
    *_with_types("GET", "api", f"{REPO}/revision/{REVISION}", repositories.info),
    *_with_types("GET", "api", f"{REPO}/auth-check", accounts.check_read_access),
    *_with_types("GET", "api", f"{REPO}/auth-check/write", accounts.check_write_access),
    *_with_types("POST", "api", f"{REPO}/branch/{NAME}", repositories.create_branch),
    *_with_types("GET", "api", f"{REPO}/tree/{REVISION}(?:/(.*))?", reading.list_tree),
    *_with_types("POST", "api", f"{REPO}/paths-info/{REVISION}", reading.list_paths),
    *_with_types("POST", "api", f"{REPO}/preupload/{REVISION}", uploading.preupload),
    *_with_types("POST", "api", f"{REPO}/commit/{REVISION}", uploading.commit),
    *_with_types("GET", "api", f"{REPO}/xet-write-token/{REVISION}", xet.give_write_token),
    *_with_types("GET", "web", f"{REPO}/resolve/{REVISION}/(.+)", reading.resolve),
    *_with_types("POST", "web", rf"{REPO}\.git/info/lfs/objects/batch", uploading.start_lfs_upload),
    *_with_types("POST", "web", rf"{REPO}\.git/info/lfs/objects/verify", uploading.verify_lfs_object),
]

CDN_ROUTES = [("GET", re.compile(f"/files/{SHA256}"), reading.download_signed)]


def no_route(hub, request: Request) -> Answer:
    """Answer requests without a route: for unsupported repositories (`spaces/…`, `gpt2`), or for pages."""
    account = accounts.find_account(hub, request)
    if re.match("/api/(models|datasets|spaces)/", request.path) or "/resolve/" in request.path:
        raise accounts.repo_not_found(account)
    raise HubError(404, "the local Hub has no such page")
