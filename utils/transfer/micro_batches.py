"""A Trainer that saves memory when it runs out: batches go through the model in parts.

The batches stay the same, also with Mixup: the parts are cut from a batch that has been augmented.
"""

from contextlib import nullcontext
from functools import partial

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer

from utils.cli.errors import UserError
from utils.cli.memory import MicroBatching, try_in_memory

# first steps before which all processes try what fits; from the second on there are optimiser states
NUM_TRIALS = 2
ADVICE = "choose a smaller model, train an adapter (--use_peft), or take a GPU with more memory."


class MicroBatchTrainer(Trainer):
    """A Trainer that divides batches as `micro_batching` says, and into smaller parts when out of memory.

    A subclass sets `micro_batching` and overrides `augment` (the model's inputs for a batch), `trained_modules` (the
    modules with gradients) and `changing_buffers` (the buffers that a forward pass changes).
    """

    micro_batching: MicroBatching

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.step_batches, self.before_step, self.num_trials = [], [], 0

    def augment(self, batch: dict) -> dict[str, torch.Tensor]:
        """Return the inputs of `compute_loss` for a batch, on the model's device, images first."""
        return self._prepare_inputs(batch)

    def trained_modules(self) -> list[nn.Module]:
        """Return the modules that get gradients."""
        return [self.model]

    def changing_buffers(self) -> list[torch.Tensor]:
        """Return the buffers that a forward pass in training changes."""
        return []

    def get_batch_samples(self, *args, **kwargs):
        self.step_batches = []
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Accumulate a batch's gradients and return its loss; when out of memory, in smaller parts than before.

        Raises:
            UserError: not even one image fits, or one of several processes ran out of memory after the trials.
        """
        if self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            return super().training_step(model, self.augment(inputs), num_items_in_batch)
        if not self.step_batches:
            self.before_step = self._copy_changing_state()
        self.step_batches.append(inputs)
        if self.args.world_size > 1:
            return self._training_step_of_several(model, inputs, num_items_in_batch)
        pending = [inputs]

        def attempt() -> torch.Tensor:
            return [self._accumulate(model, batch, num_items_in_batch) for batch in pending][-1]

        def undo() -> None:  # the gradients of the step's earlier batches are cleared too
            self._restore_state()
            pending[:] = self.step_batches

        return self.micro_batching.run(attempt, undo)

    def _training_step_of_several(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        """Take a step as one of several processes.

        With DDP, the other processes would wait for one that ran out of memory. So before the first steps, every
        process tries without DDP what fits.
        """
        if len(self.step_batches) == 1 and self.num_trials < NUM_TRIALS:
            self.num_trials += 1
            self.try_alone(model, inputs, num_items_in_batch)
        loss = try_in_memory(partial(self._accumulate, model, inputs, num_items_in_batch))
        if loss is None:
            raise UserError(
                f"{self.micro_batching.flag}: process {self.args.process_index} is out of memory after step "
                f"{self.state.global_step}, too late to change the size in all processes; run the same command with "
                "--resume_from_checkpoint latest, which starts by trying what fits."
            )
        return loss

    def try_alone(self, model, inputs, num_items_in_batch) -> None:
        """Find a size that fits in all processes, each on its own, and restore the state."""
        own = self.accelerator.unwrap_model(model)
        self.micro_batching.run(partial(self._accumulate, own, inputs, num_items_in_batch), self._restore_state)
        self._restore_state()

    def _accumulate(self, model, batch: dict, num_items_in_batch) -> torch.Tensor:
        """Accumulate the gradients of a batch, augmented as a whole, part by part, and return its loss."""
        inputs = self.augment(batch)
        num_parts = self.micro_batching.num_parts(len(inputs["labels"]))
        divided = {name: value.tensor_split(num_parts) for name, value in inputs.items()}
        losses = []
        for number in range(num_parts):
            part = {name: values[number] for name, values in divided.items()}
            is_last = number == num_parts - 1
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        return sum(losses[1:], losses[0])

    def _copy_changing_state(self) -> list[torch.Tensor]:
        """Return copies of the state that a forward pass in training changes: random states and buffers."""
        states = [torch.get_rng_state()]
        if self.args.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.args.device))
        return states + [buffer.clone() for buffer in self.changing_buffers()]

    @torch.no_grad()
    def _restore_state(self) -> None:
        """Restore the state before the step, and clear gradients."""
        for module in self.trained_modules():
            module.zero_grad()
        state, *states = self.before_step
        torch.set_rng_state(state)
        if self.args.device.type == "cuda":
            torch.cuda.set_rng_state(states.pop(0), self.args.device)
        for buffer, before in zip(self.changing_buffers(), states, strict=True):
            buffer.copy_(before)
