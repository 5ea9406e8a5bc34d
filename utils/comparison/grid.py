"""The grid of a comparison: rows of the table, cells (method x shots x seed x volume) and recipes. No torch."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from utils.cli.errors import UserError
from utils.transfer.methods import METHODS, Method, StagePlan, StageSettings, plan_stages


@dataclass(frozen=True)
class Row:
    """A row of the table: a method of `METHODS`, its synthetic set and, if volumes are compared, how much of it.

    `label` is `name` or `name@synthetic set`. `volume` is the number of synthetic images per class; None means all, or
    that the method uses none.
    """

    label: str
    name: str
    synthetic: str
    volume: int | None = None

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    @property
    def is_bridged(self) -> bool:
        return len(self.method.stages) > 1


@dataclass(frozen=True)
class Recipe:
    """What the search chooses. A `head_learning_rate_factor` of None means 10 for a fresh head and 1 otherwise."""

    learning_rate: float
    max_steps: int
    head_learning_rate_factor: float | None = None


@dataclass(frozen=True)
class Cell:
    """One complete training run; `split` is the split it is evaluated on.

    `num_shots` None means all real images, or that the method uses none. `bridge` holds the settings of stage 1.
    `fold`, such as `2/5`, is the part of the images that it is tested on and does not train on.
    """

    row: Row
    num_shots: int | None
    seed: int
    recipe: Recipe
    bridge: StageSettings
    split: str = "test"
    fold: str | None = None

    @property
    def title(self) -> str:
        shots = [shots_title(self.num_shots)] if self.row.method.uses_real else []
        volume = [] if self.row.volume is None else [volume_title(self.row.volume)]
        fold = [] if self.fold is None else [f"fold {self.fold}"]
        return ", ".join([self.row.label, *shots, *volume, f"seed {self.seed}", *fold])

    @property
    def source(self) -> tuple:
        """The key of its synthetic set in the `sources` of a `CellRunner`."""
        return source_key(self.row.synthetic, self.seed, self.fold)


def make_cell(
    row: Row, num_shots: int | None, seed: int, recipe: Recipe | None, bridge: StageSettings, split: str = "test",
    fold: str | None = None,
) -> Cell:  # fmt: skip
    """Return a cell, without the values that its method does not use, so that equal runs are equal cells."""
    if not row.method.uses_synthetic:
        row = replace(row, volume=None)
    if not row.method.uses_real:
        num_shots = None
    if not row.method.takes_recipe:
        recipe = Recipe(0.0, 0)
    return Cell(row, num_shots, seed, recipe, bridge, split, fold)


def source_key(name: str, seed: int, fold: str | None = None) -> tuple:
    """Return (name, seed), or (name, seed, fold) with folds."""
    return (name, seed) if fold is None else (name, seed, fold)


def plan_cell(
    cell: Cell, settings: StageSettings, images_per_class: float | None = None, weight: float = 1.0
) -> list[StagePlan]:
    """Return the stages of a cell; `settings` has the values that neither its recipe nor its method sets.

    `images_per_class` is the number of real images per class if the cell takes all; `weight` is as in `plan_stages`.
    """
    of_recipe = replace(settings, **asdict(cell.recipe))
    return plan_stages(cell.row.method, cell.bridge, of_recipe, cell.num_shots or images_per_class, weight)


def plan_table(
    rows: list[Row], shots: list[int | None], seeds: list[int], volumes: list[int | None], chosen: dict,
    folds: Sequence[str | None] = (None,),
) -> dict[Row, dict[int | None, list[Cell]]]:  # fmt: skip
    """Return the cells of the test table by row and shots: one per seed, or one per seed and fold.

    `chosen` is the content of chosen_settings.json.
    """
    bridge = StageSettings(**chosen["stage1"])
    table = {}
    for row in rows:
        for volume in volumes if row.method.uses_synthetic else [None]:
            recipes = {
                count: look_up_recipe(chosen, row, count) if row.method.takes_recipe else None for count in shots
            }
            table[replace(row, volume=volume)] = {
                count: [
                    make_cell(replace(row, volume=volume), count, seed, recipe, bridge, fold=fold)
                    for seed in seeds
                    for fold in folds
                ]
                for count, recipe in recipes.items()
            }
    return table


def parse_rows(methods: list[str], set_names: list[str]) -> list[Row]:
    """Return the rows for values like `method` or `method@NAME`; the first synthetic set is the default.

    Raises:
        UserError: an unknown method or synthetic set, or the same method twice.
    """
    rows = []
    for label in methods:
        name, _, synthetic = label.partition("@")
        if name not in METHODS:
            raise UserError(f"--methods {label}: unknown; choose from {', '.join(METHODS)}, each also as method@NAME.")
        if synthetic and synthetic not in set_names:
            raise UserError(f"--methods {label}: no synthetic set '{synthetic}'; choose from {', '.join(set_names)}.")
        rows.append(Row(label, name, synthetic or set_names[0]))
    if len(set(methods)) < len(methods):
        raise UserError(f"--methods {' '.join(methods)}: duplicate methods.")
    return rows


def parse_synthetic_sets(values: list[str]) -> dict[str, str]:
    """Return name -> path (which may hold `{seed}` and `{fold}`) for values like `NAME=PATH`.

    One bare path has the name `dsi`.

    Raises:
        UserError: with several paths, one has no name or two have the same name.
    """
    if len(values) == 1 and "=" not in values[0]:
        return {"dsi": values[0]}
    sets = dict(value.split("=", 1) for value in values if "=" in value)
    if len(sets) < len(values):
        raise UserError(f"--synthetic_dataset {' '.join(values)}: several sets need unique names, as NAME=PATH.")
    return sets


def fingerprint(settings: dict) -> str:
    """Return a short hash of settings, the same for equal settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def rates_around(rate: float) -> list[float]:
    """Return the three learning rates of the small search around a default."""
    return [rate / 4, rate, 4 * rate]


def shots_key(num_shots: int | None) -> str:
    """Return the key of a shot count in `chosen_settings.json`."""
    return "all" if num_shots is None else str(num_shots)


def find_recipes(chosen: dict, row: Row) -> dict | None:
    """Return the recipes of a method by shots, else of the same method with another synthetic set, else None."""
    return chosen.get(row.label) or chosen.get(row.name)


def look_up_recipe(chosen: dict, row: Row, num_shots: int | None) -> Recipe:
    """Return the recipe of a method for which `find_recipes` finds some.

    A shot count that was not searched takes the recipe of the next smaller one that was, or of the smallest if there is
    none. All images count as the largest shot count.
    """
    entries = {math.inf if key == "all" else int(key): entry for key, entry in find_recipes(chosen, row).items()}
    wanted = math.inf if num_shots is None else num_shots
    entry = entries[max((count for count in entries if count <= wanted), default=min(entries))]
    return Recipe(entry["learning_rate"], entry["max_steps"], entry["head_learning_rate_factor"])


def shots_title(count: int | None) -> str:
    """Return `1 shot`, `4 shots`, `all images`."""
    return "all images" if count is None else f"{count} shot{'s' * (count > 1)}"


def volume_title(volume: int) -> str:
    """Return `500 per class`."""
    return f"{volume} per class"
