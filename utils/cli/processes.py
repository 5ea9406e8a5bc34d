"""Which of the processes of a launch this is, before torch is imported."""

import os

RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # as accelerate asks for them


def is_main_process() -> bool:
    """Return whether this is the main process of all machines, or the only one."""
    return all(os.environ.get(name, "0") in ("0", "-1") for name in RANK_VARIABLES)
