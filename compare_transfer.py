#!/usr/bin/env python
"""Compare ways of using synthetic images, on the same real images: methods x shots x seeds, one table, one plot.

    accelerate launch compare_transfer.py --synthetic_dataset cars-syn --num_shots 1 4 16
    accelerate launch compare_transfer.py --synthetic_dataset 'dsi=syn-{seed}' 'plain=syn-plain' \\
        --methods vanilla_matched bridged bridged@plain --learning_rates 1e-4 4e-4 --step_counts 30 90

Methods: vanilla (real images only), vanilla_matched (as many steps as both stages together), mix (both kinds together,
matched), bridged (fresh head for the real images), bridged_keep (same head), synthetic_only; method@NAME takes another
synthetic set than the first. Finished cells are kept: run the same command again to go on.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import transformers
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import TrainingArguments

from utils.cli.arguments import ModelArguments
from utils.cli.errors import UserError, run_script
from utils.cli.parsing import ScriptArgumentParser, require_positive
from utils.cli.records import image_set_name, read_record, resolve_options, write_record, write_run_config
from utils.data.real_images import RealImagesRecord, check_images, load_real_images
from utils.transfer.cells import CellRunner
from utils.transfer.classifiers import check_classifier, load_image_processor
from utils.transfer.comparison import (
    ARMS,
    Arm,
    Cell,
    Recipe,
    choose_recipe,
    describe_findings,
    look_up_recipe,
    parse_arms,
    parse_synthetic_sets,
    recipe_grid,
    summarise,
    to_markdown,
)
from utils.transfer.methods import StageSettings
from utils.transfer.report import plot_comparison, print_comparison
from utils.transfer.synthetic_images import SyntheticSource, count_leaked_images, open_synthetic


@dataclass
class ComparisonArguments:
    """What is compared."""

    _argument_group_name = "comparison"

    synthetic_dataset: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Synthetic sets, NAME=PATH or one bare path (folder or data set id); '{seed}' in a path stands "
            "for the few-shot seed, as a style token is learned from that seed's images."
        },
    )
    methods: list[str] = field(
        default_factory=lambda: ["vanilla_matched", "mix", "bridged", "bridged_keep"],
        metadata={"help": f"Rows of the table: {', '.join(ARMS)}; method@NAME takes another synthetic set."},
    )
    num_shots: list[int] = field(default_factory=lambda: [1, 4], metadata={"help": "Real images per class."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Few-shot seeds, one run each."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use so many validation and test images, evenly spread; all when not given."}
    )
    output_dir: str = field(default="comparison", metadata={"help": "Output folder; finished cells in it are kept."})
    hub_token: str | None = field(
        default=None, metadata={"help": "Access token; HF_TOKEN or `hf auth login` when not given."}
    )


@dataclass
class SearchArguments:
    """Several values are a search on validation images: first of stage 1 alone, then of each method on real images."""

    _argument_group_name = "recipe search"

    learning_rates: list[float] = field(
        default_factory=lambda: [2e-4], metadata={"help": "Peak learning rates of AdamW."}
    )
    step_counts: list[int] = field(
        default_factory=lambda: [30], metadata={"help": "Steps on real images; matched methods add stage 1's."}
    )
    head_learning_rate_factors: list[float] | None = field(
        default=None, metadata={"help": "Head's learning rate over the rest's; 10 for a fresh head, 1 for a kept one."}
    )
    bridge_learning_rates: list[float] = field(
        default_factory=lambda: [5e-4], metadata={"help": "Peak learning rates on synthetic images."}
    )
    bridge_step_counts: list[int] = field(default_factory=lambda: [90], metadata={"help": "Steps on synthetic images."})
    bridge_mixup_alphas: list[float] = field(
        default_factory=lambda: [0.2], metadata={"help": "Mixup on synthetic images; 0 turns it off."}
    )
    search_seeds: list[int] | None = field(
        default=None, metadata={"help": "Few-shot seeds of the search; the first of --seeds when not given."}
    )
    settings: str | None = field(
        default=None, metadata={"help": "Take the recipes of this chosen_settings.json, search nothing."}
    )


@dataclass
class TrainingSettings:
    """Both stages."""

    _argument_group_name = "training"

    bridge_head_learning_rate_factor: float = field(
        default=10.0, metadata={"help": "Head's learning rate over the rest's, on synthetic images."}
    )
    mixup_alpha: float = field(default=0.0, metadata={"help": "Mixup elsewhere; 0 turns it off."})
    batch_norm: str = field(
        default="frozen", metadata={"help": "BatchNorm statistics.", "choices": ("frozen", "train")}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Images per device and step."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    max_synthetic_samples_per_class: int | None = field(
        default=None, metadata={"help": "Use the first so many synthetic images of each class; all when not given."}
    )


def check_arguments(comparison_args, search_args, training_settings) -> None:
    """Check values that need no data.

    Raises:
        UserError: a value is out of range or missing.
    """
    if not comparison_args.synthetic_dataset:
        raise UserError("--synthetic_dataset: give at least one synthetic set, a folder or a data set id.")
    for flag in (
        "num_shots", "learning_rates", "step_counts", "head_learning_rate_factors", "bridge_learning_rates",
        "bridge_step_counts",
    ):  # fmt: skip
        values = getattr(comparison_args, flag, None) or getattr(search_args, flag, None) or []
        for value in values:
            require_positive(**{flag: value})
    for name, value in dataclasses.asdict(training_settings).items():
        if not isinstance(value, str) and name not in ("mixup_alpha", "weight_decay"):
            require_positive(**{name: value})
        elif not isinstance(value, str) and value < 0:
            raise UserError(f"--{name} {value}: must be 0 (off) or above.")
    for value in search_args.bridge_mixup_alphas:
        if value < 0:
            raise UserError(f"--bridge_mixup_alphas {value}: must be 0 (off) or above.")
    require_positive(max_eval_samples=comparison_args.max_eval_samples)
    if PartialState().num_processes > 1:
        raise UserError(
            "--num_processes: the comparison runs in one process; run parts of it (--methods, --seeds) "
            "into the same --output_dir side by side, then all of it: finished cells are kept."
        )


def open_sources(
    sets: dict[str, str], seeds: list[int], token: str | None = None
) -> dict[tuple[str, int], SyntheticSource]:
    """Return the synthetic sets by name and few-shot seed.

    Raises:
        UserError: a set is not there, or was made for other real images than the first.
    """
    paths = {(name, seed): path.replace("{seed}", str(seed)) for name, path in sets.items() for seed in seeds}
    # each set once: all seeds get the same commit of it
    opened = {path: open_synthetic(path, token=token) for path in dict.fromkeys(paths.values())}
    sources = {key: opened[path] for key, path in paths.items()}
    for source in sources.values():
        if source.record["real_images"] is None:
            raise UserError(
                f"--synthetic_dataset {source.name}: was made for a list of class names, its record names no real "
                "images; make it with --dataset_name."
            )
    first, *others = sources.values()
    for source in others:
        ours, theirs = (image_set_name(item.record["real_images"]) for item in (first, source))
        if ours != theirs:
            raise UserError(f"--synthetic_dataset {source.name}: was made for '{theirs}', {first.name} for '{ours}'.")
    return sources


def warn_of_leaks(runner: CellRunner, num_shots: int) -> None:
    """Say which style tokens saw real images outside the smallest few-shot subset of their seed."""
    for (_, seed), source in runner.sources.items():
        rows = runner.real.train_indices[runner.few_shot_rows(num_shots, seed)]
        num_leaked = count_leaked_images(source.record, rows)
        if num_leaked:
            print(
                f"Warning: {source.name}: its style token has seen {num_leaked} real images that the {num_shots}-shot "
                f"runs of seed {seed} do not train on; vanilla has seen fewer real images."
            )


def search_bridge(
    runner: CellRunner, candidates: list[StageSettings], seeds: list[int], progress: tqdm
) -> StageSettings:
    """Return the settings of stage 1 whose model, before it sees real images, is best on the validation images.

    They are chosen on the first synthetic set that was given and used for all of them.
    """
    set_name, _ = next(iter(runner.sources))
    arm = Arm("synthetic_only", "synthetic_only", set_name)
    scores = {settings: [] for settings in candidates}
    for settings in candidates:
        runner.bridge_settings = settings
        for seed in seeds:
            progress.set_description(f"search: stage 1, seed {seed}")
            cell = Cell(arm, num_shots=0, seed=seed, recipe=Recipe(settings.learning_rate, 0), split="validation")
            scores[settings].append(runner.result(cell)["accuracy"])
            progress.update()
    return choose_recipe(scores)[0]


def search_recipes(
    runner: CellRunner, arms: list[Arm], shots: list[int], recipes: list[Recipe], seeds: list[int], progress: tqdm
) -> dict:
    """Return, by method and shots, the recipe with the best mean accuracy on the validation images."""
    chosen = {arm.label: {} for arm in arms}
    for arm in arms:
        for num_shots in shots:
            scores = {recipe: [] for recipe in recipes}
            for recipe in recipes:
                for seed in seeds:
                    progress.set_description(f"search: {arm.label}, {num_shots} shots, seed {seed}")
                    result = runner.result(Cell(arm, num_shots, seed, recipe, "validation"))
                    scores[recipe].append(result["accuracy"])
                    progress.update()
            recipe, accuracy = choose_recipe(scores)
            chosen[arm.label][str(num_shots)] = {**dataclasses.asdict(recipe), "validation_accuracy": accuracy}
    return chosen


def run_cells(
    runner: CellRunner, arms: list[Arm], shots: list[int], seeds: list[int], chosen: dict, progress: tqdm
) -> dict[str, dict[int, dict[int, float]]]:
    """Return test accuracy by method, shots and seed."""
    accuracies = {arm.label: {num_shots: {} for num_shots in shots} for arm in arms}
    for seed in seeds:
        for num_shots in shots:
            for arm in arms:
                progress.set_description(f"test: {arm.label}, {num_shots} shots, seed {seed}")
                recipe = look_up_recipe(chosen, arm, num_shots)
                result = runner.result(Cell(arm, num_shots, seed, recipe))
                accuracies[arm.label][num_shots][seed] = result["accuracy"]
                progress.update()
    return accuracies


def build_runner(model_args, comparison_args, training_settings, bridge_settings, sources: dict, real) -> CellRunner:
    """Return what runs the cells; the classifier is looked up, not loaded."""
    token = comparison_args.hub_token or None
    commit = check_classifier(model_args.model_name_or_path, model_args.model_revision, token)
    hub_options = {
        "revision": commit or "main",
        "trust_remote_code": model_args.trust_remote_code,
        "token": token,
    }
    training_args = TrainingArguments(
        output_dir=str(Path(comparison_args.output_dir) / "work"),
        per_device_train_batch_size=training_settings.per_device_train_batch_size,
        weight_decay=training_settings.weight_decay,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return CellRunner(
        model_args.model_name_or_path,
        hub_options,
        load_image_processor(model_args.model_name_or_path, **hub_options),
        real,
        sources,
        bridge_settings,
        training_settings.mixup_alpha,
        training_args,
        Path(comparison_args.output_dir),
        comparison_args.max_eval_samples,
        training_settings.max_synthetic_samples_per_class,
    )


def main(argv: Sequence[str] | None = None) -> dict:
    started = time.time()
    parser = ScriptArgumentParser([ModelArguments, ComparisonArguments, SearchArguments, TrainingSettings])
    model_args, comparison_args, search_args, training_settings = groups = parser.parse(argv)
    check_arguments(comparison_args, search_args, training_settings)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    shots, seeds = sorted(comparison_args.num_shots), comparison_args.seeds
    sets = parse_synthetic_sets(comparison_args.synthetic_dataset)
    arms = parse_arms(comparison_args.methods, list(sets))
    recipes = recipe_grid(search_args.learning_rates, search_args.step_counts, search_args.head_learning_rate_factors)
    search_seeds = search_args.search_seeds or seeds[:1]
    # nothing to choose with one recipe, and none for a method that is never trained on real images
    searched = [arm for arm in arms if arm.name != "synthetic_only" and len(recipes) > 1 and not search_args.settings]
    bridge_recipes = [
        StageSettings(
            steps, rate, training_settings.bridge_head_learning_rate_factor, alpha, training_settings.batch_norm
        )
        for steps, rate, alpha in product(
            search_args.bridge_step_counts, search_args.bridge_learning_rates, search_args.bridge_mixup_alphas
        )
    ]
    chosen = {}
    if search_args.settings:
        chosen = read_record(search_args.settings)
        bridge_recipes = [StageSettings(**chosen["stage1"])]
        for arm in arms:
            look_up_recipe(chosen, arm, shots[0])
    searches_bridge = len(bridge_recipes) > 1

    # data
    token = comparison_args.hub_token or None
    all_seeds = list(dict.fromkeys(seeds + (search_seeds if searched or searches_bridge else [])))
    sources = open_sources(sets, all_seeds, token)
    record = RealImagesRecord(**next(iter(sources.values())).record["real_images"])
    real = load_real_images(dataclasses.replace(record, num_shots=None, max_train_samples=None), token)
    check_images(real.train, "real training images", real.record.image_column_name, real.train_indices)

    # cells
    runner = build_runner(model_args, comparison_args, training_settings, bridge_recipes[0], sources, real)
    runner.check(arms, shots)
    warn_of_leaks(runner, shots[0])
    num_searched = len(searched) * len(shots) * len(recipes) * len(search_seeds)
    num_searched += len(bridge_recipes) * len(search_seeds) * searches_bridge
    with tqdm(total=num_searched + len(arms) * len(shots) * len(seeds), unit="cell") as progress:
        if searches_bridge:
            runner.bridge_settings = search_bridge(runner, bridge_recipes, search_seeds, progress)
        if not search_args.settings:
            chosen = {"stage1": dataclasses.asdict(runner.bridge_settings)}
            chosen |= {arm.label: {str(shots[0]): dataclasses.asdict(recipes[0])} for arm in arms}
            chosen |= search_recipes(runner, searched, shots, recipes, search_seeds, progress)
            write_record(runner.output_dir / "chosen_settings.json", chosen)
        accuracies = run_cells(runner, arms, shots, seeds, chosen, progress)

    # results
    baseline = next((name for name in ("vanilla_matched", "vanilla") if name in accuracies), None)
    summary = summarise(accuracies, baseline)
    findings = describe_findings(summary, baseline, len(seeds))
    comparison = {"findings": findings, "baseline": baseline, "seeds": seeds, "summary": summary, "settings": chosen}
    write_record(runner.output_dir / "comparison.json", comparison)
    (runner.output_dir / "comparison.md").write_text(to_markdown(summary, findings, baseline), encoding="utf-8")
    plot_comparison(runner.output_dir / "comparison.png", summary)
    write_run_config(runner.output_dir, resolve_options(groups), started)
    print_comparison(summary, findings, baseline)
    return comparison


if __name__ == "__main__":
    run_script(main)
