"""The recipe search on validation images: first of stage 1, then of each method, with the same candidates for all."""

import dataclasses
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from utils.cli.errors import UserError
from utils.cli.parsing import MAX_FLOAT
from utils.cli.records import read_record, write_record
from utils.comparison.cells import CellRunner, run_cells
from utils.comparison.grid import Cell, Recipe, Row, find_recipes, make_cell, rates_around, shots_key, shots_title
from utils.transfer.methods import StageSettings, steps_per_epoch

CLASSIFIERS = "classifiers"  # the key in a chosen_settings.json with recipes for several
LOST = [-1.0]  # the accuracies of a candidate that diverged
SEARCHED = ("max_steps", "learning_rate", "head_learning_rate_factor", "mixup_alpha")  # of stage 1, by `list_bridges`
STAGE_SETTINGS = tuple(field.name for field in dataclasses.fields(StageSettings))
RECIPE = tuple(field.name for field in dataclasses.fields(Recipe))
# what each number in a chosen_settings.json must be, and its check
WANTED = {
    "max_steps": ("a whole number above 0", lambda value: isinstance(value, int) and value > 0),
    "learning_rate": ("a number above 0", lambda value: 0 < value <= MAX_FLOAT),
    "head_learning_rate_factor": ("a number above 0, or null", lambda value: 0 < value <= MAX_FLOAT),
    "mixup_alpha": ("a number, 0 or above", lambda value: 0 <= value <= MAX_FLOAT),
}


def choose_settings(
    runner: CellRunner, label: str, rows: list[Row], search_args, shared_args, shots: list[int | None],
    seeds: list[int], volume: int | None, num_workers: int,
) -> dict:  # fmt: skip
    """Return the recipes of a classifier in the form of chosen_settings.json, read from such a file or searched."""
    if search_args.settings:
        return read_settings(search_args.settings, rows, runner.settings, label)
    num_synthetic = len(runner.load_synthetic(next(iter(runner.sources.values())), volume))
    bridges = list_bridges(search_args, shared_args, runner.settings, num_synthetic)
    bridge = choose_bridge(runner, bridges, seeds, volume, num_workers)
    recipes = list_recipes(search_args, runner, search_args.search_shots or shots)
    chosen = choose_recipes(runner, rows, recipes, bridge, seeds, volume, num_workers)
    return {"stage1": bridge.to_dict()} | chosen


def list_bridges(search_args, shared_args, settings: StageSettings, num_images: int) -> list[StageSettings]:
    """Return the candidate settings of stage 1; `num_images` is the number of images of the largest volume."""
    batch_size = settings.per_device_train_batch_size
    factor = shared_args.bridge_head_learning_rate_factor
    steps = search_args.bridge_step_counts or [epoch_steps(search_args.bridge_num_train_epochs, num_images, batch_size)]
    rates = search_args.bridge_learning_rates
    rates = rates_around(*rates) if search_args.search_learning_rate else rates
    grid = product(steps, rates, [factor], search_args.bridge_mixup_alphas)
    return [dataclasses.replace(settings, **dict(zip(SEARCHED, values))) for values in grid]


def list_recipes(search_args, runner: CellRunner, shots: list[int | None]) -> dict[int | None, list[Recipe]]:
    """Return the candidate recipes by shots; each shot count has its own number of steps per epoch."""
    rates = search_args.learning_rates
    rates = rates_around(*rates) if search_args.search_learning_rate else rates
    batch_size = runner.settings.per_device_train_batch_size
    recipes = {}
    for num_shots in shots:
        num_images = len(runner.few_shot_rows(num_shots, 0, runner.first_fold))
        steps = search_args.step_counts or [epoch_steps(search_args.num_train_epochs, num_images, batch_size)]
        grid = product(rates, steps, search_args.head_learning_rate_factors or [None])
        recipes[num_shots] = [Recipe(*values) for values in grid]
    return recipes


def epoch_steps(num_epochs: float, num_images: int, batch_size: int) -> int:
    return max(1, round(num_epochs * steps_per_epoch(num_images, batch_size)))


def choose_bridge(
    runner: CellRunner, candidates: list[StageSettings], seeds: list[int], volume: int | None, num_workers: int
) -> StageSettings:
    """Return the settings of stage 1 whose model is best on the validation images before it sees real ones.

    They are chosen on the first synthetic set and used for all of them.
    """
    if len(candidates) == 1:
        return candidates[0]
    set_name, *_ = next(iter(runner.sources))
    row = Row("synthetic_only", "synthetic_only", set_name, volume)
    cells = {
        bridge: [make_cell(row, None, seed, None, bridge, "validation") for seed in seeds] for bridge in candidates
    }
    scores = _score(runner, cells, num_workers, "search of stage 1")
    return choose_best(scores, f"stage 1 (--bridge_learning_rates){runner.classifier_suffix}")[0]


def choose_recipes(
    runner: CellRunner, rows: list[Row], recipes: dict[int | None, list[Recipe]], bridge: StageSettings,
    seeds: list[int], volume: int | None, num_workers: int,
) -> dict[str, dict]:  # fmt: skip
    """Return the recipe with the best mean validation accuracy, by method with steps on real images and by shots.

    `recipes` maps shots to candidates; a single candidate is taken without a search.
    """
    rows = [dataclasses.replace(row, volume=volume) for row in rows if row.method.takes_recipe]
    cells = {
        (row, num_shots, recipe): [make_cell(row, num_shots, seed, recipe, bridge, "validation") for seed in seeds]
        for row in rows
        for num_shots, candidates in recipes.items()
        for recipe in candidates
        if len(candidates) > 1
    }
    scores = _score(runner, cells, num_workers, "search")
    chosen = {row.label: {} for row in rows}
    for row, (num_shots, candidates) in product(rows, recipes.items()):
        recipe, accuracy = candidates[0], None
        if len(candidates) > 1:
            scores_here = {recipe: scores[row, num_shots, recipe] for recipe in candidates}
            what = f"{row.label} with {shots_title(num_shots)}{runner.classifier_suffix}"
            recipe, accuracy = choose_best(scores_here, what)
        chosen[row.label][shots_key(num_shots)] = dataclasses.asdict(recipe) | {"validation_accuracy": accuracy}
    return chosen


def write_settings(path: Path, chosen: dict[str, dict]) -> None:
    """Write a chosen_settings.json; of stage 1, only the settings that can be searched are written.

    `chosen` maps the labels of classifiers to what was chosen for each; with several classifiers, so does the file.
    """
    searched = {
        label: of_one | {"stage1": {name: of_one["stage1"][name] for name in SEARCHED}}
        for label, of_one in chosen.items()
    }
    write_record(path, join_classifiers(searched))


def join_classifiers(chosen: dict[str, dict]) -> dict:
    """Return settings by classifier in the form of records: for a single classifier, just its settings."""
    return {CLASSIFIERS: chosen} if len(chosen) > 1 else next(iter(chosen.values()))


def split_classifiers(chosen: dict) -> dict[str | None, dict]:
    """Return the settings by classifier from what `join_classifiers` returned; a single classifier has the key None."""
    return chosen.get(CLASSIFIERS, {None: chosen})


def check_settings(path: str, rows: list[Row], classifier: str | None = None) -> dict:
    """Return the recipes of a chosen_settings.json for a classifier, given by its label, with every value checked.

    A file with the recipes of a single classifier serves any classifier.

    Raises:
        UserError: it is not such a file, or has no recipe for the classifier or for a method.
    """
    chosen = read_record(path)
    if CLASSIFIERS in chosen:
        by_label = chosen[CLASSIFIERS]
        if not isinstance(by_label, dict) or not all(isinstance(of_one, dict) for of_one in by_label.values()):
            raise UserError(
                f"--settings {path}: not a chosen_settings.json of this script ({CLASSIFIERS} must map names to "
                "recipes)."
            )
        if classifier not in by_label:
            names = ", ".join(by_label)
            raise UserError(f"--settings {path}: has no recipes for the classifier '{classifier}'; it has {names}.")
        chosen = by_label[classifier]
    problems = [_find_problem("stage1", chosen.get("stage1"), SEARCHED, STAGE_SETTINGS)]
    methods = {name: by_shots for name, by_shots in chosen.items() if name != "stage1"}
    for name, by_shots in methods.items():
        if not isinstance(by_shots, dict) or not all(shots == "all" or shots.isdecimal() for shots in by_shots):
            problems.append(f"{name} is {by_shots!r}, must be a mapping of shots to recipes")
            continue
        problems += [_find_problem(f"{name} with {shots} shots", entry, RECIPE) for shots, entry in by_shots.items()]
    if problem := next(filter(None, problems), None):
        raise UserError(f"--settings {path}: not a chosen_settings.json of this script ({problem}).")
    for row in rows:
        if row.method.takes_recipe and not find_recipes(chosen, row):
            raise UserError(f"--settings {path}: has no recipe for '{row.label}'; it has {', '.join(methods)}.")
    return chosen


def _find_problem(where: str, part: object, names: Sequence[str], known: Sequence[str] | None = None) -> str | None:
    """Return what is wrong with a mapping that must have `names` and may have `known`, or None."""
    if not isinstance(part, dict):
        return f"{where} is {part!r}, must be a mapping of settings to values"
    for name in names:
        if name not in part:
            return f"{where} has no {name}"
        value, (wanted, is_valid) = part[name], WANTED[name]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_valid(value) if is_number else value is None and name == "head_learning_rate_factor"):
            return f"{name} of {where} is {value!r}, must be {wanted}"
    unknown = [name for name in part if known is not None and name not in known]
    return f"{where} has an unknown {unknown[0]}" if unknown else None


def read_settings(path: str, rows: list[Row], settings: StageSettings, classifier: str | None = None) -> dict:
    """Return the recipes of a chosen_settings.json for a classifier; the rest of stage 1 is as in `settings`.

    Older files hold all settings of stage 1; if these differ from `settings`, a warning says so.

    Raises:
        UserError: what `check_settings` raises.
    """
    chosen = check_settings(path, rows, classifier)
    recorded = settings.to_dict() | chosen["stage1"]
    chosen["stage1"] = settings.to_dict() | {name: chosen["stage1"][name] for name in SEARCHED}
    others = [f"{name} {value}" for name, value in recorded.items() if value != chosen["stage1"].get(name)]
    if others:
        print(
            f"Warning: --settings {path}: its stage 1 was searched with {', '.join(others)}; this run uses its own "
            "values, for every method."
        )
    return chosen


def describe_choice(settings_path: str | None, chosen: dict[str, dict], seeds: list[int]) -> str:
    """Return how the recipes of each classifier were chosen, as the end of a sentence that begins 'Recipes were'."""
    if settings_path is not None:
        return f"taken from `{settings_path}`"
    entries = [
        entry
        for of_one in chosen.values()
        for name, by_shots in of_one.items()
        if name != "stage1"
        for entry in by_shots.values()
    ]
    if all(entry["validation_accuracy"] is None for entry in entries):
        return "given, not searched for"
    numbers = ", ".join(map(str, seeds))
    each = " for each classifier" if len(chosen) > 1 else ""
    return f"chosen{each} on the validation images of seed {numbers}, from the same candidates for every method"


def _score(runner: CellRunner, cells: dict[object, list[Cell]], num_workers: int, what: str) -> dict:
    """Return each candidate's accuracies, one per seed; a candidate that diverged on any seed loses, with a warning."""
    results = run_cells(runner, [cell for by_seed in cells.values() for cell in by_seed], num_workers, what)
    for diverged in dict.fromkeys(result["diverged"] for result in results.values() if "diverged" in result):
        print(f"Warning: a candidate of the {what} was dropped: {diverged}")
    scores = {candidate: [results[cell]["accuracy"] for cell in by_seed] for candidate, by_seed in cells.items()}
    return {candidate: LOST if None in accuracies else accuracies for candidate, accuracies in scores.items()}


def choose_best(scores: dict, what: str) -> tuple[object, float]:
    """Return the candidate with the best mean validation accuracy over seeds, the first at a tie, and that mean.

    Raises:
        UserError: all of them diverged.
    """
    best = max(scores, key=lambda candidate: np.mean(scores[candidate]))
    if scores[best] is LOST:
        raise UserError(f"--learning_rates: every candidate of {what} diverged; give lower rates.")
    return best, float(np.mean(scores[best]))
