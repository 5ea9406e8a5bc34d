"""One stage of a method, from the weights it starts with to its folder: settings, checkpoints, the trained model."""

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
SYNTHETIC_STATISTICS = "synthetic_statistics.safetensors"  # of BatchNorm, where it has some for each kind of images


@dataclass(frozen=True)
class Pretrained:
    """The checkpoint that a method adapts: its name, its image processor, and how it is loaded from the Hub.

    With `lora`, an adapter and the head are trained in place of all weights.
    """

    name: str
    image_processor: object
    hub_options: dict
    lora: LoraSettings | None = None

    @property
    def revision(self) -> str | None:
        """The commit, None of a folder."""
        return None if Path(self.name).is_dir() else self.hub_options["revision"]

    @property
    def identity(self) -> str:
        """What tells its contents, as they are now, from others of its name."""
        return Source(self.name, "--model_name_or_path", revision=self.revision).identity(list_loaded_files)


def open_pretrained(
    model_name_or_path: str, model_revision: str | None, trust_remote_code: bool, token: str | None,
    lora: LoraSettings | None = None,
) -> Pretrained:  # fmt: skip
    """Return the checkpoint that is to be adapted, its commit pinned; its weights are not loaded.

    Raises:
        UserError: there is no such classifier, or it has no image processor that can be used.
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
    """Fine-tune on `images` as the plan says, and save the trained stage in `output_dir`, `stage.json` last.

    `start` is the folder of the stage whose weights it takes, None for `pretrained` itself. With `resume` it goes on
    from what `output_dir` holds: a finished stage is loaded, from a checkpoint it is trained on with the same outcome
    as without a break; else the folder is cleared. `inputs` are those of `run_method`.

    Raises:
        UserError: the checkpoint is no image classifier; what is to be resumed was begun with other settings or inputs;
            the settings do not go together; training diverged.
    """
    own_images = images.own if isinstance(images, ImagePair) else images
    _check_stream(stage, own_images)
    assert stage.settings.batch_norm != "domain" or isinstance(images, ReplayedImages), "of two kinds of images only"
    settings = describe_stage(stage, images, pretrained, class_names, training_args)
    folder = stage_folder(output_dir, settings, stage_inputs(stage, start, inputs or {}))
    earlier, checkpoint = find_earlier_run(folder) if resume else (None, None)
    # the head of a later stage is not that of the first drawn once more, to which the features have come closer
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
        # statistics and head, where they are those of the stage's own images
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
    """Set the head to a probe's, and return what a stage that is nothing else has done."""
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
            raise UserError(f"--{flag} {value}: needs all images at once, which a stream does not give; {rest}.")


def load_start(
    stage: StagePlan, start: Path | None, pretrained: Pretrained, class_names: list[str], seed: int
) -> PreTrainedModel | PeftModel:
    """Return the model that a stage begins with, on the CPU; for `imprint` and `probe`, with a fresh head still.

    `start` is the folder of an earlier stage, or None for the checkpoint itself; `seed` draws what is fresh.
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
    """Return all that decides a stage's weights, as JSON holds it; a stream's images are not counted."""
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
        "mixed_precision": None if precision == "no" else precision,  # of a flag, or of accelerate launch
        "num_processes": training_args.world_size,
        "class_names": class_names,
    }
    return json.loads(json.dumps(description))


def _describe_alignment(stage: StagePlan, images: AlignedImages) -> dict:
    return {"alignment": dataclasses.asdict(stage.alignment), "num_real_images": len(images.real)}


def stage_inputs(stage: StagePlan, start: Path | None, inputs: Mapping[str, str]) -> dict[str, str]:
    """Return what tells the contents that a stage depends on from others: the model, its images, the earlier stage."""
    unused = {"real": ("synthetic_dataset",), "synthetic": PLACES}.get(stage.images, ())
    if stage.alignment is not None:
        unused = ()
    used = {name: identity for name, identity in inputs.items() if name not in unused}
    if start is None:
        return used
    weights = sorted(path.name for path in start.glob("*.safetensors"))
    return used | {"start": describe_files(start, weights)}


def stage_folder(folder: str | Path, settings: dict, inputs: Mapping[str, str]) -> RunFolder:
    """Return the folder of a stage with these settings, of `describe_stage`, and inputs, of `stage_inputs`."""
    return RunFolder(
        Path(folder), "a stage", settings, STAGE_RECORD, noted_in=(SETTINGS_RECORD, "settings"),
        traces=CHECKPOINTS, inputs=inputs,
    )  # fmt: skip


def find_earlier_run(folder: RunFolder) -> tuple[dict | None, str | None]:
    """Return the result of the finished stage that a folder holds, and its last whole checkpoint, None where not.

    Raises:
        UserError: they were made with other settings.
    """
    result, checkpoint = None, None
    if folder.is_begun:
        folder.check_options()
        if (folder.path / STAGE_RECORD).exists():
            result = read_record(folder.path / STAGE_RECORD)["result"]
        else:
            checkpoint = _last_checkpoint(folder)
    PartialState().wait_for_everyone()  # before one of them changes what is there
    return result, checkpoint


def _last_checkpoint(folder: RunFolder) -> str | None:
    """Return the checkpoint of the most steps among those that were written to the end."""
    whole = None
    for path in folder.find_traces():
        if _is_whole(path, folder.options["num_processes"]):
            whole = str(path)
        else:
            warn_once(f"Warning: --resume_from_checkpoint: {path} is not whole, or torn; it is passed over.")
    return whole


def _is_whole(checkpoint: Path, num_processes: int) -> bool:
    """Say whether a checkpoint has its last file, the Trainer's state, all random states, and no torn file."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, json.JSONDecodeError, SafetensorError):
        return False
    saved = list(checkpoint.glob("rng_state*.pth"))
    # torch saves archives, of which a torn one has no end
    return len(saved) == num_processes and all(map(is_zipfile, [*saved, *checkpoint.glob("*.pt")]))
