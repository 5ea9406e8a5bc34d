"""A local Hub with a user who publishes the dataset `ann/cars`, and helpers to inspect it."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from utils.hub import targets

ROOT = Path(__file__).parents[2]
TOKEN = "hf_ann_secret"
SHARDS = ("data/train-*.parquet",)


@pytest.fixture
def hub(local_hub, monkeypatch):
    """The local Hub with a user's tokens, and short pauses of ours and of the client."""
    local_hub.add_user("ann", TOKEN)
    local_hub.add_user("ann", "hf_ann_reads", role="read")
    monkeypatch.setattr(targets, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: time.sleep(0.01)))
    return local_hub


def published(hub, repo_name: str = "cars", repo_type: str = "dataset", revision: str = "main") -> dict[str, bytes]:
    """Return a repository's files, except the Hub's own; none if there is no repository."""
    if (repo_type, f"ann/{repo_name}") not in hub.repositories:
        return {}
    there = hub.repo(f"ann/{repo_name}", repo_type).files(revision)
    return {path: data for path, data in there.items() if path != ".gitattributes"}


def contents_sent(hub) -> list[str]:
    """Return the hash of each content that was sent, with repetitions."""
    return [request.path.rsplit("/", 1)[1] for request in hub.log if request.method == "PUT"]


def commits(hub) -> list[str]:
    return [request.path for request in hub.log if "/commit/" in request.path]


def wait_until(condition, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)
