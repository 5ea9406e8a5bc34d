"""Publishing with the real client: complete after any fault, nothing sent twice, and only the intended files."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.hub.conftest import ROOT, TOKEN, commits, contents_sent, published, wait_until
from tests.hub.fault_sweep import CARD, FAULTS, FOLDERS, LEFT_OUT, PATTERNS, write_folder
from tests.local_hub import Fault
from utils.cli.errors import UserError
from utils.hub import targets
from utils.hub.publishing import publish_finished, publish_folder
from utils.hub.targets import open_target

pytest_plugins = ["tests.local_hub.fixtures"]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "cars", FOLDERS["set"], "x")


def publish(folder, name="cars", repo_type="dataset", token=TOKEN, **options):
    return publish_folder(folder, open_target(folder, name, repo_type, token=token, **options), PATTERNS)


def is_whole(hub, folder) -> bool:
    return published(hub) == {name: (folder / name).read_bytes() for name in FOLDERS["set"]}


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """The results of every fault at every request of each kind of upload; both run at the same time."""
    children = {}
    for kind in FOLDERS:
        command = [sys.executable, "-m", "tests.hub.fault_sweep", kind, str(tmp_path_factory.mktemp(kind))]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        children[kind] = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return {kind: json.loads(child.communicate()[0].splitlines()[-1]) for kind, child in children.items()}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_push_ends_complete_whatever_fault_meets_whichever_request(kind, sweeps):
    result = sweeps[kind]
    assert result["problems"] == []
    assert result["server_failures"] == []
    assert any("/commit/main" in request for request in result["requests"])
    # each fault met each request
    assert result["survived"] == {name: len(result["requests"]) for name in FAULTS}


@pytest.mark.parametrize("path", ["/whoami-v2", "/repos/create", "/api/datasets/ann/cars$", "/commit/main"])
def test_past_the_limit_of_tries_there_is_one_line_and_a_second_run_completes(path, hub, folder, monkeypatch):
    monkeypatch.setattr(targets, "MAX_TRIES", 3)
    fault = Fault("status", path=path, times=None)
    hub.inject(fault)
    with pytest.raises(UserError, match=r"gave up after 3 tries \(HfHubHTTPError: Server error '503") as caught:
        publish(folder)
    if path != "/whoami-v2":
        assert "run the same command again" in str(caught.value)
    assert hub.faults_fired.count(fault) == 3
    hub.clear_faults()
    publish(folder)
    assert is_whole(hub, folder)


def test_an_unchanged_folder_sends_no_file_and_makes_no_commit(hub, folder):
    publish(folder)
    num_commits = len(hub.repo("ann/cars", "dataset").commits())
    hub.clear_log()
    publish(folder)
    assert contents_sent(hub) == commits(hub) == []
    assert len(hub.repo("ann/cars", "dataset").commits()) == num_commits


def test_a_grown_set_sends_the_new_shard_only_and_a_smaller_one_leaves_none_behind(hub, folder):
    publish(folder)
    (folder / "data/train-00003.parquet").write_bytes(b"new shard")
    hub.clear_log()
    publish(folder)
    assert len(contents_sent(hub)) == 1
    for number in (1, 2, 3):
        (folder / f"data/train-{number:05d}.parquet").unlink()
    publish(folder)
    assert [path for path in published(hub) if path.endswith(".parquet")] == ["data/train-00000.parquet"]


def test_our_files_missing_from_the_folder_are_deleted_and_foreign_files_stay(hub, tmp_path):
    folder = tmp_path / "cars"
    ours = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
            "adapter/adapter_model.safetensors", "eval_results.json"]  # fmt: skip
    theirs = {"notes.txt": b"mine", "photos/car.jpg": b"photo", "model.onnx": b"converted", ".gitattributes": b"own"}
    hub.create_repo("ann/cars").commit({**dict.fromkeys(ours, b"of an earlier run"), **theirs, "README.md": b"mine"})
    write_folder(folder, {"model.safetensors": b"weights", "config.json": b"{}"}, "x")
    patterns = ("model*.safetensors", "model.safetensors.index.json", "adapter/*", "*.json", "README.md")
    publish_finished(folder, open_target(folder, "cars", "model", token=TOKEN), patterns)
    there = hub.repo("ann/cars").files()
    assert there == theirs | {path: (folder / path).read_bytes() for path in ("model.safetensors", "config.json")} | {
        "README.md": b"mine"  # a folder without a card keeps the existing one
    }
    num_commits = len(hub.repo("ann/cars").commits())
    publish_finished(folder, open_target(folder, "cars", "model", token=TOKEN), (*patterns, "*"))
    assert set(hub.repo("ann/cars").files()) == {"model.safetensors", "config.json", "README.md", ".gitattributes"}
    assert len(hub.repo("ann/cars").commits()) == num_commits + 1


def test_many_files_go_in_several_commits_with_the_card_in_the_last(hub, folder, monkeypatch):
    monkeypatch.setattr("utils.hub.publishing.MAX_FILES_PER_COMMIT", 2)
    publish(folder)
    first, *others = list(reversed(hub.repo("ann/cars", "dataset").commits()))[1:]
    assert len(others) == 2
    assert "README.md" in others[-1].paths
    assert set(first.paths) == {"data/train-00000.parquet", "data/train-00001.parquet"}


def test_a_file_above_the_threshold_goes_by_lfs_whatever_its_name(hub, tmp_path):
    folder = write_folder(tmp_path / "cars", FOLDERS["model"], "x")
    (folder / "config.json").write_bytes(b"{" + b" " * hub.lfs_threshold + b"}")
    publish(folder, repo_type="model")
    assert published(hub, repo_type="model")["config.json"] == (folder / "config.json").read_bytes()
    assert max(request.num_bytes_in for request in hub.log if "/commit/" in request.path) < hub.lfs_threshold


def test_after_a_kill_only_what_is_missing_is_sent(hub, folder, start_with_hub):
    hub.inject(Fault("hold", "POST", "/commit/"))
    child = start_with_hub(["-c", PUBLISH, folder], TOKEN)
    wait_until(lambda: hub.faults_fired)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len(contents_sent(hub)) == 3
    hub.clear_faults()
    hub.clear_log()
    publish(folder)
    assert contents_sent(hub) == []
    assert is_whole(hub, folder)


def publish_while(hub, ours: Path, request: tuple[str, str], commit_theirs) -> None:
    """Publish `ours` while someone else commits during one of our requests."""
    held, failures = Fault("hold", *request), []
    hub.inject(held)

    def push():
        try:
            publish(ours)
        except UserError as error:
            failures.append(error)

    slow = threading.Thread(target=push)
    slow.start()
    wait_until(lambda: hub.faults_fired)
    commit_theirs()
    held.released.set()
    slow.join()
    if failures:
        raise failures[0]


# before and after the parent commit is looked up
MOMENTS = [("GET", "/api/datasets/ann/cars/tree/"), ("POST", "/preupload/")]


@pytest.fixture
def ours(hub, folder):
    """A dataset on the Hub, then changed locally: a new shard, new words in the card, two shards removed."""
    publish(folder)
    for number in (1, 2):
        (folder / f"data/train-{number:05d}.parquet").unlink()
    (folder / "data/train-00009.parquet").write_bytes(b"ours")
    (folder / "README.md").write_text(CARD + "new words")
    return folder


@pytest.mark.parametrize("request_held", MOMENTS)
def test_commits_of_others_to_other_files_during_a_push_stay(request_held, hub, ours):
    theirs = {"data/train-00007.parquet": b"theirs", "data/train-00002.parquet": b"theirs too"}
    publish_while(hub, ours, request_held, lambda: hub.repo("ann/cars", "dataset").commit(theirs))
    assert (412 in [request.status for request in hub.log]) == (request_held[1] == "/preupload/")
    there = published(hub)
    ours_there = {"data/train-00000.parquet", "data/train-00009.parquet"}
    assert {path for path in there if path.endswith(".parquet")} == theirs.keys() | ours_there
    assert there.items() >= theirs.items() and there["data/train-00009.parquet"] == b"ours"


@pytest.mark.parametrize("path", ["data/train-00009.parquet", "README.md"])
@pytest.mark.parametrize("request_held", MOMENTS)
def test_commits_of_others_to_the_same_file_during_a_push_are_reported_and_stay(request_held, path, hub, ours):
    with pytest.raises(UserError, match=f"someone else has just changed {path}"):
        publish_while(hub, ours, request_held, lambda: hub.repo("ann/cars", "dataset").commit({path: b"theirs"}))
    assert published(hub)[path] == b"theirs"


def test_a_branch_is_created_and_main_is_unchanged(hub, folder):
    publish(folder, revision="try-2")
    assert set(published(hub, revision="try-2")) == set(FOLDERS["set"])
    assert published(hub) == {}


def test_only_what_belongs_there_is_published_without_token_or_home(hub, tmp_path, monkeypatch):
    home = tmp_path / "home" / "ann"
    monkeypatch.setattr(Path, "home", lambda: home)
    folder = write_folder(tmp_path / "cars", FOLDERS["set"] | LEFT_OUT, "x")
    (folder / "run_config.json").write_text(json.dumps({"output_dir": f"{home}/cars"}))
    publish(folder)
    there = published(hub)
    assert set(there) == {*FOLDERS["set"], "run_config.json"}
    assert json.loads(there["run_config.json"]) == {"output_dir": "~/cars"}
    (folder / "notes.json").write_text(f'{{"token": "{TOKEN}"}}')
    with pytest.raises(UserError, match="notes.json holds an access token; nothing was published"):
        publish(folder, "other")
    assert not any(TOKEN.encode() in data for repo in hub.repos() for data in repo.files().values())
    assert all(request.path.startswith("/lfs-upload") is (request.token is None) for request in hub.log)


def test_a_persons_text_in_the_card_stays(hub, folder):
    theirs = b"---\nlicense: mit\ntags:\n- cars\n---\n\nMy cars, taken in my street.\n"
    hub.create_repo("ann/cars", "dataset").commit({"README.md": theirs})
    publish(folder)
    card = published(hub)["README.md"].decode()
    assert "My cars, taken in my street." in card and "# A card" in card
    assert "license: mit" in card and "- cars" in card and "- bridged-transfer" in card


PUBLISH = r"""
import re, sys
from pathlib import Path
from tests.hub.fault_sweep import PATTERNS
from utils.hub.publishing import publish_folder
from utils.hub.targets import open_target

def peak():
    # not ru_maxrss: a child process inherits that from the one that started it, here from pytest
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

target, before = open_target(sys.argv[1], 'cars', 'dataset'), peak()
publish_folder(sys.argv[1], target, PATTERNS)
print(f'peak memory {before:.0f} MiB before, {peak():.0f} MiB after')
"""


def test_the_clients_own_upload_path_xet_ends_complete_and_sends_nothing_twice(hub, tmp_path, run_with_hub):
    folder = write_folder(tmp_path / "cars", FOLDERS["set"], "x" * 100_000)
    run_with_hub(["-c", PUBLISH, folder], token=TOKEN, xet=True, check=True)
    assert is_whole(hub, folder)
    assert any("xet-write-token" in request.path for request in hub.log)
    hub.clear_log()
    run_with_hub(["-c", PUBLISH, folder], token=TOKEN, xet=True, check=True)
    assert commits(hub) == []


@pytest.mark.soak
@pytest.mark.parametrize("num_shards", [10, 30])
@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_memory_stays_flat_while_shards_of_50_mb_are_pushed(xet, num_shards, hub, tmp_path, run_with_hub, capsys):
    (tmp_path / "cars" / "data").mkdir(parents=True)
    for number in range(num_shards):
        (tmp_path / "cars" / "data" / f"train-{number:05d}.parquet").write_bytes(os.urandom(50_000_000))
    (tmp_path / "cars" / "README.md").write_bytes(FOLDERS["set"]["README.md"])
    done = run_with_hub(["-c", PUBLISH, tmp_path / "cars"], token=TOKEN, xet=xet, check=True)
    before, after = (int(word) for word in done.stdout.splitlines()[-1].split() if word.isdigit())
    with capsys.disabled():
        print(f"\n{num_shards} shards of 50 MB, {'xet' if xet else 'lfs'}: {done.stdout.splitlines()[-1]}")
    assert after - before < (350 if xet else 100)  # a shard and a margin; hf_xet sends several parts at a time
