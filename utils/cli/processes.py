"""Which of the processes of a launch this is, before torch is imported; what only one of them says."""

import logging
import os
from functools import cache

logger = logging.getLogger(__name__)

RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # as accelerate asks for them


def is_main_process() -> bool:
    """Return whether this is the main process of all machines, or the only one."""
    return all(os.environ.get(name, "0") in ("0", "-1") for name in RANK_VARIABLES)


@cache
def warn_once(line: str) -> None:
    """Warn in the main process, once a run: a set or a model is loaded for one purpose, and again for another."""
    if is_main_process():
        logger.warning(line)
