"""The picture of a comparison: accuracy over shots and volumes, at most six methods in colour, all others in grey.

Made to be read at half its width: its fonts are large for its size, and a line is named at its end.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Annotation
from sklearn.isotonic import isotonic_regression

from utils.cli.tables import shorten
from utils.comparison.grid import shots_title
from utils.comparison.statistics import count_runs
from utils.transfer.methods import METHODS

# at least 23 apart (CIE76), from each other and from grey, as seen with each kind of colour blindness (simulated as by
# Machado, Oliveira & Fernandes 2009); the first is of the reference, if there is one
COLORS = ("#000000", "#3399dd", "#b8860b", "#117733", "#882255", "#332288")
MARKERS = "oDs^vP"
GREY = "0.6"
WIDTH, DPI = 6, 200  # inches and pixels per inch
LONG_NAME = 18  # characters; up to this, two plots over volumes fit side by side
TITLE_LENGTH = 74  # characters per line
MAX_NAME = 26  # characters of a method's name
FONTS = {
    "text.parse_math": False,  # dollars in a name are no formula
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "axes.spines.right": False, "axes.spines.top": False,
}  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """What is drawn of one classifier: its entries of a summary, below a title."""

    title: str
    summary: list[dict]


def make_panels(summary: list[dict], labels: Sequence[str], answers: list[str]) -> list[Panel]:
    """Return a panel per classifier: its entries of the summary, with its answer as the title."""
    return [
        Panel(answer, [entry for entry in summary if entry.get("classifier", label) == label])
        for answer, label in zip(answers, labels)
    ]


@matplotlib.rc_context(FONTS)
def plot_comparison(path: str | Path, panels: list[Panel], highlighted: Sequence[str]) -> None:
    """Draw accuracy over shots (a point per method with one shot count) and, where there are several, over volumes.

    Each panel has its part of the picture, one below the other. Methods are in colour, with their standard deviations,
    if they are `highlighted`, in all panels alike. Dashed lines are methods without synthetic images.
    """
    heights = [sum(_heights(panel, highlighted)) + _title_height(panel) for panel in panels]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, panel in zip(parts, panels):
        _draw_panel(part, panel, highlighted)
    _move_names_apart(figure)
    figure.savefig(path, dpi=DPI)


def _draw_panel(part: SubFigure, panel: Panel, highlighted: Sequence[str]) -> None:
    volumes, shots = _volumes(panel.summary), _shots(panel.summary)
    styles = _styles(panel, highlighted)
    heights = _heights(panel, highlighted)
    part.suptitle(_wrap(panel.title), fontsize=9, fontweight="bold", x=0.01, horizontalalignment="left")
    num_columns = _num_columns(panel, highlighted)
    grid = part.add_gridspec(len(heights), num_columns, height_ratios=heights)
    axis = part.add_subplot(grid[0, :])
    top = [entry for entry in panel.summary if entry["volume"] in (None, *volumes[-1:])]
    if len(shots) == 1:
        _plot_points(axis, top, styles)
    else:
        _plot_over_shots(axis, top, styles, shots)
    if volumes:
        axis.set_title(f"{volumes[-1]} synthetic images per class", loc="left")
    first = None
    for number, num_shots in enumerate(shots if len(heights) > 1 else []):
        row, column = divmod(number, num_columns)
        axis = part.add_subplot(grid[1 + row, column], sharey=first)
        first = first or axis
        entries = [entry for entry in panel.summary if entry["num_shots"] == num_shots]
        _plot_over_volume(axis, entries, styles, volumes)
        axis.set_title(shots_title(num_shots), loc="left")
        axis.set(ylabel="test accuracy, %" if column == 0 else "")


def _heights(panel: Panel, highlighted: Sequence[str]) -> list[float]:
    """Return the inches of the plot over shots, then those of each row of plots over volumes, if there are several."""
    methods, shots = _methods(panel.summary), _shots(panel.summary)
    names = sum(0.18 if method in highlighted else 0.13 for method in methods)
    height = max(3.6, 0.9 + names) if len(shots) > 1 else 0.8 + 0.22 * len(methods)
    num_rows = -(-len(shots) // _num_columns(panel, highlighted)) if len(_volumes(panel.summary)) > 1 else 0
    return [height, *[2.2] * num_rows]


def _num_columns(panel: Panel, highlighted: Sequence[str]) -> int:
    """Return how many plots over volumes fit side by side with the names at their lines' ends."""
    return 2 if all(len(method) <= LONG_NAME for method in _methods(panel.summary) if method in highlighted) else 1


def _title_height(panel: Panel) -> float:
    return 0.16 * (1 + _wrap(panel.title).count("\n"))


def _methods(summary: list[dict]) -> list[str]:
    return list(dict.fromkeys(entry["method"] for entry in summary))


def _shots(summary: list[dict]) -> list[int | None]:
    return list(dict.fromkeys(entry["num_shots"] for entry in summary))


def _volumes(summary: list[dict]) -> list[int]:
    return sorted({entry["volume"] for entry in summary if entry["volume"] is not None})


def _wrap(title: str) -> str:
    return textwrap.fill(title, TITLE_LENGTH)


def _styles(panel: Panel, highlighted: Sequence[str]) -> dict[str, dict]:
    """Return what lines and points of each method look like."""
    styles = {}
    for method in _methods(panel.summary):
        if method in highlighted:
            number = list(highlighted).index(method)
            styles[method] = {
                "color": COLORS[number], "marker": MARKERS[number], "linewidth": 1.8, "markersize": 5.5,
                "elinewidth": 1.1, "capsize": 2.5, "zorder": 4,
            }  # fmt: skip
        else:
            styles[method] = {"color": GREY, "marker": ".", "linewidth": 0.7, "markersize": 3, "zorder": 2}
        if not METHODS[method.partition("@")[0]].uses_synthetic:
            styles[method]["linestyle"] = "--"
    return styles


def _text_style(style: dict) -> dict:
    if style["color"] == GREY:
        return {"color": "0.4", "fontsize": 6.5}
    return {"color": style["color"], "fontsize": 9, "fontweight": "bold"}


def _plot_points(axis, entries: list[dict], styles: dict[str, dict]) -> None:
    for position, entry in enumerate(reversed(entries)):
        style = styles[entry["method"]]
        axis.errorbar(entry["mean"], position, xerr=entry["std"] or 0, label=entry["method"], **style)
        if entry["std"] is not None:
            places = [position] * len(entry["values"])
            axis.plot(entry["values"], places, "|", color=style["color"], markersize=9, alpha=0.6)
    axis.set_yticks(range(len(entries)), [shorten(entry["method"], MAX_NAME) for entry in reversed(entries)])
    for label, entry in zip(axis.get_yticklabels(), reversed(entries)):
        label.set(**_text_style(styles[entry["method"]]))
    num_runs, runs = count_runs(entries)
    what = _describe_bars(entries) + (f", ticks: each {runs[:-1]}" if num_runs > 1 else "")
    axis.set(xlabel=f"test accuracy, %, {shots_title(entries[0]['num_shots'])}\n({what})")
    axis.set_ylim(-0.6, len(entries) - 0.4)
    axis.grid(alpha=0.3, axis="x")


def _plot_over_shots(axis, entries: list[dict], styles: dict[str, dict], shots: list[int]) -> None:
    for method in styles:
        _plot_line(axis, [entry for entry in entries if entry["method"] == method], "num_shots", styles)
    _set_log_ticks(axis, shots)
    axis.set(xlabel=f"real images per class ({_describe_bars(entries)})", ylabel="test accuracy, %")


def _describe_bars(entries: list[dict]) -> str:
    num_runs, runs = count_runs(entries)
    return "one seed" if num_runs == 1 else f"bars: standard deviation over {num_runs} {runs}"


def _plot_over_volume(axis, entries: list[dict], styles: dict[str, dict], volumes: list[int]) -> None:
    for method, style in styles.items():
        mine = [entry for entry in entries if entry["method"] == method]
        if mine[0]["volume"] is None:
            axis.plot((volumes[0], volumes[-1]), 2 * [mine[0]["mean"]], "--", color=style["color"],
                      linewidth=style["linewidth"], zorder=style["zorder"])  # fmt: skip
            if style["color"] != GREY:
                _name_line(axis, method, volumes[-1], mine[0]["mean"], styles)
        else:
            _plot_line(axis, mine, "volume", styles)
    _set_log_ticks(axis, volumes)
    axis.set(xlabel="synthetic images per class")


def _plot_line(axis, entries: list[dict], key: str, styles: dict[str, dict]) -> None:
    """Draw a method's line, with bars if it is in colour. Over volumes, grey lines have no names."""
    entries = sorted(entries, key=lambda entry: entry[key])
    method = entries[0]["method"]
    style, places, means = styles[method], [entry[key] for entry in entries], [entry["mean"] for entry in entries]
    if style["color"] == GREY:
        axis.plot(places, means, label=method, **style)
    else:
        # side by side, else the bars hide one another
        coloured = [name for name, other in styles.items() if other["color"] != GREY]
        shift = (places[-1] / places[0]) ** (0.008 * (coloured.index(method) - (len(coloured) - 1) / 2))
        places = [shift * place for place in places]
        axis.errorbar(places, means, [entry["std"] or 0 for entry in entries], label=method, **style)
    if style["color"] != GREY or key == "num_shots":
        _name_line(axis, method, places[-1], means[-1], styles)


def _name_line(axis, method: str, last: float, end: float, styles: dict[str, dict]) -> None:
    """Write a line's name to the right of its end; `_move_names_apart` sets its final height."""
    style = styles[method]
    leader = {"arrowstyle": "-", "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2}
    axis.annotate(
        shorten(method, MAX_NAME), (last, end), (1.04, end), "data", axis.get_yaxis_transform(), annotation_clip=False,
        verticalalignment="center", arrowprops=leader | {"color": style["color"]}, **_text_style(style),
    )  # fmt: skip


def _move_names_apart(figure: Figure) -> None:
    """Move the names at the ends of lines up and down until none overlap."""
    figure.draw_without_rendering()  # the layout gives the axes their sizes
    for axis in figure.axes:
        names = sorted((text for text in axis.texts if isinstance(text, Annotation)), key=lambda text: text.xy[1])
        if names:
            (_, low), (_, high) = axis.transAxes.transform([(0, 0), (1, 1)])
            per_pixel = (axis.get_ylim()[1] - axis.get_ylim()[0]) / (high - low)
            heights = [per_pixel * _text_box(name).height for name in names]
            for name, place in zip(names, spread([name.xy[1] for name in names], heights, *axis.get_ylim())):
                name.set_position((name.xyann[0], place))


def _text_box(name: Annotation):
    """Return the pixels of a name without its leader."""
    return super(Annotation, name).get_window_extent()


def spread(values: Sequence[float], heights: Sequence[float], low: float, high: float) -> np.ndarray:
    """Return the centres, nearest to ascending values, at which texts of these heights do not overlap.

    If they fit, all lie between `low` and `high`.
    """
    offsets = np.cumsum(heights) - heights[0] - (np.asarray(heights) - heights[0]) / 2
    lowest = low + heights[0] / 2
    highest = max(lowest, high - heights[-1] / 2 - offsets[-1])
    return isotonic_regression(np.asarray(values) - offsets, y_min=lowest, y_max=highest) + offsets


def _set_log_ticks(axis, values: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, values)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
