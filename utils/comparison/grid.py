"""Methods side by side: rows of a table, cells (method x shots x seed x volume), the recipe of each. No torch."""

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from utils.cli.errors import UserError
from utils.transfer.methods import StagePlan, StageSettings, plan_stages


@dataclass(frozen=True)
class Variant:
    """A method as a comparison runs it.

    `matched` methods take the steps of both stages. `bridge` and `real` replace settings of the stages on synthetic and
    on real images (on both kinds, for mix). `warms_head_up` gives half of stage 2's steps to the head alone, so the
    steps stay the same. `mix_ratio` is synthetic images per real one; None takes each image once.
    """

    description: str
    method: str
    head_init: str = "reset"
    matched: bool = False
    bridge: dict = field(default_factory=dict)
    real: dict = field(default_factory=dict)
    warms_head_up: bool = False
    mix_ratio: float | None = None


NO_MIXUP = {"mixup_alpha": 0.0}
MIXUP = {"mixup_alpha": 0.2}
VARIANTS = {
    "vanilla": Variant("real images only, for the steps of stage 2", "vanilla"),
    "vanilla_matched": Variant("real images only, for the steps of both stages", "vanilla", matched=True),
    "vanilla_mixup": Variant("vanilla_matched with Mixup 0.2", "vanilla", matched=True, real=MIXUP),
    "mix": Variant("both kinds of images in one stage, each once an epoch, matched", "mix", matched=True),
    "mix_mixup": Variant("mix with Mixup 0.2", "mix", matched=True, real=MIXUP),
    "mix_balanced": Variant("mix with as many real images as synthetic", "mix", matched=True, mix_ratio=1.0),
    "bridged": Variant("synthetic images with Mixup, then real ones with a fresh head (the paper's ++)", "bridged"),
    "bridged_keep": Variant("bridged with the head of stage 1", "bridged", "keep"),
    "bridged_imprint": Variant("bridged with a head of class means of features", "bridged", "imprint"),
    "bridged_head_warmup": Variant(
        "bridged with a fresh head that is trained alone in the first half of stage 2", "bridged", warms_head_up=True
    ),
    "bridged_no_mixup": Variant("bridged without Mixup", "bridged", bridge=NO_MIXUP),
    "bridged_plain": Variant("the paper's plain: head of stage 1, no Mixup", "bridged", "keep", bridge=NO_MIXUP),
    "bridged_recalibrate": Variant(
        "bridged with BatchNorm statistics measured on the real images before stage 2", "bridged",
        real={"batch_norm": "recalibrate"},
    ),
    "synthetic_only": Variant("stage 1 alone", "synthetic_only"),
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A method with its synthetic set: `label` is `name` or `name@synthetic set`."""

    label: str
    name: str
    synthetic: str

    @property
    def variant(self) -> Variant:
        return VARIANTS[self.name]

    @property
    def uses_real(self) -> bool:
        return self.variant.method != "synthetic_only"

    @property
    def uses_synthetic(self) -> bool:
        return self.variant.method != "vanilla"


@dataclass(frozen=True)
class Recipe:
    """What the search chooses. A `head_learning_rate_factor` of None is 10 for a fresh head, 1 for another."""

    learning_rate: float
    max_steps: int
    head_learning_rate_factor: float | None = None


@dataclass(frozen=True)
class Cell:
    """One training run, complete in itself; `split` is what it is judged on.

    `num_shots` None is all real images, or none for an arm that uses none; `volume`, synthetic images per class, None
    is all of them, or none.
    """

    arm: Arm
    num_shots: int | None
    seed: int
    recipe: Recipe
    bridge: StageSettings
    volume: int | None = None
    split: str = "test"

    @property
    def title(self) -> str:
        parts = [self.arm.label]
        if self.arm.uses_real:
            parts.append(shots_title(self.num_shots))
        if self.volume is not None:
            parts.append(volume_title(self.volume))
        return ", ".join([*parts, f"seed {self.seed}"])


def make_cell(
    arm: Arm,
    num_shots: int | None,
    seed: int,
    recipe: Recipe,
    bridge: StageSettings,
    volume: int | None = None,
    split: str = "test",
) -> Cell:
    """Return a cell without what its arm does not use, so that equal runs are equal cells."""
    return Cell(
        arm,
        num_shots if arm.uses_real else None,
        seed,
        recipe if arm.uses_real else Recipe(0.0, 0),
        bridge,
        volume if arm.uses_synthetic else None,
        split,
    )


def plan_cell(cell: Cell, settings: StageSettings) -> list[StagePlan]:
    """Return the stages of a cell; `settings` has what its recipe and its variant leave open."""
    variant = cell.arm.variant
    settings = replace(
        settings,
        max_steps=cell.recipe.max_steps,
        learning_rate=cell.recipe.learning_rate,
        head_learning_rate_factor=cell.recipe.head_learning_rate_factor,
        **variant.real,
    )
    if variant.warms_head_up:
        num_steps = settings.max_steps // 2
        settings = replace(settings, max_steps=settings.max_steps - num_steps, head_warmup_steps=num_steps)
    return plan_stages(
        variant.method, replace(cell.bridge, **variant.bridge), settings, variant.head_init, variant.matched
    )


def parse_arms(methods: list[str], set_names: list[str]) -> list[Arm]:
    """Return the arms for `method` or `method@NAME`; the first synthetic set is the default.

    Raises:
        UserError: an unknown method or synthetic set, or the same method twice.
    """
    arms = []
    for label in methods:
        name, _, synthetic = label.partition("@")
        if name not in VARIANTS:
            raise UserError(f"--methods {label}: unknown; there are {', '.join(VARIANTS)}, each also as method@NAME.")
        if synthetic and synthetic not in set_names:
            raise UserError(f"--methods {label}: no synthetic set '{synthetic}'; there are {', '.join(set_names)}.")
        arms.append(Arm(label, name, synthetic or set_names[0]))
    if len(set(methods)) < len(methods):
        raise UserError(f"--methods {' '.join(methods)}: a method is there twice.")
    return arms


def parse_synthetic_sets(values: list[str]) -> dict[str, str]:
    """Return name -> path (which may hold `{seed}`) for values like `NAME=PATH`, or one bare path (named `dsi`).

    Raises:
        UserError: several paths of which one has no name, or a name twice.
    """
    if len(values) == 1 and "=" not in values[0]:
        return {"dsi": values[0]}
    sets = dict(value.split("=", 1) for value in values if "=" in value)
    if len(sets) < len(values):
        raise UserError(f"--synthetic_dataset {' '.join(values)}: several sets need names, NAME=PATH, each once.")
    return sets


def fingerprint(settings: dict) -> str:
    """Return a short hash of settings, the same for equal settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def rates_around(rate: float) -> list[float]:
    """Return the three learning rates of the small search around a default."""
    return [rate / 4, rate, 4 * rate]


def recipe_grid(learning_rates: list[float], step_counts: list[int], factors: list[float] | None) -> list[Recipe]:
    """Return every combination."""
    return [Recipe(*values) for values in product(learning_rates, step_counts, factors or [None])]


def choose_best(scores: dict) -> tuple[object, float]:
    """Return the candidate with the best mean validation accuracy over seeds, the first at a tie, and that mean."""
    best = max(scores, key=lambda candidate: np.mean(scores[candidate]))
    return best, float(np.mean(scores[best]))


def shots_key(num_shots: int | None) -> str:
    """Return what `chosen_settings.json` calls a shot count."""
    return "all" if num_shots is None else str(num_shots)


def look_up_recipe(chosen: dict, arm: Arm, num_shots: int | None) -> Recipe:
    """Return the recipe of a method (of the same method with another synthetic set, if need be).

    A shot count that was not searched takes the nearest smaller one, else the nearest; all images count as most.

    Raises:
        UserError: the method was not searched.
    """
    by_shots = chosen.get(arm.label) or chosen.get(arm.name)
    if not by_shots:
        raise UserError(f"--settings: has no recipe for '{arm.label}'; it has {', '.join(chosen)}.")
    entries = {math.inf if key == "all" else int(key): entry for key, entry in by_shots.items()}
    wanted = math.inf if num_shots is None else num_shots
    entry = entries[max((count for count in entries if count <= wanted), default=min(entries))]
    return Recipe(entry["learning_rate"], entry["max_steps"], entry["head_learning_rate_factor"])


def shots_title(count: int | None) -> str:
    """Return `1 shot`, `4 shots`, `all images`."""
    return "all images" if count is None else f"{count} shot{'s' * (count > 1)}"


def volume_title(volume: int) -> str:
    """Return `500 a class`."""
    return f"{volume} a class"
