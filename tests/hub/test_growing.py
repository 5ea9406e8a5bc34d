"""Shards uploaded while later ones are made: early, complete after any fault, never twice, never mixed."""

import json
import re
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from tests.hub.conftest import SHARDS, TOKEN, commits, contents_sent, published, wait_until
from tests.hub.fault_sweep import CARD, FAULTS, PATTERNS
from tests.local_hub import Fault
from utils.cli.errors import UserError
from utils.cli.records import GENERATION_CONFIG, write_record
from utils.hub import growing, targets
from utils.hub.cards import BEGIN, END
from utils.hub.growing import GrowingUpload
from utils.hub.publishing import publish_folder
from utils.hub.targets import open_target

pytest_plugins = ["tests.local_hub.fixtures"]
OUR_CARD = CARD.replace("# A card", f"{BEGIN}\n# A card\n{END}")


@pytest.fixture
def folder(tmp_path):
    return start_folder(tmp_path / "cars", "ours")


def start_folder(folder: Path, fingerprint: str) -> Path:
    write_record(folder / GENERATION_CONFIG, {"fingerprint": fingerprint})
    return folder


def write_shard(folder: Path, number: int, mark: str = "") -> str:
    """Write a shard as the generator does, by renaming. Its content is new to the Hub in every test."""
    path = folder / f"data/train-{number:05d}.parquet"
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".tmp").write_bytes(f"shard {number} of {folder} {mark}".encode() * 100)
    path.with_suffix(".tmp").rename(path)
    return path.relative_to(folder).as_posix()


def find_shards(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.glob(SHARDS[0])]


def grow(folder: Path, fingerprint: str = "ours", pause: float = 0.02, **options) -> GrowingUpload:
    target = open_target(folder, "cars", "dataset", token=TOKEN, **options)
    return GrowingUpload(folder, target, lambda: find_shards(folder), fingerprint, pause)


def finish(folder: Path, **options) -> None:
    """Finish as the generator does: write the card and publish everything."""
    (folder / "README.md").write_text(OUR_CARD)
    publish_folder(folder, open_target(folder, "cars", "dataset", token=TOKEN, **options), PATTERNS)


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [*find_shards(folder), GENERATION_CONFIG, "README.md"]
    return {path: (folder / path).read_bytes() for path in paths if (folder / path).exists()}


def write_shards(folder: Path, hub, number: int) -> None:
    """Write shards, each after the previous one is on the Hub."""
    for path in (write_shard(folder, number) for number in range(number)):
        wait_until(lambda path=path: path in published(hub))


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == growing.__name__]


def test_shards_arrive_one_after_another_before_the_end_and_are_sent_once(hub, folder):
    # a person's card, which does not mark a dataset as complete
    hub.create_repo("ann/cars", "dataset").commit({"README.md": CARD.encode()})
    with grow(folder):
        for number in range(3):
            path = write_shard(folder, number)
            wait_until(lambda path=path: path in published(hub))
            # without our card the dataset counts as incomplete
            assert published(hub) == files_of(folder) | {"README.md": CARD.encode()}
    write_shard(folder, 3)
    finish(folder)
    assert published(hub) == files_of(folder) | {"README.md": published(hub)["README.md"]}
    assert len(contents_sent(hub)) == len(set(contents_sent(hub))) == 4


LOAD = """
import json
from datasets import load_dataset
whole, streamed = load_dataset("ann/cars", split="train"), load_dataset("ann/cars", split="train", streaming=True)
assert repr(whole.features) == repr(streamed.features)
print(json.dumps([whole.features["label"].names, whole["label"][:], [row["label"] for row in streamed]]))
"""


def test_a_set_that_was_uploaded_early_loads_with_its_features_streaming_too(hub, folder, run_with_hub):
    features = Features({"image": Image(), "label": ClassLabel(names=["van", "suv"])})
    with grow(folder):
        for number in range(3):
            rows = {"image": [PILImage.new("RGB", (8, 6))], "label": [number % 2]}
            Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / "shard.tmp")
            (folder / "data/shard.tmp").rename(folder / f"data/train-{number:05d}.parquet")
        wait_until(lambda: len(published(hub)) == 4)
        loaded = json.loads(run_with_hub(LOAD, token=TOKEN, check=True).stdout)
    assert loaded == [["van", "suv"], [0, 1, 0], [0, 1, 0]]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_at_every_kind_of_request_loses_nothing(kind, hub, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(targets, "LONGEST_PAUSE", 0.01)  # a pause that the Hub asks for is at least a second
    clean = start_folder(tmp_path / "clean", "ours")
    with grow(clean):
        write_shards(clean, hub, 3)
    finish(clean)
    blob = re.compile("[0-9a-f]{40,64}")
    requests = {(request.method, blob.sub("[0-9a-f]{40,64}", request.path)) for request in hub.log}
    assert len(requests) > 10
    hub.reset()
    hub.add_user("ann", TOKEN)
    target = open_target(tmp_path / "hit", "cars", "dataset", token=TOKEN)
    for method, path in requests:
        for skip in (0, 3):
            hub.inject(Fault(method=method, path=f"^{path}$", skip=skip, **FAULTS[kind]))
    folder = start_folder(tmp_path / "hit", "ours")
    with GrowingUpload(folder, target, lambda: find_shards(folder), "ours", pause=0.02):
        write_shards(folder, hub, 4)
    finish(folder)
    assert published(hub) == files_of(folder)
    assert len(hub.faults_fired) >= len(requests)
    # a lost answer causes no second commit
    paths = [path for commit in hub.repo("ann/cars", "dataset").commits() for path in commit.paths]
    assert len([path for path in paths if path.endswith(".parquet")]) == 4
    assert warnings_of(caplog) == []


def test_while_the_hub_is_down_the_work_continues_with_one_line_and_uploads_follow(hub, folder, caplog):
    upload, down = grow(folder), Fault("status", path="", times=None)
    hub.inject(down)
    with upload:
        write_shard(folder, 0)
        wait_until(lambda: hub.faults_fired.count(down) > 3 * targets.MAX_TRIES)
        write_shard(folder, 1)
        wait_until(lambda: hub.faults_fired.count(down) > 5 * targets.MAX_TRIES)
        [line] = warnings_of(caplog)
        assert re.fullmatch(
            r"publishing ann/cars: gave up after 6 tries \(HfHubHTTPError: .*503.*\); the work continues, and finished "
            "shards are uploaded later.",
            line,
        )
        # not even tries are logged: they would be hundreds of lines in a night
        assert [record for record in caplog.records if record.name == targets.__name__] == []
        hub.clear_faults()
        wait_until(lambda: len(published(hub)) == 3)
        hub.inject(Fault("status", path="", times=None))
        write_shard(folder, 2)
        wait_until(lambda: len(warnings_of(caplog)) == 2)
    with pytest.raises(UserError, match="gave up after 6 tries"):
        finish(folder)
    hub.clear_faults()
    finish(folder)
    assert published(hub) == files_of(folder)


def test_a_record_that_is_temporarily_unavailable_is_not_taken_for_another_dataset(hub, folder, caplog):
    with grow(folder):
        write_shard(folder, 0)
        wait_until(lambda: len(published(hub)) == 2)
        hub.inject(Fault("status", path=f"/resolve/.*/{GENERATION_CONFIG}", times=None))
        write_shard(folder, 1)
        wait_until(lambda: warnings_of(caplog))
        hub.clear_faults()
        wait_until(lambda: len(published(hub)) == 3)
    assert "gave up after 6 tries" in caplog.text and len(warnings_of(caplog)) == 1


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        ("refused", "403"),
        ("public", "'ann/cars' already exists and is public; make it private in its settings, or choose another with"),
        ("token", "generation_config.json holds an access token"),
    ],
)
def test_a_forbidden_upload_is_one_line_and_the_work_continues(problem, line, hub, folder, caplog):
    if problem == "refused":
        hub.inject(Fault("status", path="/commit/", status=403, times=None))
    if problem == "token":
        write_record(folder / GENERATION_CONFIG, {"fingerprint": "ours", "token": TOKEN})
    write_shard(folder, 0)
    upload = grow(folder, private=problem == "public")
    if problem == "public":  # created after the initial check
        hub.create_repo("ann/cars", "dataset")
    with upload:
        wait_until(lambda: len([request for request in hub.log if request.path.endswith("/ann/cars")]) > 3)
    [told] = warnings_of(caplog)
    assert line in told and "\n" not in told and TOKEN not in caplog.text
    assert published(hub) == {}
    assert len(contents_sent(hub)) == (problem == "refused")


def test_each_kind_of_error_of_our_own_is_one_line_without_the_token_and_the_next_look_is_made(hub, folder, caplog):
    looks = []

    def find_finished():
        looks.append(len(looks))
        if len(looks) < 4:
            raise ZeroDivisionError(f"a bug with {TOKEN}, look {len(looks)}\nand more")
        if len(looks) < 7:
            raise KeyError(f"look {len(looks)}")
        return find_shards(folder)

    write_shard(folder, 0)
    target = open_target(folder, "cars", "dataset", token=TOKEN)
    with GrowingUpload(folder, target, find_finished, "ours", pause=0.02):
        wait_until(lambda: len(published(hub)) == 2)
    later = "the work continues, and finished shards are uploaded later."
    assert warnings_of(caplog) == [
        f"publishing ann/cars: ZeroDivisionError: a bug with ***, look 1; {later}",
        f"publishing ann/cars: KeyError: 'look 4'; {later}",
    ]


KILLED = """
import sys, time
from pathlib import Path
from tests.hub.test_growing import find_shards, grow, write_shard
folder = Path(sys.argv[1])
with grow(folder) as upload:
    for number in range(2):
        path = write_shard(folder, number)
        while path not in upload._done:
            time.sleep(0.01)
    time.sleep(10_000)
"""


@pytest.mark.parametrize("moment", ["between two commits", "in a commit"])
def test_after_a_kill_a_new_run_recognizes_its_shards_and_completes_the_repository(moment, hub, folder, start_with_hub):
    if moment == "in a commit":
        hub.inject(Fault("hold", "POST", "/commit/", skip=1))
    child = start_with_hub(["-c", KILLED, folder], TOKEN)
    wait_until(lambda: len(contents_sent(hub)) == 2 and (hub.faults_fired or len(published(hub)) == 3))
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert sorted(published(hub)) == [*sorted(files_of(folder))[: len(published(hub)) - 1], GENERATION_CONFIG]
    hub.clear_faults()
    with grow(folder):
        write_shard(folder, 2)
        wait_until(lambda: len(published(hub)) == 4)
    assert len(contents_sent(hub)) == len(set(contents_sent(hub))) == 3
    finish(folder)
    assert published(hub) == files_of(folder)
    assert len(contents_sent(hub)) == 3


def their_set(record: dict | None) -> dict[str, bytes]:
    config = {} if record is None else {GENERATION_CONFIG: json.dumps(record).encode()}
    return {"data/train-00000.parquet": b"theirs", "README.md": OUR_CARD.encode(), **config}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"schema_version": 1, "fingerprint": "theirs"}, "its generation_config.json has another fingerprint"),
        ({"schema_version": 1}, "its generation_config.json has another fingerprint"),
        ({"schema_version": 9, "fingerprint": "ours"}, "its generation_config.json cannot be read"),
        (None, "it has no generation_config.json, and a data/train-00000.parquet that does not belong to this dataset"),
    ],
)
def test_another_dataset_in_the_repository_stays_complete_until_ours_replaces_it(record, reason, hub, folder, caplog):
    theirs = their_set(record)
    hub.create_repo("ann/cars", "dataset").commit(theirs)
    upload = grow(folder)
    with upload:
        for number in range(2):
            write_shard(folder, number)
        wait_until(lambda: not upload._thread.is_alive())
        assert warnings_of(caplog) == [
            f"ann/cars holds another dataset ({reason}): nothing is uploaded until this one is complete "
            "and replaces it."
        ]
        assert contents_sent(hub) == [] and published(hub) == theirs
    finish(folder)
    assert published(hub) == files_of(folder) | {"README.md": published(hub)["README.md"]}


@pytest.mark.parametrize("moment", ["between two commits", "in a commit"])
def test_another_dataset_pushed_in_the_meantime_is_left_alone_too(moment, hub, folder, caplog):
    theirs = their_set({"schema_version": 1, "fingerprint": "theirs"})
    held = Fault("hold", "POST", "/preupload/", skip=1)
    if moment == "in a commit":
        hub.inject(held)
    with grow(folder):
        write_shard(folder, 0)
        wait_until(lambda: hub.faults_fired if moment == "in a commit" else len(published(hub)) == 2)
        hub.repo("ann/cars", "dataset").commit(theirs)
        write_shard(folder, 1)
        held.released.set()
        wait_until(lambda: warnings_of(caplog))
    assert (412 in [request.status for request in hub.log]) == (moment == "in a commit")
    assert [line.split(" (")[0] for line in warnings_of(caplog)] == ["ann/cars holds another dataset"]
    assert published(hub) == theirs


def test_our_shards_without_a_record_are_recognized_by_content_and_get_it_again(hub, folder):
    """The state of a large push killed after its first commit: records come last."""
    paths = [write_shard(folder, number) for number in range(2)]
    hub.create_repo("ann/cars", "dataset").commit({path: folder / path for path in paths})
    with grow(folder):
        write_shard(folder, 2)
        wait_until(lambda: len(published(hub)) == 4)
        hub.repo("ann/cars", "dataset").add_commit({}, [GENERATION_CONFIG], "delete")
        write_shard(folder, 3)
        wait_until(lambda: len(published(hub)) == 5)
    assert len(contents_sent(hub)) == 2


def test_a_complete_dataset_that_grows_matches_its_card_until_the_end(hub, folder, caplog):
    write_shard(folder, 0)
    finish(folder)
    before, _ = published(hub), hub.clear_log()
    with grow(folder):
        write_shard(folder, 0, "with more images")
        write_shard(folder, 1)
        wait_until(lambda: len(contents_sent(hub)) == 2)
        time.sleep(0.2)
        assert published(hub) == before and commits(hub) == []
    finish(folder)
    assert published(hub) == files_of(folder)
    # the contents were sent ahead
    assert len(contents_sent(hub)) == 2
    assert warnings_of(caplog) == []


def test_many_shards_go_in_commits_of_a_limited_size(hub, folder, monkeypatch):
    monkeypatch.setattr("utils.hub.publishing.MAX_FILES_PER_COMMIT", 3)
    for number in range(7):
        write_shard(folder, number)
    with grow(folder, pause=10_000):  # no second look
        wait_until(lambda: len(published(hub)) == 8)
    sizes = [len(commit.paths) for commit in hub.repo("ann/cars", "dataset").commits()]
    assert sizes == [2, 3, 3, 1]  # newest first; the last is the repository's own


def test_the_repository_is_made_with_the_first_shard_private_and_on_its_branch(hub, folder):
    with grow(folder, private=True, revision="try-2"):
        time.sleep(0.2)
        assert hub.repos() == []
        write_shard(folder, 0)
        wait_until(lambda: hub.repos() and "try-2" in hub.repos()[0].branches)
        wait_until(lambda: len(published(hub, revision="try-2")) == 2)
    assert hub.repo("ann/cars", "dataset").private
    assert published(hub) == {}
    hub.clear_log()
    with grow(folder, private=True, revision="try-2"):
        wait_until(lambda: any("/tree/" in request.path for request in hub.log))
        time.sleep(0.1)
    assert not any("/preupload/" in request.path for request in hub.log)  # looked up on the branch
    finish(folder, private=True, revision="try-2")
    assert published(hub, revision="try-2") == files_of(folder)


@contextmanager
def grow_while_held(folder: Path, hub, *fault, **options):
    """Grow with a request that the Hub answers only when the block is left."""
    held, upload = Fault("hold", *fault, **options), grow(folder)
    hub.inject(held)
    threading.Thread(target=lambda: upload._stop.wait() and held.released.set(), daemon=True).start()
    with upload:
        yield


def test_leaving_the_block_finishes_a_commit_under_way_and_begins_no_other(hub, folder):
    with grow_while_held(folder, hub, "POST", "/commit/"):
        first = write_shard(folder, 0)
        wait_until(lambda: hub.faults_fired)
        write_shard(folder, 1)
    assert set(published(hub)) == {first, GENERATION_CONFIG}
    assert not any(thread.name == "growing upload" for thread in threading.enumerate())


def test_leaving_the_block_between_two_shards_sends_no_more_of_them(hub, folder):
    for number in range(9):
        write_shard(folder, number)
    with grow_while_held(folder, hub, "PUT", "/lfs-upload/", skip=1):
        wait_until(lambda: hub.faults_fired)
    assert len(contents_sent(hub)) == 2 and published(hub) == {}
    finish(folder)
    assert published(hub) == files_of(folder)
    assert len(contents_sent(hub)) == len(set(contents_sent(hub))) == 9


def test_leaving_the_block_reads_no_more_shards(hub, folder, caplog):
    path = write_shard(folder, 0)
    hub.create_repo("ann/cars", "dataset").commit({path: folder / path})
    with grow_while_held(folder, hub, "GET", "/tree/"):
        wait_until(lambda: hub.faults_fired)
        (folder / path).unlink()  # so that reading it would fail
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("error", [UserError, SystemExit, KeyboardInterrupt])
def test_an_error_in_the_block_ends_the_thread_at_once_while_a_try_waits_for_the_next(error, hub, folder, monkeypatch):
    for pause in ("FIRST_PAUSE", "LONGEST_PAUSE"):
        monkeypatch.setattr(targets, pause, 10_000)
    monkeypatch.setattr(growing, "SECONDS_TO_FINISH", 60)  # the wait without waking the thread
    hub.inject(Fault("status", "POST", "/commit/", times=None))
    write_shard(folder, 0)
    with pytest.raises(error), grow(folder):  # noqa: PT012 - the error comes while the upload waits
        wait_until(lambda: hub.faults_fired)
        time.sleep(0.1)
        raise error("stop")
    assert len(hub.faults_fired) == 1
    assert not any(thread.name == "growing upload" for thread in threading.enumerate())


INTERRUPTED = """
import sys, threading, time
from pathlib import Path
from types import SimpleNamespace
from tests.hub.test_growing import grow
from utils.hub import growing

join = threading.Thread.join

def show_and_join(thread, timeout=None):
    print(thread.name, timeout, flush=True)
    join(thread, timeout)

threading.Thread.join = show_and_join
growing.SECONDS_TO_FINISH = 0.1
sys.modules["huggingface_hub.utils._http"].time = SimpleNamespace(sleep=lambda seconds: time.sleep(10_000))
with grow(Path(sys.argv[1])):
    sys.stdin.readline()
    raise SystemExit(3)
"""


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/preupload/"), ("PUT", "/lfs-upload/")], ids=["preupload", "content"]
)
def test_a_process_ends_within_seconds_though_the_client_itself_waits_for_half_a_minute(
    method, path, hub, folder, start_with_hub
):
    """The client here waits for hours between tries: an ending process waits for its thread only briefly."""
    assert growing.SECONDS_TO_FINISH <= 2
    write_shard(folder, 0)
    write_shard(folder, 1)
    hub.inject(Fault("status", method, path, times=None))
    child = start_with_hub(["-c", INTERRUPTED, folder], TOKEN)
    wait_until(lambda: hub.faults_fired)
    stdout, stderr = child.communicate("now\n", timeout=300)
    assert child.returncode == 3
    assert stdout == "growing upload 0.1\n"
    assert TOKEN not in stderr and "Traceback" not in stderr


ALONE = """
import os, sys
os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS")
from pathlib import Path
from huggingface_hub.utils import are_progress_bars_disabled
from tests.hub.test_growing import grow
with grow(Path(sys.argv[1])):
    sys.stdin.readline()
assert not are_progress_bars_disabled()
"""


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_a_run_after_another_sends_nothing_again_by_either_way_to_upload(xet, hub, folder, start_with_hub):
    for number in range(3):
        write_shard(folder, number)
    for run in range(2):
        child = start_with_hub(["-c", ALONE, folder], TOKEN, xet=xet)
        wait_until(lambda: any("/tree/" in request.path for request in hub.log) and published(hub) == files_of(folder))
        time.sleep(0.3)  # for requests that should not come
        _, stderr = child.communicate("now\n")
        assert child.returncode == 0, stderr
        # only the work's own bar, none here
        assert stderr == ""
        asked_to_upload = [request.path for request in hub.log if re.search("/preupload/|xet-write|lfs", request.path)]
        assert bool(asked_to_upload) is bool(commits(hub)) is (run == 0)
        assert any("xet" in path for path in asked_to_upload) is (xet and run == 0)
        # known shards are not requested at every look
        assert run == 0 or len([request for request in hub.log if "/tree/" in request.path]) == 1
        hub.clear_log()
