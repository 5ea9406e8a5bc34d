"""One stage of a method, from its start weights to its folder with settings, checkpoints and the trained model."""

import dataclasses
import json
import logging
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from zipfile import is_zipfile

import numpy as np
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from utils.cli.contents import describe_files
from utils.cli.errors import UserError
from utils.cli.processes import warn_once
from utils.cli.records import read_record
from utils.cli.run_folder import CHECKPOINTS, RunFolder
from utils.data.image_set import PLACES
from utils.hub.repositories import Source
from utils.transfer.adapters import LoraSettings, add_adapter, load_adapter, save_adapter
from utils.transfer.alignment import AlignedImages
from utils.transfer.arguments import OF_EACH_STAGE
from utils.transfer.classifiers import (
    list_loaded_files,
    load_classifier,
    load_image_processor,
    open_classifier,
    save_classifier,
)
from utils.transfer.domain_norm import measure_statistics
from utils.transfer.fine_tuning import StageResult, count_gpus, fine_tune
from utils.transfer.image_format import EvalImages
from utils.transfer.methods import StagePlan
from utils.transfer.model_parts import batch_norm_modules, imprint_head, recalibrate_batch_norm, reset_head
from utils.transfer.probe import choose_probe_images, probe_head
from utils.transfer.replay import ImagePair, ReplayedImages

logger = logging.getLogger(__name__)

STAGE_RECORD = "stage.json"
SETTINGS_RECORD = "stage_settings.json"
SYNTHETIC_STATISTICS = "synthetic_statistics.safetensors"  # of BatchNorm, if each kind of images has its own


@dataclass(frozen=True)
class Pretrained:
    """The checkpoint that a method adapts: its name, image processor, and options for loading it from the Hub.

    With `lora`, an adapter and the head are trained instead of all weights.
    """

    name: str
    image_processor: object
    hub_options: dict
    lora: LoraSettings | None = None

    @property
    def revision(self) -> str | None:
        """The commit, or None for a folder."""
        return None if Path(self.name).is_dir() else self.hub_options["revision"]

    @property
    def identity(self) -> str:
        """What identifies its current contents."""
        return Source(self.name, "--model_name_or_path", revision=self.revision).identity(list_loaded_files)


def open_pretrained(
    model_name_or_path: str, model_revision: str | None, trust_remote_code: bool, token: str | None,
    lora: LoraSettings | None = None,
) -> Pretrained:  # fmt: skip
    """Return the checkpoint to adapt, pinned to a commit, without loading its weights.

    Raises:
        UserError: the classifier does not exist, or has no usable image processor.
    """
    source = open_classifier(model_name_or_path, model_revision, token)
    hub_options = {"revision": source.revision or "main", "trust_remote_code": trust_remote_code, "token": token}
    image_processor = load_image_processor(model_name_or_path, **hub_options)
    return Pretrained(model_name_or_path, image_processor, hub_options, lora)


def run_stage(
    stage: StagePlan, start: Path | None, images: Dataset | IterableDataset, pretrained: Pretrained,
    class_names: list[str], training_args: TrainingArguments, output_dir: str | Path, *,
    validation: Dataset | None = None, resume: bool = False, inputs: Mapping[str, str] | None = None,
) -> tuple[nn.Module, StageResult]:  # fmt: skip
    """Fine-tune on `images` as planned, and save the trained stage in `output_dir`, with `stage.json` last.

    `start` is the folder of the stage whose weights it takes, None for `pretrained` itself. With `resume`, a finished
    stage in `output_dir` is loaded, and training continues from a checkpoint with the same result as uninterrupted
    training; otherwise the folder is cleared. `inputs` are those of `run_method`.

    Raises:
        UserError: the checkpoint is not an image classifier; the stage to resume has other settings or inputs; the
            settings are inconsistent; training diverged.
    """
    own_images = images.own if isinstance(images, ImagePair) else images
    _check_stream(stage, own_images)
    assert stage.settings.batch_norm != "domain" or isinstance(images, ReplayedImages), "only with two kinds of images"
    settings = describe_stage(stage, images, pretrained, class_names, training_args)
    folder = stage_folder(output_dir, settings, stage_inputs(stage, start, inputs or {}))
    earlier, checkpoint = find_earlier_run(folder) if resume else (None, None)
    # a later stage gets another head than the first, to which the features have adapted
    head_seed = training_args.seed if stage.start is None else zlib.crc32(f"{training_args.seed} {stage.name}".encode())
    if earlier is not None:
        finished = dataclasses.replace(stage, head_init="keep")
        return load_start(finished, folder.path, pretrained, class_names, head_seed), StageResult(**earlier)
    model = load_start(stage, start, pretrained, class_names, head_seed)
    if stage.settings.batch_norm != "frozen" and not batch_norm_modules(model):
        warn_once(f"Warning: --batch_norm {stage.settings.batch_norm}: {pretrained.name} has no BatchNorm; no effect.")
    if checkpoint is None:
        if PartialState().is_main_process:
            folder.begin()
        PartialState().wait_for_everyone()
        # statistics and head that come from the stage's own images
        eval_images = EvalImages(own_images, pretrained.image_processor)
        batch_size = training_args.per_device_eval_batch_size
        if stage.settings.batch_norm == "recalibrate":
            recalibrate_batch_norm(model, eval_images, training_args.device, training_args.seed, batch_size)
        if stage.settings.batch_norm == "domain":
            synthetic = EvalImages(images.synthetic, pretrained.image_processor)
            statistics = measure_statistics(
                model, synthetic, eval_images, training_args.device, training_args.seed, batch_size
            )
            images = dataclasses.replace(images, statistics=statistics)
            if PartialState().is_main_process:
                save_file(statistics, folder.path / SYNTHETIC_STATISTICS)
        if stage.head_init == "imprint":
            imprint_head(model, eval_images, batch_size)
        if stage.head_init == "probe":
            result = _probe(model, own_images, pretrained.image_processor, training_args)
    elif stage.settings.batch_norm == "domain":
        images = dataclasses.replace(images, statistics=load_file(folder.path / SYNTHETIC_STATISTICS))
    if stage.settings.max_steps > 0:
        result = fine_tune(
            model, images, pretrained.image_processor, stage.settings, training_args, output_dir, validation, checkpoint
        )
    if PartialState().is_main_process:
        if isinstance(model, PeftModel):
            save_adapter(model, folder.path)
        else:
            save_classifier(model, pretrained.image_processor, folder.path)
        folder.finish({"settings": settings, "result": result.to_dict()})
    PartialState().wait_for_everyone()
    return model, result


def _probe(model: nn.Module, images: Dataset, image_processor, training_args: TrainingArguments) -> StageResult:
    """Set the head to a probe, and return the result of a stage that does only this."""
    started = time.perf_counter()
    images = images.select(choose_probe_images(np.array(images["label"])))
    loading = training_args.per_device_eval_batch_size, training_args.dataloader_num_workers
    how = probe_head(model, EvalImages(images, image_processor), *loading)
    logger.info(f"Head: {how}.")
    seconds = round(time.perf_counter() - started, 2)
    return StageResult(0, len(images), seconds, count_gpus(training_args), [])


def _is_stream(images: Dataset | IterableDataset | ImagePair) -> bool:
    return isinstance(images, IterableDataset) or (isinstance(images, ImagePair) and images.is_streamed)


def _check_stream(stage: StagePlan, images: Dataset | IterableDataset) -> None:
    if not isinstance(images, IterableDataset):
        return
    for flag, value, rest in (
        ("head_init", "imprint", "choose reset or keep"),
        ("head_init", "probe", "choose reset or keep"),
        ("batch_norm", "recalibrate", "choose frozen or train"),
    ):
        if value in (stage.head_init, stage.settings.batch_norm):
            raise UserError(f"--{flag} {value}: needs all images at once, which a stream does not have; {rest}.")


def load_start(
    stage: StagePlan, start: Path | None, pretrained: Pretrained, class_names: list[str], seed: int
) -> PreTrainedModel | PeftModel:
    """Return the model that a stage starts with, on the CPU; for `imprint` and `probe`, still with a fresh head.

    `start` is the folder of an earlier stage, or None for the checkpoint itself; `seed` draws fresh weights.
    """
    keep_head = stage.head_init == "keep"
    load = partial(
        load_classifier, class_names=class_names, seed=seed, dropout=stage.settings.dropout,
        drop_path_rate=stage.settings.drop_path_rate, **pretrained.hub_options,
    )  # fmt: skip
    if pretrained.lora is None:
        return load(str(start or pretrained.name), reset_head=not keep_head)
    base = load(pretrained.name, reset_head=True)
    if start is None:
        return add_adapter(base, pretrained.lora, seed, revision=pretrained.hub_options.get("revision"))
    model = load_adapter(base, start)
    if not keep_head:
        reset_head(model, seed)
    return model


def describe_stage(
    stage: StagePlan, images: Dataset | IterableDataset, pretrained: Pretrained, class_names: list[str],
    training_args: TrainingArguments,
) -> dict:  # fmt: skip
    """Return everything that determines a stage's weights, as JSON values; a stream's images are not counted."""
    trainer_settings = training_args.to_dict()
    precision = training_args.mixed_precision
    description = {
        "start": stage.start or pretrained.name,
        "revision": None if stage.start else pretrained.hub_options.get("revision"),
        "images": stage.images,
        "num_images": None if _is_stream(images) else len(images),
        "head_init": stage.head_init,
        **stage.settings.to_dict(),
        "lora": dataclasses.asdict(pretrained.lora) if pretrained.lora else None,
        **{name: trainer_settings[name] for name in OF_EACH_STAGE},
        **({} if stage.synthetic_share is None else {"synthetic_share": stage.synthetic_share}),
        **(_describe_alignment(stage, images) if stage.alignment else {}),
        "mixed_precision": None if precision == "no" else precision,  # from a flag or accelerate launch
        "num_processes": training_args.world_size,
        "class_names": class_names,
    }
    return json.loads(json.dumps(description))


def _describe_alignment(stage: StagePlan, images: AlignedImages) -> dict:
    return {"alignment": dataclasses.asdict(stage.alignment), "num_real_images": len(images.real)}


def stage_inputs(stage: StagePlan, start: Path | None, inputs: Mapping[str, str]) -> dict[str, str]:
    """Return what identifies the inputs of a stage: the model, its images, the earlier stage."""
    unused = {"real": ("synthetic_dataset",), "synthetic": PLACES}.get(stage.images, ())
    if stage.alignment is not None:
        unused = ()
    used = {name: identity for name, identity in inputs.items() if name not in unused}
    if start is None:
        return used
    weights = sorted(path.name for path in start.glob("*.safetensors"))
    return used | {"start": describe_files(start, weights)}


def stage_folder(folder: str | Path, settings: dict, inputs: Mapping[str, str]) -> RunFolder:
    """Return the folder of a stage with the settings of `describe_stage` and the inputs of `stage_inputs`."""
    return RunFolder(
        Path(folder), "a stage", settings, STAGE_RECORD, noted_in=(SETTINGS_RECORD, "settings"),
        traces=CHECKPOINTS, inputs=inputs,
    )  # fmt: skip


def find_earlier_run(folder: RunFolder) -> tuple[dict | None, str | None]:
    """Return the result of the finished stage in a folder, and its last complete checkpoint; None if there is none.

    Raises:
        UserError: they have other settings.
    """
    result, checkpoint = None, None
    if folder.is_begun:
        folder.check_options()
        if (folder.path / STAGE_RECORD).exists():
            result = read_record(folder.path / STAGE_RECORD)["result"]
        else:
            checkpoint = _last_checkpoint(folder)
    PartialState().wait_for_everyone()  # before one of them changes the folder
    return result, checkpoint


def _last_checkpoint(folder: RunFolder) -> str | None:
    """Return the complete checkpoint with the most steps."""
    whole = None
    for path in folder.find_traces():
        if _is_complete(path, folder.options["num_processes"]):
            whole = str(path)
        else:
            warn_once(f"Warning: --resume_from_checkpoint: {path} is incomplete or damaged; it is skipped.")
    return whole


def _is_complete(checkpoint: Path, num_processes: int) -> bool:
    """Return whether a checkpoint has the Trainer's state (written last), all random states and no damaged file."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, json.JSONDecodeError, SafetensorError):
        return False
    saved = list(checkpoint.glob("rng_state*.pth"))
    # torch saves zip archives; incomplete ones are not valid
    return len(saved) == num_processes and all(map(is_zipfile, [*saved, *checkpoint.glob("*.pt")]))
