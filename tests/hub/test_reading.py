"""Every input by id, with the real clients: its commit, and the one-line error if it cannot be read."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import CLASS_NAMES
from tests.local_hub import Fault, LocalHub
from utils.cli.records import DSI_CONFIG, write_record

pytest_plugins = ["tests.transfer.fixtures"]

REPOSITORY_ROOT = Path(__file__).parents[2]
KINDS = {
    "base_model": ("model", "sd", "--pretrained_model_name_or_path"),
    "token": ("model", "style", "--learned_embeds"),
    "real": ("dataset", "cars", "--dataset_name"),
    "synthetic": ("dataset", "syn", "--synthetic_dataset"),
    "classifier": ("model", "vit", "--model_name_or_path"),
}
NOWHERE = "http://127.0.0.1:9"  # nothing listens there
OUT_OF_REACH = {"HF_HUB_OFFLINE": {"HF_HUB_OFFLINE": "1"}, "no network": {"HF_ENDPOINT": NOWHERE}}


class Client:
    """A client process with its own environment, which answers any number of questions."""

    def __init__(self, hub: LocalHub, hf_home: Path, **environment):
        self.stderr_path = hf_home.with_name(f"{hf_home.name}.stderr")
        with self.stderr_path.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.hub.reading_client"], env=hub.environment(hf_home) | environment,
                cwd=REPOSITORY_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
            )  # fmt: skip

    def ask(self, cases: dict) -> tuple[dict, str]:
        """Return the answers, and the output to stderr."""
        num_lines = len(self.stderr())
        cases = {case: (*values, *[None] * (5 - len(values))) for case, values in cases.items()}
        self.process.stdin.write(json.dumps(cases) + "\n")
        self.process.stdin.flush()
        answers = self.process.stdout.readline()
        assert answers, "".join(self.stderr())
        return json.loads(answers), "".join(self.stderr()[num_lines:])

    def stderr(self) -> list[str]:
        return self.stderr_path.read_text().splitlines(keepends=True)


def files_of(folder: str | Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in Path(folder).rglob("*") if path.is_file()}


def write_token(folder: Path, generator: str, generator_revision: str) -> None:
    record = {
        "base_model": {"id": generator, "revision": generator_revision}, "class_names": CLASS_NAMES,
        "prompt_nouns": CLASS_NAMES, "real_images": {}, "placeholder_token": "<dsi-style>", "num_vectors": 1,
        "resolution": 32,
    }  # fmt: skip
    write_record(folder / DSI_CONFIG, record)
    (folder / "learned_embeds.safetensors").write_bytes(b"rows")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_pipeline_dir, real_images_dir, synthetic_dir, classifiers):
    """A Hub where ada has every kind of input: public, private and gated; `v1`, `dev` and `main` of each differ."""
    with LocalHub(tmp_path_factory.mktemp("hub"), cdn=True) as hub:
        hub.add_user("ada", "hf_ada")
        hub.add_user("bob", "hf_bob", role="read")
        folders = {
            "sd": tiny_pipeline_dir, "cars": real_images_dir, "syn": synthetic_dir, "vit": classifiers["vit"],
            "timm": classifiers["timm"], "style": tmp_path_factory.mktemp("style"),
        }  # fmt: skip
        commits = {}
        for name in ("sd", "style", "cars", "syn", "vit", "timm"):
            if name == "style":
                write_token(folders[name], "ada/sd", commits["sd"]["v1"])
            files = files_of(folders[name])
            # later commits of a dataset have two and three times the images
            path, rows = "data/train", files.get("data/train-00000.parquet", b"no image")
            for access in ("", "-private", "-gated"):
                repo_type = "dataset" if name in ("cars", "syn") else "model"
                access_options = {"private": access == "-private", "gated": access == "-gated"}
                repo = hub.create_repo(f"ada/{name}{access}", repo_type, **access_options)
                commits[name + access] = {"v1": repo.commit(files)}
                repo.tags["v1"] = repo.find_commit("main")
                commits[name + access]["dev"] = repo.commit({f"{path}-1.parquet": rows})
                repo.branches["dev"] = repo.find_commit("main")
                commits[name + access]["main"] = repo.commit({f"{path}-2.parquet": rows})
        hub.create_repo("ada/nothing")
        hub.create_repo("ada/nothing-set", "dataset")
        hub.create_repo("ada/torn", "dataset").commit({"data/train-00000.parquet": b"torn"})
        hub.create_repo("ada/headless").commit({"config.json": Path(classifiers["vit"]) / "config.json"})
        yield SimpleNamespace(hub=hub, commits=commits, homes=tmp_path_factory.mktemp("homes"))


@pytest.fixture(scope="module")
def clients(world):
    """A client that reaches the Hub, and one for each way in which it cannot; each HF_HOME is empty at first.

    They start together, as imports take most of their time.
    """
    environments = {"used": {}} | OUT_OF_REACH
    clients = {name: Client(world.hub, world.homes / name, **settings) for name, settings in environments.items()}
    yield clients
    for client in clients.values():
        client.process.stdin.close()
    assert [client.process.wait() for client in clients.values()] == [0] * len(clients)


@pytest.fixture(scope="module")
def client(clients):
    return clients["used"]


@pytest.fixture(scope="module")
def asked(world, client):
    """The answers of a client with an empty HF_HOME for every input, and the requests that it sent."""
    world.hub.clear_log()
    cases = {}
    for kind, (repo_type, name, _) in KINDS.items():
        repo = f"ada/{name}"
        cases |= {
            f"{kind}, missing": (kind, "ada/no-such"),
            f"{kind}, missing, logged in": (kind, "ada/no-such", None, None, "hf_bob"),
            f"{kind}, private": (kind, f"{repo}-private"),
            f"{kind}, private, other user": (kind, f"{repo}-private", None, "hf_bob"),
            f"{kind}, gated": (kind, f"{repo}-gated"),
            f"{kind}, gated, other user": (kind, f"{repo}-gated", None, "hf_bob"),
            f"{kind}, bad --hub_token": (kind, repo, None, "hf_expired", "hf_ada"),
            f"{kind}, bad HF_TOKEN": (kind, repo, None, None, "hf_expired"),
            f"{kind}, other type": (kind, "ada/vit" if repo_type == "dataset" else "ada/cars"),
            f"{kind}, no revision": (kind, repo, "v9"),
            f"{kind}, no commit": (kind, repo, "0" * 40),
            f"{kind}, nothing in it": (kind, "ada/nothing-set" if repo_type == "dataset" else "ada/nothing"),
            # before it is in the cache
            f"{kind}, empty --hub_token": (kind, repo, None, ""),
            f"{kind}, main": (kind, repo),
            f"{kind}, tag": (kind, repo, "v1"),
            f"{kind}, branch": (kind, repo, "dev"),
            f"{kind}, commit": (kind, repo, world.commits[name]["v1"]),
            f"{kind}, private, --hub_token": (kind, f"{repo}-private", None, "hf_ada", "hf_expired"),
            f"{kind}, gated, HF_TOKEN": (kind, f"{repo}-gated", None, None, "hf_ada"),
        }
    cases["timm"] = ("classifier", "ada/timm")
    cases["headless"] = ("classifier", "ada/headless")
    cases["torn"] = ("real", "ada/torn")
    cases["odd name"] = ("classifier", "ada/a--b..c")
    answers, _ = client.ask(cases)
    return SimpleNamespace(answers=answers, log=list(world.hub.log), cdn_log=list(world.hub.cdn_log))


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_by_id_is_read_at_its_revision_and_its_commit_is_reported(kind, asked, world):
    _, name, _ = KINDS[kind]
    public = world.commits[name]
    expected = {
        "main": public["main"], "tag": public["v1"], "branch": public["dev"], "commit": public["v1"],
        "private, --hub_token": world.commits[f"{name}-private"]["main"],
        "gated, HF_TOKEN": world.commits[f"{name}-gated"]["main"], "empty --hub_token": public["main"],
    }  # fmt: skip
    assert {case: asked.answers[f"{kind}, {case}"].get("commit") for case in expected} == expected


def test_the_contents_are_those_of_the_revision(asked, world):
    for kind, number in (("real", 60), ("synthetic", 18)):
        counts = [asked.answers[f"{kind}, {case}"]["num_images"] for case in ("tag", "branch", "main", "commit")]
        assert counts == [number, 2 * number, 3 * number, number]
    assert asked.answers["token, main"]["generator"] == world.commits["sd"]["v1"]
    assert asked.answers["timm"]["commit"] == world.commits["timm"]["main"]


NOT_FOUND = "neither a folder nor a {type} repository "
NO_ACCOUNT = (
    "neither a folder nor a public {type} repository; "
    "for a private one, log in with `hf auth login` or give --hub_token."
)
LINES = {
    "missing": NO_ACCOUNT,
    "missing, logged in": NOT_FOUND + "that the token (HF_TOKEN) can read; "
    "for a private one, set another HF_TOKEN or give --hub_token.",
    "private": NO_ACCOUNT,
    "private, other user": NOT_FOUND + "that the token (--hub_token) can read; "
    "for a private one, give another --hub_token.",
    "gated": "is gated; accept its conditions at {page}-gated, then log in with `hf auth login` or give --hub_token.",
    "gated, other user": "is gated; accept its conditions at {page}-gated, with the account of the token "
    "(--hub_token).",
    "bad --hub_token": "the Hub rejects the token (--hub_token) as wrong or expired; give another --hub_token.",
    "bad HF_TOKEN": "the Hub rejects the token (HF_TOKEN) as wrong or expired; "
    "set another HF_TOKEN or give --hub_token.",
    "other type": "must be a {type}, but is a {other type} repository.",
    "no revision": "the repository has no branch, tag or commit 'v9'.",
    "no commit": "the repository has no branch, tag or commit '0000000000000000000000000000000000000000'.",
}
REPOS = {
    "missing": "ada/no-such", "missing, logged in": "ada/no-such", "private": "{repo}-private",
    "private, other user": "{repo}-private", "gated": "{repo}-gated", "gated, other user": "{repo}-gated",
    "other type": "{other repo}",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_inputs_are_one_line(kind, asked, world):
    repo_type, name, flag = KINDS[kind]
    is_model = repo_type == "model"
    words = {
        "type": "model" if is_model else "dataset", "other type": "dataset" if is_model else "model",
        "repo": f"ada/{name}", "other repo": "ada/cars" if is_model else "ada/vit",
        "page": f"{world.hub.url}/{'' if is_model else 'datasets/'}ada/{name}",
    }  # fmt: skip
    expected = {case: f"{flag} {REPOS.get(case, '{repo}')}: {line}".format_map(words) for case, line in LINES.items()}
    assert {case: asked.answers[f"{kind}, {case}"].get("line") for case in LINES} == expected


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("base_model, nothing in it", "the repository has no model_index.json, so it is not a pipeline of diffusers."),
        ("token, nothing in it", "the repository has no dsi_config.json, so it is not a style token of train_dsi.py."),
        ("synthetic, nothing in it", "the repository has no generation_config.json, so it is not a synthetic set of"),
        ("classifier, nothing in it", "the repository has no config.json, so it is not a checkpoint of transformers"),
        ("real, nothing in it", "doesn't contain any data files"),
        ("headless", "--model_name_or_path ada/headless: has no weights; must contain one of model.safetensors,"),
        ("torn", "--dataset_name ada/torn: cannot be loaded (Parquet file size is 4 bytes"),
        ("odd name", "--model_name_or_path ada/a--b..c: neither an existing folder nor a repository id like"),
    ],
)
def test_a_repository_with_unsuitable_contents_is_one_line(case, message, asked):
    assert message in asked.answers[case]["line"]


def test_after_the_commit_is_known_no_branch_is_read(asked):
    reads = [re.search("/(resolve|tree|paths-info)/([^/]+)", request.path) for request in asked.log]
    assert {read[2] for read in reads if read and not re.fullmatch("[0-9a-f]{40}", read[2])} == set()


def test_a_token_goes_to_the_hub_only(asked):
    assert {"hf_ada", "hf_bob"} < {request.token for request in asked.log}
    assert asked.cdn_log and {request.token for request in asked.cdn_log} == {None}


def test_a_stored_login_is_used_and_the_flag_wins(asked, world, client):
    login = world.homes / "used" / "token"
    login.write_text("hf_ada")
    cases = {
        "flag": ("file", "ada/vit-private", None, "hf_bob"), "stored": ("file", "ada/vit-private"),
        "missing": ("file", "ada/no-such"),
    }  # fmt: skip
    answers, _ = client.ask(cases)
    login.unlink()
    assert answers["stored"]["commit"] == world.commits["vit-private"]["main"]
    assert "that the token (--hub_token) can read" in answers["flag"]["line"]
    assert "the token (from `hf auth login`) can read; for a private one, log in again" in answers["missing"]["line"]


@pytest.fixture(scope="module", params=OUT_OF_REACH)
def unreached(request, asked, world, clients):
    """An unreachable Hub, and a client's answers with an empty HF_HOME and then with a filled one."""
    how, home, client = request.param, world.homes / request.param, clients[request.param]
    cases = {kind: (kind, f"ada/{name}") for kind, (_, name, _) in KINDS.items()}
    with_empty_cache, _ = client.ask(cases | {"real, commit": ("real", "ada/cars", world.commits["cars"]["main"])})
    shutil.copytree(world.homes / "used", home, symlinks=True, dirs_exist_ok=True)
    cases |= {"real, tag": ("real", "ada/cars", "v1"), "synthetic, tag": ("synthetic", "ada/syn", "v1")}
    cases["real, commit"] = ("real", "ada/cars", world.commits["cars"]["dev"])
    with_cache, stderr = client.ask(cases)
    return SimpleNamespace(how=how, home=home, with_empty_cache=with_empty_cache, with_cache=with_cache, stderr=stderr)


def test_offline_the_cache_is_used_at_the_same_commits(unreached, asked):
    answers, stderr, is_tried = unreached.with_cache, unreached.stderr, unreached.how == "no network"
    for kind in KINDS:
        assert without_seconds(answers[kind]) == without_seconds(asked.answers[f"{kind}, main"])
    assert without_seconds(answers["synthetic, tag"]) == without_seconds(asked.answers["synthetic, tag"])
    assert [answers[case]["num_images"] for case in ("real, tag", "real, commit")] == [60, 120]
    assert sum(answer["seconds_slept"] for answer in answers.values()) < 20  # no half minute of retries for each
    told = [name for _, name, _ in KINDS.values() if f"Using cached commit hash for 'ada/{name}'" in stderr]
    assert len(told) == (len(KINDS) if is_tried else 0)
    assert ("--dataset_name ada/cars: the Hub cannot be reached" in stderr) == is_tried


def test_offline_and_not_in_the_cache_is_one_line(unreached, world):
    answers, how = unreached.with_empty_cache, unreached.how
    for kind, (_, name, flag) in KINDS.items():
        reason = f"the Hub ({NOWHERE}) cannot be reached ([Errno 111] Connection refused), "
        cache, then = f"the cache ({unreached.home}/hub) does not have it", "; unset HF_HUB_OFFLINE to download it"
        middle = f"{reason}and {cache}" if how == "no network" else f"and {cache}{then}"
        assert answers[kind]["line"] == f"{flag} ada/{name}: no such folder here, {middle}."
    assert f"does not have the images of commit {world.commits['cars']['main']}" in answers["real, commit"]["line"]


def test_a_hub_that_fails_is_one_line_or_the_cache(asked, world, client):
    world.hub.inject(Fault("status", path="ada/(cars|timm)", times=None, status=503))
    cases = {"cached": ("real", "ada/cars"), "not cached": ("classifier", "ada/timm-private", None, "hf_ada")}
    answers, _ = client.ask(cases)
    world.hub.clear_faults()
    assert answers["cached"]["commit"] == world.commits["cars"]["main"]
    assert re.fullmatch(
        r"--model_name_or_path ada/timm-private: the Hub \(.*\) returned error 503.*; try again later\.",
        answers["not cached"]["line"],
    )


def without_seconds(answer: dict) -> dict:
    return {key: value for key, value in answer.items() if key != "seconds_slept"}
