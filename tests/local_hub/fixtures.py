"""The local Hub for tests, emptied before each, and clients in separate processes."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.local_hub import LocalHub

REPOSITORY_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def local_hub_server(tmp_path_factory):
    """The Hub of the whole session, on one port; use `local_hub`."""
    with LocalHub(tmp_path_factory.mktemp("local-hub"), lfs_threshold=2**20) as hub:
        yield hub


@pytest.fixture
def local_hub(local_hub_server):
    """An empty Hub. The test fails if the Hub itself fails."""
    local_hub_server.reset()
    yield local_hub_server
    assert local_hub_server.failures == []


@pytest.fixture
def start_with_hub(local_hub, tmp_path) -> Callable[..., subprocess.Popen]:
    """Start a client process with its own empty HF_HOME, as warm caches hide failures.

    `start_with_hub(code_or_argv, token=None, hf_home=None, xet=False, **environment)` takes Python code, or the
    arguments after `python`, e.g. `["train_dsi.py", "--help"]`. It runs in the repository's root.
    """
    homes = (tmp_path / f"hf-home-{number}" for number in itertools.count(1))

    def start(code_or_argv, token=None, hf_home=None, xet=False, **environment) -> subprocess.Popen:
        argv = ["-c", code_or_argv] if isinstance(code_or_argv, str) else [str(word) for word in code_or_argv]
        env = local_hub.environment(hf_home or next(homes), token, xet) | {"PYTHONPATH": str(REPOSITORY_ROOT)}
        return subprocess.Popen(
            [sys.executable, *argv], env=env | environment, cwd=REPOSITORY_ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


@pytest.fixture
def run_with_hub(start_with_hub) -> Callable[..., subprocess.CompletedProcess]:
    """Run a process of `start_with_hub` to its end within `timeout` seconds; with `check` it must succeed."""

    def run(code_or_argv, *args, check=False, timeout=300, **options) -> subprocess.CompletedProcess:
        child = start_with_hub(code_or_argv, *args, **options)
        try:
            stdout, stderr = child.communicate(timeout=timeout)
        finally:
            child.kill()
        assert not check or child.returncode == 0, stdout + stderr
        return subprocess.CompletedProcess(child.args, child.returncode, stdout, stderr)

    return run
