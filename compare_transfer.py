#!/usr/bin/env python
"""Compare ways of using synthetic images on the same real images: methods x shots x seeds x volumes in one table.

    python compare_transfer.py --synthetic_dataset user/cars-syn
    python compare_transfer.py --synthetic_dataset cars-syn --num_shots 1 2 4 8 16 --seeds 0 1 2 \\
        --methods vanilla_matched mix bridged bridged_keep synthetic_only --volumes 500 1000 2000 --num_workers 2
    python compare_transfer.py --synthetic_dataset 'dsi=syn-{seed}' 'plain=user/cars-plain@v1' \\
        --methods vanilla_matched bridged bridged@plain --num_shots 4 --search_learning_rate
    python compare_transfer.py --synthetic_dataset user/cars-syn --search_learning_rate \\
        --model_name_or_path timm/resnet18.tv_in1k google/vit-base-patch16-224-in21k

    python compare_transfer.py --synthetic_dataset photos-syn --num_folds 5 --num_repeats 2

method@NAME uses the synthetic set NAME instead of the first. Each classifier has its own settings. Finished runs are
kept: run the same command again to resume.
"""

import dataclasses
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import transformers

from utils.cli.errors import UserError, report_how_to_resume, run_script
from utils.cli.options import resolve_options
from utils.cli.parsing import ScriptArgumentParser
from utils.cli.processes import check_single_process, public_command
from utils.cli.records import COMPARISON, RUN_CONFIG, image_set_name, read_record, write_record, write_run_config
from utils.cli.run_folder import RunFolder
from utils.cli.threads import report_threads
from utils.comparison.arguments import GROUPS, SearchArguments, set_precision
from utils.comparison.cells import CellRunner, run_cells, use_one_gpu, visible_gpus
from utils.comparison.classifiers import Classifier, parse_classifiers
from utils.comparison.costs import summarise_all
from utils.comparison.findings import describe_findings, describe_guards, list_highlights, list_recommendations
from utils.comparison.fold_sets import check_fold_sets, check_folds, list_steps, make_fold_sets
from utils.comparison.folds import check_fold_values, choose_seeds, describe_protocol, list_test_indices
from utils.comparison.gains import plot_gains
from utils.comparison.grid import Row, parse_rows, parse_synthetic_sets, plan_table, shots_title, source_key
from utils.comparison.plots import make_panels, plot_comparison
from utils.comparison.report import print_comparison, write_markdown
from utils.comparison.search import (
    check_settings,
    choose_settings,
    describe_choice,
    join_classifiers,
    write_settings,
)
from utils.comparison.statistics import stack_correct
from utils.data.arguments import check_output_outside, check_real_images_given, explain_recorded_name
from utils.data.image_set import PARTS, RealImagesRecord
from utils.data.real_images import identify_real_images, is_same_image_set, load_for_folds, load_real_images
from utils.transfer.classifiers import default_learning_rates
from utils.transfer.methods import StageSettings, describe_methods
from utils.transfer.rehearsal import rehearse
from utils.transfer.run_method import open_real_images
from utils.transfer.stage import open_pretrained
from utils.transfer.synthetic_images import (
    SyntheticSource,
    count_leaked_images,
    describe_seeing,
    open_synthetic,
)

SETTINGS = "chosen_settings.json"
BASELINES = ("vanilla_matched", "vanilla")  # the first of these that is compared
OUTPUTS = (COMPARISON, "comparison.md", "comparison.png", "gain.png", RUN_CONFIG)


def parse_arguments(argv: Sequence[str] | None) -> tuple[list, dict[tuple, SyntheticSource], str | None, set[str]]:
    """Return the argument groups, the synthetic sets, the set whose record names the real images, and given flags.

    Flags that are not given take their values from the record of the first synthetic set. The third value is None if a
    flag names the real images; the last is the set of names of the flags that are given.
    """
    parser = ScriptArgumentParser(GROUPS, description=f"{__doc__}\n{describe_methods()}")
    groups = parser.parse(argv)
    check_values(resolve_options(groups))
    model_args, real_args, comparison_args, search_args, _ = groups
    classifiers = parse_classifiers(model_args.model_name_or_path, model_args.model_revision)
    sets = parse_synthetic_sets(comparison_args.synthetic_dataset)
    rows = parse_rows(comparison_args.methods, list(sets))
    for classifier in classifiers if search_args.settings else []:
        check_settings(search_args.settings, rows, classifier.label)
    num_folds = comparison_args.num_folds
    if num_folds is not None:
        comparison_args.seeds = choose_seeds(comparison_args.seeds, comparison_args.num_repeats, parser.given)
    seeds = list(dict.fromkeys(comparison_args.seeds + (search_args.search_seeds or [])))
    token = comparison_args.hub_token or None
    if comparison_args.token_per_fold:  # before the records of the sets are read
        prepare_fold_sets(sets, real_args, comparison_args)
    sources = open_sources(sets, seeds, token, num_folds, comparison_args.use_rejected)
    given = real_args.dataset_name, real_args.train_dir
    first = next(iter(sources.values()))
    recorded, recorded_in = first.record["real_images"], first.name if given == (None, None) else None
    if given == (None, None):
        check_records(list(sources.values()))
    if given == (None, None) or (recorded and is_same_image_set(recorded, *given)):
        not_ours = (
            "num_shots",
            "few_shot_seed",
            "max_train_samples",
            "fold",
            "fold_seed",
        )  # the comparison draws its own subsets
        parser.fill_in([real_args], {name: value for name, value in recorded.items() if name not in not_ours})
    with explain_recorded_name(real_args, recorded_in):
        check_real_images_given(real_args)
    check_output(comparison_args.output_dir, real_args)
    return list(groups), sources, recorded_in, parser.given


def check_output(output_dir: str, real_args) -> None:
    """Check that results can be written, and not into a folder of images.

    Raises:
        UserError: they cannot.
    """
    check_output_outside(output_dir, real_args)
    RunFolder(
        Path(output_dir), "a comparison", {}, COMPARISON, traces=("cells", "stage1"), outputs=OUTPUTS
    ).check_writable()


def prepare_fold_sets(sets: dict[str, str], real_args, comparison_args) -> None:
    """Make the style tokens and synthetic sets of the folds, after all possible checks.

    Raises:
        UserError: the images cannot be divided into folds, or a step failed.
    """
    seeds, num_folds, token = comparison_args.seeds, comparison_args.num_folds, comparison_args.hub_token or None
    check_fold_sets(sets, seeds, real_args)
    check_output(comparison_args.output_dir, real_args)
    check_folds(real_args, num_folds, token)
    recipes = comparison_args.dsi_recipe, comparison_args.synthesis_recipe
    make_fold_sets(list_steps(sets, seeds, num_folds, real_args, *recipes), Path(comparison_args.output_dir), token)


def check_values(values: dict) -> None:
    """Check the flags that need no data, given as flag -> value.

    Raises:
        UserError: a value is missing, duplicate or impossible.
    """
    if not values["synthetic_dataset"]:
        raise UserError("--synthetic_dataset: give at least one synthetic set, a folder or a dataset id.")
    for name, entries in values.items():
        if isinstance(entries, list) and len(set(entries)) < len(entries):
            raise UserError(f"--{name} {' '.join(map(str, entries))}: duplicate values.")
    for name in ("learning_rates", "bridge_learning_rates"):
        if values["search_learning_rate"] and len(values[name] or []) > 1:
            raise UserError(f"--search_learning_rate: searches around one value, but --{name} has {len(values[name])}.")
    check_fold_values(values)
    other_shots = set(values["search_shots"] or []) - set(values["num_shots"] or [])
    if other_shots:
        raise UserError(f"--search_shots {min(other_shots)}: not among --num_shots.")
    check_single_process("the comparison starts its own processes; use --num_workers instead.")


def open_sources(
    sets: dict[str, str], seeds: list[int], token: str | None = None, num_folds: int | None = None,
    use_rejected: Sequence[str] = (),
) -> dict[tuple, SyntheticSource]:  # fmt: skip
    """Return the synthetic sets by name, few-shot seed and, with folds, fold; each is opened once, at one commit.

    `use_rejected` names the sets from which no image is left out.

    Raises:
        UserError: a set does not exist, or its verdicts are about other images; a name is not that of a set.
    """
    if unknown := set(use_rejected) - set(sets):
        raise UserError(f"--use_rejected {min(unknown)}: must be a name of --synthetic_dataset ({', '.join(sets)}).")
    folds = [None] if num_folds is None else [f"{number}/{num_folds}" for number in range(1, num_folds + 1)]
    paths = {
        source_key(name, seed, fold): path.replace("{seed}", str(seed)).replace("{fold}", str(fold).partition("/")[0])
        for name, path in sets.items()
        for seed in seeds
        for fold in folds
    }
    opened = {}
    for path, uses_rejected in dict.fromkeys((path, key[0] in use_rejected) for key, path in paths.items()):
        name, _, revision = (path, "", "") if Path(path).is_dir() else path.partition("@")
        opened[path, uses_rejected] = open_synthetic(name, revision or None, token, uses_rejected)
    return {key: opened[path, key[0] in use_rejected] for key, path in paths.items()}


def check_records(sources: list[SyntheticSource]) -> None:
    """Check that the records of all synthetic sets name the same real images.

    Raises:
        UserError: they do not.
    """
    for source in sources:
        if source.record["real_images"] is None:
            raise UserError(
                f"--dataset_name: {source.name} was made from a list of class names, so its record names no real "
                "images; give --dataset_name or --train_dir."
            )
        ours, theirs = (image_set_name(item.record["real_images"]) for item in (sources[0], source))
        if ours != theirs:
            raise UserError(
                f"--synthetic_dataset {source.name}: was made for '{theirs}', {sources[0].name} for '{ours}'; give "
                "--dataset_name or --train_dir to compare them anyway."
            )


def warn_about_leaks(runner: CellRunner, num_shots: int | None) -> None:
    """Warn about style tokens that saw real images outside the smallest few-shot subset of their seed."""
    record = runner.real.record
    if runner.folds is not None:  # `describe_protocol` says so
        return
    for (_, seed), source in runner.sources.items():
        recorded = source.record["real_images"]
        if not recorded or not is_same_image_set(recorded, record.dataset_name, record.train_dir):
            continue
        rows = runner.real.train_indices[runner.few_shot_rows(num_shots, seed)]
        num_leaked = count_leaked_images(source.record, rows)
        if num_leaked:
            print(
                f"Warning: {source.name}: {describe_seeing(source.record).replace('the ', 'its ', 1)} "
                f"{num_leaked} real images that the runs of seed {seed} with {shots_title(num_shots)} do not train on; "
                "vanilla sees fewer real images."
            )


def build_runners(
    classifiers: list[Classifier], groups: list, sources: dict, rows: list[Row], recorded_in: str | None
) -> dict[str, CellRunner]:
    """Return the runner of the cells of each classifier, by label.

    Each classifier gets a trial run of two images before the real images are opened. `recorded_in` is the set whose
    record names these.

    Raises:
        UserError: a classifier cannot be trained, or the images cannot be used.
    """
    model_args, real_args, comparison_args, _, shared_args = groups
    token, trust = comparison_args.hub_token or None, model_args.trust_remote_code
    opened = {item.label: open_pretrained(item.name, item.revision, trust, token) for item in classifiers}
    settings = StageSettings(
        max_steps=0, learning_rate=0.0, mixup_alpha=shared_args.mixup_alpha, batch_norm=shared_args.batch_norm,
        label_smoothing_factor=shared_args.label_smoothing_factor, augmentation=shared_args.augmentation,
        random_flip=real_args.random_flip, per_device_train_batch_size=shared_args.per_device_train_batch_size,
        weight_decay=shared_args.weight_decay, class_weights=shared_args.class_weights,
    )  # fmt: skip
    from transformers import TrainingArguments  # imported late, as it loads torch

    try:
        training_args = TrainingArguments(
            output_dir=str(Path(comparison_args.output_dir) / "work"), per_device_eval_batch_size=128,
            bf16=shared_args.bf16, fp16=shared_args.fp16, use_cpu=shared_args.use_cpu,
            dataloader_num_workers=shared_args.dataloader_num_workers,
            lr_scheduler_type="cosine", logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
    except ValueError as error:  # this machine does not support the precision
        raise UserError(str(error)) from None
    head_inits = {stage.head_init for row in rows for stage in row.method.stages}
    alignments = dict.fromkeys(row.method.alignment for row in rows)
    for pretrained, alignment in product(opened.values(), alignments):
        rehearse(pretrained, settings, training_args, head_inits, alignment)
    identities = {label: pretrained.identity for label, pretrained in opened.items()}
    with explain_recorded_name(real_args, recorded_in):
        record, of_images = identify_real_images(RealImagesRecord.from_arguments(real_args), token)
        if comparison_args.num_folds is None:
            folds, real, parts = None, load_real_images(record, token), PARTS
        else:
            folds = load_for_folds(record, comparison_args.num_folds, token)
            real, parts = folds.images, ("train",)
    real = open_real_images(real, comparison_args.max_eval_samples, print, parts)
    folds = folds and dataclasses.replace(folds, images=real)
    synthetic, known = {}, {}  # shared by all
    return {
        label: CellRunner(
            pretrained, real, sources, settings, training_args, Path(comparison_args.output_dir),
            comparison_args.max_eval_samples, comparison_args.allow_missing_classes,
            {"model_name_or_path": identities[label]} | of_images, label if len(opened) > 1 else None, folds,
            shared_args.cache_images, _synthetic=synthetic, _identities=known,
        )
        for label, pretrained in opened.items()
    }  # fmt: skip


def identify_inputs(
    classifiers: list[Classifier], runners: dict[str, CellRunner], volumes: list[int | None]
) -> dict[str, str]:
    """Return what identifies the contents of the comparison's inputs, by the flag and value that name them.

    Print a line if an earlier comparison in this folder had other contents: those cells are not used.
    """
    inputs = {}
    for classifier in classifiers:
        runner = runners[classifier.label]
        named = runner.real.record.to_dict() | {"model_name_or_path": classifier.given}
        inputs |= {f"--{flag} {named[flag]}": identity for flag, identity in runner.shared_inputs.items()}
    for source in runner.sources.values():
        what = " without rejected images" if source.left_out else ""
        inputs[f"--synthetic_dataset {source.name}{what}"] = runner.synthetic_identity(source, volumes[-1])
    path = runner.output_dir / COMPARISON
    before = read_record(path).get("inputs", {}) if path.exists() else {}
    changed = [
        f"{named} was {before[named]}, now {now}" for named, now in inputs.items() if before.get(named, now) != now
    ]
    if changed:
        print(
            f"Since the last comparison in {runner.output_dir}: {'; '.join(changed)}. Cells that depend on it are run "
            "again, the others are kept."
        )
    return inputs


def fill_in_learning_rates(search_args: SearchArguments, runner: CellRunner) -> SearchArguments:
    """Return the search with default learning rates for the kind of classifier if none are given, and print them."""
    if search_args.settings or (search_args.learning_rates and search_args.bridge_learning_rates):
        return search_args
    rates = default_learning_rates(runner.pretrained.name, **runner.pretrained.hub_options)
    print(
        f"Default learning rates{runner.classifier_suffix}: {rates.real:g} on real, {rates.synthetic:g} on synthetic "
        f"images; {rates.reason}."
    )
    return dataclasses.replace(
        search_args,
        learning_rates=search_args.learning_rates or [rates.real],
        bridge_learning_rates=search_args.bridge_learning_rates or [rates.synthetic],
    )


def run_table(runner: CellRunner, table: dict, num_workers: int) -> dict[Row, dict[int | None, list[dict]]]:
    """Return the results of the cells, run seed by seed, so an unfinished comparison has some for every row."""
    rounds = zip(*(cells for by_shots in table.values() for cells in by_shots.values()))
    results = run_cells(runner, [cell for cells in rounds for cell in cells], num_workers, "test")
    return {
        row: {num_shots: [results[cell] for cell in cells] for num_shots, cells in by_shots.items()}
        for row, by_shots in table.items()
    }


def prepare_images(
    runners: dict[str, CellRunner], sources: dict[tuple, SyntheticSource], rows: list[Row], shots: list[int | None],
    volumes: list[int | None],
) -> None:  # fmt: skip
    """Decode the images once if it pays, after what to know of them: those left out, limits, leaks."""
    first = next(iter(runners.values()))
    for source in {source.key: source for source in sources.values() if source.left_out}.values():
        print(source.left_out.describe(source.name))
    for line in first.describe_limits(rows, volumes):
        print(line)
    warn_about_leaks(first, shots[0])
    for runner in runners.values():
        if line := runner.decode_once(rows, volumes):
            print(line)


def draw_pictures(output_dir: Path, summary: list[dict], correct: dict, findings: list[str], baseline: Row | None):
    """Draw comparison.png and, if there is a reference with other rows, gain.png."""
    panels = make_panels(summary, list(correct), findings)
    plot_comparison(output_dir / "comparison.png", panels, list_highlights(correct, baseline))
    if any("gain" in entry for entry in summary):
        plot_gains(output_dir / "gain.png", summary, baseline.label)
    else:  # of an earlier comparison in this folder
        (output_dir / "gain.png").unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> dict:
    started = time.time()
    groups, sources, recorded_in, given = parse_arguments(argv)
    model_args, _, comparison_args, search_args, shared_args = groups
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    num_workers, seeds = comparison_args.num_workers, comparison_args.seeds
    report_threads("cuda" if visible_gpus() else "cpu", num_workers)
    if num_workers == 1:
        use_one_gpu(0, visible_gpus())
    if line := set_precision(shared_args, comparison_args.output_dir, given):
        print(line)
    output_dir, sets = Path(comparison_args.output_dir), parse_synthetic_sets(comparison_args.synthetic_dataset)
    rows = parse_rows(comparison_args.methods, list(sets))
    shots = sorted(comparison_args.num_shots) if comparison_args.num_shots else [None]
    volumes = sorted(comparison_args.volumes) if comparison_args.volumes else [None]

    # models and data
    classifiers = parse_classifiers(model_args.model_name_or_path, model_args.model_revision)
    runners = build_runners(classifiers, groups, sources, rows, recorded_in)
    searches = {label: fill_in_learning_rates(search_args, runner) for label, runner in runners.items()}
    first = next(iter(runners.values()))
    first.check(rows, shots, volumes)
    prepare_images(runners, sources, rows, shots, volumes)
    inputs = identify_inputs(classifiers, runners, volumes)
    protocol = describe_protocol(first, seeds, shots, search_args.settings) if first.folds is not None else []

    command = public_command("compare_transfer.py", argv)
    output_dir.mkdir(parents=True, exist_ok=True)
    with report_how_to_resume(output_dir, lambda: f"finished runs are kept; resume with: {command}"):
        # recipes
        search_seeds = search_args.search_seeds or seeds[:1]
        chosen = {
            label: choose_settings(
                runner, label, rows, searches[label], shared_args, shots, search_seeds, volumes[-1], num_workers
            )
            for label, runner in runners.items()
        }
        if not search_args.settings:
            write_settings(output_dir / SETTINGS, chosen)

        # cells
        folds, results = [None] if first.folds is None else first.folds.names, {}
        for label, runner in runners.items():
            table = plan_table(rows, shots, seeds, volumes, chosen[label], folds)
            results[label] = run_table(runner, table, num_workers)
            runner.release_images()

        # results
        tested = first.folds and list_test_indices(first, seeds)
        correct = {label: stack_correct(of_one, tested, len(first.real.train)) for label, of_one in results.items()}
        baseline = next((row for name in BASELINES for row in results[classifiers[0].label] if row.label == name), None)
        baseline_name = baseline and baseline.label
        summary = summarise_all(
            results, correct, baseline, sources=sources, seeds=seeds, token=comparison_args.hub_token or None
        )  # fmt: skip
        findings = describe_findings(correct, baseline) + describe_guards(results) + protocol
        comparison = {
            "findings": findings, "baseline": baseline_name, "seeds": seeds, "summary": summary,
            "settings": join_classifiers(chosen), "inputs": inputs, "recommendations": list_recommendations(correct),
        }  # fmt: skip
        if first.folds is not None:
            comparison |= {"num_folds": first.folds.num_folds, "num_repeats": len(seeds), "protocol": protocol}
        write_record(output_dir / COMPARISON, comparison)
        write_markdown(
            output_dir / "comparison.md", summary, baseline_name,
            findings=findings, seeds=seeds, sets=sets, own_sets="{seed}" in "".join(sets.values()),
            classifiers=classifiers, real=first.real.record.name, chosen=chosen,
            chosen_how=describe_choice(search_args.settings, chosen, search_seeds), command=command,
            num_folds=comparison_args.num_folds,
        )  # fmt: skip
        draw_pictures(output_dir, summary, correct, findings, baseline)
        if len(searches) == 1:  # several classifiers have different learning rates
            groups[groups.index(search_args)] = searches[classifiers[0].label]
        write_run_config(output_dir, resolve_options(groups), started)
    print_comparison(summary, findings, baseline_name)
    return comparison


if __name__ == "__main__":
    run_script(main)
