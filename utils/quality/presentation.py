"""The presentation of a quality report: a table and verdicts, plots, and the most similar pairs of images."""

import textwrap
from pathlib import Path

import numpy as np
from datasets import Dataset
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from utils.cli.tables import print_table
from utils.data.images import to_rgb
from utils.quality.verdicts import format_distance

MAX_ROWS = 10
COLOURS = {"good": "green", "look": "yellow", "bad": "red", "unknown": "dim"}
MAX_BARS = 20
NAME_LENGTH = 22
REAL, SYNTHETIC = "0.65", "tab:blue"
KINDS = {"test": "real test", "train": "real training", "synthetic": "other synthetic"}


def print_quality(record: dict) -> None:
    """Print the classes that are farthest from their real ones, the verdicts and the caveats."""
    console = Console(markup=False, emoji=False)  # names may have brackets
    classes = record["classes"]
    shown = f"the {MAX_ROWS} farthest of {len(classes)}" if len(classes) > MAX_ROWS else "farthest first"
    counts = {name: f"{count['used']:,}" for name, count in record["num_images"].items()}
    table = Table(
        title=f"{record['synthetic']['id']}: classes, {shown}; real images in brackets",
        caption=f"{counts['synthetic']} synthetic images; real: {counts['train']} training, {counts['held_out']} "
        f"held-out, {counts['test']} test; features of {record['model']['id']}",
    )
    table.add_column("class")
    for name in ("images", "shift (0: as close as real images)", "diversity", "nearest to own class"):
        table.add_column(name, justify="right")
    for entry in classes[:MAX_ROWS]:
        table.add_row(
            entry["class"],
            f"{entry['num_images']:,}",
            _with_real(entry["shift"], entry["shift_floor"], ".2f"),
            _with_real(entry["diversity"], entry["real_diversity"], ".2f"),
            _with_real(entry["own_share"], entry["real_own_share"], ".0%"),
        )
    print_table(table, console)
    for verdict in record["verdicts"]:
        console.print(f"{verdict['level']:>7}  ", style=COLOURS[verdict["level"]], end="")
        console.print(f"{verdict['subject']}: {verdict['text']}", highlight=False, soft_wrap=True)
    for caveat in record["caveats"]:
        console.print(f"   note  {caveat}", highlight=False, soft_wrap=True)


def _with_real(value: float | None, real: float | None, form: str) -> str:
    texts = ["-" if number is None else format(number, form) for number in (value, real)]
    return f"{texts[0]} ({texts[1]})"


@rc_context({"text.parse_math": False})  # no formulas: names can have dollar signs
def plot_quality(path: str | Path, record: dict, similarities: dict[str, dict[str, np.ndarray]]) -> None:
    """Plot distances, classes, labels, diversity and similarities, each compared with real images.

    `similarities` maps test, train and synthetic to the similarities of `synthetic` and `real` images to their nearest
    one.
    """
    figure = Figure(figsize=(17, 10), layout="constrained")
    axes = figure.subplots(2, 3)
    _plot_distances(figure, axes[0, 0], record["distance"])
    _plot_shifts(axes[0, 1], record["classes"][:MAX_BARS], len(record["classes"]))
    _plot_diversity(axes[0, 2], record["classes"])
    _plot_confusions(axes[1, 0], record["nearest_class"]["confusions"])
    for axis, kind in zip(axes[1, 1:], ("train", "test")):
        _plot_similarities(axis, kind, similarities.get(kind), record["duplicates"].get(kind))
    figure.suptitle(
        f"{record['synthetic']['id']} compared with the real images, in the features of {record['model']['id']}",
        fontsize=13,
    )
    figure.savefig(path, dpi=100)


@rc_context({"text.parse_math": False})  # no formulas: names can have dollar signs
def plot_pairs(
    path: str | Path, duplicates: dict, positions: dict[str, list[tuple[int, int]]], images: dict[str, Dataset]
) -> None:
    """Draw the closest pairs, those with real test images first.

    `duplicates` is from the record; `positions` are the rows of each kind's pairs in `images`.
    """
    kinds = [kind for kind in KINDS if positions.get(kind)]
    num_columns = max((len(positions[kind]) for kind in kinds), default=1)
    figure = Figure(figsize=(1.7 * num_columns + 1.4, 4.6 * max(1, len(kinds))), layout="constrained")
    blocks = np.atleast_1d(figure.subfigures(max(1, len(kinds)), 1, hspace=0.04))
    for block, kind in zip(blocks, kinds):
        found = duplicates[kind]
        block.suptitle(
            f"most similar pairs of a synthetic and {KINDS[kind].replace('other', 'another')} image "
            f"(red: a copy, or similarity of {found['threshold']:.3f} or more)",
            fontsize=11,
        )
        axes = block.subplots(2, num_columns, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for (top, bottom), pair, (synthetic, other) in zip(axes.T, found["pairs"], positions[kind]):
            colour = "tab:red" if pair["is_copy"] or pair["similarity"] >= found["threshold"] else "black"
            _show(top, images["synthetic"][synthetic]["image"])
            _show(bottom, images[kind][other]["image"])
            top.set_title(
                f"{'copy, ' if pair['is_copy'] else ''}{pair['similarity']:.3f}\nsynthetic {pair['synthetic_row']:,}\n"
                f"{_short(pair['synthetic_class'], 16)}",
                fontsize=8,
                color=colour,
            )
            bottom.set_title(
                f"{KINDS[kind]} {pair['other_row']:,}\n{_short(pair['other_class'], 16)}", fontsize=8, color=colour
            )
    figure.savefig(path, dpi=100)


def _show(axis, image) -> None:
    axis.imshow(to_rgb(image))
    axis.set_aspect("equal")


def _short(name: str, length: int = NAME_LENGTH) -> str:
    return textwrap.shorten(name, length, placeholder="...") if " " in name else name[:length]


def _plot_distances(figure, axis, distance: dict) -> None:
    """Plot both distances and their floors, each on its own scale."""
    axis.set_title("distance to the real training images\n(close to the floor is good)")
    if distance["frechet"]["floor"] is None:
        axis.text(0.5, 0.5, "too few held-out real images", ha="center", transform=axis.transAxes)
        return
    twin = axis.twinx()
    for place, (side, name) in enumerate(((axis, "frechet"), (twin, "kernel"))):
        values = [distance[name]["synthetic"], distance[name]["floor"]]
        # from 0, as the kernel distance can be slightly negative by chance
        bars = side.bar([3 * place, 3 * place + 1], np.maximum(values, 0), color=[SYNTHETIC, REAL])
        side.bar_label(bars, [format_distance(value) for value in values], padding=3)
        side.set_ylim(0, 1.15 * max(*values, 1e-9))
    axis.set_ylabel("Frechet distance")
    twin.set_ylabel("kernel distance")
    names = ["synthetic", "floor: real\nheld-out"]
    axis.set_xticks([0, 1, 3, 4], [f"{name}\n{kind}" for kind in ("Frechet", "kernel") for name in names], fontsize=8)


def _plot_shifts(axis, classes: list[dict], num_classes: int) -> None:
    shown = [entry for entry in classes if entry["shift"] is not None][::-1]
    places = np.arange(len(shown))
    axis.barh(places, [entry["shift"] for entry in shown], color=SYNTHETIC, label="synthetic")
    floors = [np.nan if entry["shift_floor"] is None else entry["shift_floor"] for entry in shown]
    axis.plot(floors, places, "|", color="black", markersize=9, label="held-out real images")
    axis.axvline(1, color="tab:red", linestyle="--", label="nearest other real class")
    axis.set_xlim(left=-0.03)  # room for floors of 0
    axis.set_yticks(places, [_short(entry["class"]) for entry in shown])
    which = f"the {len(shown)} farthest of {num_classes} classes" if len(shown) < num_classes else "each class"
    axis.set(
        title=f"shift from the real class, {which}\n(0: as close as real images)",
        xlabel="distance / nearest other class",
    )
    axis.legend(fontsize=8, loc="lower right")


def _plot_diversity(axis, classes: list[dict]) -> None:
    known = [entry for entry in classes if None not in (entry["diversity"], entry["real_diversity"])]
    real, synthetic = ([entry[key] for entry in known] for key in ("real_diversity", "diversity"))
    axis.scatter(real, synthetic, color=SYNTHETIC)
    top = 1.1 * max([*real, *synthetic, 1e-3])
    axis.plot([0, top], [0, top], color=REAL, label="as varied as the real images")
    for entry in sorted(known, key=lambda entry: entry["diversity"] / max(entry["real_diversity"], 1e-9))[:8]:
        place = entry["real_diversity"], entry["diversity"]
        axis.annotate(_short(entry["class"]), place, xytext=(4, -10), textcoords="offset points", fontsize=8)
    axis.set(
        title="diversity: mean distance between two images of a class\n(below the line: less varied than real)",
        xlabel="real training images", ylabel="synthetic images", xlim=(0, 1.1 * top), ylim=(0, top),
    )  # fmt: skip
    axis.legend(fontsize=8, loc="upper left")


def _plot_confusions(axis, confusions: list[dict]) -> None:
    shown = confusions[::-1]
    places = np.arange(len(shown))
    axis.barh(places + 0.2, [entry["share"] for entry in shown], 0.4, color=SYNTHETIC, label="synthetic")
    axis.barh(places - 0.2, [entry["real_share"] or 0 for entry in shown], 0.4, color=REAL, label="real held-out")
    axis.set_yticks(
        places, [f"{_short(entry['class'])} near {_short(entry['nearest'])}" for entry in shown], fontsize=8
    )
    axis.set(
        title="images nearest to another real class, more often\nthan real ones (short bars are good)",
        xlabel="share of the class's images",
    )
    if shown:
        axis.legend(fontsize=8, loc="lower right")
    else:
        axis.text(0.5, 0.5, "no class more often than real images", ha="center", transform=axis.transAxes)


def _plot_similarities(axis, kind: str, similarities: dict | None, found: dict | None) -> None:
    axis.set_title(f"similarity to the nearest {KINDS[kind]} image\n(bars right of the line: look-alikes)")
    if similarities is None:
        axis.text(0.5, 0.5, "no images to compare with", ha="center", transform=axis.transAxes)
        return
    low = min(values.min() for values in similarities.values() if len(values))
    bins = np.linspace(low, 1, 51)
    for name, colour, label in (("real", REAL, "real held-out"), ("synthetic", SYNTHETIC, "synthetic")):
        values = similarities[name]
        if len(values):  # shares, as there may be far more images of one kind
            axis.hist(values, bins, weights=np.full(len(values), 1 / len(values)), color=colour, alpha=0.6, label=label)
    axis.axvline(found["threshold"], color="tab:red", linestyle="--", label=f"threshold {found['threshold']:.3f}")
    axis.set(xlabel="cosine similarity", ylabel="share of the images")
    axis.legend(fontsize=8, loc="upper left")
