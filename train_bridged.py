#!/usr/bin/env python
"""Fine-tune an image classifier on synthetic images, then on real ones (bridged transfer, arXiv 2403.19866).

    accelerate launch train_bridged.py --synthetic_dataset user/cars-syn
    accelerate launch train_bridged.py --synthetic_dataset cars-syn --num_shots 4 --head_init keep
    accelerate launch train_bridged.py --dataset_name user/cars --method vanilla

The real images, their columns and their few-shot subset come from the record in the synthetic set; flags win.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from accelerate import PartialState
from datasets import concatenate_datasets
from transformers import TrainingArguments, set_seed

from utils.cli.arguments import ModelArguments, RealDataArguments
from utils.cli.commands import public_command
from utils.cli.errors import UserError, run_script
from utils.cli.parsing import ScriptArgumentParser, require_positive
from utils.cli.records import (
    ALL_RESULTS,
    BRIDGED_CONFIG,
    RUN_CONFIG,
    read_record,
    resolve_options,
    was_finished,
    write_record,
    write_run_config,
)
from utils.data.class_folders import check_real_images_given
from utils.data.real_images import RealImagesRecord, check_images, load_real_images
from utils.data.splits import SPLIT_SEED
from utils.hub.licenses import read_licenses
from utils.hub.merged_card import check_card
from utils.hub.model_card import write_model_card
from utils.hub.publishing import publish_finished, publish_folder
from utils.hub.targets import open_target
from utils.transfer.classifiers import check_classifier, load_image_processor, save_classifier
from utils.transfer.fine_tuning import run_stage, steps_per_epoch
from utils.transfer.image_datasets import EvalImages, take_spread
from utils.transfer.methods import METHODS, StagePlan, StageSettings, plan_stages
from utils.transfer.metrics import classification_metrics
from utils.transfer.prediction import leep_of_checkpoint, predict
from utils.transfer.report import plot_report, print_results
from utils.transfer.synthetic_images import SyntheticSource, count_leaked_images, load_synthetic, open_synthetic

logger = logging.getLogger(__name__)

# the classifier itself, no stage and no training state
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
PUBLISHED_FILES = (
    *WEIGHTS, "config.json", "preprocessor_config.json", "report.png", ALL_RESULTS, BRIDGED_CONFIG, RUN_CONFIG,
    "README.md",
)  # fmt: skip


@dataclass
class SyntheticDataArguments:
    """The labelled synthetic images."""

    _argument_group_name = "synthetic images"

    synthetic_dataset: str | None = field(
        default=None, metadata={"help": "Synthetic set, as generate_synthetic.py wrote it: a folder or a data set id."}
    )
    synthetic_dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the synthetic set on the Hub."}
    )
    max_synthetic_samples_per_class: int | None = field(
        default=None, metadata={"help": "Use the first so many synthetic images of each class; all when not given."}
    )


@dataclass
class BridgeArguments:
    """The method and its two stages."""

    _argument_group_name = "bridged transfer"

    method: str = field(
        default="bridged",
        metadata={
            "help": "bridged: synthetic, then real images; vanilla: real only; mix: both together in one stage; "
            "synthetic_only: the first stage alone.",
            "choices": METHODS,
        },
    )
    bridge_num_train_epochs: float = field(
        default=5.0, metadata={"help": "Epochs over the synthetic images (over both kinds for mix)."}
    )
    bridge_max_steps: int | None = field(
        default=None, metadata={"help": "Optimiser steps on synthetic images, in place of epochs."}
    )
    bridge_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate on synthetic images; --learning_rate when not given."}
    )
    bridge_mixup_alpha: float = field(
        default=0.2, metadata={"help": "Mixup's Beta parameter on synthetic images; 0 turns it off."}
    )
    mixup_alpha: float = field(default=0.0, metadata={"help": "Mixup's Beta parameter elsewhere; 0 turns it off."})
    head_init: str = field(
        default="reset",
        metadata={"help": "Head at the start of the second stage: fresh or kept.", "choices": ("reset", "keep")},
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the head; 10 x the stage's for a fresh head, 1 x for a kept one."},
    )
    batch_norm: str = field(
        default="frozen",
        metadata={
            "help": "BatchNorm statistics: the pretrained, or those of the batch.",
            "choices": ("frozen", "train"),
        },
    )
    match_steps: bool = field(
        default=False, metadata={"help": "Give vanilla and mix as many steps as both stages together."}
    )


@dataclass
class BridgedTrainingArguments(TrainingArguments):
    """Trainer's own flags, for both stages; `num_train_epochs`, `max_steps` and `learning_rate` are the second's."""

    _argument_group_name = "training"

    output_dir: str | None = field(
        default=None, metadata={"help": "Output folder; '<synthetic set>-bridged' (the method's name) when not given."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a classifier that is there already."})
    do_train: bool = field(default=True, metadata={"help": "Train; without it there is nothing to do."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Images per device and step."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Images per device in evaluation."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of AdamW."})
    num_train_epochs: float = field(default=30.0, metadata={"help": "Epochs over the real images."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up: steps, or below 1 a share of all steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    logging_steps: float = field(default=0.05, metadata={"help": "Log every so many steps, or below 1 this share."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints in the stages' folders."})
    report_to: str = field(default="none", metadata={"help": "Experiment tracker, as in transformers."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use so many validation and test images, evenly spread; all when not given."}
    )


def parse_arguments(argv: Sequence[str] | None) -> tuple:
    """Return the argument groups, with what the synthetic set's record says for flags that are not given."""
    parser = ScriptArgumentParser(
        [ModelArguments, RealDataArguments, SyntheticDataArguments, BridgeArguments, BridgedTrainingArguments]
    )
    _, real_args, synthetic_args, bridge_args, training_args = parser.parse(argv)
    source = None
    if synthetic_args.synthetic_dataset is not None:
        source = open_synthetic(
            synthetic_args.synthetic_dataset, synthetic_args.synthetic_dataset_revision, training_args.hub_token
        )
        recorded = source.record["real_images"] or {}  # a set for a list of class names has none
        given = real_args.dataset_name, real_args.train_dir
        if given in ((None, None), (recorded.get("dataset_name"), recorded.get("train_dir"))):
            parser.set_defaults(**recorded)
    elif synthetic_args.synthetic_dataset_revision is not None:
        raise UserError(
            f"--synthetic_dataset_revision {synthetic_args.synthetic_dataset_revision}: needs --synthetic_dataset."
        )
    elif bridge_args.method != "vanilla":
        raise UserError(f"--synthetic_dataset: --method {bridge_args.method} needs one; only vanilla does without.")
    elif bridge_args.match_steps and bridge_args.bridge_max_steps is None:
        raise UserError("--match_steps: give --synthetic_dataset or --bridge_max_steps, the steps to match.")
    elif real_args.dataset_name is None and real_args.train_dir is None:
        raise UserError(
            "--dataset_name or --train_dir: give the real images, or a --synthetic_dataset whose record names them."
        )
    name = Path(synthetic_args.synthetic_dataset or real_args.dataset_name or real_args.train_dir).name
    parser.set_defaults(output_dir=f"{name}-{bridge_args.method}")
    arguments = parser.parse(argv)
    check_arguments(*arguments)
    return (*arguments, source)


def check_arguments(model_args, real_args, synthetic_args, bridge_args, training_args) -> None:
    """Check values that need no data.

    Raises:
        UserError: a value is out of range, or asks for what this script does not do.
    """
    check_real_images_given(real_args)
    require_positive(
        max_synthetic_samples_per_class=synthetic_args.max_synthetic_samples_per_class,
        bridge_num_train_epochs=bridge_args.bridge_num_train_epochs,
        bridge_max_steps=bridge_args.bridge_max_steps,
        bridge_learning_rate=bridge_args.bridge_learning_rate,
        head_learning_rate=bridge_args.head_learning_rate,
        learning_rate=training_args.learning_rate,
        num_train_epochs=training_args.num_train_epochs,
        max_eval_samples=training_args.max_eval_samples,
    )
    for name in ("bridge_mixup_alpha", "mixup_alpha"):
        if getattr(bridge_args, name) < 0:
            raise UserError(f"--{name} {getattr(bridge_args, name)}: must be 0 (off) or above.")
    if not training_args.do_train:
        raise UserError("--do_train false: there is nothing else to do; for predictions use a transformers pipeline.")
    for name in ("resume_from_checkpoint", "load_best_model_at_end"):
        if getattr(training_args, name):
            raise UserError(f"--{name}: not offered; the second stage can be run again from the folder 'stage1'.")


def stage_settings(bridge_args, training_args, num_images: dict[str, int]) -> tuple[StageSettings, StageSettings]:
    """Return the settings on synthetic and on real images (on both kinds, for mix), epochs turned into steps."""

    def num_steps(max_steps: int | None, epochs: float, kind: str) -> int:
        if max_steps is not None and max_steps > 0:
            return max_steps
        return max(1, round(epochs * steps_per_epoch(num_images.get(kind, 0), training_args)))

    def head_factor(learning_rate: float, reset_head: bool) -> float:
        if bridge_args.head_learning_rate is not None:
            return bridge_args.head_learning_rate / learning_rate
        return 10.0 if reset_head else 1.0

    bridge_budget = bridge_args.bridge_max_steps, bridge_args.bridge_num_train_epochs
    learning_rate = bridge_args.bridge_learning_rate or training_args.learning_rate
    bridge_settings = StageSettings(
        num_steps(*bridge_budget, "synthetic"),
        learning_rate,
        head_factor(learning_rate, True),
        bridge_args.bridge_mixup_alpha,
        bridge_args.batch_norm,
    )
    unmatched_mix = bridge_args.method == "mix" and not bridge_args.match_steps
    keeps_head = bridge_args.method == "bridged" and bridge_args.head_init == "keep"
    settings = StageSettings(
        num_steps(*bridge_budget, "both")
        if unmatched_mix
        else num_steps(training_args.max_steps, training_args.num_train_epochs, "real"),
        training_args.learning_rate,
        head_factor(training_args.learning_rate, not keeps_head),
        bridge_args.mixup_alpha,
        bridge_args.batch_norm,
    )
    return bridge_settings, settings


def load_images(real_args, synthetic_args, bridge_args, source: SyntheticSource | None, token: str | None) -> tuple:
    """Return the real images and the training images by kind (`real`, `synthetic`, `both`), checked."""
    real = load_real_images(RealImagesRecord(**dataclasses.asdict(real_args)), token)
    check_images(real.train, "real training images", real.record.image_column_name, real.train_indices)
    images = {"real": real.train}
    if source is not None:
        images["synthetic"] = load_synthetic(
            source, real.class_names, synthetic_args.max_synthetic_samples_per_class, token
        )
        images["both"] = concatenate_datasets([real.train, images["synthetic"]])
        num_leaked = count_leaked_images(source.record, real.train_indices)
        if num_leaked and bridge_args.method != "vanilla":
            logger.warning(
                f"Warning: the style token has seen {num_leaked} real images outside the {len(real.train)} that this "
                "run trains on, so a method without synthetic images has seen fewer real images."
            )
    return real, images


def describe_run(model_args, bridge_args, real, source: SyntheticSource | None, stages: list[StagePlan]) -> dict:
    """Return what `bridged_config.json` holds."""
    return {
        "method": bridge_args.method,
        "head_init": bridge_args.head_init,
        "match_steps": bridge_args.match_steps,
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "base_model": model_args.model_name_or_path,
        "base_model_revision": model_args.model_revision,
        "class_names": real.class_names,
        "real_images": real.record.to_dict(),
        "train_indices": real.train_indices.tolist(),
        "validation": {"num_images": len(real.validation), "split_seed": SPLIT_SEED},
        "synthetic_dataset": dataclasses.asdict(source) if source else None,
    }


def main(argv: Sequence[str] | None = None) -> dict:
    started = time.time()
    model_args, real_args, synthetic_args, bridge_args, training_args, source = parse_arguments(argv)

    output_dir = Path(training_args.output_dir)
    options = resolve_options([model_args, real_args, synthetic_args, bridge_args, training_args])
    finished = was_finished(output_dir, BRIDGED_CONFIG, "a classifier", options, training_args.overwrite_output_dir)
    hub_target = None
    if training_args.push_to_hub:
        hub_target = open_target(
            output_dir, training_args.hub_model_id, "model", bool(training_args.hub_private_repo),
            training_args.hub_revision, training_args.hub_token,
        )  # fmt: skip
    if finished:
        publish_finished(output_dir, hub_target, PUBLISHED_FILES)
        return read_record(output_dir / ALL_RESULTS)
    check_card(output_dir / "README.md")

    # logging
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    transformers.utils.logging.set_verbosity_error()
    is_main_process = PartialState().is_main_process
    logger.setLevel(logging.INFO if is_main_process else logging.ERROR)
    set_seed(training_args.seed)

    # data
    token = training_args.hub_token or None
    pretrained = model_args.model_name_or_path
    model_args.model_revision = check_classifier(pretrained, model_args.model_revision, token)
    real, images = load_images(real_args, synthetic_args, bridge_args, source, token)
    validation = take_spread(real.validation, training_args.max_eval_samples)
    test = take_spread(real.test, training_args.max_eval_samples)

    # model
    hub_options = {
        "revision": model_args.model_revision or "main",
        "trust_remote_code": model_args.trust_remote_code,
        "token": token,
    }
    image_processor = load_image_processor(pretrained, **hub_options)

    # stages
    if is_main_process:
        (output_dir / BRIDGED_CONFIG).unlink(missing_ok=True)  # from here on, what is there is being replaced
    bridge_settings, settings = stage_settings(bridge_args, training_args, {k: len(v) for k, v in images.items()})
    stages = plan_stages(bridge_args.method, bridge_settings, settings, bridge_args.head_init, bridge_args.match_steps)
    train_images = EvalImages(real.train, image_processor)
    results = {"leep_pretrained": leep_of_checkpoint(pretrained, train_images, **hub_options), "leep_bridged": None}
    log_histories = {}
    for stage in stages:
        stage_dir = output_dir / stage.name
        start, start_options = (output_dir / "stage1", {}) if stage.name == "stage2" else (pretrained, hub_options)
        logger.info(
            f"{stage.name}: {stage.settings.max_steps} steps on {len(images[stage.images])} images ({stage.images})"
        )
        model, done = run_stage(
            stage, start, real.class_names, images[stage.images], image_processor, training_args, stage_dir, validation,
            **start_options,
        )  # fmt: skip
        results |= {f"{stage.name}_{key}": value for key, value in done.summary().items()}
        log_histories[stage.name] = done.log_history
        if stage.name == "stage1":
            if is_main_process:
                save_classifier(model, image_processor, stage_dir)
            PartialState().wait_for_everyone()
            results["leep_bridged"] = leep_of_checkpoint(stage_dir, train_images)

    # results: the one time that the test images are read
    logits, labels = predict(model, EvalImages(test, image_processor), training_args.per_device_eval_batch_size)
    results |= {f"test_{name}": value for name, value in classification_metrics(logits, labels).items()}
    results["num_test_images"] = len(test)
    if is_main_process:
        config = describe_run(model_args, bridge_args, real, source, stages)
        save_classifier(model, image_processor, output_dir)
        write_record(output_dir / ALL_RESULTS, results)
        plot_report(output_dir / "report.png", log_histories, logits, labels, real.class_names)
        write_run_config(output_dir, options, started)
        print_results(f"{bridge_args.method}: {output_dir}", results)

        # card
        model_id = hub_target.repo_id if hub_target else output_dir.resolve().name
        sources = [(pretrained, "model", model_args.model_revision)]
        sources.append((real.record.name, "dataset", real.record.dataset_revision))
        if source is not None:
            sources.append((source.name, "dataset", source.revision))
        licenses = read_licenses(sources, token)
        command = public_command("train_bridged.py", argv)
        write_model_card(output_dir, model_id, pretrained, config, results, licenses, command)
        write_record(output_dir / BRIDGED_CONFIG, config)  # last: its presence says that the classifier is finished
        if hub_target is not None:
            publish_folder(output_dir, hub_target, PUBLISHED_FILES, stale_patterns=WEIGHTS)
    return results


if __name__ == "__main__":
    run_script(main)
