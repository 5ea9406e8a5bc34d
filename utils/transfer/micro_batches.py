"""A Trainer whose steps take less memory where there is little: batches go through the model in parts.

The batches stay what they are, with their Mixup: a part is cut from a batch that is augmented already.
"""

from contextlib import nullcontext
from functools import partial

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer

from utils.cli.errors import UserError
from utils.cli.memory import MicroBatching, try_in_memory

# steps before which processes try together what fits: the second is the first with the optimiser's states
NUM_TRIALS = 2
ADVICE = "choose a smaller model, train an adapter (--use_peft), or take a GPU with more memory."


class MicroBatchTrainer(Trainer):
    """A Trainer that divides a loader's batches as its `micro_batching` says, and tries again where memory is short.

    A subclass sets `micro_batching`, and says by `augment` what the model takes of a batch, by `trained_modules` where
    gradients are, and by `changing_buffers` what a forward pass changes.
    """

    micro_batching: MicroBatching

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.step_batches, self.before_step, self.num_trials = [], [], 0

    def augment(self, batch: dict) -> dict[str, torch.Tensor]:
        """Return a loader's batch as `compute_loss` takes it, all of it on the model's device, images first."""
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
        """Add a batch's gradients, and return its loss; where memory is short, in smaller parts than before.

        Raises:
            UserError: it does not fit in any way; in several processes, one of them ran out of memory after the trials.
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

        def undo() -> None:  # with the gradients of the batch those of the step's earlier ones are gone
            self._go_back()
            pending[:] = self.step_batches

        return self.micro_batching.run(attempt, undo)

    def _training_step_of_several(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        """Be one of several processes: DDP has those that have memory wait for one that has not.

        So it is tried without DDP what fits in all of them, before the first steps.
        """
        if len(self.step_batches) == 1 and self.num_trials < NUM_TRIALS:
            self.num_trials += 1
            self.try_alone(model, inputs, num_items_in_batch)
        loss = try_in_memory(partial(self._accumulate, model, inputs, num_items_in_batch))
        if loss is None:
            raise UserError(
                f"{self.micro_batching.flag}: process {self.args.process_index} is out of memory after step "
                f"{self.state.global_step}, where the others cannot follow it; run the same command with "
                "--resume_from_checkpoint latest, which begins by trying what fits."
            )
        return loss

    def try_alone(self, model, inputs, num_items_in_batch) -> None:
        """Find out what fits in all processes, each by itself, and leave no trace of it."""
        own = self.accelerator.unwrap_model(model)
        self.micro_batching.run(partial(self._accumulate, own, inputs, num_items_in_batch), self._go_back)
        self._go_back()

    def _accumulate(self, model, batch: dict, num_items_in_batch) -> torch.Tensor:
        """Add the gradients of a batch, augmented as a whole, a part after another, and return its loss."""
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
        """Return copies of what a forward pass in training changes: random states and buffers."""
        states = [torch.get_rng_state()]
        if self.args.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.args.device))
        return states + [buffer.clone() for buffer in self.changing_buffers()]

    @torch.no_grad()
    def _go_back(self) -> None:
        """Be as before the step, without gradients."""
        for module in self.trained_modules():
            module.zero_grad()
        state, *states = self.before_step
        torch.set_rng_state(state)
        if self.args.device.type == "cuda":
            torch.cuda.set_rng_state(states.pop(0), self.args.device)
        for buffer, before in zip(self.changing_buffers(), states, strict=True):
            buffer.copy_(before)
