"""The local Hub, asked by the real clients, each in a process of its own with an empty HF_HOME."""

import http.client
import json
import sys
import threading
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from tests.local_hub import Fault
from tests.local_hub.storage import git_blob_sha1

pytest_plugins = ["tests.local_hub.fixtures"]

BIG = bytes(range(256)) * 8192  # 2 MiB, above the fixture's LFS threshold
TOKEN = "hf_ann"


@pytest.fixture
def hub(local_hub):
    local_hub.add_user("ann", token=TOKEN)
    local_hub.add_user("ann", token="hf_ann_reads", role="read")
    local_hub.add_user("bob", token="hf_bob")
    return local_hub


@pytest.fixture
def connection(hub):
    """One kept-alive connection, for what clients do not show."""
    address = urlsplit(hub.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
    yield connection
    connection.close()


def ask(connection, method, path, body=None, **headers):
    """Return status, headers and body of an answer."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body=body, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def printed(done) -> dict:
    """Return the JSON that a child printed last."""
    return json.loads(done.stdout.splitlines()[-1])


def paths_of(hub, method: str) -> list[str]:
    return [entry.path for entry in hub.log if entry.method == method]


ROUND_TRIP = """
import json, pathlib, tempfile
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub import hf_hub_download, snapshot_download

api, seen = HfApi(), {}
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "data").mkdir()
(folder / "README.md").write_text("---\\nlicense: mit\\n---\\nCars.\\n")
(folder / "data/big.bin").write_bytes(bytes(range(256)) * 8192)
(folder / "data/letters é.txt").write_text("abc")
(folder / "empty.safetensors").write_text("")
for _ in range(2):
    seen["url"] = str(api.create_repo("cars", repo_type="dataset", exist_ok=True))
first = api.upload_folder(repo_id="ann/cars", repo_type="dataset", folder_path=folder, commit_message="first")
again = api.upload_folder(repo_id="ann/cars", repo_type="dataset", folder_path=folder)
seen["first"], seen["again"] = first.oid, again.oid
downloaded = pathlib.Path(snapshot_download("ann/cars", repo_type="dataset"))
for path in folder.rglob("*"):
    copy = downloaded / path.relative_to(folder)
    assert path.is_dir() or copy.read_bytes() == path.read_bytes(), path
seen["tree"] = [f"{type(row).__name__} {row.path}" for row in api.list_repo_tree("ann/cars", repo_type="dataset")]
api.create_tag("ann/cars", tag="v1", repo_type="dataset")
api.create_branch("ann/cars", branch="a/b", repo_type="dataset")
operations = [
    CommitOperationAdd("notes.txt", b"new"),
    CommitOperationCopy("data/big.bin", "copy.bin"),
    CommitOperationDelete("data/", is_folder=True),
]
api.create_commit("ann/cars", operations, commit_message="second", repo_type="dataset", revision="a/b")
path = hf_hub_download("ann/cars", "copy.bin", repo_type="dataset", revision="a/b")
assert pathlib.Path(path).read_bytes() == bytes(range(256)) * 8192
rows = api.get_paths_info("ann/cars", ["data/big.bin", "data", "none"], repo_type="dataset", revision="v1")
seen["paths"] = [row.path for row in rows]
refs = api.list_repo_refs("ann/cars", repo_type="dataset")
seen["refs"] = [ref.ref for ref in refs.branches + refs.tags]
seen["titles"] = [commit.title for commit in api.list_repo_commits("ann/cars", repo_type="dataset", revision="a/b")]
seen["info"] = [sibling.rfilename for sibling in api.dataset_info("ann/cars", revision="a/b").siblings]
seen["user"] = api.whoami()["name"]
print(json.dumps(seen))
"""


def test_what_is_uploaded_comes_back_and_is_not_sent_twice(hub, run_with_hub):
    hub.page_size = 2  # every listing comes in pages
    seen = printed(run_with_hub(ROUND_TRIP, token=TOKEN, check=True))
    repo = hub.repo("ann/cars", "dataset")
    assert seen["url"] == f"{hub.url}/datasets/ann/cars"
    assert seen["user"] == "ann"
    assert seen["again"] == seen["first"] == repo.commits()[0].id
    assert [commit.title for commit in repo.commits()] == ["first", "initial commit"]
    assert repo.commits()[0].paths == ["README.md", "data/big.bin", "data/letters é.txt", "empty.safetensors"]
    assert repo.files()["data/big.bin"] == repo.files("a/b")["copy.bin"] == BIG
    assert repo.paths("a/b") == [".gitattributes", "README.md", "copy.bin", "empty.safetensors", "notes.txt"]
    assert seen["info"] == repo.paths("a/b")
    assert seen["tree"] == [
        "RepoFile .gitattributes",
        "RepoFile README.md",
        "RepoFolder data",
        "RepoFile empty.safetensors",
    ]
    assert seen["paths"] == ["data/big.bin", "data"]
    assert seen["refs"] == ["refs/heads/main", "refs/heads/a/b", "refs/tags/v1"]
    assert seen["titles"] == ["second", "first", "initial commit"]
    assert {entry.path.split("/")[5] for entry in hub.log if "cursor=" in entry.query} == {"tree", "commits"}
    # Uploaded once; the copy and the second push found it there. The object itself travels without a token.
    uploads = [entry for entry in hub.log if entry.method == "PUT"]
    assert [(entry.num_bytes_in, entry.token, entry.status) for entry in uploads] == [(len(BIG), None, 200)]
    commits = [entry for entry in hub.log if "/commit/" in entry.path]
    assert [(entry.path, entry.token) for entry in commits] == [
        ("/api/datasets/ann/cars/commit/main", TOKEN),
        ("/api/datasets/ann/cars/commit/a%2Fb", TOKEN),
    ]


PUSH_AND_LOAD = """
import json, pathlib, tempfile
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from datasets.exceptions import DatasetNotFoundError
import datasets, numpy, PIL.Image

datasets.config.USE_PARQUET_EXPORT = False
features = Features({"image": Image(), "label": ClassLabel(names=["suv", "van"])})
images = [PIL.Image.fromarray(numpy.full((8, 8, 3), value, numpy.uint8)) for value in range(4)]
pushed = Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]}, features=features)
pushed.push_to_hub("ann/pushed", num_shards=2)
folder = pathlib.Path(tempfile.mkdtemp())
pushed.to_parquet(folder / "data/train-00000.parquet")
from huggingface_hub import HfApi
HfApi().create_repo("ann/folder", repo_type="dataset")
HfApi().upload_folder(repo_id="ann/folder", repo_type="dataset", folder_path=folder)
for name in ("ann/pushed", "ann/folder"):
    whole = load_dataset(name, split="train")
    assert whole.features == features, name
    assert [row["image"].getpixel((0, 0))[0] for row in whole] == [0, 1, 2, 3], name
    streamed = load_dataset(name, split="train", streaming=True)
    assert [(row["image"].getpixel((0, 0))[0], row["label"]) for row in streamed] == [(0, 0), (1, 1), (2, 0), (3, 1)]
seen = {}
for name, token in (("bob/hidden", None), ("bob/gated", None), ("bob/none", None), ("bob/open", "hf_wrong")):
    try:
        load_dataset(name, token=False if token is None else token, streaming=True)
    except Exception as error:
        seen[name] = f"{type(error).__name__}: {error}"
print(json.dumps(seen))
"""


@pytest.mark.parametrize("has_cdn", [False, True])
def test_a_pushed_data_set_loads_and_streams(hub, run_with_hub, has_cdn):
    hub.has_cdn = has_cdn
    hub.create_repo("bob/open", "dataset")
    hub.create_repo("bob/hidden", "dataset", private=True)
    hub.create_repo("bob/gated", "dataset", gated=True).commit({"data/train.parquet": b"x"})
    seen = printed(run_with_hub(PUSH_AND_LOAD, token=TOKEN, check=True))
    assert seen["bob/hidden"].startswith("DatasetNotFoundError: Dataset 'bob/hidden' doesn't exist on the Hub")
    assert seen["bob/none"].startswith("DatasetNotFoundError")
    assert seen["bob/gated"].startswith("DatasetNotFoundError: Dataset 'bob/gated' is a gated dataset on the Hub")
    assert "Invalid credentials in Authorization header" in seen["bob/open"]
    assert hub.repo("ann/pushed", "dataset").paths() == [
        ".gitattributes",
        "README.md",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
    ]
    reads = hub.cdn_log if has_cdn else [entry for entry in hub.log if entry.path.endswith(".parquet")]
    assert {entry.status for entry in reads if entry.method == "GET"} == {200, 206}  # loaded, and streamed in ranges
    if has_cdn:
        assert all("authorization" not in entry.headers for entry in hub.cdn_log)
        assert not any(entry.status in (200, 206) for entry in hub.log if entry.path.endswith(".parquet"))
    else:
        assert hub.cdn_log == []


REFUSALS = """
import json, os
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download

def read(repo_id, token, filename="a.txt", **keywords):
    return hf_hub_download(repo_id, filename, token=token, **keywords)

def write(repo_id, token, **keywords):
    operations = [CommitOperationAdd("a.txt", os.urandom(8))]
    return HfApi(token=token).create_commit(repo_id, operations, commit_message="new", **keywords)

head = HfApi(token="hf_ann").model_info("ann/open").sha
write("ann/open", "hf_ann", parent_commit=head)
calls = {
    "missing, anonymous": lambda: read("ann/none", False),
    "missing": lambda: read("ann/none", "hf_ann"),
    "wrong type": lambda: read("ann/open", "hf_ann", repo_type="dataset"),
    "without a name": lambda: read("gpt2", "hf_ann"),
    "private, anonymous": lambda: read("ann/hidden", False),
    "private, other user": lambda: read("ann/hidden", "hf_bob"),
    "private, info": lambda: HfApi().model_info("ann/hidden", token="hf_bob"),
    "gated, anonymous": lambda: read("ann/gated", False),
    "gated, other user": lambda: read("ann/gated", "hf_bob"),
    "gated, info": lambda: HfApi().auth_check("ann/gated", token="hf_bob"),
    "unknown token": lambda: HfApi().model_info("ann/open", token="hf_wrong"),
    "unknown token, whoami": lambda: HfApi().whoami(token="hf_wrong"),
    "no such file": lambda: read("ann/open", "hf_ann", "b.txt"),
    "no such revision": lambda: read("ann/open", "hf_ann", revision="v9"),
    "read token writes": lambda: write("ann/open", "hf_ann_reads"),
    "read token creates": lambda: HfApi().create_repo("ann/new", token="hf_ann_reads"),
    "other user writes": lambda: write("ann/open", "hf_bob"),
    "other user creates": lambda: HfApi().create_repo("ann/new", token="hf_bob"),
    "created before": lambda: HfApi().create_repo("ann/open", token="hf_ann"),
    "stale parent": lambda: write("ann/open", "hf_ann", parent_commit=head),
    "no such branch": lambda: write("ann/open", "hf_ann", revision="b"),
    "tag there": lambda: [HfApi(token="hf_ann").create_tag("ann/open", tag="v1") for _ in range(2)],
    "owner reads hidden": lambda: read("ann/hidden", "hf_ann_reads"),
    "owner reads gated": lambda: read("ann/gated", "hf_ann_reads"),
    "gated metadata": lambda: HfApi().model_info("ann/gated", token=False),
}
seen = {}
for name, call in calls.items():
    try:
        call()
        seen[name] = ["", None]
    except Exception as error:
        seen[name] = [type(error).__name__, error.response.status_code]
print(json.dumps(seen))
"""


def test_refusals_raise_what_the_hub_s_would(hub, run_with_hub):
    for name, settings in {"open": {}, "hidden": {"private": True}, "gated": {"gated": True}}.items():
        hub.create_repo(f"ann/{name}", "model", **settings).commit({"a.txt": b"a"})
    assert printed(run_with_hub(REFUSALS, check=True)) == {
        "missing, anonymous": ["RepositoryNotFoundError", 401],
        "missing": ["RepositoryNotFoundError", 404],
        "wrong type": ["RepositoryNotFoundError", 404],
        "without a name": ["RepositoryNotFoundError", 404],
        "private, anonymous": ["RepositoryNotFoundError", 401],
        "private, other user": ["RepositoryNotFoundError", 404],
        "private, info": ["RepositoryNotFoundError", 404],
        "gated, anonymous": ["GatedRepoError", 401],
        "gated, other user": ["GatedRepoError", 403],
        "gated, info": ["GatedRepoError", 403],
        "unknown token": ["HfHubHTTPError", 401],
        "unknown token, whoami": ["HfHubHTTPError", 401],
        "no such file": ["RemoteEntryNotFoundError", 404],
        "no such revision": ["RevisionNotFoundError", 404],
        "read token writes": ["HfHubHTTPError", 403],
        "read token creates": ["HfHubHTTPError", 403],
        "other user writes": ["HfHubHTTPError", 403],
        "other user creates": ["HfHubHTTPError", 403],
        "created before": ["HfHubHTTPError", 409],
        "stale parent": ["HfHubHTTPError", 412],
        "no such branch": ["RevisionNotFoundError", 404],
        "tag there": ["HfHubHTTPError", 409],
        "owner reads hidden": ["", None],
        "owner reads gated": ["", None],
        "gated metadata": ["", None],
    }
    assert [repo.id for repo in hub.repos()] == ["ann/open", "ann/hidden", "ann/gated"]
    assert len(hub.repo("ann/open").commits()) == 3  # initial commit, the seed, one of the two with the same parent


XET_ROUND_TRIP = """
import json, os, pathlib, tempfile
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download

api = HfApi()
api.create_repo("cars", repo_type="dataset")
folder = pathlib.Path(tempfile.mkdtemp())
for number in range(3):
    (folder / f"{number}.bin").write_bytes(bytes(range(256)) * 8192 + bytes([number]))
api.upload_folder(repo_id="ann/cars", repo_type="dataset", folder_path=folder)
(folder / "3.bin").write_bytes(os.urandom(100_000))
api.upload_folder(repo_id="ann/cars", repo_type="dataset", folder_path=folder)
operations = [CommitOperationAdd("4.bin", folder / "3.bin"), CommitOperationAdd("5.bin", folder / "0.bin")]
api.create_commit("ann/cars", operations, commit_message="third", repo_type="dataset")
downloaded = pathlib.Path(snapshot_download("ann/cars", repo_type="dataset"))
for number, same in enumerate([0, 1, 2, 3, 3, 0]):
    assert (downloaded / f"{number}.bin").read_bytes() == (folder / f"{same}.bin").read_bytes()
"""


def test_what_is_pushed_through_xet_comes_back(hub, run_with_hub):
    pytest.importorskip("hf_xet")
    run_with_hub(XET_ROUND_TRIP, token=TOKEN, xet=True, check=True)
    repo = hub.repo("ann/cars", "dataset")
    assert repo.files()["1.bin"] == BIG + b"\1"
    assert [commit.paths for commit in repo.commits()][:3] == [
        ["4.bin", "5.bin"],
        ["3.bin"],
        ["0.bin", "1.bin", "2.bin"],
    ]
    assert paths_of(hub, "PUT") == []  # nothing went by LFS
    assert paths_of(hub, "GET").count("/api/datasets/ann/cars/xet-write-token/main") >= 2


FAULTS = """
import json, pathlib, time
from types import SimpleNamespace
import huggingface_hub.utils._http as http
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download

api, seen, pauses = HfApi(), {}, []
constants.DOWNLOAD_CHUNK_SIZE = 2**18  # resume from what has come, not only from 10 MB on
http.time = SimpleNamespace(sleep=pauses.append)

def attempt(name, call):
    try:
        seen[name] = call() and "done"
    except Exception as error:
        seen[name] = type(error).__name__

def write(path):
    operations = [CommitOperationAdd(path, b"new")]
    return api.create_commit("ann/cars", operations, commit_message=path)

attempt("status", lambda: write("status"))
attempt("lost answer", lambda: write("lost answer"))
attempt("skipped", lambda: write("skipped"))
attempt("dropped", lambda: write("dropped"))
attempt("retried", lambda: write("retried"))
seen["pauses"] = pauses
attempt("truncated", lambda: hf_hub_download("ann/cars", "big.bin"))
seen["same"] = pathlib.Path(hf_hub_download("ann/cars", "big.bin")).read_bytes() == bytes(range(256)) * 8192
attempt("delayed", api.whoami)
print(json.dumps(seen))
"""


def test_each_fault_strikes_the_request_it_is_meant_for(hub, run_with_hub, monkeypatch):
    delays = []
    monkeypatch.setattr("tests.local_hub.server.time", SimpleNamespace(sleep=delays.append))
    repo = hub.create_repo("ann/cars")
    repo.commit({"big.bin": BIG})
    commit = {"method": "POST", "path": "^/api/models/ann/cars/commit/"}
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
    seen = printed(run_with_hub(FAULTS, token=TOKEN, check=True))
    assert seen["status"] == "HfHubHTTPError"
    assert (seen["lost answer"], seen["dropped"]) == ("RemoteProtocolError",) * 2
    assert (seen["skipped"], seen["retried"], seen["truncated"], seen["delayed"]) == ("done",) * 4
    assert [pause for pause in seen["pauses"] if pause >= 3] == [4, 4]  # Retry-After and a second
    assert seen["same"]
    assert delays == [0.4]
    assert [entry.status for entry in hub.log if entry.fault == "delay"] == [200]
    # The work of a lost answer is done, that of the others is not.
    assert [commit.title for commit in repo.commits()][:-2] == ["retried", "skipped", "lost answer"]
    assert hub.faults_fired == [*faults[:4], *faults[3:6]]
    log = [(entry.status, entry.fault) for entry in hub.log if "/commit/" in entry.path]
    assert log == [(500, "status"), (200, "lost_answer"), (200, None), (None, "drop"), (200, None)]
    downloads = [entry for entry in hub.log if entry.path.endswith("/big.bin") and entry.method == "GET"]
    assert [(entry.status, entry.headers.get("range")) for entry in downloads] == [
        (200, None),
        (206, f"bytes={len(BIG) // 2}-"),
    ]
    hub.clear_faults()
    hub.clear_log()
    assert hub.faults_fired == hub.log == []


def test_ranges_are_answered_on_both_origins(hub, connection):
    repo = hub.create_repo("ann/letters")
    repo.commit({"a.txt": b"0123456789", "a.bin": b"0123456789"})
    for path in ("/ann/letters/resolve/main/a.txt", "/ann/letters/resolve/main/a.bin"):
        for asked, status, content, content_range in [
            ("bytes=2-5", 206, b"2345", "bytes 2-5/10"),
            ("bytes=7-", 206, b"789", "bytes 7-9/10"),
            ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
            ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ]:
            answer = ask(connection, "GET", path, Range=asked)
            assert (answer[0], answer[2], answer[1]["Content-Range"]) == (status, content, content_range)
        status, headers, _ = ask(connection, "GET", path, Range="bytes=10-")
        assert (status, headers["Content-Range"]) == (416, "bytes */10")
        status, headers, content = ask(connection, "HEAD", path)
        assert (status, headers["Content-Length"], content) == (200, "10", b"")
        assert headers["X-Repo-Commit"] == repo.commits()[0].id
    assert headers["ETag"] == headers["X-Linked-Etag"] == f'"{repo.find_commit("main").files["a.bin"].sha256}"'
    hub.has_cdn = True
    status, headers, _ = ask(connection, "GET", "/ann/letters/resolve/main/a.bin")
    assert (status, headers["X-Linked-Size"]) == (302, "10")
    second = urlsplit(headers["Location"])
    assert second.port != urlsplit(hub.url).port
    cdn = http.client.HTTPConnection(second.hostname, second.port, timeout=20)
    assert ask(cdn, "GET", f"{second.path}?{second.query}", Range="bytes=2-5")[2] == b"2345"
    assert ask(cdn, "GET", f"{second.path}?{second.query}", Authorization="Bearer hf_ann")[0] == 400
    assert ask(cdn, "GET", second.path)[0] == 403  # no signature
    cdn.close()
    assert [(entry.status, entry.token) for entry in hub.cdn_log] == [(206, None), (400, "hf_ann"), (403, None)]


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
    batch = {"operation": "upload", "objects": [{"oid": "0" * 64, "size": 3}]}
    path = "/ann/cars.git/info/lfs/objects/batch"
    answer = ask(connection, "POST", path, json.dumps(batch), Authorization=f"Bearer {TOKEN}")
    actions = json.loads(answer[2])["objects"][0]["actions"]
    upload, verify = urlsplit(actions["upload"]["href"]), urlsplit(actions["verify"]["href"])
    assert ask(connection, "PUT", upload.path, b"abc")[0] == 403  # no signature
    assert ask(connection, "PUT", f"{upload.path}?{upload.query}", b"abc")[0] == 400  # not what hashes to zeros
    body = json.dumps({"oid": "0" * 64, "size": 3})
    assert ask(connection, "POST", verify.path, body, Authorization=f"Bearer {TOKEN}")[0] == 404
    assert not any(path.name.endswith(".incomplete") for path in hub.blobs.folder.iterdir())


def test_the_answers_to_preupload_follow_the_hub_s_rules(hub, connection):
    content = b"---\nlicense: mit\n---\n"
    repo = hub.create_repo("ann/cars", "dataset")
    repo.commit({"README.md": content, "a.parquet": b"abc"})
    sizes = {"README.md": 21, "a.parquet": 3, "b.PNG": 1, "c.safetensors": 0, "d.txt": 2**20, "e.txt": 2**20 - 1}
    body = json.dumps({"files": [{"path": path, "size": size, "sample": ""} for path, size in sizes.items()]})
    answer = ask(connection, "POST", "/api/datasets/ann/cars/preupload/main", body, Authorization=f"Bearer {TOKEN}")
    rows = {row["path"]: row for row in json.loads(answer[2])["files"]}
    modes = {path: row["uploadMode"] for path, row in rows.items()}
    assert modes == {
        "README.md": "regular",
        "a.parquet": "lfs",
        "b.PNG": "lfs",
        "c.safetensors": "regular",
        "d.txt": "lfs",
        "e.txt": "regular",
    }
    assert rows["README.md"]["oid"] == git_blob_sha1(content)
    assert rows["a.parquet"]["oid"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of b"abc"
    assert "oid" not in rows["b.PNG"]


def test_concurrent_commits_are_put_in_a_row(hub):
    repo = hub.create_repo("ann/cars")

    def commit_ten(number: int) -> None:
        for step in range(10):
            repo.commit({f"{number}/{step}.txt": b"x"})

    threads = [threading.Thread(target=commit_ten, args=(number,)) for number in range(8)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(repo.paths()) == 81
    assert len({commit.id for commit in repo.commits()}) == 81


def test_a_reset_leaves_nothing_behind(hub, connection):
    hub.create_repo("ann/cars").commit({"a.bin": BIG})
    hub.inject(Fault("drop", times=None))
    hub.page_size, hub.has_cdn = 1, True
    hub.reset()
    assert ask(connection, "GET", "/api/models/ann/cars")[0] == 401
    assert hub.repos() == [] and list(hub.blobs.folder.iterdir()) == []
    assert (hub.page_size, hub.has_cdn, len(hub.log), hub.accounts) == (1000, False, 1, {})


def test_the_environment_is_complete_and_keeps_nothing_of_another_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_real")
    monkeypatch.setenv("HF_TOKEN", "hf_real")
    env = hub.environment(tmp_path)
    assert {name for name in env if name.startswith(("HF_", "HUGGING_FACE_"))} == {
        "HF_ENDPOINT",
        "HF_HOME",
        "HF_HUB_DISABLE_XET",
        "HF_HUB_DISABLE_TELEMETRY",
        "HF_HUB_DISABLE_UPDATE_CHECK",
        "HF_HUB_DISABLE_PROGRESS_BARS",
    }
    assert env["HF_ENDPOINT"] == hub.url
    assert hub.environment(tmp_path, token="hf_x", xet=True)["HF_TOKEN"] == "hf_x"
    assert "HF_HUB_DISABLE_XET" not in hub.environment(tmp_path, xet=True)
