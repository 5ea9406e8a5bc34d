"""The local Hub for tests, emptied for each, and clients in processes of their own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.local_hub import LocalHub

REPOSITORY_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def local_hub_server(tmp_path_factory):
    """A Hub for the whole session, on one port; use `local_hub`."""
    with LocalHub(tmp_path_factory.mktemp("local-hub"), lfs_threshold=2**20) as hub:
        yield hub


@pytest.fixture
def local_hub(local_hub_server):
    """An empty Hub. The test fails if the Hub itself broke."""
    local_hub_server.reset()
    yield local_hub_server
    assert local_hub_server.failures == []


@pytest.fixture
def run_with_hub(local_hub, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Run a client in a process of its own, with its own empty HF_HOME: warm caches hide failures.

    `run_with_hub(code_or_argv, token=None, hf_home=None, xet=False, check=False, timeout=300, **environment)` takes
    Python code, or the arguments after `python`, e.g. `["train_dsi.py", "--help"]`. It runs in the repository's root.
    """
    num_homes = 0

    def run(
        code_or_argv, token=None, hf_home=None, xet=False, check=False, timeout=300, **environment
    ) -> subprocess.CompletedProcess:
        nonlocal num_homes
        num_homes += 1
        hf_home = hf_home or tmp_path / f"hf-home-{num_homes}"
        argv = ["-c", code_or_argv] if isinstance(code_or_argv, str) else [str(word) for word in code_or_argv]
        env = local_hub.environment(hf_home, token, xet) | {"PYTHONPATH": str(REPOSITORY_ROOT)} | environment
        done = subprocess.run(
            [sys.executable, *argv], env=env, cwd=REPOSITORY_ROOT, capture_output=True, text=True, timeout=timeout
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run
