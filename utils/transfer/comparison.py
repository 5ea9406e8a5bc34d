"""Methods side by side: cells (method x shots x seed), the recipe chosen for each, and what they say. No torch."""

import hashlib
import json
from dataclasses import dataclass
from itertools import product

import numpy as np

from utils.cli.errors import UserError

# name -> method, head at the start of stage 2, as many steps as both stages together
ARMS = {
    "vanilla": ("vanilla", "reset", False),
    "vanilla_matched": ("vanilla", "reset", True),
    "mix": ("mix", "reset", True),
    "bridged": ("bridged", "reset", False),
    "bridged_keep": ("bridged", "keep", False),
    "synthetic_only": ("synthetic_only", "reset", False),
}


@dataclass(frozen=True)
class Arm:
    """A row of the table: `label` is `name` or `name@synthetic set`."""

    label: str
    name: str
    synthetic: str

    @property
    def uses_synthetic(self) -> bool:
        return ARMS[self.name][0] != "vanilla"


@dataclass(frozen=True)
class Recipe:
    """What the search chooses. A `head_learning_rate_factor` of None is 10 for a fresh head, 1 for a kept one."""

    learning_rate: float
    max_steps: int
    head_learning_rate_factor: float | None = None


@dataclass(frozen=True)
class Cell:
    """One training run; `split` is what it is judged on."""

    arm: Arm
    num_shots: int
    seed: int
    recipe: Recipe
    split: str = "test"


def parse_arms(methods: list[str], set_names: list[str]) -> list[Arm]:
    """Return the rows for `method` or `method@NAME`; the first synthetic set is the default.

    Raises:
        UserError: an unknown method or synthetic set, or the same row twice.
    """
    arms = []
    for label in methods:
        name, _, synthetic = label.partition("@")
        if name not in ARMS:
            raise UserError(f"--methods {label}: unknown; there are {', '.join(ARMS)}, each also as method@NAME.")
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


def recipe_grid(learning_rates: list[float], step_counts: list[int], factors: list[float] | None) -> list[Recipe]:
    """Return every combination."""
    return [Recipe(*values) for values in product(learning_rates, step_counts, factors or [None])]


def choose_recipe(scores: dict[Recipe, list[float]]) -> tuple[Recipe, float]:
    """Return the recipe with the best mean validation accuracy over seeds, the first at a tie, and that mean."""
    best = max(scores, key=lambda recipe: np.mean(scores[recipe]))
    return best, float(np.mean(scores[best]))


def look_up_recipe(chosen: dict, arm: Arm, num_shots: int) -> Recipe:
    """Return the recipe of a method (of the same method with another synthetic set, if need be).

    A shot count that was not searched takes the nearest smaller one, else the nearest.

    Raises:
        UserError: the method was not searched.
    """
    by_shots = chosen.get(arm.label) or chosen.get(arm.name)
    if not by_shots:
        raise UserError(f"--settings: has no recipe for '{arm.label}'; it has {', '.join(chosen)}.")
    shots = sorted(int(key) for key in by_shots)
    nearest = max((count for count in shots if count <= num_shots), default=shots[0])
    entry = by_shots[str(nearest)]
    return Recipe(entry["learning_rate"], entry["max_steps"], entry["head_learning_rate_factor"])


def summarise(accuracies: dict[str, dict[int, dict[int, float]]], baseline: str | None) -> dict:
    """Return method -> shots -> mean, spread over seeds, and the gain over `baseline` paired by seed.

    `accuracies` is method -> shots -> seed -> accuracy in [0, 1]; the summary is in percent. Spread is the sample
    standard deviation, None for one seed.
    """
    summary = {}
    for method, by_shots in accuracies.items():
        summary[method] = {}
        for shots, by_seed in by_shots.items():
            values = 100 * np.array(list(by_seed.values()))
            entry = {"mean": float(values.mean()), "std": _spread(values), "values": values.tolist()}
            if baseline is not None and method != baseline:
                gains = values - 100 * np.array([accuracies[baseline][shots][seed] for seed in by_seed])
                entry |= {"gain": float(gains.mean()), "gain_std": _spread(gains)}
            summary[method][shots] = entry
    return summary


def _spread(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def describe_findings(summary: dict, baseline: str | None, num_seeds: int) -> str:
    """Return in words what was found, whichever way it went.

    A difference within two standard errors of the paired gains is called no clear difference; with one seed there is
    no such bound, and the number stands alone.
    """
    if baseline is None:
        return "No vanilla run among the methods: nothing to compare with."
    findings = []
    for method, by_shots in summary.items():
        if not method.startswith("bridged"):
            continue
        parts = []
        for shots, entry in by_shots.items():
            gain, spread = entry["gain"], entry["gain_std"]
            if spread is None:
                verdict = "differs by an amount that one seed cannot tell from noise"
            elif abs(gain) <= 2 * spread / np.sqrt(num_seeds):
                verdict = "makes no clear difference"
            else:
                verdict = "gains" if gain > 0 else "loses"
            parts.append(f"{verdict} ({gain:+.1f} points) at {shots_title(shots)}")
        findings.append(f"{method} {', '.join(parts)}")
    if not findings:
        return f"No bridged method was run; gains are over {baseline}."
    return f"Over {num_seeds} seed{'s' * (num_seeds > 1)}, against {baseline}: {'; '.join(findings)}."


def table_rows(summary: dict) -> list[list[str]]:
    """Return a row a method: label, then mean ± spread and (gain) for each shot count."""
    rows = []
    for method, by_shots in summary.items():
        row = [method]
        for entry in by_shots.values():
            text = f"{entry['mean']:.1f}" + ("" if entry["std"] is None else f" ± {entry['std']:.1f}")
            row.append(text + (f" ({entry['gain']:+.1f})" if "gain" in entry else ""))
        rows.append(row)
    return rows


def to_markdown(summary: dict, findings: str, baseline: str | None) -> str:
    """Return the comparison as Markdown: what was found, then the table."""
    shots = list(next(iter(summary.values())))
    lines = [findings, "", "| method | " + " | ".join(shots_title(count) for count in shots) + " |"]
    lines.append("|---" * (len(shots) + 1) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in table_rows(summary)]
    note = f"; in brackets the gain over {baseline}, paired by seed" if baseline else ""
    lines += ["", f"Test accuracy in percent, mean ± standard deviation over seeds{note}."]
    return "\n".join(lines) + "\n"


def shots_title(count: int) -> str:
    """Return `1 shot`, `4 shots`."""
    return f"{count} shot{'s' * (count > 1)}"
