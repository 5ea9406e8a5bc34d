"""Threads that compute on a CPU: how many a process has, and how they wait for each other."""

import math
import os
from pathlib import Path

from utils.cli.processes import warn_once

NUM_THREADS = "OMP_NUM_THREADS"
WAIT_POLICY = "OMP_WAIT_POLICY"
CGROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# as torch and the launchers of MPI tell how many processes they have started on this machine
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")

_chosen: list[int] = []  # what `prepare_threads` has set, as it differs from torch's default


def prepare_threads() -> None:
    """Set OMP_WAIT_POLICY, and OMP_NUM_THREADS where torch's default is too much; what is set already stays.

    OpenMP reads both when it is loaded, with torch, so this comes before that. Its threads spin by default while they
    wait for each other, for milliseconds. Beside other work on the same cores, such as that of the encoders' threads,
    they keep away the very thread that they wait for, and a run takes ten times as long. Passive threads sleep.

    torch's own number of threads, one per core that this process may use, does not know of a container's limit and of
    other processes.
    """
    os.environ.setdefault(WAIT_POLICY, "PASSIVE")
    if NUM_THREADS not in os.environ and num_threads(num_local_processes()) < len(_own_cores()):
        _chosen.append(num_threads(num_local_processes()))
        os.environ[NUM_THREADS] = str(_chosen[0])


def chosen_num_threads() -> int | None:
    """Return how many threads were chosen for this process, None where torch's default or the user's number holds."""
    return _chosen[0] if _chosen else None


def num_threads(num_processes: int) -> int:
    """Return how many threads each of `num_processes` on this machine should compute with; at most the user's number.

    Those of MPI may be bound to cores of their own already: then there are no others to share.
    """
    share = min(len(_own_cores()), _limit() // num_processes)
    given = os.environ.get(NUM_THREADS, "").partition(",")[0]  # after the comma come nested teams'
    return max(1, min(share, int(given)) if given.isdecimal() else share)


def num_cores() -> int:
    """Return how many cores this process may use: those that it is bound to, and as many as its container grants."""
    return max(1, min(len(_own_cores()), _limit()))


def num_local_processes() -> int:
    """Return how many processes the launch has started on this machine."""
    return next((int(os.environ[name]) for name in LOCAL_SIZES if name in os.environ), 1)


def report_threads(device_type: str, num_processes: int | None = None) -> None:
    """Say in one line how many threads were chosen, or that more than half of the cores of a CPU are idle.

    `num_processes` are those on this machine, of the launch when not given.
    """
    num_processes = num_processes or num_local_processes()
    given = os.environ.get(NUM_THREADS, "")
    if _chosen:
        warn_once(
            f"{NUM_THREADS}: set to {_chosen[0]}, as {num_processes} process(es) may use {num_cores()} of "
            f"{os.cpu_count()} cores; a number of your own wins."
        )
    elif device_type == "cpu" and given.isdecimal() and 2 * int(given) * num_processes < num_cores():
        warn_once(
            f"{NUM_THREADS}: is {given}, which leaves most of {num_cores()} cores idle (accelerate launch sets it to 1 "
            f"when it is not set); {NUM_THREADS}={num_cores() // num_processes} before the command uses them all."
        )


def _own_cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _limit() -> int:
    """Return the cores that the control groups of this process grant it, all of the machine's where they say nothing.

    A part of a core counts as one, which would do nothing otherwise.
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
