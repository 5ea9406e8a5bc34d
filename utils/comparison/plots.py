"""The picture of a comparison: what to use and what it is compared with in colour, all other methods in grey."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure, SubFigure
from sklearn.isotonic import isotonic_regression

from utils.comparison.findings import list_highlights, recommend
from utils.comparison.grid import shots_title
from utils.comparison.statistics import count_runs
from utils.transfer.methods import METHODS

COLORS = [color for number, color in enumerate(matplotlib.colormaps["tab10"].colors) if number != 7]  # without grey
MARKERS = "osD^vPX*<>hp"
GREY = "0.6"
WIDTH = 11  # inches, at least
LABEL_HEIGHT = 0.19  # inches, of a line's name beside it
TITLE_LENGTH = 125  # characters a line
MAX_NAME = 44  # characters of a name beside its line or point


@dataclass(frozen=True)
class Panel:
    """What is drawn of one classifier: its entries of a summary, a title, and the methods that stand out."""

    title: str
    summary: list[dict]
    highlighted: Sequence[str] = ()


def make_panels(summary: list[dict], correct: dict[str, dict], answers: list[str]) -> list[Panel]:
    """Return what the picture shows of each classifier, below its answer."""
    return [
        Panel(
            answer, [entry for entry in summary if entry.get("classifier", label) == label],
            list_highlights(recommend(of_one), of_one),
        )
        for answer, (label, of_one) in zip(answers, correct.items())
    ]  # fmt: skip


@matplotlib.rc_context({"text.parse_math": False})  # dollars in a name are no formula
def plot_comparison(path: str | Path, panels: list[Panel]) -> None:
    """Draw accuracy over shots (a point a method with one shot count) and, where there are several, over volumes.

    Each panel has its part of the picture, one below the other. Dashed lines are methods without synthetic images.
    """
    heights = [sum(_heights(panel)) + 0.25 * _wrap(panel.title).count("\n") for panel in panels]
    widths = [2.8 * len(_shots(panel.summary)) if len(_volumes(panel.summary)) > 1 else 0 for panel in panels]
    figure = Figure(figsize=(max(WIDTH, *widths), sum(heights)), layout="constrained")
    parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    coloured = list(dict.fromkeys(method for panel in panels for method in _coloured(panel)))  # alike in all panels
    for part, panel in zip(parts, panels):
        _draw_panel(part, panel, coloured)
    figure.savefig(path, dpi=130)


def _draw_panel(part: SubFigure, panel: Panel, coloured: list[str]) -> None:
    volumes, shots = _volumes(panel.summary), _shots(panel.summary)
    styles = _styles(panel, coloured)
    heights = _heights(panel)
    num_columns = len(shots) if len(heights) > 1 else 1
    part.suptitle(_wrap(panel.title), fontsize="medium", fontweight="bold", x=0.01, horizontalalignment="left")
    grid = part.add_gridspec(len(heights), num_columns, height_ratios=heights)
    axis = part.add_subplot(grid[0, :])
    top = [entry for entry in panel.summary if entry["volume"] in (None, *volumes[-1:])]
    if len(shots) == 1:
        _plot_points(axis, top, styles)
    else:
        _plot_over_shots(axis, top, styles, shots, heights[0])
    if volumes:
        axis.set_title(f"{volumes[-1]} synthetic images per class")
    if len(heights) > 1:
        axes = grid[1, :].subgridspec(1, num_columns).subplots(sharey=True, squeeze=False)[0]
        for axis, num_shots in zip(axes, shots):
            entries = [entry for entry in panel.summary if entry["num_shots"] == num_shots]
            _plot_over_volume(axis, entries, styles, volumes)
            axis.set(title=shots_title(num_shots), ylabel="test accuracy, %" if axis is axes[0] else "")


def _heights(panel: Panel) -> list[float]:
    """Return the inches of the plot over shots and, where there are several volumes, of those over volumes."""
    num_methods = len(_methods(panel.summary))
    if len(_shots(panel.summary)) > 1:
        height = max(5.0, 1.5 + LABEL_HEIGHT * num_methods)
    else:
        height = 1.6 + 0.3 * num_methods
    return [height, 3.8] if len(_volumes(panel.summary)) > 1 else [height]


def _methods(summary: list[dict]) -> list[str]:
    return list(dict.fromkeys(entry["method"] for entry in summary))


def _shots(summary: list[dict]) -> list[int | None]:
    return list(dict.fromkeys(entry["num_shots"] for entry in summary))


def _volumes(summary: list[dict]) -> list[int]:
    return sorted({entry["volume"] for entry in summary if entry["volume"] is not None})


def _wrap(title: str) -> str:
    return textwrap.fill(title, TITLE_LENGTH)


def _coloured(panel: Panel) -> list[str]:
    """Return the methods of a panel in colour: those that are highlighted, without any all."""
    methods = _methods(panel.summary)
    return [method for method in methods if method in panel.highlighted] or methods


def _styles(panel: Panel, coloured: list[str]) -> dict[str, dict]:
    """Return what lines and points of each method look like; `coloured` are those of all panels, by their colours."""
    styles, in_colour = {}, _coloured(panel)
    for method in _methods(panel.summary):
        if method in in_colour:
            number = coloured.index(method)
            styles[method] = {
                "color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "linewidth": 2.2,
                "markersize": 7, "elinewidth": 1.2, "capsize": 3, "zorder": 3,
            }  # fmt: skip
        else:
            styles[method] = {
                "color": GREY, "marker": ".", "linewidth": 0.8, "markersize": 4, "elinewidth": 0.6, "capsize": 1.5,
                "zorder": 2,
            }  # fmt: skip
        if not METHODS[method.partition("@")[0]].uses_synthetic:
            styles[method]["linestyle"] = "--"
    return styles


def _text_style(style: dict) -> dict:
    if style["color"] == GREY:
        return {"color": "0.4", "fontsize": "x-small"}
    return {"color": style["color"], "fontsize": "small", "fontweight": "bold"}


def _plot_points(axis, entries: list[dict], styles: dict[str, dict]) -> None:
    for position, entry in enumerate(reversed(entries)):
        style = styles[entry["method"]]
        axis.errorbar(entry["mean"], position, xerr=entry["std"] or 0, label=entry["method"], **style)
        if entry["std"] is not None:
            places = [position] * len(entry["values"])
            axis.plot(entry["values"], places, "|", color=style["color"], markersize=12, alpha=0.6)
    axis.set_yticks(range(len(entries)), [_shorten(entry["method"]) for entry in reversed(entries)])
    for label, entry in zip(axis.get_yticklabels(), reversed(entries)):
        label.set(**_text_style(styles[entry["method"]]))
    _, runs = count_runs(entries)
    bars = f"bars: standard deviation over {runs}, ticks: each {runs[:-1]}"
    what = bars if entries[0]["std"] is not None else "one seed"
    axis.set(xlabel=f"test accuracy, %, {shots_title(entries[0]['num_shots'])} ({what})")
    axis.set_ylim(-0.6, len(entries) - 0.4)
    axis.grid(alpha=0.3, axis="x")


def _plot_over_shots(axis, entries: list[dict], styles: dict[str, dict], shots: list[int], height: float) -> None:
    for method, style in styles.items():
        _plot_line(axis, [entry for entry in entries if entry["method"] == method], "num_shots", style, styles)
    _set_log_ticks(axis, shots)
    what = (
        f" (bars: standard deviation over {count_runs(entries)[1]})" if entries[0]["std"] is not None else ", one seed"
    )
    axis.set(xlabel="real images per class", ylabel=f"test accuracy, %{what}")
    last = {entry["method"]: entry["mean"] for entry in entries if entry["num_shots"] == shots[-1]}
    _label_lines(axis, last, styles, height)


def _label_lines(axis, ends: dict[str, float], styles: dict[str, dict], height: float) -> None:
    """Write each line's name to the right of its end, one below the other where the ends are closer than the names."""
    low, high = axis.get_ylim()
    step = LABEL_HEIGHT * (high - low) / (height - 1.2)
    names = sorted(ends, key=ends.get)
    places = spread([ends[name] for name in names], step, low, high)
    transform = axis.get_yaxis_transform()  # across in shares of the axis, up in percent
    leader = {"arrowstyle": "-", "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 0}
    for name, place in zip(names, places):
        style = styles[name]
        axis.annotate(
            _shorten(name), (1, ends[name]), (1.04, place), transform, transform, annotation_clip=False,
            verticalalignment="center", arrowprops=leader | {"color": style["color"]}, **_text_style(style),
        )  # fmt: skip


def spread(values: Sequence[float], step: float, low: float, high: float) -> np.ndarray:
    """Return the places nearest to ascending values that are `step` apart or more, from `low` to `high` if they fit."""
    offsets = step * np.arange(len(values))
    highest = max(low, high - offsets[-1])
    return isotonic_regression(np.asarray(values) - offsets, y_min=low, y_max=highest) + offsets


def _plot_over_volume(axis, entries: list[dict], styles: dict[str, dict], volumes: list[int]) -> None:
    for method, style in styles.items():
        mine = [entry for entry in entries if entry["method"] == method]
        if mine[0]["volume"] is None:
            axis.axhline(mine[0]["mean"], color=style["color"], linewidth=style["linewidth"], linestyle="--")
        else:
            _plot_line(axis, mine, "volume", style, styles)
    _set_log_ticks(axis, volumes)
    axis.set(xlabel="synthetic images per class")


def _plot_line(axis, entries: list[dict], key: str, style: dict, styles: dict[str, dict]) -> None:
    entries = sorted(entries, key=lambda entry: entry[key])
    # beside each other, else the error bars hide one another
    method = entries[0]["method"]
    step = min(0.04, 0.3 / len(styles))
    shift = 2 ** (step * (list(styles).index(method) - (len(styles) - 1) / 2))
    places = [entry[key] * shift for entry in entries]
    means, spreads = [entry["mean"] for entry in entries], [entry["std"] or 0 for entry in entries]
    axis.errorbar(places, means, spreads, label=method, **style)


def _set_log_ticks(axis, values: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, values)
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
