"""The local Hub answers like the real one: to the real client, and over a plain connection."""

import http.client
import json
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download

from tests.hub.conftest import TOKEN
from tests.local_hub import Fault

pytest_plugins = ["tests.local_hub.fixtures"]

BIG = bytes(range(256)) * 8192  # 2 MiB, above the fixture's LFS threshold


@pytest.fixture
def hub(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))  # a warm cache hides refusals
    hub.add_user("bob", token="hf_bob")
    return hub


@pytest.fixture
def connection(hub):
    """One kept-alive connection, for behaviour that clients hide."""
    address = urlsplit(hub.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
    yield connection
    connection.close()


def ask(connection, method, path, body=None, **headers):
    """Return status, headers and body of an answer."""
    connection.request(method, path, body=body, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def write(repo_id: str = "ann/open", token: str = TOKEN, path: str = "a.txt", **options):
    operations = [CommitOperationAdd(path, b"new " + path.encode())]
    return HfApi(token=token).create_commit(repo_id, operations, commit_message=path, **options)


def read(repo_id: str = "ann/open", token: str | bool = TOKEN, path: str = "a.txt", **options) -> bytes:
    return Path(hf_hub_download(repo_id, path, token=token, **options)).read_bytes()


def test_uploads_can_be_downloaded_and_are_not_sent_twice(hub, tmp_path_factory):
    hub.page_size = 2  # listings come in pages
    folder = tmp_path_factory.mktemp("cars")
    api, where = HfApi(token=TOKEN), {"repo_id": "ann/cars", "repo_type": "dataset"}
    content = {"README.md": b"---\nlicense: mit\n---\n", "data/big.bin": BIG, "data/letters é.txt": b"a", "empty": b""}
    for path, data in content.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)
    urls = [str(api.create_repo(exist_ok=True, **where)) for _ in range(2)]
    assert urls == [f"{hub.url}/datasets/ann/cars"] * 2
    repo = hub.repo("ann/cars", "dataset")
    commits = [api.upload_folder(folder_path=folder, commit_message="first", **where).oid for _ in range(2)]
    assert commits == [repo.commits()[0].id] * 2
    assert [(commit.title, commit.paths) for commit in repo.commits()] == [
        ("first", sorted(content)), ("initial commit", [".gitattributes"])
    ]  # fmt: skip
    assert [repo.files()[path] for path in content] == list(content.values())
    downloaded = Path(huggingface_hub.snapshot_download(token=TOKEN, **where))
    assert [(downloaded / path).read_bytes() for path in content] == list(content.values())
    rows = [f"{type(row).__name__} {row.path}" for row in api.list_repo_tree(**where)]
    assert rows == ["RepoFile .gitattributes", "RepoFile README.md", "RepoFolder data", "RepoFile empty"]
    rows = api.get_paths_info(paths=["data/big.bin", "data", "no"], **where)
    assert [row.path for row in rows] == ["data/big.bin", "data"]
    api.create_branch(branch="a/b", **where)
    operations = [CommitOperationAdd("copy.bin", BIG), CommitOperationDelete("data/big.bin")]
    api.create_commit(operations=operations, commit_message="second", revision="a/b", **where)
    assert read("ann/cars", path="copy.bin", repo_type="dataset", revision="a/b") == BIG
    on_branch = [".gitattributes", "README.md", "copy.bin", "data/letters é.txt", "empty"]
    assert [sibling.rfilename for sibling in api.dataset_info("ann/cars", revision="a/b").siblings] == on_branch
    assert any("cursor=" in entry.query for entry in hub.log)
    # Uploaded once; the copy and the second push found it there. The object itself travels without a token.
    uploads = [entry for entry in hub.log if entry.method == "PUT"]
    assert [(entry.num_bytes_in, entry.token, entry.status) for entry in uploads] == [(len(BIG), None, 200)]
    assert [(entry.path, entry.token) for entry in hub.log if "/commit/" in entry.path] == [
        ("/api/datasets/ann/cars/commit/main", TOKEN), ("/api/datasets/ann/cars/commit/a%2Fb", TOKEN)
    ]  # fmt: skip


# errors of readers are in test_reading.py, by their message
REFUSALS = {
    "without a name": (lambda: read("gpt2"), "RepositoryNotFoundError", 404),
    "private, info": (lambda: HfApi().model_info("ann/hidden", token="hf_bob"), "RepositoryNotFoundError", 404),
    "gated, info": (lambda: HfApi().auth_check("ann/gated", token="hf_bob"), "GatedRepoError", 403),
    "no such file": (lambda: read(path="b.txt"), "RemoteEntryNotFoundError", 404),
    "read token writes": (lambda: write(token="hf_ann_reads"), "HfHubHTTPError", 403),
    "read token creates": (lambda: HfApi().create_repo("ann/new", token="hf_ann_reads"), "HfHubHTTPError", 403),
    "other user writes": (lambda: write(token="hf_bob"), "HfHubHTTPError", 403),
    "other user creates": (lambda: HfApi().create_repo("ann/new", token="hf_bob"), "HfHubHTTPError", 403),
    "created before": (lambda: HfApi().create_repo("ann/open", token=TOKEN), "HfHubHTTPError", 409),
    "no such branch": (lambda: write(revision="b"), "RevisionNotFoundError", 404),
    "branch there": (lambda: HfApi().create_branch("ann/open", branch="main", token=TOKEN), "HfHubHTTPError", 409),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_raise_the_same_errors_as_the_hub(case, hub):
    for name, settings in {"open": {}, "hidden": {"private": True}, "gated": {"gated": True}}.items():
        hub.create_repo(f"ann/{name}", "model", **settings).commit({"a.txt": b"a"})
    call, error, status = REFUSALS[case]
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as caught:
        call()
    assert (type(caught.value).__name__, caught.value.response.status_code) == (error, status)
    assert len(hub.repos()) == 3 and len(hub.repo("ann/open").commits()) == 2
    assert read("ann/hidden", "hf_ann_reads") == read("ann/gated", "hf_ann_reads") == b"a"
    assert HfApi().model_info("ann/gated", token=False).gated


def test_each_fault_strikes_the_request_it_is_meant_for(hub, monkeypatch):
    pauses, delays, outcomes = [], [], {}
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=pauses.append))
    monkeypatch.setattr("tests.local_hub.server.time", SimpleNamespace(sleep=delays.append))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**18)  # resume from what has come, not only from 10 MB on
    repo = hub.create_repo("ann/faults")
    repo.commit({"big.bin": BIG})
    commit = {"method": "POST", "path": "^/api/models/ann/faults/commit/"}
    faults = [
        Fault("status", status=500, **commit),
        Fault("lost_answer", skip=1, **commit),
        Fault("drop", skip=3, **commit),
        # The fifth preupload: two are answered 429, and the client waits as long as it is told.
        Fault("status", path="/preupload/", status=429, retry_after=3, skip=4, times=2),
        Fault("truncate", method="GET", path=r"/resolve/.*/big\.bin$"),
        Fault("delay", path="whoami", seconds=0.4),
        Fault("drop", path="/no-such-path"),
    ]
    for fault in faults:
        hub.inject(fault)
    for path in ("status", "lost answer", "skipped", "dropped", "retried"):
        try:
            outcomes[path] = write("ann/faults", path=path) and "done"
        except Exception as error:  # noqa: BLE001 - of whichever http client
            outcomes[path] = type(error).__name__
    lost = "RemoteProtocolError"
    assert list(outcomes.values()) == ["HfHubHTTPError", lost, "done", lost, "done"]
    assert [pause for pause in pauses if pause >= 3] == [4, 4]  # Retry-After and a second
    # The work of a lost answer is done, that of the others is not.
    assert [commit.title for commit in repo.commits()][:-2] == ["retried", "skipped", "lost answer"]
    assert [(entry.status, entry.fault) for entry in hub.log if "/commit/" in entry.path] == [
        (500, "status"), (200, "lost_answer"), (200, None), (None, "drop"), (200, None)
    ]  # fmt: skip
    assert read("ann/faults", path="big.bin") == BIG
    downloads = [entry for entry in hub.log if entry.path.endswith("/big.bin") and entry.method == "GET"]
    ranges = [(entry.status, entry.headers.get("range")) for entry in downloads]
    assert ranges == [(200, None), (206, f"bytes={len(BIG) // 2}-")]
    HfApi(token=TOKEN).whoami()
    assert delays == [0.4] and [entry.status for entry in hub.log if entry.fault == "delay"] == [200]
    assert hub.faults_fired == [*faults[:4], *faults[3:6]]
    hub.clear_faults()
    hub.clear_log()
    assert hub.faults_fired == hub.log == []


def test_ranges_are_answered_on_both_origins(hub, connection):
    repo, path = hub.create_repo("ann/letters"), "/ann/letters/resolve/main/a.bin"
    commit = repo.commit({"a.bin": b"0123456789"})
    for asked, content, content_range in [
        ("bytes=2-5", b"2345", "bytes 2-5/10"), ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=8-99", b"89", "bytes 8-9/10"), ("bytes=-3", b"789", "bytes 7-9/10"),
    ]:  # fmt: skip
        answer = ask(connection, "GET", path, Range=asked)
        assert (answer[0], answer[2], answer[1]["Content-Range"]) == (206, content, content_range)
    status, headers, _ = ask(connection, "GET", path, Range="bytes=10-")
    assert (status, headers["Content-Range"]) == (416, "bytes */10")
    status, headers, content = ask(connection, "HEAD", path)
    assert (status, headers["Content-Length"], headers["X-Repo-Commit"], content) == (200, "10", commit, b"")
    assert headers["ETag"] == headers["X-Linked-Etag"] == f'"{repo.find_commit("main").files["a.bin"].sha256}"'
    hub.has_cdn = True
    status, headers, _ = ask(connection, "GET", path)
    assert (status, headers["X-Linked-Size"]) == (302, "10")
    second = urlsplit(headers["Location"])
    assert second.port != urlsplit(hub.url).port
    cdn = http.client.HTTPConnection(second.hostname, second.port, timeout=20)
    assert ask(cdn, "GET", f"{second.path}?{second.query}", Range="bytes=2-5")[2] == b"2345"
    assert ask(cdn, "GET", f"{second.path}?{second.query}", Authorization=f"Bearer {TOKEN}")[0] == 400
    assert ask(cdn, "GET", second.path)[0] == 403  # no signature
    cdn.close()
    assert [(entry.status, entry.token) for entry in hub.cdn_log] == [(206, None), (400, TOKEN), (403, None)]


def test_a_refused_body_leaves_the_connection_usable(hub, connection):
    hub.create_repo("ann/cars")
    for _ in range(2):
        body = b"x" * 100_000
        status, headers, _ = ask(connection, "POST", "/api/models/ann/none/commit/main", body)
        assert (status, headers["X-Error-Code"]) == (401, "RepoNotFound")
        assert ask(connection, "GET", "/api/models/ann/cars")[0] == 200
        assert ask(connection, "POST", "/nowhere", body)[0] == 404
    assert [entry.num_bytes_in for entry in hub.log] == [100_000, 0, 100_000] * 2


def test_an_upload_is_taken_only_whole_and_where_it_was_announced(hub, connection):
    hub.create_repo("ann/cars")
    login, described = {"Authorization": f"Bearer {TOKEN}"}, {"oid": "0" * 64, "size": 3}
    batch = json.dumps({"operation": "upload", "objects": [described]})
    answer = ask(connection, "POST", "/ann/cars.git/info/lfs/objects/batch", batch, **login)
    actions = json.loads(answer[2])["objects"][0]["actions"]
    upload, verify = urlsplit(actions["upload"]["href"]), urlsplit(actions["verify"]["href"])
    assert ask(connection, "PUT", upload.path, b"abc")[0] == 403  # no signature
    assert ask(connection, "PUT", f"{upload.path}?{upload.query}", b"abc")[0] == 400  # not what hashes to zeros
    assert ask(connection, "POST", verify.path, json.dumps(described), **login)[0] == 404
    assert not any(path.name.endswith(".incomplete") for path in hub.blobs.folder.iterdir())


def test_the_environment_is_complete_and_keeps_nothing_of_another_hub(hub, tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, "1")
    env = hub.environment(tmp_path)
    names = {name for name in env if name.startswith(("HF_", "HUGGING_FACE_")) and "_DISABLE_" not in name}
    assert names == {"HF_ENDPOINT", "HF_HOME"} and env["HF_ENDPOINT"] == hub.url and env["HF_HUB_DISABLE_XET"] == "1"
    with_xet = hub.environment(tmp_path, token="hf_x", xet=True)
    assert with_xet["HF_TOKEN"] == "hf_x" and "HF_HUB_DISABLE_XET" not in with_xet
