"""The model of a stage, plain or with an adapter: as it starts, saved, and loaded again."""

from collections.abc import Callable
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from utils.cli.errors import UserError
from utils.transfer.adapters import LoraSettings, add_adapter, load_adapter, save_adapter
from utils.transfer.classifiers import save_classifier
from utils.transfer.methods import StagePlan
from utils.transfer.model_parts import batch_norm_modules, reset_head


def load_start(
    stage: StagePlan,
    start: str | Path,
    lora: LoraSettings | None,
    pretrained: str | None,
    seed: int,
    load: Callable,
    revision: str | None = None,
) -> PreTrainedModel | PeftModel:
    """Return the model that a stage begins with, on the CPU; for `imprint`, with a fresh head still.

    `load` is `load_classifier` with all but the checkpoint's name and `reset_head`; `seed` draws what is fresh;
    `revision` is that of `pretrained`.

    Raises:
        UserError: BatchNorm is to change together with an adapter.
    """
    fresh_head = stage.head_init != "keep"
    if lora is None:
        return load(str(start), reset_head=fresh_head)
    base = load(pretrained, reset_head=True)
    if stage.settings.batch_norm != "frozen" and batch_norm_modules(base):
        raise UserError(
            f"--batch_norm {stage.settings.batch_norm}: BatchNorm's statistics are no part of an adapter; with "
            "--use_peft choose frozen."
        )
    if stage.start is None:
        return add_adapter(base, lora, seed, revision=revision)
    model = load_adapter(base, start)
    if fresh_head:
        reset_head(model, seed)
    return model


def save_trained(model: PreTrainedModel | PeftModel, image_processor, folder: str | Path) -> None:
    """Write a stage's model: a checkpoint with its image processor, or the adapter alone."""
    if isinstance(model, PeftModel):
        save_adapter(model, folder)
    else:
        save_classifier(model, image_processor, folder)


def load_trained(folder: str | Path, pretrained: str | None, load: Callable) -> PreTrainedModel | PeftModel:
    """Return what `save_trained` wrote, an adapter on the checkpoint `pretrained`, None for a plain model."""
    if pretrained is None:
        return load(str(folder), reset_head=False)
    return load_adapter(load(pretrained, reset_head=True), folder)
