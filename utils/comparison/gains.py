"""The picture of gains: what each row of a comparison gains over the reference, with its 95 % interval."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from utils.cli.tables import shorten
from utils.comparison.grid import shots_title, volume_title
from utils.comparison.plots import DPI, FONTS, MAX_NAME, WIDTH
from utils.comparison.report import group_by_row
from utils.comparison.statistics import Gain

NUM_COLUMNS = 4  # shot counts side by side, at most; fewer next to long names
CHARACTER = 0.08  # inches, of a name
STYLES = {  # by verdict; colours of Okabe & Ito 2008, which the colour-blind tell apart
    "gains": {"color": "#0072b2", "marker": "o", "markerfacecolor": "#0072b2"},
    "loses": {"color": "#d55e00", "marker": "s", "markerfacecolor": "#d55e00"},
    "makes no clear difference": {"color": "0.45", "marker": "o", "markerfacecolor": "white"},
    "cannot be judged": {"color": "0.45", "marker": "x"},
}


@matplotlib.rc_context(FONTS)
def plot_gains(path: str | Path, summary: list[dict], baseline: str) -> None:
    """Draw a point and an interval per row for each shot count, rows in the order of the table.

    The classifiers of a summary have a part each, one below the other; `baseline` is the row that gains are over.
    """
    gains, by_classifier = [entry for entry in summary if "gain" in entry], {}
    for entry in gains:
        by_classifier.setdefault(entry.get("classifier"), []).append(entry)
    heights = [_height(entries) for entries in by_classifier.values()]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05)
    unknown = "; cross: interval not known" if any(entry["gain_low"] is None for entry in gains) else ""
    figure.suptitle(
        f"Gain over {baseline} in points of test accuracy,\n"
        f"with 95 % intervals (filled: zero lies outside{unknown})",
        fontsize=9, fontweight="bold", x=0.01, horizontalalignment="left",
    )  # fmt: skip
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (classifier, entries) in zip(parts, by_classifier.items()):
        if len(parts) > 1:
            part.suptitle(shorten(classifier, 60), fontsize=9, x=0.01, horizontalalignment="left")
        _draw_part(part, entries)
    figure.savefig(path, dpi=DPI)


def _draw_part(part: SubFigure, entries: list[dict]) -> None:
    groups = list(group_by_row(entries).values())
    num_rows, num_columns = _grid_size(groups)
    axes = part.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(groups[0]) :]:
        axis.set_axis_off()
    for number, (axis, *shown) in enumerate(zip(axes.flat, *groups)):  # a shot count each
        for position, entry in enumerate(reversed(shown)):
            _plot_gain(axis, entry, position)
        axis.axvline(0, color="black", linewidth=0.8, zorder=1)
        axis.set_title(shots_title(shown[0]["num_shots"]))
        axis.grid(alpha=0.25)
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labelbottom=number + num_columns >= len(groups[0]), labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(min(8, 12 // num_columns), steps=[1, 2, 2.5, 5, 10]))
    axes[0, 0].set_yticks(range(len(groups)), [_name(group) for group in reversed(groups)])
    axes[0, 0].set_ylim(-0.6, len(groups) - 0.4)


def _plot_gain(axis, entry: dict, position: int) -> None:
    gain = Gain(entry["gain"], entry["gain_low"], entry["gain_high"], entry["num_test_images"])
    style = STYLES[gain.verdict]
    if gain.low is not None:
        axis.plot((gain.low, gain.high), (position, position), color=style["color"], linewidth=1.3, zorder=2)
    axis.plot(gain.mean, position, **style, markersize=4, linestyle="none", zorder=3)


def _height(entries: list[dict]) -> float:
    groups = list(group_by_row(entries).values())
    return (0.45 + 0.19 * len(groups)) * _grid_size(groups)[0]


def _grid_size(groups: list[list[dict]]) -> tuple[int, int]:
    """Return how many rows and columns of plots the shot counts have; `groups` are the entries of each row."""
    num_shots = len(groups[0])
    fitting = int(WIDTH - CHARACTER * max(len(_name(group)) for group in groups))  # an inch each
    num_columns = min(num_shots, NUM_COLUMNS, fitting)
    return -(-num_shots // num_columns), num_columns


def _name(group: list[dict]) -> str:
    name, volume = shorten(group[0]["method"], MAX_NAME), group[0]["volume"]
    return name if volume is None else f"{name}, {volume_title(volume)}"
