#!/usr/bin/env python
"""Fine-tune an image classifier on synthetic images, then on real ones (bridged transfer, arXiv 2403.19866).

    accelerate launch train_bridged.py --synthetic_dataset user/cars-syn
    accelerate launch train_bridged.py --synthetic_dataset cars-syn --num_shots 4 --head_init keep
    accelerate launch train_bridged.py --synthetic_dataset cars-syn --use_peft --bf16 \\
        --model_name_or_path timm/vit_base_patch16_224.augreg_in21k_ft_in1k
    accelerate launch train_bridged.py --dataset_name user/cars --method vanilla
    accelerate launch train_bridged.py --synthetic_dataset user/cars-syn --resume_from_checkpoint latest
    accelerate launch train_bridged.py --output_dir cars-syn-bridged --no_do_train --do_eval
    accelerate launch train_bridged.py --train_dir photos --dry_run

The real images, their columns and their few-shot subset come from the record in the synthetic set; flags win.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.cli.errors import UserError, run_script
from utils.cli.options import absolute_if_local, free_options, resolve_options
from utils.cli.parsing import ScriptArgumentParser
from utils.cli.processes import public_command
from utils.cli.records import (
    ALL_RESULTS,
    BRIDGED_CONFIG,
    EVAL_RESULTS,
    RUN_CONFIG,
    read_record,
    write_record,
    write_run_config,
)
from utils.cli.run_folder import RunFolder
from utils.data.arguments import RealDataArguments
from utils.data.class_folders import check_output_outside, check_real_images_given
from utils.data.label_matching import match_labels
from utils.hub.merged_card import check_card
from utils.hub.publishing import publish_finished, publish_folder
from utils.hub.targets import open_target
from utils.transfer.arguments import (
    BridgedTrainingArguments,
    BridgeStageArguments,
    LoraArguments,
    MethodArguments,
    ModelArguments,
    StageArguments,
    SyntheticDataArguments,
    check_training_arguments,
)
from utils.transfer.methods import STAGE_NAMES, StagePlan, plan_stages
from utils.transfer.stage_settings import check_stages, stage_settings

logger = logging.getLogger(__name__)

# up to so many real images a class the head of stage 1 beat a fresh one (README, the demo's comparison)
MAX_IMAGES_FOR_KEPT_HEAD = 4
# the classifier itself, no stage and no training state
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapter/*")
PUBLISHED_FILES = (
    *WEIGHTS, "config.json", "preprocessor_config.json", "report.png", ALL_RESULTS, BRIDGED_CONFIG, RUN_CONFIG,
    "README.md",
)  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """All argument groups of this script, in the order of `--help`."""

    model: ModelArguments
    real: RealDataArguments
    synthetic: SyntheticDataArguments
    method: MethodArguments
    stage: StageArguments
    bridge: BridgeStageArguments
    lora: LoraArguments
    training: BridgedTrainingArguments
    real_images_from: str | None = None  # whose record names the real images, where no flag does

    @property
    def groups(self) -> list:
        return [getattr(self, group.name) for group in GROUPS]


GROUPS = [group for group in dataclasses.fields(Arguments) if group.name != "real_images_from"]


def parse_arguments(argv: Sequence[str] | None) -> tuple:
    """Return the arguments, with what the synthetic set's record says for flags that are not given, and that set."""
    from utils.data.real_images import same_image_set
    from utils.transfer.synthetic_images import open_synthetic

    parser = ScriptArgumentParser([group.type for group in GROUPS], description=__doc__)
    args = Arguments(*parser.parse(argv))
    source, recorded = None, None
    given = args.real.dataset_name, args.real.train_dir
    if not args.training.do_train:
        recorded = read_finished(args)["real_images"]
    elif args.synthetic.synthetic_dataset is not None:
        source = open_synthetic(
            args.synthetic.synthetic_dataset, args.synthetic.synthetic_dataset_revision, args.training.hub_token
        )
        recorded = source.record["real_images"]  # None: made for a list of class names
    elif not args.training.dry_run:
        check_real_alone(args)
    if recorded and (given == (None, None) or same_image_set(recorded, *given)):
        parser.set_defaults(**recorded)
    name = args.synthetic.synthetic_dataset or args.real.dataset_name or args.real.train_dir or ""
    parser.set_defaults(output_dir=f"{Path(name).resolve().name}-{args.method.method}")
    is_recorded = bool(recorded) and given == (None, None)
    recorded_in = args.synthetic.synthetic_dataset or args.training.output_dir
    args = Arguments(*parser.parse(argv), real_images_from=recorded_in if is_recorded else None)
    check_arguments(args)
    if not args.training.dry_run:
        check_output_outside(args.training.output_dir, args.real)
    return args, source


def read_finished(args: Arguments) -> dict:
    """Return the record of the classifier that is to be evaluated.

    Raises:
        UserError: no evaluation is asked for, or there is no finished classifier.
    """
    if not args.training.do_eval:
        raise UserError(
            "--no_do_train: leaves nothing to do; add --do_eval to evaluate the classifier in --output_dir."
        )
    path = Path(args.training.output_dir) / BRIDGED_CONFIG
    if not path.is_file():
        raise UserError(f"--output_dir {args.training.output_dir}: holds no finished classifier (no {BRIDGED_CONFIG}).")
    return read_record(path)


def check_real_alone(args: Arguments) -> None:
    """Check that a run without a synthetic set needs none.

    Raises:
        UserError: it does, or names no real images.
    """
    if args.synthetic.synthetic_dataset_revision is not None:
        raise UserError(
            f"--synthetic_dataset_revision {args.synthetic.synthetic_dataset_revision}: needs --synthetic_dataset."
        )
    if args.method.method != "vanilla":
        raise UserError(f"--synthetic_dataset: --method {args.method.method} needs one; only vanilla does without.")
    if args.method.match_steps and args.bridge.bridge_max_steps is None:
        raise UserError("--match_steps: give --synthetic_dataset or --bridge_max_steps, the steps to match.")
    if args.real.dataset_name is None and args.real.train_dir is None:
        raise UserError(
            "--dataset_name or --train_dir: give the real images, or a --synthetic_dataset whose record names them."
        )


def check_arguments(args: Arguments) -> None:
    """Check values that need no data.

    Raises:
        UserError: a value asks for what this script does not do.
    """
    check_real_images_given(args.real)
    for name, value in (("batch_norm", args.stage.batch_norm), ("bridge_batch_norm", args.bridge.bridge_batch_norm)):
        if args.lora.use_peft and value != "frozen":
            raise UserError(f"--{name} {value}: not with --use_peft; an adapter has no place for statistics.")
    if args.synthetic.streaming and args.real.skip_bad_images:
        logger.warning("Warning: --skip_bad_images: no image of a stream is opened first; damaged ones end the run.")
    if args.synthetic.streaming and args.method.method == "mix":
        raise UserError("--streaming: not with --method mix, which draws from both kinds of images at random.")
    check_training_arguments(args.training)


def load_and_open(args: Arguments, parts: tuple[str, ...] = ("train", "validation", "test")):
    """Return the real images; each of `parts` was opened once.

    Raises:
        UserError: they cannot be loaded, one is damaged, or none are left to validate or to test on.
    """
    from utils.data.image_set import RealImagesRecord
    from utils.data.opened_images import open_all
    from utils.data.real_images import check_held_out, limit_held_out, load_real_images

    try:
        real = load_real_images(RealImagesRecord.from_arguments(args.real), args.training.hub_token or None)
    except UserError as error:
        if args.real_images_from is None:
            raise
        raise UserError(
            f"{error} (named in the record of {args.real_images_from}; give --dataset_name or --train_dir)"
        ) from None
    for remark in real.remarks:
        logger.info(remark)
    real = limit_held_out(real, args.training.max_eval_samples)
    check_held_out(real, parts)
    opened = open_all(real, parts)
    for remark in opened.remarks:
        logger.warning(remark)
    check_held_out(opened.images, parts)  # of what was left out, all may have been in one part
    return opened.images


def load_images(args: Arguments, source) -> tuple:
    """Return the real images, the training images by kind, and how many these are.

    Raises:
        UserError: the images do not go together, are damaged, or a stream's epochs cannot be counted.
    """
    from utils.transfer.training_images import load_training_images

    token = args.training.hub_token or None
    real = load_and_open(args)
    images, num_images = load_training_images(
        real, source, args.method.method, token, max_samples_per_class=args.synthetic.max_synthetic_samples_per_class,
        allow_missing_classes=args.synthetic.allow_missing_classes, streaming=args.synthetic.streaming,
        mix_ratio=args.method.mix_ratio,
    )  # fmt: skip
    if "synthetic" in images and num_images["synthetic"] is None:
        if args.bridge.bridge_max_steps is None:
            raise UserError(
                f"--streaming: the record of {source.name} does not count its images; give --bridge_max_steps."
            )
        num_images["synthetic"] = 0  # not asked for where steps are given
    is_reset = args.method.method == "bridged" and args.method.head_init == "reset"
    if is_reset and len(real.train) <= MAX_IMAGES_FOR_KEPT_HEAD * len(real.class_names):
        logger.info(
            f"With {len(real.train)} real images of {len(real.class_names)} classes --head_init keep is likely to be "
            "better than the fresh head of the paper."
        )
    return real, images, num_images


def describe_run(args: Arguments, real, source, stages: list[StagePlan]) -> dict:
    """Return what `bridged_config.json` holds."""
    return {
        **vars(args.method),
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "lora": vars(args.lora) if args.lora.use_peft else None,
        "base_model": absolute_if_local(args.model.model_name_or_path),
        "base_model_revision": args.model.model_revision,
        "class_names": real.class_names,
        "real_images": real.record.to_dict(),
        "train_indices": real.train_indices.tolist(),
        "parts": {
            part: {"split": where.split, "num_images": len(where.rows), "is_carved": where.is_carved}
            for part, where in real.parts.items()
        },
        "validation": {"num_images": len(real.validation)},
        "test_split": real.parts["test"].split,
        "synthetic_dataset": dataclasses.asdict(source) | {"name": absolute_if_local(source.name)} if source else None,
    }


def set_up_logging(training_args: BridgedTrainingArguments) -> bool:
    """Let the main process alone speak, and say whether this is it."""
    import transformers

    logging.basicConfig(format="%(message)s")  # not INFO for all: httpx tells of every request to the Hub
    transformers.utils.logging.set_verbosity_error()
    # joins the processes, and must be the first to do so: a bare PartialState would take CPU processes for single ones
    is_main_process = training_args.process_index == 0
    for ours in (logger, logging.getLogger("utils")):
        ours.setLevel(logging.INFO if is_main_process else logging.ERROR)
    return is_main_process


def loader_options(training_args: BridgedTrainingArguments) -> tuple[int, int]:
    """Return batch size and workers of an evaluation."""
    return training_args.per_device_eval_batch_size, training_args.dataloader_num_workers


def check_data(args: Arguments, source) -> dict:
    """Print what is wrong with the real images, for `--dry_run`, and return how often.

    Raises:
        UserError: there are no such images, or the synthetic set has other classes.
    """
    from utils.data.audit import audit_images, list_findings, print_audit
    from utils.data.image_set import RealImagesRecord
    from utils.data.real_images import load_real_images
    from utils.transfer.synthetic_images import load_synthetic

    is_main_process = set_up_logging(args.training)
    token = args.training.hub_token or None
    real = load_real_images(RealImagesRecord.from_arguments(args.real), token)
    for remark in real.remarks:
        logger.info(remark)
    if source is not None:
        allowed = args.synthetic.allow_missing_classes
        load_synthetic(
            source, real.class_names, token=token, allow_missing_classes=allowed, streaming=args.synthetic.streaming
        )
    if not is_main_process:
        return {}
    audit = audit_images(real)
    print_audit(audit, real.record.name)
    return {finding.what: finding.number for finding in list_findings(audit)}


def evaluate_finished(args: Arguments) -> dict:
    """Evaluate the finished classifier in `--output_dir` on the test images, write and return `eval_results.json`.

    Raises:
        UserError: the real images have other classes than the classifier.
    """
    from utils.transfer.classifiers import load_classifier, load_image_processor
    from utils.transfer.image_datasets import EvalImages
    from utils.transfer.metrics import test_metrics
    from utils.transfer.prediction import predict
    from utils.transfer.report import print_results

    is_main_process = set_up_logging(args.training)
    output_dir = Path(args.training.output_dir)
    class_names = read_record(output_dir / BRIDGED_CONFIG)["class_names"]
    real = load_and_open(args, ("test",))
    # found by name: the same images may come with their classes in another case or order
    places = match_labels(class_names, real.class_names, f"--output_dir {output_dir}:", "the classifier")
    trust = {"trust_remote_code": args.model.trust_remote_code}
    model = load_classifier(str(output_dir), class_names, False, args.training.seed, **trust)
    images = EvalImages(real.test, load_image_processor(str(output_dir), **trust))
    logits, labels = predict(model, images, *loader_options(args.training))
    results = test_metrics(logits[:, np.argsort(list(places.values()))], labels)
    if is_main_process:
        write_record(output_dir / EVAL_RESULTS, results)
        print_results(f"{output_dir} on '{real.record.name}'", results)
    return results


def main(argv: Sequence[str] | None = None) -> dict:
    started = time.time()
    args, source = parse_arguments(argv)
    training_args, token = args.training, args.training.hub_token or None
    if training_args.dry_run:
        return check_data(args, source)
    if not training_args.do_train:
        return evaluate_finished(args)

    # output folder
    output_dir = Path(training_args.output_dir)
    options = resolve_options(args.groups)
    folder = RunFolder(
        output_dir, "a classifier", options, BRIDGED_CONFIG, traces=STAGE_NAMES, free=free_options(args.groups),
        overwrite=training_args.overwrite_output_dir,
    )  # fmt: skip
    is_finished = folder.is_finished
    hub_target = None
    if training_args.push_to_hub:
        hub_target = open_target(
            output_dir, training_args.hub_model_id, "model", bool(training_args.hub_private_repo),
            training_args.hub_revision, training_args.hub_token,
        )  # fmt: skip
    if is_finished:
        publish_finished(output_dir, hub_target, PUBLISHED_FILES)
        return read_record(output_dir / ALL_RESULTS)
    check_card(output_dir / "README.md")
    resume = folder.is_resumable(training_args.resume_from_checkpoint == "latest")

    # these take seconds to import: only once the arguments are known to be good
    import transformers
    from accelerate import PartialState

    from utils.hub.licenses import read_licenses
    from utils.transfer.adapters import LoraSettings, save_merged
    from utils.transfer.card import write_model_card
    from utils.transfer.classifiers import check_classifier, load_image_processor, save_classifier
    from utils.transfer.fine_tuning import run_stage
    from utils.transfer.image_datasets import EvalImages
    from utils.transfer.metrics import test_metrics
    from utils.transfer.prediction import leep_of_checkpoint, leep_of_model, num_source_classes, predict
    from utils.transfer.rehearsal import rehearse
    from utils.transfer.report import add_totals, plot_report, print_results

    is_main_process = set_up_logging(training_args)
    transformers.set_seed(training_args.seed)

    # model: what it cannot do is found before the images are read
    pretrained, method = args.model.model_name_or_path, args.method
    args.model.model_revision = check_classifier(pretrained, args.model.model_revision, token)
    hub_options = {
        "revision": args.model.model_revision or "main",
        "trust_remote_code": args.model.trust_remote_code,
        "token": token,
    }
    image_processor = load_image_processor(pretrained, **hub_options)
    lora = LoraSettings(**args.lora.settings) if args.lora.use_peft else None
    rehearse(
        pretrained, image_processor, stage_settings(options, {"real": 1, "both": 1}, 1)[1], training_args, lora=lora,
        imprint=method.method == "bridged" and method.head_init == "imprint", **hub_options,
    )  # fmt: skip

    # data
    real, images, num_images = load_images(args, source)

    # stages
    bridge_settings, settings = stage_settings(options, num_images, training_args.world_size)
    stages = plan_stages(method.method, bridge_settings, settings, method.head_init, method.match_steps)
    check_stages(stages, options, num_images, len(real.class_names), training_args.world_size)
    if is_main_process and not resume:
        folder.begin()
    PartialState().wait_for_everyone()
    train_images = EvalImages(real.train, image_processor)
    results = {
        "leep_pretrained": leep_of_checkpoint(pretrained, train_images, **hub_options),
        "leep_bridged": None,
        "leep_num_images": len(real.train),
        "leep_num_source_classes": num_source_classes(pretrained, **hub_options),
    }
    transformers.utils.logging.disable_progress_bar()  # what is to be downloaded is; the rest are moments
    log_histories = {}
    for stage in stages:
        logger.info(
            f"{stage.name}: {stage.settings.max_steps} steps on {num_images[stage.images]} images ({stage.images})"
        )
        model, done = run_stage(
            stage, output_dir / stage.start if stage.start else pretrained, real.class_names, images[stage.images],
            image_processor, training_args, output_dir / stage.name, real.validation, lora=lora, pretrained=pretrained,
            resume=resume, **hub_options,
        )  # fmt: skip
        results |= {f"{stage.name}_{key}": value for key, value in done.summary().items()}
        log_histories[stage.name] = done.log_history
        if stage.name == "stage1":
            results["leep_bridged"] = leep_of_model(model, train_images, *loader_options(training_args))
    results = add_totals(results, list(log_histories))

    # results: the one time that the test images are read
    logits, labels = predict(model, EvalImages(real.test, image_processor), *loader_options(training_args))
    results |= test_metrics(logits, labels)
    if is_main_process:
        config = describe_run(args, real, source, stages)
        save = save_merged if lora else save_classifier
        save(model, image_processor, output_dir)
        write_record(output_dir / ALL_RESULTS, results)
        plot_report(output_dir / "report.png", log_histories, logits, labels, real.class_names)
        write_run_config(output_dir, options, started)
        print_results(f"{method.method}: {output_dir}", results)

        # card
        model_id = hub_target.repo_id if hub_target else output_dir.resolve().name
        sources = [(pretrained, "model", args.model.model_revision)]
        sources.append((real.record.name, "dataset", real.record.dataset_revision))
        if source is not None:
            sources.append((source.name, "dataset", source.revision))
        licenses = read_licenses(sources, token)
        command = public_command("train_bridged.py", argv)
        write_model_card(output_dir, model_id, pretrained, config, results, licenses, command)
        folder.finish(config)
        if hub_target is not None:
            publish_folder(output_dir, hub_target, PUBLISHED_FILES, stale_patterns=WEIGHTS)
    return results


if __name__ == "__main__":
    run_script(main)
