"""The memory that a model takes, counted by its shapes: nothing is computed, no weight is loaded."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Not counted: what the allocator loses between blocks, workspaces of convolutions and matrix products. Chosen, not
# measured on a GPU; on a CPU a step of Stable Diffusion's kind stays within 2 % of the count (tests/forecast).
MARGIN = 0.05
CONTEXT = 2**29  # bytes of a CUDA context with its kernels; on a CPU about what the libraries take
PROBE_SIDE = 64  # numbers a side of the weight that an optimiser is tried on


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a forward and backward pass take besides the weights that are there before it.

    `kept` is what lies between the passes: activations saved for the backward pass, outputs, inputs made on the way.
    `peak` is the most at any moment of both, the gradients of trained weights among it, which are `gradients`.
    """

    kept: int
    peak: int
    gradients: int


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, each once however many tensors view it, until freed.

    `live` are those at the moment, `peak` the most since the start; both leave out what existed before.
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
    return tensor.untyped_storage()._cdata  # the same for all views, as long as the storage lives


@contextmanager
def shapes_only(*modules: nn.Module) -> Iterator[None]:
    """Let modules built on `torch.device("meta")`, and all tensors made within the block, have shapes and no values.

    Unlike on the meta device itself, attention and autocast then choose what they choose on a real device.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in modules:
            module.to_empty(device="cpu")
        yield


def count_step(compute_loss: Callable[[], torch.Tensor], parameters: list[nn.Parameter]) -> StepMemory:
    """Return what a forward and backward pass take; `parameters` are those with gradients, which end without.

    What `compute_loss` makes is counted, what it refers to is not: inputs that lie on the device should be made in it.
    In `shapes_only` nothing is computed. Attention is counted as PyTorch's fused kernels do it: they keep no matrix
    of scores.

    Left out: workspaces of kernels, fragmentation, and the CUDA context of about half a GB; `needed_bytes` adds them.
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
    """Return the peak in bytes of a forward pass without gradients, its outputs included; else as `count_step`."""
    with StorageCounter() as counter:
        compute()
    return counter.peak


def weight_bytes(*modules: nn.Module) -> int:
    """Return the bytes of all weights and buffers, on the meta device too; one that is shared counts once."""
    tensors = {value for module in modules for value in [*module.parameters(), *module.buffers()]}
    return sum(value.numel() * value.element_size() for value in tensors)


def state_bytes(make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], trained: int) -> int:
    """Return the bytes that an optimiser keeps for weights of `trained` bytes, by what it keeps for a small one."""
    weight = nn.Parameter(torch.zeros(PROBE_SIDE, PROBE_SIDE))
    weight.grad = torch.ones_like(weight)
    optimizer = make_optimizer([weight])
    optimizer.step()
    state = [value for value in _tensors(list(optimizer.state.values())) if value.numel() > 1]
    kept = sum(value.numel() * value.element_size() for value in state)
    return round(trained * kept / (weight.numel() * weight.element_size()))


def needed_bytes(counted: int) -> int:
    """Return what a device must have free for a counted peak: 5 % more, and half a GB for the context."""
    return round(counted * (1 + MARGIN)) + CONTEXT


def available_bytes(device: torch.device) -> tuple[int, str]:
    """Return the memory of a GPU, or what is free of a CPU's, and words that say so with {} in the place of the GiB."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.total_memory, f"your GPU ({properties.name}) has {{}}"
    import psutil  # which accelerate needs

    return psutil.virtual_memory().available, "{} are free on this machine"
