"""A simulated device with too little memory: models run out of memory above a number of images."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def limit_memory(
    model_class: type, limit: float, *, from_call: int = 1, in_backward: bool = False,
    applies: Callable[[], bool] = torch.is_grad_enabled,
) -> Iterator[list[int]]:  # fmt: skip
    """Let models of a class run out of memory with more than `limit` images; yield the batch sizes.

    An image takes half as much with gradient checkpointing. The limit holds in calls to which it `applies`, by default
    those with gradients, from one of these on. `in_backward` all gradients but the last one are there already.
    """
    forward, sizes = model_class.forward, []

    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    @functools.wraps(forward)
    def limited(self, *args, **kwargs):
        if not applies():
            return forward(self, *args, **kwargs)
        size = len(args[0] if args else kwargs["pixel_values"])
        sizes.append(size)
        is_short = len(sizes) >= from_call and size * (0.5 if self.is_gradient_checkpointing else 1) > limit
        if not is_short:
            return forward(self, *args, **kwargs)
        if not in_backward:
            run_out()
        first = next(parameter for parameter in self.parameters() if parameter.requires_grad)
        handle = first.register_hook(lambda gradient: (handle.remove(), run_out()))
        return forward(self, *args, **kwargs)

    model_class.forward = limited
    try:
        yield sizes
    finally:
        model_class.forward = forward
