#!/usr/bin/env python
"""Fine-tune an image classifier on synthetic images, then on real ones (bridged transfer, arXiv 2403.19866).

    accelerate launch train_bridged.py --synthetic_dataset user/cars-syn
    accelerate launch train_bridged.py --synthetic_dataset cars-syn --num_shots 4 --head_init keep
    accelerate launch train_bridged.py --synthetic_dataset cars-syn --use_peft --bf16 \\
        --model_name_or_path timm/vit_base_patch16_224.augreg_in21k_ft_in1k
    accelerate launch train_bridged.py --dataset_name user/cars --method vanilla
    accelerate launch train_bridged.py --synthetic_dataset user/cars-syn --resume_from_checkpoint latest
    accelerate launch train_bridged.py --output_dir cars-syn-bridged_replay --no_do_train --do_eval
    accelerate launch train_bridged.py --train_dir photos --audit
    accelerate launch train_bridged.py --synthetic_dataset user/cars-syn --dry_run

The real images, their columns and their few-shot subset come from the record of the synthetic set; flags override it.
"""

import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from utils.cli.errors import UserError, run_script
from utils.cli.options import absolute_if_local, free_options, resolve_options
from utils.cli.parsing import ScriptArgumentParser
from utils.cli.processes import check_processes_joined, public_command, warn_once
from utils.cli.records import (
    ALL_RESULTS,
    BRIDGED_CONFIG,
    EVAL_RESULTS,
    RUN_CONFIG,
    image_set_name,
    read_record,
    write_record,
)
from utils.cli.run_folder import RunFolder
from utils.cli.threads import report_threads
from utils.data.arguments import check_output_outside, check_real_images_given, explain_recorded_name
from utils.data.class_names import match_labels
from utils.hub.cards import check_card
from utils.hub.publishing import publish_finished, publish_folder
from utils.hub.targets import open_target
from utils.transfer.arguments import GROUPS, BridgedTrainingArguments, check_training_arguments, set_precision
from utils.transfer.methods import (
    METHODS,
    STAGE_1,
    StagePlan,
    check_average,
    check_stages,
    describe_methods,
    describe_shares,
    plan_stages,
    stage_names,
    stage_settings,
)

logger = logging.getLogger(__name__)

# up to this many real images per class, the head of stage 1 was better than a fresh one (docs/results.md)
MAX_IMAGES_FOR_KEPT_HEAD = 4
LEEP_RESULTS = ("leep_pretrained", "leep_bridged", "leep_num_images", "leep_num_source_classes")
# the classifier itself, without stages and training states
PUBLISHED_FILES = (
    "model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json", "config.json",
    "preprocessor_config.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/README.md",
    "report.png", ALL_RESULTS, BRIDGED_CONFIG, RUN_CONFIG, "README.md",
)  # fmt: skip
OUTPUTS = (*PUBLISHED_FILES[:-1], EVAL_RESULTS)  # a card may contain text of a person


def parse_arguments(argv: Sequence[str] | None) -> tuple:
    """Return the arguments, with values from the synthetic set's record for flags that are not given, and that set.

    The arguments have the groups of `GROUPS` by name, and also `groups`, a list of them; `chosen_method`, the row of
    the table with the given flags; `real_images_from`, the set or folder whose record names the real images, None if a
    flag does; and, after `identify_inputs`, `model_commit` and `real_record`.
    """
    from utils.data.real_images import is_same_image_set
    from utils.transfer.synthetic_images import open_synthetic

    parser = ScriptArgumentParser(GROUPS.values(), description=f"{__doc__}\n{describe_methods()}")
    groups = parser.parse(argv)
    args = SimpleNamespace(groups=groups, **dict(zip(GROUPS, groups)))
    training_args, synthetic_args = args.training, args.synthetic
    options = resolve_options(groups)
    given_flags = {name: options[name] for name in parser.given if options.get(name) is not None}
    args.chosen_method = METHODS[args.method.method].with_flags(given_flags)
    for name, value in args.chosen_method.flags.items():
        if getattr(args.method, name) is None:
            setattr(args.method, name, value)

    # the real images, from the record of the synthetic set
    source, recorded = None, None
    given = args.real.dataset_name, args.real.train_dir
    if not training_args.do_train:
        recorded = read_finished_record(args)["real_images"]
    elif synthetic_args.synthetic_dataset is not None:
        source = open_synthetic(
            synthetic_args.synthetic_dataset,
            synthetic_args.synthetic_dataset_revision,
            training_args.hub_token,
            bool(synthetic_args.use_rejected),
        )
        recorded = source.record["real_images"]  # None: made from a list of class names
    elif not is_preview(training_args):
        check_without_synthetic(args)
    if recorded and (given == (None, None) or is_same_image_set(recorded, *given)):
        parser.fill_in([args.real], recorded)
    parser.check_needs(vars(args.real))
    name = synthetic_args.synthetic_dataset or args.real.dataset_name or args.real.train_dir or ""
    parser.fill_in([training_args], {"output_dir": f"{Path(name).resolve().name}-{args.method.method}"})
    is_recorded = bool(recorded) and given == (None, None)
    recorded_in = synthetic_args.synthetic_dataset or training_args.output_dir
    args.real_images_from = recorded_in if is_recorded else None
    args.model_commit, args.real_record = args.model.model_revision, None  # until the inputs are identified
    check_arguments(args)
    if training_args.do_train and not training_args.audit and (line := set_precision(training_args, parser.given)):
        warn_once(line)
    if not is_preview(training_args):
        check_output_outside(training_args.output_dir, args.real)
    return args, source


def is_preview(training_args: BridgedTrainingArguments) -> bool:
    """Return whether the run only looks at images and needs, and trains and writes nothing."""
    return training_args.audit or training_args.dry_run


def read_finished_record(args: SimpleNamespace) -> dict:
    """Return the record of the classifier to evaluate.

    Raises:
        UserError: `--do_eval` is missing, or there is no finished classifier.
    """
    if not args.training.do_eval:
        raise UserError(
            "--no_do_train: nothing is left to do; add --do_eval to evaluate the classifier in --output_dir."
        )
    path = Path(args.training.output_dir) / BRIDGED_CONFIG
    if not path.is_file():
        raise UserError(
            f"--output_dir {args.training.output_dir}: contains no finished classifier (no {BRIDGED_CONFIG})."
        )
    return read_record(path)


def check_without_synthetic(args: SimpleNamespace) -> None:
    """Check that a run without a synthetic set does not need one.

    Raises:
        UserError: it needs one, or no real images are given.
    """
    if args.chosen_method.uses_synthetic:
        real_only = [name for name, row in METHODS.items() if not row.uses_synthetic]
        raise UserError(
            f"--synthetic_dataset: required by --method {args.method.method}; not by {', '.join(real_only)}."
        )
    if args.method.match_steps and args.bridge.bridge_max_steps is None:
        raise UserError(
            f"--match_steps (given, or from --method {args.method.method}): give --synthetic_dataset or "
            "--bridge_max_steps, the steps to match, or --no_match_steps."
        )
    if args.real.dataset_name is None and args.real.train_dir is None:
        raise UserError(
            "--dataset_name or --train_dir: give the real images, or a --synthetic_dataset whose record names them."
        )


def check_arguments(args: SimpleNamespace) -> None:
    """Check the values that need no data.

    Raises:
        UserError: a value or a combination is not possible.
    """
    with explain_recorded_name(args.real, args.real_images_from):
        check_real_images_given(args.real)
    modes = [("batch_norm", args.stage.batch_norm), ("bridge_batch_norm", args.bridge.bridge_batch_norm)]
    modes += [("batch_norm", stage.settings.get("batch_norm", "frozen")) for stage in args.chosen_method.stages]
    for name, value in modes if args.lora.use_peft else ():
        if value != "frozen":
            raise UserError(
                f"--{name} {value}: not possible with --use_peft, as an adapter does not contain statistics."
            )
    replays = "replayed" in args.chosen_method.kinds and not args.synthetic.streaming
    if "domain" in [value for _, value in modes] and not replays:
        raise UserError(
            "--batch_norm domain: needs synthetic images among the real ones, not streamed (--method bridged_replay)."
        )
    alignment = args.chosen_method.alignment
    if alignment is not None and args.bridge.bridge_freeze_backbone:
        raise UserError(
            f"--bridge_freeze_backbone: not possible with --bridge_alignment {alignment.kind} (given, or from --method "
            f"{args.method.method}), which changes features; leave out one of the two."
        )
    if args.synthetic.streaming and args.real.skip_bad_images:
        warn_once(
            "Warning: --skip_bad_images: images of a stream are not opened in advance; a damaged one ends the run."
        )
    if args.synthetic.streaming and "both" in args.chosen_method.kinds:
        raise UserError(
            f"--streaming: not possible with --method {args.method.method}, which mixes both kinds of images at random."
        )
    check_average(args.chosen_method, args.lora.use_peft)
    check_training_arguments(args.training)


def load_real(args: SimpleNamespace, parts: tuple[str, ...] = ("train", "validation", "test")):
    """Return the real images, after opening each image of `parts` once.

    Raises:
        UserError: they cannot be loaded, one is damaged, or none are left for validation or test.
    """
    from utils.data.image_set import RealImagesRecord
    from utils.data.real_images import load_real_images
    from utils.transfer.run_method import open_real_images

    with explain_recorded_name(args.real, args.real_images_from):
        record = args.real_record or RealImagesRecord.from_arguments(args.real)
        real = load_real_images(record, args.training.hub_token or None)
    return open_real_images(real, args.training.max_eval_samples, logger.info, parts)


def load_images(args: SimpleNamespace, source, pretrained) -> tuple:
    """Return the real images, the images of the method's stages by kind, and their numbers by kind.

    Raises:
        UserError: the classes differ, images are damaged, the epochs of a stream cannot be counted, or the decoded
            images do not fit on the disk.
    """
    from utils.data.opened_images import open_synthetic
    from utils.data.real_images import describe_small_parts
    from utils.transfer.run_method import select_images
    from utils.transfer.synthetic_images import (
        count_leaked_images,
        describe_limit,
        describe_seeing,
        load_synthetic,
        num_images,
        seen_rows,
    )

    real, synthetic, method = load_real(args), None, args.chosen_method
    counts = {"real": len(real.train)}
    if small := describe_small_parts(real):
        logger.warning(small)
    if source is not None:
        limit, streaming = args.synthetic.max_synthetic_samples_per_class, args.synthetic.streaming
        synthetic = load_synthetic(
            source, real.class_names, limit, args.training.hub_token or None, streaming=streaming,
            allow_missing_classes=args.synthetic.allow_missing_classes,
        )  # fmt: skip
        if streaming:
            counts["synthetic"] = num_images(source, limit)
            if counts["synthetic"] is None and args.bridge.bridge_max_steps is None:
                raise UserError(
                    f"--streaming: the record of {source.name} has no number of images; give --bridge_max_steps."
                )
        else:
            synthetic, remarks = open_synthetic(synthetic, source.name, real.record.skip_bad_images)
            counts["synthetic"] = len(synthetic)
            for remark in remarks:
                logger.warning(remark)
        if source.left_out:
            logger.info(source.left_out.describe(source.name))
        if line := describe_limit(source, limit):
            logger.warning(line)
        num_leaked = count_leaked_images(source.record, real.train_indices)
        if num_leaked and method.uses_synthetic:
            tested = ""
            if real.record.fold:
                number = len(seen_rows(source.record) & set(real.parts["test"].rows))
                tested = f", {number} of them test images of --fold {real.record.fold}" if number else ""
            logger.warning(
                f"Warning: {describe_seeing(source.record)} {num_leaked} real images outside the {len(real.train)} "
                f"that this run trains on{tested}; a method without synthetic images sees fewer real images."
            )
    trained_on = {"real": real.train, "synthetic": synthetic}
    if args.training.cache_images:
        trained_on = decode_once({kind: seen for kind, seen in trained_on.items() if seen is not None}, pretrained)
    images = select_images(method, trained_on.get("real"), trained_on.get("synthetic"))
    counts |= {kind: len(seen) for kind, seen in images.items() if kind in ("both", "replayed")}
    is_reset = any(stage.start is not None and stage.head_init == "reset" for stage in method.stages)
    if is_reset and len(real.train) <= MAX_IMAGES_FOR_KEPT_HEAD * len(real.class_names):
        logger.info(
            f"With {len(real.train)} real images of {len(real.class_names)} classes, --head_init keep is likely to be "
            "better than the fresh head of the paper."
        )
    return real, images, counts


def describe_run(args: SimpleNamespace, real, source, stages: list[StagePlan], pretrained) -> dict:
    """Return the content of `bridged_config.json`."""
    return {
        # no `average` in the records of methods without one
        **{name: value for name, value in vars(args.method).items() if name != "average" or value is not None},
        "stages": [stage.to_dict() for stage in stages],
        "lora": vars(args.lora) if args.lora.use_peft else None,
        "base_model": absolute_if_local(args.model.model_name_or_path),
        "base_model_revision": pretrained.revision,
        "class_names": real.class_names,
        "real_images": real.record.to_dict(),
        "train_indices": real.train_indices.tolist(),
        "parts": {
            part: {"split": where.split, "num_images": len(where.rows), "is_carved": where.is_carved}
            for part, where in real.parts.items()
        },
        "validation": {"num_images": len(real.validation)},
        "test_split": real.parts["test"].split,
        "synthetic_dataset": source.to_dict() | {"name": absolute_if_local(source.name)} if source else None,
    }


def set_up_logging(training_args: BridgedTrainingArguments) -> bool:
    """Let only the main process log, and return whether this is it."""
    import transformers

    logging.basicConfig(format="%(message)s")  # not INFO for all: httpx logs every request to the Hub
    transformers.utils.logging.set_verbosity_error()
    # joins the processes; must come first, as a plain PartialState would not join processes on a CPU
    is_main_process = training_args.process_index == 0
    check_processes_joined(training_args.world_size)
    report_threads(training_args.device.type)
    for ours in (logger, logging.getLogger("utils")):
        ours.setLevel(logging.INFO if is_main_process else logging.ERROR)
    return is_main_process


def preview_run(args: SimpleNamespace, source) -> dict:
    """Print the problems of the real images and return their numbers; with `--dry_run` also what the run needs.

    Raises:
        UserError: the images do not exist, or the synthetic set has other classes.
    """
    from utils.data.audit import audit_images, list_findings, print_audit
    from utils.data.image_set import RealImagesRecord
    from utils.data.real_images import load_real_images
    from utils.transfer.synthetic_images import load_synthetic

    is_main_process = set_up_logging(args.training)
    token = args.training.hub_token or None
    with explain_recorded_name(args.real, args.real_images_from):
        record = RealImagesRecord.from_arguments(args.real)
        disk = list_disk(args, source, record) if args.training.dry_run else []  # before the downloads
        real = load_real_images(record, token)
    for remark in real.remarks:
        logger.info(remark)
    synthetic = None
    if source is not None:
        allowed = args.synthetic.allow_missing_classes
        synthetic = load_synthetic(
            source, real.class_names, args.synthetic.max_synthetic_samples_per_class, token=token,
            allow_missing_classes=allowed, streaming=args.synthetic.streaming,
        )  # fmt: skip
    needs = show_needs(args, source, real, synthetic, disk) if args.training.dry_run else {}
    if not is_main_process:
        return {}
    audit = audit_images(real)
    print_audit(audit, real.record.name)
    print_class_names(real.class_names, args.training.write_class_names)
    return {finding.what: finding.number for finding in list_findings(audit)} | needs


def print_class_names(class_names: list[str], path: str | None) -> None:
    """Print the class names that may mislead a generator; write the nouns to a file, unless it exists.

    Raises:
        UserError: the file cannot be written, or does not end in .yaml.
    """
    from utils.data.class_names import propose_noun
    from utils.data.name_doctor import diagnose, print_findings, write_class_names

    nouns = list(map(propose_noun, class_names))
    findings = diagnose(class_names, nouns)
    print_findings(findings)
    if path is not None and Path(path).exists():
        print(f"--write_class_names {path}: exists and is kept.")
    elif path is not None:
        write_class_names(path, class_names, nouns, findings)


def decode_once(sets: dict, pretrained) -> dict:
    """Return the sets with decoded images, after logging the disk space that these take.

    Raises:
        UserError: they do not fit on the disk.
    """
    from utils.transfer.image_cache import cache_images, describe_cache
    from utils.transfer.image_format import read_image_format

    size = read_image_format(pretrained.image_processor).crop_size
    logger.info(describe_cache(list(sets.values()), size, is_asked_for=True))
    return {kind: cache_images(images, size) for kind, images in sets.items()}


def list_disk(args: SimpleNamespace, source, record) -> list:
    """Return the disk use of loading the real images and the synthetic set."""
    from utils.forecast.inputs import dataset_disk, real_set_disk
    from utils.hub.repositories import Source
    from utils.transfer.synthetic_images import FLAG

    token = args.training.hub_token or None
    disk = real_set_disk(record, token)
    if source is not None and not args.synthetic.streaming:
        disk += dataset_disk(Source(source.name, FLAG, "dataset", source.revision, token))
    return disk


def show_needs(args: SimpleNamespace, source, real, synthetic, disk: list) -> dict:
    """Print and return the memory, time and disk that the run needs; a line says why something is unknown."""
    from utils.forecast.memory import available_bytes
    from utils.forecast.report import print_forecast
    from utils.transfer.classifiers import open_classifier
    from utils.transfer.forecast import classifier_disk, forecast_memory, forecast_time, outputs_disk

    training_args, memory, times = args.training, None, []
    try:
        token = training_args.hub_token or None
        classifier = open_classifier(args.model.model_name_or_path, args.model.model_revision, token)
        args.model_commit, disk = classifier.revision, [*disk, *classifier_disk(classifier)]
        choose_learning_rate(args)
        pretrained, stages = open_checkpoint(args), plan_ahead(args, source, real, synthetic)
        if args.chosen_method.takes_steps:
            memory = forecast_memory(pretrained, len(real.class_names), stages, training_args)
            times = [forecast_time(pretrained, real, stages, training_args, is_known=are_steps_known(args, source))]
            disk.append(outputs_disk(memory.training, len(stages), training_args))
    except UserError as error:
        logger.warning(f"The forecast is incomplete: {error}")
    return print_forecast(memory, available_bytes(training_args.device), times, disk, logger.info)


def are_steps_known(args: SimpleNamespace, source) -> bool:
    """Return whether the steps of all stages are known; on synthetic images they need the set or a flag."""
    method, is_given = args.chosen_method, args.bridge.bridge_max_steps is not None
    return source is not None or is_given or not (method.uses_synthetic or args.method.match_steps)


def plan_ahead(args: SimpleNamespace, source, real, synthetic) -> list[StagePlan]:
    """Return the stages that would be trained, without the measurement of a guard."""
    from utils.transfer.run_method import images_per_class
    from utils.transfer.synthetic_images import num_images

    number = 0
    if source is not None:
        limit = args.synthetic.max_synthetic_samples_per_class
        number = num_images(source, limit) or 0 if args.synthetic.streaming else len(synthetic)
    counts = {"real": len(real.train), "synthetic": number, "both": len(real.train) + number}
    settings = stage_settings(args.chosen_method, resolve_options(args.groups), counts, args.training.world_size)
    return plan_stages(args.chosen_method, *settings, images_per_class(real.train))


def evaluate_finished(args: SimpleNamespace) -> dict:
    """Evaluate the finished classifier in `--output_dir` on the test images; write and return `eval_results.json`.

    Raises:
        UserError: the classes of the real images differ from those of the classifier.
    """
    from utils.transfer.classifiers import load_classifier, load_image_processor
    from utils.transfer.evaluation import predict, test_metrics
    from utils.transfer.image_format import EvalImages
    from utils.transfer.report import print_results

    is_main_process = set_up_logging(args.training)
    output_dir = Path(args.training.output_dir)
    class_names = read_record(output_dir / BRIDGED_CONFIG)["class_names"]
    real = load_real(args, ("test",))
    # by name: the images' classes may have another case or order
    places = match_labels(class_names, real.class_names, f"--output_dir {output_dir}:", "the classifier")
    trust = {"trust_remote_code": args.model.trust_remote_code}
    model = load_classifier(str(output_dir), class_names, False, args.training.seed, **trust)
    images = EvalImages(real.test, load_image_processor(str(output_dir), **trust))
    batch_size, num_workers = args.training.per_device_eval_batch_size, args.training.dataloader_num_workers
    logits, labels = predict(model, images, batch_size, num_workers)
    results = test_metrics(logits[:, np.argsort(list(places.values()))], labels)
    if is_main_process:
        write_record(output_dir / EVAL_RESULTS, results)
        print_results(f"{output_dir} on '{real.record.name}'", results)
    return results


def identify_inputs(args: SimpleNamespace, source) -> dict[str, str]:
    """Return what identifies the contents of model and images, by flag, and pin their commits for the run.

    Raises:
        UserError: one of them is neither a folder nor a readable repository.
    """
    from utils.data.image_set import RealImagesRecord
    from utils.data.real_images import identify_real_images
    from utils.transfer.classifiers import list_loaded_files, open_classifier
    from utils.transfer.synthetic_images import identify_synthetic

    token = args.training.hub_token or None
    classifier = open_classifier(args.model.model_name_or_path, args.model_commit, token)
    record = args.real_record or RealImagesRecord.from_arguments(args.real)
    args.model_commit = classifier.revision
    with explain_recorded_name(args.real, args.real_images_from):
        args.real_record, inputs = identify_real_images(record, token)
    inputs["model_name_or_path"] = classifier.identity(list_loaded_files)
    if source is not None:
        inputs["synthetic_dataset"] = identify_synthetic(source, args.synthetic.max_synthetic_samples_per_class)
    return inputs


def open_folder(args: SimpleNamespace, inputs: dict[str, str]) -> tuple:
    """Return the output folder, whether its classifier is finished, and its target on the Hub, if any.

    Raises:
        UserError: the folder belongs to another run or cannot be written; what `open_target` raises.
    """
    training_args, options = args.training, resolve_options(args.groups)
    folder = RunFolder(
        Path(training_args.output_dir), "a classifier", options, BRIDGED_CONFIG, traces=stage_names(),
        free=free_options(args.groups), overwrite=training_args.overwrite_output_dir, inputs=inputs, outputs=OUTPUTS,
    )  # fmt: skip
    is_finished, hub_target = folder.is_finished, None
    if training_args.push_to_hub:
        hub_target = open_target(
            training_args.output_dir, training_args.hub_model_id, "model", bool(training_args.hub_private_repo),
            training_args.hub_revision, training_args.hub_token,
        )  # fmt: skip
    if not is_finished:
        folder.check_writable()
        check_card(folder.path / "README.md")
    return folder, is_finished, hub_target


def choose_learning_rate(args: SimpleNamespace) -> str | None:
    """Set the learning rates that are not given, by the kind of model, and return the reason.

    If `--learning_rate` is given, it applies to all stages, and None is returned.
    """
    from utils.transfer.classifiers import default_learning_rates

    if not args.chosen_method.takes_steps:
        args.training.learning_rate = 0.0
    if args.training.learning_rate is not None:
        return None
    heads_alone = [
        stage.settings.get("freeze_backbone", args.bridge.bridge_freeze_backbone)
        if stage.images == "synthetic"
        else stage.settings.get("freeze_backbone", args.stage.freeze_backbone)
        for stage in args.chosen_method.stages
    ]
    model_args, token = args.model, args.training.hub_token or None
    rates = default_learning_rates(
        model_args.model_name_or_path, use_peft=args.lora.use_peft, freeze_backbone=all(heads_alone),
        revision=args.model_commit or "main", trust_remote_code=model_args.trust_remote_code, token=token,
    )  # fmt: skip
    args.training.learning_rate = rates.real
    if args.bridge.bridge_learning_rate is None and "synthetic" in args.chosen_method.kinds:
        args.bridge.bridge_learning_rate = rates.synthetic
    return rates.reason


def open_checkpoint(args: SimpleNamespace):
    """Return the checkpoint to adapt, without its weights.

    Raises:
        UserError: the classifier does not exist.
    """
    from utils.transfer.adapters import LoraSettings
    from utils.transfer.stage import open_pretrained

    lora = args.lora
    settings = LoraSettings(lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.lora_target_modules)
    pinned = vars(args.model) | {"model_revision": args.model_commit}
    return open_pretrained(**pinned, token=args.training.hub_token or None, lora=settings if lora.use_peft else None)


def open_model(args: SimpleNamespace, options: dict):
    """Return the checkpoint to adapt, after a trial run of two images.

    Raises:
        UserError: the classifier does not exist, or cannot be trained with these flags.
    """
    from utils.transfer.rehearsal import rehearse

    pretrained, stages = open_checkpoint(args), args.chosen_method.stages
    trial_settings = stage_settings(args.chosen_method, options, {"real": 1, "both": 1}, 1)[1]
    head_inits = {stage.head_init for stage in stages}  # a guard tries its own choice
    rehearse(pretrained, trial_settings, args.training, head_inits, args.chosen_method.alignment)
    return pretrained


def plan_run(
    args: SimpleNamespace, options: dict, real, images: dict, num_images: dict[str, int], pretrained
) -> tuple[list[StagePlan], dict]:
    """Return the stages to train and the measurements of a guard; log how a method that replays divides its steps.

    Raises:
        UserError: what `check_stages` raises.
    """
    from utils.transfer.guard import guard_stages
    from utils.transfer.run_method import images_per_class

    training_args, number = args.training, images_per_class(real.train)
    settings = stage_settings(args.chosen_method, options, num_images, training_args.world_size)
    plan = partial(plan_stages, args.chosen_method, *settings, number)
    stages, guard = plan(), {}
    check_stages(stages, options, num_images, len(real.class_names), training_args.world_size)
    if stages[-1].guarded_by_probe:
        loading = training_args.per_device_eval_batch_size, training_args.dataloader_num_workers
        stages, guard = guard_stages(
            lambda weight: plan(weight=weight), images["replayed"], pretrained, real.class_names, training_args.seed,
            *loading,
        )  # fmt: skip
    if "replayed" in args.chosen_method.kinds:
        logger.info(f"{describe_shares(stages, number)} (--method {args.method.method}; the paper's is bridged).")
    return stages, guard


def measure_leep(
    args: SimpleNamespace, pretrained, train_images, names: list[str], results: dict, stage: StagePlan, model
) -> None:
    """Put LEEP of the checkpoint and of stage 1's model into `results`, after stage 1 or else the first stage.

    `names` are the names of the stages.
    """
    from utils.transfer.evaluation import leep_results
    from utils.transfer.image_format import EvalImages

    has_stage_1 = STAGE_1.name in names
    is_measured = has_stage_1 if args.training.leep is None else args.training.leep
    if is_measured and stage.name == (STAGE_1.name if has_stage_1 else names[0]):
        images = EvalImages(train_images, pretrained.image_processor)
        loading = args.training.per_device_eval_batch_size, args.training.dataloader_num_workers
        bridged = model if has_stage_1 else None
        results.update(leep_results(pretrained.name, bridged, images, *loading, **pretrained.hub_options))


def write_results(args: SimpleNamespace, model_id: str, pretrained, config: dict, results: dict, done, command: str):
    """Write the classifier, its results, report.png and the model card; print the results."""
    from utils.hub.cards import read_licenses
    from utils.transfer.adapters import save_merged
    from utils.transfer.classifiers import save_classifier
    from utils.transfer.report import plot_report, print_results, write_model_card

    folder = Path(args.training.output_dir)
    save = save_merged if pretrained.lora else save_classifier
    save(done.model, pretrained.image_processor, folder)
    write_record(folder / ALL_RESULTS, results)
    plot_report(folder / "report.png", done.log_histories, done.logits, done.labels, config["class_names"])
    print_results(f"{args.method.method}: {folder}", results)
    real, synthetic = config["real_images"], config["synthetic_dataset"]
    sources = [(pretrained.name, "model", pretrained.revision)]
    sources.append((image_set_name(real), "dataset", real["dataset_revision"]))
    if synthetic is not None:
        sources.append((synthetic["name"], "dataset", synthetic["revision"]))
    licenses = read_licenses(sources, args.training.hub_token or None)
    write_model_card(folder, model_id, pretrained.name, config, results, licenses, command)


def main(argv: Sequence[str] | None = None) -> dict:
    started = time.time()
    args, source = parse_arguments(argv)
    training_args = args.training
    if is_preview(training_args):
        return preview_run(args, source)
    if not training_args.do_train:
        return evaluate_finished(args)

    # output folder
    inputs = identify_inputs(args, source)
    rate_reason = choose_learning_rate(args)
    folder, is_finished, hub_target = open_folder(args, inputs)
    options = folder.options
    if is_finished:
        publish_finished(folder.path, hub_target, PUBLISHED_FILES)
        return read_record(folder.path / ALL_RESULTS)
    resume = folder.is_resumable(training_args.resume_from_checkpoint == "latest")

    # imports that take seconds, after the arguments are checked
    import transformers
    from accelerate import PartialState

    from utils.transfer.evaluation import test_metrics
    from utils.transfer.image_format import EvalImages
    from utils.transfer.report import add_totals
    from utils.transfer.run_method import run_method

    is_main_process = set_up_logging(training_args)
    transformers.set_seed(training_args.seed)
    if rate_reason is not None:
        rates = [f"--learning_rate {training_args.learning_rate:g}"]
        if args.bridge.bridge_learning_rate is not None:
            rates.append(f"--bridge_learning_rate {args.bridge.bridge_learning_rate:g}")
        logger.info(f"{', '.join(rates)}: {rate_reason}.")

    # model: its problems are found before the images are read
    pretrained = open_model(args, options)

    # images and stages
    real, images, num_images = load_images(args, source, pretrained)
    stages, guard = plan_run(args, options, real, images, num_images, pretrained)

    # training
    with folder.working(command := public_command("train_bridged.py", argv)):
        if is_main_process and not resume:
            folder.begin()
        PartialState().wait_for_everyone()
        leep = dict.fromkeys(LEEP_RESULTS)
        transformers.utils.logging.disable_progress_bar()  # all downloads are done
        done = run_method(
            stages, images, EvalImages(real.test, pretrained.image_processor), pretrained, real.class_names,
            training_args, lambda stage: folder.path, validation=real.validation, resume=resume, inputs=inputs,
            after_stage=partial(measure_leep, args, pretrained, real.train, [stage.name for stage in stages], leep),
        )  # fmt: skip

        # results: the only use of the test images
        left_out = source.left_out.counts() if source and args.chosen_method.uses_synthetic else {}
        results = add_totals(leep | guard | left_out | done.results, list(done.log_histories)) | test_metrics(
            done.logits, done.labels
        )
        if is_main_process:
            folder.check_unchanged(partial(identify_inputs, args, source))
            config = describe_run(args, real, source, stages, pretrained) | {"learning_rate_reason": rate_reason}
            model_id = hub_target.repo_id if hub_target else folder.path.resolve().name
            write_results(args, model_id, pretrained, config, results, done, command)
            folder.write_run_config(started)
            folder.finish(config)  # last, as it marks the classifier as finished
            if hub_target is not None:
                publish_folder(folder.path, hub_target, PUBLISHED_FILES)
    return results


if __name__ == "__main__":
    run_script(main)
