"""CPU threads: how many a process uses, and how they wait for each other."""

import math
import os
from pathlib import Path

from utils.cli.processes import warn_once

NUM_THREADS = "OMP_NUM_THREADS"
WAIT_POLICY = "OMP_WAIT_POLICY"
CGROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# where torch and MPI launchers give the number of processes on this machine
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")

_chosen: list[int] = []  # the number that `prepare_threads` set, if it differs from torch's default


def prepare_threads() -> None:
    """Set OMP_WAIT_POLICY, and OMP_NUM_THREADS if torch's default is too high, unless the user has set them.

    OpenMP reads both when torch loads it, so this must come first. By default its threads spin for milliseconds while
    they wait for each other. With other work on the same cores, such as image encoding, they block the thread that they
    wait for, and a run takes ten times as long. Passive threads sleep.

    torch's default, one thread per core of this process, ignores a container's limit and other processes.
    """
    os.environ.setdefault(WAIT_POLICY, "PASSIVE")
    if NUM_THREADS not in os.environ and num_threads(num_local_processes()) < len(_own_cores()):
        _chosen.append(num_threads(num_local_processes()))
        os.environ[NUM_THREADS] = str(_chosen[0])


def chosen_num_threads() -> int | None:
    """Return the number of threads set for this process; None if torch's default or the user's number is in use."""
    return _chosen[0] if _chosen else None


def num_threads(num_processes: int) -> int:
    """Return the number of threads for each of `num_processes` on this machine; at most the user's number.

    MPI may already have bound each process to its own cores; then these are not divided again.
    """
    share = min(len(_own_cores()), _limit() // num_processes)
    given = os.environ.get(NUM_THREADS, "").partition(",")[0]  # the numbers after the comma are for nested teams
    return max(1, min(share, int(given)) if given.isdecimal() else share)


def num_cores() -> int:
    """Return how many cores this process may use, by its affinity and its container's limit."""
    return max(1, min(len(_own_cores()), _limit()))


def num_local_processes() -> int:
    """Return the number of processes of the launch on this machine."""
    return next((int(os.environ[name]) for name in LOCAL_SIZES if name in os.environ), 1)


def report_threads(device_type: str, num_processes: int | None = None) -> None:
    """Report in one line the number of threads that was set, or that more than half of the cores are idle.

    `num_processes` is the number on this machine (default: of the launch).
    """
    num_processes = num_processes or num_local_processes()
    given = os.environ.get(NUM_THREADS, "")
    if _chosen:
        warn_once(
            f"{NUM_THREADS}: set to {_chosen[0]}, as {num_processes} process(es) may use {num_cores()} of "
            f"{os.cpu_count()} cores; set it yourself to override."
        )
    elif device_type == "cpu" and given.isdecimal() and 2 * int(given) * num_processes < num_cores():
        warn_once(
            f"{NUM_THREADS}: {given} leaves most of {num_cores()} cores idle (accelerate launch defaults to 1); put "
            f"{NUM_THREADS}={num_cores() // num_processes} before the command to use them all."
        )


def _own_cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _limit() -> int:
    """Return the cores that this process's control groups allow; all of the machine's without a limit.

    A fraction of a core is rounded up.
    """
    cores = float(os.cpu_count() or 1)
    try:
        lines = OWN_GROUP.read_text().splitlines()
        group = next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
    except (OSError, StopIteration):  # not Linux, or the first version of control groups
        return math.ceil(cores)
    for folder in (CGROUPS / group, *(CGROUPS / group).parents):
        limit = folder / "cpu.max"
        quota, period = limit.read_text().split() if limit.exists() else ("max", "")  # the root has none
        if quota != "max":
            cores = min(cores, int(quota) / int(period))
    return math.ceil(cores)
