"""The plot of benchmarks.generate_quality: accuracy and Frechet distance over speed, with Pareto fronts."""

import statistics
import textwrap
from collections.abc import Callable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from benchmarks.quality_settings import (
    MAX_FRECHET_ABOVE,
    Result,
    choose,
    deviation,
    find_loop,
    pareto_front,
)
from utils.comparison.plots import spread

COLORS = matplotlib.colormaps["tab10"].colors
LABEL_HEIGHT = 0.055  # of the name of a line, as a share of a panel's height
TITLE_LENGTH = 105
MARGIN = 1.12  # of the speeds, as a factor


def draw_results(results: list[Result], title: str) -> Figure:
    """Return the plot: accuracy and, below it, Frechet distance over images/s; each point is a setting."""
    figure = Figure(figsize=(11, 11), layout="constrained")
    figure.suptitle(textwrap.fill(title, TITLE_LENGTH), x=0.01, horizontalalignment="left", fontweight="bold")
    upper, lower = figure.subplots(2, 1, sharex=True)
    loop_speed = statistics.median(speed / times for one in results for speed, times in zip(one.speeds, one.times))
    loop = find_loop(results)
    what = "mean and standard deviation over seeds" if len(loop.accuracies) > 1 else "one seed"

    def accuracy(result: Result) -> tuple[float, float | None]:
        return result.accuracy, deviation(result.accuracies)

    def frechet(result: Result) -> tuple[float, float | None]:
        return result.frechet, deviation(result.scores["frechet"])

    _draw(upper, results, loop_speed, accuracy, lambda result: result.accuracy)
    _draw_limit(upper, loop.accuracy, "the loop's setting: not below")
    upper.set(ylabel=f"accuracy on real validation images, %\n({what})")
    _draw(lower, results, loop_speed, frechet, lambda result: -result.frechet)
    _draw_limit(
        lower, (1 + MAX_FRECHET_ABOVE) * loop.frechet, f"{100 * MAX_FRECHET_ABOVE:.0f} % above the loop's: not above"
    )
    lower.invert_yaxis()
    lower.set(ylabel=f"Frechet distance, better upwards\n({what})")
    lower.set(xlabel=f"images/s (multiples of the plain loop's, times its median of {loop_speed:.1f}), logarithmic")
    _mark_speeds(lower, [result.speed * loop_speed for result in results])
    for axis in (upper, lower):
        _label_series(axis, results, loop_speed, accuracy if axis is upper else frechet)
    upper.plot([], [], "o", color="0.5", markersize=15, label="number: denoising steps")
    figure.legend(*upper.get_legend_handles_labels(), loc="outside lower left", ncols=3, borderpad=1, handletextpad=1.2)
    return figure


def _series(results: list[Result]) -> dict[str, list[Result]]:
    """Return the results of each line, from the slowest to the fastest."""
    names = dict.fromkeys(result.setting.series for result in results)
    ordered = sorted(results, key=lambda result: result.speed)
    return {name: [result for result in ordered if result.setting.series == name] for name in names}


def _draw(axis: Axes, results: list[Result], loop_speed: float, value: Callable, quality: Callable) -> None:
    front = pareto_front(results, quality)
    slowest = min(result.speed for result in results) / MARGIN
    axis.plot(  # the quality of a point is available at lower speeds too
        [loop_speed * speed for speed in (slowest, *(result.speed for result in front))],
        [value(result)[0] for result in (front[0], *front)], drawstyle="steps-pre", color="0.8", linewidth=7, zorder=1,
        label="Pareto front",
    )  # fmt: skip
    chosen = choose(results)
    axis.plot(
        chosen.speed * loop_speed, value(chosen)[0], "o", markersize=23, markerfacecolor="none", markeredgecolor="k",
        markeredgewidth=1.8, zorder=5, linestyle="none", label="recommended setting",
    )  # fmt: skip
    for color, members in zip(COLORS, _series(results).values()):
        places = [member.speed * loop_speed for member in members]
        values, spreads = zip(*map(value, members))
        axis.errorbar(
            places, values, [each or 0 for each in spreads], color=color, marker="o", markersize=15, linewidth=1.3,
            elinewidth=1.2, zorder=3,
        )  # fmt: skip
        for place, height, member in zip(places, values, members):
            axis.annotate(
                str(member.setting.num_steps), (place, height), ha="center", va="center_baseline", color="w",
                fontsize=8, fontweight="bold", zorder=4,
            )  # fmt: skip
    axis.set_xscale("log")
    axis.margins(y=0.09)
    axis.grid(alpha=0.3)


def _draw_limit(axis: Axes, value: float, name: str) -> None:
    axis.axhline(value, color="0.4", linewidth=1, linestyle="--", zorder=0)
    axis.annotate(
        name, (0.995, value), (0, 3), axis.get_yaxis_transform(), "offset points", fontsize="small", color="0.4",
        ha="right", va="bottom",
    )  # fmt: skip


def _mark_speeds(axis: Axes, speeds: list[float]) -> None:
    """Place ticks at round speeds: by default, a logarithmic axis has few within one power of ten."""
    low, high = min(speeds), max(speeds)
    axis.set_xlim(low / MARGIN, high * MARGIN)
    marks = [mark for mark in MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(low, high) if mark > 0]
    axis.set_xticks(marks)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda mark, _: f"{mark:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _label_series(axis: Axes, results: list[Result], loop_speed: float, value: Callable) -> None:
    """Write each line's name to the right of the panel, one below the other, with a thin line to its fastest point."""
    ends = {
        name: (members[-1].speed * loop_speed, value(members[-1])[0], color)
        for color, (name, members) in zip(COLORS, _series(results).items())
    }
    (low, high), names = axis.get_ylim(), list(ends)
    heights = {name: (ends[name][1] - low) / (high - low) for name in names}  # as shares of the panel's height
    names.sort(key=heights.get)
    places = spread([heights[name] for name in names], [LABEL_HEIGHT] * len(names), 0, 1)
    for name, place in zip(names, places):
        speed, height, color = ends[name]
        axis.annotate(
            name, (speed, height), (1.03, place), "data", "axes fraction", annotation_clip=False, color=color,
            fontsize="small", fontweight="bold", va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": color, "relpos": (0, 0.5), "alpha": 0.6},
        )  # fmt: skip
