"""The memory of a model, counted from its shapes: nothing is computed, no weight is loaded."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Covers what is not counted: fragmentation, and workspaces of convolutions and matrix products. Chosen, not measured on
# a GPU; on a CPU, a step of a small Stable Diffusion stays within 2 % of the count (tests/forecast).
MARGIN = 0.05
CONTEXT = 2**29  # bytes of a CUDA context with its kernels; on a CPU, roughly of the libraries
PROBE_SIDE = 64  # rows and columns of the weight on which an optimiser is tried


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a forward and backward pass, without the existing weights.

    `kept` is what exists between the passes: activations saved for the backward pass, outputs, and inputs made on the
    way. `peak` is the maximum during both, including the `gradients` of trained weights.
    """

    kept: int
    peak: int
    gradients: int


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of the storages that operations create, each once for all its views, until freed.

    `live` is the current number, `peak` the maximum since the start; both without what existed before.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {_key(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            if (key := _key(tensor)) not in given | self._known:
                storage = tensor.untyped_storage()
                self._known.add(key)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, key, storage.nbytes())
        return result

    def _free(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


def _tensors(values: object) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata  # the same for all views while the storage exists


@contextmanager
def shapes_only(*modules: nn.Module) -> Iterator[None]:
    """Give modules built on `torch.device("meta")`, and all tensors created in the block, shapes but no values.

    Unlike on the meta device itself, attention and autocast choose the same kernels as on a real device.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in modules:
            module.to_empty(device="cpu")
        yield


def count_step(compute_loss: Callable[[], torch.Tensor], parameters: list[nn.Parameter]) -> StepMemory:
    """Return the memory of a forward and backward pass; clears the gradients of `parameters`, those that are trained.

    Only what `compute_loss` creates is counted, so it should also create the inputs on the device. In `shapes_only`
    nothing is computed. Attention is counted as in PyTorch's fused kernels, which keep no matrix of scores.

    Not counted: workspaces of kernels, fragmentation, and the CUDA context of about half a GB; `needed_bytes` adds
    them.
    """
    with StorageCounter() as counter:
        loss = compute_loss()
        kept = counter.live
        loss.backward()
    gradients = sum(value.grad.untyped_storage().nbytes() for value in parameters if value.grad is not None)
    for value in parameters:
        value.grad = None
    return StepMemory(kept, counter.peak, gradients)


@torch.no_grad()
def count_forward(compute: Callable[[], object]) -> int:
    """Return the peak bytes of a forward pass without gradients, including its outputs; otherwise as `count_step`."""
    with StorageCounter() as counter:
        compute()
    return counter.peak


def weight_bytes(*modules: nn.Module) -> int:
    """Return the bytes of all weights and buffers, also on the meta device; shared ones count once."""
    tensors = {value for module in modules for value in [*module.parameters(), *module.buffers()]}
    return sum(value.numel() * value.element_size() for value in tensors)


def state_bytes(make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], trained: int) -> int:
    """Return the bytes of an optimiser's state for weights of `trained` bytes, scaled from a small weight."""
    weight = nn.Parameter(torch.zeros(PROBE_SIDE, PROBE_SIDE))
    weight.grad = torch.ones_like(weight)
    optimizer = make_optimizer([weight])
    optimizer.step()
    state = [value for value in _tensors(list(optimizer.state.values())) if value.numel() > 1]
    kept = sum(value.numel() * value.element_size() for value in state)
    return round(trained * kept / (weight.numel() * weight.element_size()))


def needed_bytes(counted: int) -> int:
    """Return the free memory needed for a counted peak: 5 % more, and half a GB for the context."""
    return round(counted * (1 + MARGIN)) + CONTEXT


def available_bytes(device: torch.device) -> tuple[int, str]:
    """Return the memory of a GPU, or the free memory of the machine, and a text about it with {} for the GiB."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.total_memory, f"your GPU ({properties.name}) has {{}}"
    import psutil  # a dependency of accelerate

    return psutil.virtual_memory().available, "{} are free on this machine"
