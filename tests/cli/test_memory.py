"""Too little memory: what is tried next, what is reported, and that nothing of a failed attempt remains."""

import weakref

import pytest
import torch

from utils.cli.errors import UserError
from utils.cli.memory import MicroBatching, run_in_parts, try_in_memory

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_results_that_fit_are_returned_and_failures_leave_nothing_behind():
    filled = []

    def attempt():
        tensor = torch.zeros(8)
        filled.append(weakref.ref(tensor))
        torch.empty(2**58)  # more than there is: the CPU's allocator fails
        return tensor

    assert try_in_memory(lambda: 5) == 5
    assert try_in_memory(attempt) is None
    assert filled[0]() is None


def test_another_error_is_not_out_of_memory():
    with pytest.raises(RuntimeError, match="shape"):
        try_in_memory(lambda: torch.zeros(2).view(3))


@pytest.fixture
def checkpointed():
    return []


def plan(enabled: list, size: int = 6, can_checkpoint: bool = True, **options) -> MicroBatching:
    enable = (lambda: enabled.append(True)) if can_checkpoint else None
    return MicroBatching(size, f"--batch {size}", "buy more.", enable, **options)


def run(micro_batching: MicroBatching, enabled: list, limit: float) -> tuple[list, int]:
    """Run an attempt whose memory grows with the images at a time, half with checkpointing; count undone attempts."""
    tried, undone = [], []

    def attempt():
        tried.append(micro_batching.size)
        if micro_batching.size * (0.5 if enabled else 1) > limit:
            raise OUT_OF_MEMORY
        return micro_batching.size

    assert micro_batching.run(attempt, lambda: undone.append(True)) == micro_batching.size
    return tried, len(undone)


def test_the_size_is_halved_until_a_step_fits_and_stays_so(checkpointed, caplog):
    micro_batching = plan(checkpointed, caveat="all else stays")
    assert run(micro_batching, checkpointed, 6) == ([6], 0)
    assert micro_batching.state() == {} and caplog.messages == []
    assert run(micro_batching, checkpointed, 2) == ([6, 3, 1], 2)
    assert run(micro_batching, checkpointed, 2) == ([1], 0)
    assert micro_batching.state() == {"micro_batch_size": 1} and not checkpointed
    assert [micro_batching.num_parts(number) for number in (6, 5, 1)] == [6, 5, 1]
    assert caplog.messages == [
        f"--batch 6: out of memory with {before} images at a time; from now on {after}, with gradients accumulated: "
        "all else stays." for before, after in ((6, 3), (3, 1))
    ]  # fmt: skip


def test_below_one_image_checkpointing_is_turned_on_and_then_there_is_one_clear_error(checkpointed, caplog):
    micro_batching = plan(checkpointed, size=2)
    assert run(micro_batching, checkpointed, 0.5) == ([2, 1, 1], 2)
    assert micro_batching.state() == {"micro_batch_size": 1, "gradient_checkpointing": True}
    assert caplog.messages[1:] == [
        "--batch 2: out of memory with one image at a time; from now on with gradient checkpointing."
    ]
    with pytest.raises(UserError, match="^--batch 2: out of memory .*, even with gradient .*; buy more.$"):
        run(micro_batching, checkpointed, 0)
    with pytest.raises(UserError, match="^--batch 2: out of memory with one image at a time; buy more.$"):
        run(plan([], size=2, can_checkpoint=False), [], 0)
    assert checkpointed == [True]


def test_a_resumed_run_starts_with_the_size_that_worked(checkpointed):
    micro_batching = plan(checkpointed)
    micro_batching.restore({})
    assert (micro_batching.size, micro_batching.state(), checkpointed) == (6, {}, [])
    state = {"micro_batch_size": 1, "gradient_checkpointing": True}
    for _ in range(2):
        micro_batching.restore(state)
    assert micro_batching.state() == state and checkpointed == [True]


def test_parts_are_halved_from_the_first_failure_on():
    def take(part: slice) -> list[int]:
        numbers = list(range(10))[part]
        if len(numbers) > 2 and 4 in numbers:
            raise OUT_OF_MEMORY
        return numbers

    assert run_in_parts(take, 10, 4, "no") == ([[0, 1, 2, 3], [4, 5], [6, 7], [8, 9]], 2)
    assert run_in_parts(take, 0, 4, "no") == ([], 4)

    def fail(part: slice):
        raise OUT_OF_MEMORY

    with pytest.raises(UserError, match="^too large$"):
        run_in_parts(fail, 3, 4, "too large")
