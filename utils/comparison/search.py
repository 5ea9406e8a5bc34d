"""The search of recipes on validation images: of stage 1 first, then of each method by the same candidates."""

import dataclasses
from itertools import product

from utils.cli.errors import UserError
from utils.cli.records import read_record
from utils.comparison.cells import CellRunner
from utils.comparison.grid import (
    Arm,
    Cell,
    Recipe,
    choose_best,
    look_up_recipe,
    make_cell,
    shots_key,
    shots_title,
)
from utils.comparison.workers import run_cells
from utils.transfer.methods import StageSettings

LOST = [-1.0]  # the accuracies of a candidate that diverged


def choose_bridge(
    runner: CellRunner, candidates: list[StageSettings], seeds: list[int], volume: int | None, num_workers: int
) -> StageSettings:
    """Return the settings of stage 1 whose model, before it sees real images, is best on the validation images.

    They are chosen on the first synthetic set that was given and used for all of them.
    """
    if len(candidates) == 1:
        return candidates[0]
    set_name, _ = next(iter(runner.sources))
    arm = Arm("synthetic_only", "synthetic_only", set_name)
    cells = {
        bridge: [make_cell(arm, None, seed, Recipe(0.0, 0), bridge, volume, "validation") for seed in seeds]
        for bridge in candidates
    }
    return _choose(_score(runner, cells, num_workers, "search of stage 1"), "stage 1 (--bridge_learning_rates)")[0]


def choose_recipes(
    runner: CellRunner, arms: list[Arm], recipes: dict[int | None, list[Recipe]], bridge: StageSettings,
    seeds: list[int], volume: int | None, num_workers: int,
) -> dict[str, dict]:  # fmt: skip
    """Return, by method that uses real images and by shots, the recipe with the best mean validation accuracy.

    `recipes` maps shots to the candidates; the only one is chosen as it is.
    """
    cells = {
        (arm, num_shots, recipe): [
            make_cell(arm, num_shots, seed, recipe, bridge, volume, "validation") for seed in seeds
        ]
        for arm in arms
        if arm.uses_real
        for num_shots, candidates in recipes.items()
        for recipe in candidates
        if len(candidates) > 1
    }
    scores = _score(runner, cells, num_workers, "search")
    chosen = {arm.label: {} for arm in arms if arm.uses_real}
    for arm, (num_shots, candidates) in product(arms, recipes.items()):
        if not arm.uses_real:
            continue
        recipe, accuracy = candidates[0], None
        if len(candidates) > 1:
            scores_here = {recipe: scores[arm, num_shots, recipe] for recipe in candidates}
            recipe, accuracy = _choose(scores_here, f"{arm.label} with {shots_title(num_shots)}")
        chosen[arm.label][shots_key(num_shots)] = dataclasses.asdict(recipe) | {"validation_accuracy": accuracy}
    return chosen


def read_settings(path: str, arms: list[Arm], shots: list[int | None], settings: StageSettings) -> dict:
    """Return what a chosen_settings.json holds, checked; `settings` fill in what its stage 1 leaves open.

    Raises:
        UserError: it is no such file, or has no recipe for a method.
    """
    chosen = read_record(path)
    try:
        of_images = {"random_flip": settings.random_flip}  # whatever images the recipes were searched on
        chosen["stage1"] = dataclasses.asdict(dataclasses.replace(settings, **chosen["stage1"] | of_images))
    except (KeyError, TypeError) as error:
        raise UserError(f"--settings {path}: is no chosen_settings.json of this script ({error}).") from None
    for arm, num_shots in product(arms, shots):
        if arm.uses_real:
            look_up_recipe(chosen, arm, num_shots)
    return chosen


def describe_choice(settings_path: str | None, chosen: dict, seeds: list[int]) -> str:
    """Return how the recipes were chosen, to follow 'recipes were'."""
    if settings_path is not None:
        return f"taken from `{settings_path}`"
    entries = [entry for name, by_shots in chosen.items() if name != "stage1" for entry in by_shots.values()]
    if all(entry["validation_accuracy"] is None for entry in entries):
        return "given, not searched for"
    numbers = ", ".join(map(str, seeds))
    return f"chosen on the validation images of seed {numbers}, for every method from the same candidates"


def _score(runner: CellRunner, cells: dict[object, list[Cell]], num_workers: int, what: str) -> dict:
    """Return each candidate's accuracies on the validation images; `cells` has one a seed.

    A candidate that diverged on any seed is told of, and has lost: its accuracies are below all others.
    """
    results = run_cells(runner, [cell for by_seed in cells.values() for cell in by_seed], num_workers, what)
    for diverged in dict.fromkeys(result["diverged"] for result in results.values() if "diverged" in result):
        print(f"Warning: a candidate of the {what} was dropped: {diverged}")
    scores = {candidate: [results[cell]["accuracy"] for cell in by_seed] for candidate, by_seed in cells.items()}
    return {candidate: LOST if None in accuracies else accuracies for candidate, accuracies in scores.items()}


def _choose(scores: dict, what: str) -> tuple[object, float]:
    """Return the best candidate and its mean accuracy.

    Raises:
        UserError: all of them diverged.
    """
    best, accuracy = choose_best(scores)
    if scores[best] is LOST:
        raise UserError(f"--learning_rates: every candidate of {what} diverged; give lower ones.")
    return best, accuracy
