"""The number of threads of a process and how they wait, as reported by OpenMP, and a container's limits."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.cli import processes, threads
from utils.cli.records import write_run_config
from utils.cli.threads import LOCAL_SIZES, NUM_THREADS, WAIT_POLICY

ROOT = Path(__file__).parents[2]
SCRIPTS = ["train_dsi", "generate_synthetic", "train_bridged", "compare_transfer", "quality_report"]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a function that simulates a machine with 8 free cores, with changes."""

    def make(own=range(8), group="/", limits=None, **environment):
        for name in (NUM_THREADS, WAIT_POLICY, *LOCAL_SIZES):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(threads, "_chosen", [])
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(own))
        (tmp_path / "group").write_text(f"1:name=systemd:/\n0::{group}\n")
        monkeypatch.setattr(threads, "OWN_GROUP", tmp_path / "group")
        monkeypatch.setattr(threads, "CGROUPS", tmp_path / "cgroups")
        for folder, text in (limits or {}).items():
            (tmp_path / "cgroups" / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / "cgroups" / folder / "cpu.max").write_text(text)
        processes.warn_once.cache_clear()
        threads.prepare_threads()
        return os.environ.get(NUM_THREADS), threads.num_cores()

    yield make
    monkeypatch.undo()
    processes.warn_once.cache_clear()


def test_torchs_number_of_threads_stays_without_a_lower_limit(machine):
    assert machine() == (None, 8)
    assert machine(own=range(3)) == (None, 3)  # torch itself counts these
    assert machine(limits={"": "max 100000\n"}) == (None, 8)
    assert machine(limits={"": "1600000 100000\n"}) == (None, 8)
    assert threads.chosen_num_threads() is None


def test_a_containers_limit_and_other_processes_leave_fewer_threads(machine):
    assert machine(limits={"": "300000 100000\n"}) == ("3", 3)
    assert machine(limits={"": "150000 100000\n"}) == ("2", 2)
    assert machine(limits={"": "50000 100000\n"}) == ("1", 1)
    # the lowest limit of the parent groups
    assert machine(group="/a/b", limits={"": "max 1", "a": "200000 100000", "a/b": "max 100000"}) == ("2", 2)
    assert machine(limits={"": "max 100000"}, LOCAL_WORLD_SIZE="2") == ("4", 8)
    assert machine(OMPI_COMM_WORLD_LOCAL_SIZE="16") == ("1", 8)
    # bound by MPI to its own two cores
    assert machine(own=range(2), MPI_LOCALNRANKS="4") == (None, 2)


def test_the_users_numbers_win(machine):
    given = {"OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "ACTIVE"}
    assert machine(limits={"": "300000 100000\n"}, **given)[0] == "5"
    assert os.environ[WAIT_POLICY] == "ACTIVE"
    assert threads.chosen_num_threads() is None


def test_workers_share_the_cores_and_each_has_at_most_the_users_number(machine):
    machine()
    assert [threads.num_threads(workers) for workers in (1, 2, 3, 20)] == [8, 4, 2, 1]
    machine(OMP_NUM_THREADS="3,1")
    assert [threads.num_threads(workers) for workers in (1, 2, 3)] == [3, 3, 2]
    machine(OMP_NUM_THREADS="many")  # OpenMP itself reports that it ignores this
    assert threads.num_threads(2) == 4


def test_only_a_chosen_number_of_threads_is_reported_and_recorded(machine, tmp_path, caplog):
    def told(*arguments) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            threads.report_threads(*arguments)
        return caplog.messages

    def recorded() -> dict:
        write_run_config(tmp_path / "run", {}, started=0)
        return json.loads((tmp_path / "run" / "run_config.json").read_text())["hardware"]

    machine(limits={"": "300000 100000\n"})
    [line] = told("cpu")
    assert "OMP_NUM_THREADS: set to 3, as 1 process(es) may use 3 of 8 cores" in line
    assert recorded()["num_threads"] == 3
    machine(limits={"": "max 1"})
    assert told("cpu") == [] and "num_threads" not in recorded()
    machine(OMP_NUM_THREADS="1")  # as accelerate launch sets it
    [line] = told("cpu")
    assert "OMP_NUM_THREADS: 1 leaves most of 8 cores idle" in line and "OMP_NUM_THREADS=8 before" in line
    assert told("cuda") == []
    processes.warn_once.cache_clear()
    assert told("cpu", 4) == [] and "num_threads" not in recorded()
    machine(OMP_NUM_THREADS="4")
    assert told("cpu") == []


# each script is a process with all imports; the short form has one that trains and one that generates
IN_SHORT = ("train_dsi", "generate_synthetic")


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=[] if name in IN_SHORT else pytest.mark.soak) for name in SCRIPTS]
)
def test_threads_of_every_script_sleep_while_they_wait(script):
    """OpenMP reports the values that it read on loading: passive threads never spin."""
    environment = {key: value for key, value in os.environ.items() if key not in (WAIT_POLICY, NUM_THREADS)}
    done = subprocess.run(
        [sys.executable, "-c", f"import {script}, torch"], cwd=ROOT, env=environment | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = [line.strip() for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert said and set(said) == {"GOMP_SPINCOUNT = '0'"}
