"""Steps that do not fit in memory: run in smaller micro-batches, then with gradient checkpointing."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from utils.cli.errors import UserError
from utils.cli.processes import is_main_process

logger = logging.getLogger(__name__)
T = TypeVar("T")

SAME_STEP = "a step stays the same"
# keys in a run's state and record
MICRO_BATCH_SIZE, GRADIENT_CHECKPOINTING = "micro_batch_size", "gradient_checkpointing"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the host is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def try_in_memory(attempt: Callable[[], T]) -> T | None:
    """Return the result of `attempt`, or None if it runs out of memory, which is then freed."""
    try:
        return attempt()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # only here is the error gone, and with it the references to the memory in use
    clear_device_cache(garbage_collection=True)
    return None


def run_in_parts(run: Callable[[slice], T], num_items: int, size: int, refusal: str) -> tuple[list[T], int]:
    """Return the results of `run` for consecutive slices of `num_items`, and the size: at most `size`, halved as
    needed.

    For work without gradients, whose slices are independent.

    Raises:
        UserError: not even one item fits in memory; `refusal` is the message.
    """
    results, start = [], 0
    while start < num_items:
        part = slice(start, min(start + size, num_items))
        if (result := try_in_memory(lambda part=part: run(part))) is not None:
            results.append(result)
            start = part.stop
        elif size == 1:
            raise UserError(refusal)
        else:
            size //= 2
    return results, size


@dataclass
class MicroBatching:
    """How many images of a training step go through the model at a time, and whether with gradient checkpointing.

    When memory runs out, `size` is halved and gradients are accumulated over more passes. At one image,
    `enable_checkpointing` is called (None: not supported, or already on). After that, training ends with an error that
    has `flag` and `advice`. `caveat` ends the warning about a smaller size: which part of a step depends on it. All
    processes change together.
    """

    size: int
    flag: str
    advice: str
    enable_checkpointing: Callable[[], None] | None = None
    caveat: str = SAME_STEP
    is_checkpointing: bool = field(default=False, init=False)  # because memory ran out
    _planned_size: int = field(init=False)

    def __post_init__(self):
        self._planned_size = self.size

    def run(self, attempt: Callable[[], T], undo: Callable[[], None]) -> T:
        """Return the result of `attempt` in this process once it fits in the memory of every process.

        `attempt` takes `size` images at a time and does not return None. `undo` clears what a failed attempt left
        behind, such as gradients. Every process must call this equally often.

        Raises:
            UserError: not even one image fits with gradient checkpointing.
        """
        while True:
            result = try_in_memory(attempt)
            if not _in_any_process(result is None):
                return result
            del result
            undo()
            self._reduce()

    def num_parts(self, num_images: int) -> int:
        """Return the number of passes for `num_images`."""
        return -(-num_images // self.size)

    def refuse(self, how: str) -> UserError:
        """Return the out-of-memory error; `how` describes the attempt."""
        return UserError(f"{self.flag}: out of memory {how}; {self.advice}")

    def state(self) -> dict:
        """Return what was changed to fit in memory, for checkpoints and records; empty if nothing was."""
        changed = {MICRO_BATCH_SIZE: self.size} if self.size < self._planned_size else {}
        return changed | ({GRADIENT_CHECKPOINTING: True} if self.is_checkpointing else {})

    def restore(self, state: dict) -> None:
        """Start from what fit in memory in the run that saved `state`."""
        self.size = min(self.size, state.get(MICRO_BATCH_SIZE, self.size))
        if state.get(GRADIENT_CHECKPOINTING) and self.enable_checkpointing is not None and not self.is_checkpointing:
            self.enable_checkpointing()
            self.is_checkpointing = True

    def _reduce(self) -> None:
        if self.size > 1:
            before, self.size = self.size, self.size // 2
            line = (
                f"{self.flag}: out of memory with {before} images at a time; from now on {self.size}, with gradients "
                f"accumulated: {self.caveat}."
            )
        elif self.enable_checkpointing is not None and not self.is_checkpointing:
            self.enable_checkpointing()
            self.is_checkpointing = True
            line = f"{self.flag}: out of memory with one image at a time; from now on with gradient checkpointing."
        else:
            checkpointing = ", even with gradient checkpointing" if self.is_checkpointing else ""
            raise self.refuse(f"with one image at a time{checkpointing}")
        if is_main_process():
            logger.warning(line)


def _in_any_process(happened: bool) -> bool:
    """Return, in every process, whether something happened in any of them."""
    state = PartialState()
    if state.num_processes == 1:
        return happened
    return bool(reduce(torch.tensor(float(happened), device=state.device), "sum"))
