"""Forecast of a reproduction: images, optimiser steps, GPU-hours and disk space. No torch."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from utils.cli.errors import UserError
from utils.cli.parsing import read_mapping
from utils.cli.tables import print_table
from utils.comparison.grid import parse_rows, rates_around
from utils.data.arguments import RealDataArguments
from utils.forecast.costs import GIB, estimate_hours, folder_bytes, latent_bytes
from utils.transfer.methods import StageSettings, steps_per_epoch

RECIPES = Path(__file__).resolve().parent
RATES = RECIPES / "rates.yaml"
RESOLUTION = 512  # of the recipes' base model, Stable Diffusion 1.5


@dataclass(frozen=True)
class Plan:
    """One dataset with one classifier; hours are for one GPU, `*_steps` are optimiser steps.

    `disk_gib` covers the synthetic images, their Arrow copy for training, and the latents of the real images.
    """

    title: str
    num_classes: int
    num_real: int
    num_synthetic: int
    dsi_steps: int
    bridge_steps: int
    real_steps: int
    dsi_hours: float
    synthetic_hours: float
    bridged_hours: float
    comparison_hours: float
    disk_gib: float

    @property
    def hours(self) -> float:
        return self.dsi_hours + self.synthetic_hours + self.bridged_hours + self.comparison_hours


def read_sets() -> dict[str, dict]:
    """Return name -> facts about a dataset, for all with recipes."""
    path = RECIPES / "sets.yaml"
    sets = read_mapping(path, "image sets")
    for name, facts in sets.items():
        missing = [key for key in ("title", "num_classes", "num_images") if key not in facts]
        if missing:
            raise UserError(f"{path}: '{name}' has no {' and no '.join(missing)}.")
    return sets


def read_recipe(name: str) -> dict:
    """Return the flags in a recipe: `cars/dsi` of a dataset, or `synthetic`, `bridged` or `compare` of all."""
    return read_mapping(RECIPES / f"{name}.yaml", "recipe")


def read_class_names(name: str) -> dict[str, str]:
    """Return class name -> noun of a dataset, in label order."""
    return read_mapping(RECIPES / name / "class_names.yaml", "class names")


def read_models() -> dict[str, dict]:
    """Return name -> flags of each classifier."""
    return read_mapping(RECIPES / "models.yaml", "classifiers")


def read_rates(path: Path, model: str) -> dict:
    """Return the speed of a GPU per second.

    Raises:
        UserError: the file cannot be read, or lacks a rate.
    """
    rates = read_mapping(path, "rates")
    missing = read_mapping(RATES, "rates").keys() - rates.keys()
    if missing:
        raise UserError(f"--rates {path}: has no {', '.join(sorted(missing))}; {RATES.name} has all required keys.")
    if model not in rates["training_images_per_second"]:
        raise UserError(f"--rates {path}: training_images_per_second has no {model}.")
    return rates


def make_plan(name: str, model: str, rates: dict, num_images_per_class: int, control: bool = False) -> Plan:
    """Return the plan of the dataset `name`, from its recipes and a GPU's rates.

    With `control` there is a second synthetic set, and a method more in the comparison.
    """
    facts = read_sets()[name]
    dsi, synthetic, bridged, compare = (
        read_recipe(step) for step in (f"{name}/dsi", "synthetic", "bridged", "compare")
    )
    num_real = facts["num_images"]["train"]
    if not {"validation", "test"} <= facts["num_images"].keys():
        num_real -= round(num_real * RealDataArguments.train_val_split)
    num_drawn_classes = facts["num_classes"] - len(facts.get("exclude_classes", []))
    num_synthetic = num_drawn_classes * num_images_per_class
    bridge_images = bridged["bridge_num_train_epochs"] * num_synthetic
    real_images = bridged["num_train_epochs"] * num_real
    num_drawn = num_synthetic * (2 if control else 1)
    if control:
        compare["methods"].append("bridged@plain")
    batch_size = StageSettings.per_device_train_batch_size
    compared_images = count_compared_images(
        compare, compare["bridge_num_train_epochs"] * num_synthetic, compare["num_train_epochs"] * num_real
    )
    training_rate = rates["training_images_per_second"][model]
    num_dsi_images = dsi["max_train_steps"] * dsi["train_batch_size"]
    disk = folder_bytes(num_drawn, rates["bytes_per_image"], is_read=True)
    disk += latent_bytes(num_real, dsi.get("resolution", RESOLUTION), num_copies=2)
    return Plan(
        facts["title"],
        facts["num_classes"],
        num_real,
        num_synthetic,
        dsi["max_train_steps"],
        bridged["bridge_num_train_epochs"] * steps_per_epoch(num_synthetic, batch_size),
        bridged["num_train_epochs"] * steps_per_epoch(num_real, batch_size),
        dsi_hours=estimate_hours(num_dsi_images, rates["dsi_images_per_second"]),
        synthetic_hours=estimate_hours(
            num_drawn * synthetic["num_inference_steps"], rates["sampling_image_steps_per_second"]
        ),
        bridged_hours=estimate_hours(bridge_images + real_images, training_rate),
        comparison_hours=estimate_hours(compared_images, training_rate),
        disk_gib=disk / GIB,
    )


def count_compared_images(compare: dict, bridge_images: int, real_images: int) -> int:
    """Return the number of training images of a comparison, including its search; a shared stage 1 counts once.

    `bridge_images` and `real_images` are the images of one stage 1 and one stage 2.
    """
    num_rates = len(rates_around(1.0)) if compare["search_learning_rate"] else 1
    num_searched = num_rates if num_rates > 1 else 0
    rows = parse_rows(compare["methods"], ["dsi", "plain"])
    bridges = {
        (row.synthetic, json.dumps(stage.settings, sort_keys=True))
        for row in rows
        for stage in row.method.stages
        if stage.images == "synthetic"
    }
    num_seeds = len(compare["seeds"])
    total = (num_seeds * len(bridges) + num_rates - 1) * bridge_images
    for row in rows:
        if row.method.uses_real:
            per_run = real_images + (bridge_images if row.method.flags["match_steps"] else 0)
            total += (num_seeds + num_searched) * per_run
    return total


def print_plans(plans: list[Plan], model: str, rates: dict, num_images_per_class: int) -> None:
    """Print the plans as a table."""
    table = Table(
        "dataset", "classes", "real images", "synthetic", "steps (token, stage 1, stage 2)", "token h", "images h",
        "bridged h", "comparison h", "disk GiB",
        title=f"{num_images_per_class:,} synthetic images per class, {model}, hours on one {rates['gpu']}",
    )  # fmt: skip
    for plan in plans:
        table.add_row(
            plan.title, str(plan.num_classes), f"{plan.num_real:,}", f"{plan.num_synthetic:,}",
            f"{plan.dsi_steps:,}, {plan.bridge_steps:,}, {plan.real_steps:,}", f"{plan.dsi_hours:.1f}",
            f"{plan.synthetic_hours:.1f}", f"{plan.bridged_hours:.2f}", f"{plan.comparison_hours:.1f}",
            f"{plan.disk_gib:.0f}",
        )  # fmt: skip
    console = Console()
    print_table(table, console)
    hours, gib = sum(plan.hours for plan in plans), sum(plan.disk_gib for plan in plans)
    console.print(
        f"Total: {hours:,.0f} GPU-hours and {gib:,.0f} GiB. Computed from measured rates (sources in "
        "recipes/rates.yaml), without loading images and evaluation."
    )
