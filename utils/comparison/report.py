"""What people look at after a comparison: table, plots, and a Markdown report."""

from pathlib import Path

import matplotlib
from huggingface_hub import ModelCard, ModelCardData
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.table import Table
from rich.text import Text

from utils.cli.records import write_text
from utils.comparison.grid import shots_key, shots_title, volume_title
from utils.comparison.statistics import COSTS, Gain
from utils.hub.cards import FUNCTIONS, code, hub_ids, text
from utils.transfer.methods import METHODS

TEMPLATE = Path(__file__).with_name("report.md.jinja")
MARKERS = "osD^vPX*<>hp"


def print_comparison(summary: list[dict], findings: list[str], baseline: str | None) -> None:
    """Print what was found, then the table."""
    head, *rows = _accuracy_table(summary, "\n")
    console = Console(markup=False, emoji=False)
    for sentence in findings:
        console.print(Text(sentence), soft_wrap=True)  # Text: brackets in names and intervals are no markup
    num_runs, runs = _count_runs(summary)
    title = f"test accuracy, %, {'one seed' if num_runs == 1 else f'mean ± deviation over {num_runs} {runs}'}"
    table = Table(
        title=title, caption=baseline and f"below it the gain over {baseline} [95 % interval]", show_lines=True
    )
    for name in head:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    # as wide as it must be: a cut or folded number is worse than a broken line
    console.width = max(console.width, Console(width=10_000).measure(table).maximum)
    console.print(table)


def write_markdown(path: str | Path, summary: list[dict], baseline: str | None, **facts) -> None:
    """Write the report: what was found, table, costs, settings; ready to be a README on the Hub.

    `facts`: findings, seeds, sets (name -> path), own_sets (each seed has sets of its own), model, real, chosen (what
    `chosen_settings.json` holds), chosen_how, command; of folds also num_folds.
    """
    methods = list(dict.fromkeys(entry["method"] for entry in summary))
    real, model = facts["real"], facts["model"]
    metadata = ModelCardData(
        tags=["bridged-transfer", "image-classification", "synthetic-data"],
        base_model=next(iter(hub_ids(model)), None),
        datasets=hub_ids(real, *facts["sets"].values()) or None,
    )
    recipes = [["method", "real images", "learning rate", "steps", "head's rate"]]
    for method in methods:
        for shots, entry in facts["chosen"].get(method, {}).items():
            factor = entry["head_learning_rate_factor"]
            rate = "10 x for a fresh head, 1 x for another" if factor is None else f"{factor:g} x"
            shown = "all" if shots == shots_key(None) else f"{shots} a class"
            recipes.append([method, shown, str(entry["learning_rate"]), str(entry["max_steps"]), rate])
    card = ModelCard.from_template(
        metadata, template_path=str(TEMPLATE), baseline=baseline, table=_to_markdown(_accuracy_table(summary, "<br>")),
        costs=_to_markdown(_cost_table(summary)), recipes=_to_markdown(recipes), shots=_shots(summary),
        num_test_images=summary[0]["num_test_images"], methods={method: _describe(method) for method in methods},
        stage1={key: value for key, value in facts["chosen"]["stage1"].items() if value is not None}, **facts,
        **FUNCTIONS,
    )  # fmt: skip
    write_text(path, f"{card}\n")


def _accuracy_table(summary: list[dict], separator: str) -> list[list[str]]:
    """Return head and rows: a row a method (and volume), a column a shot count."""
    shots = _shots(summary)
    rows = {}
    for entry in summary:
        text = f"{entry['mean']:.1f}" + ("" if entry["std"] is None else f" ± {entry['std']:.1f}")
        if "gain" in entry:
            gain = Gain(entry["gain"], entry["gain_low"], entry["gain_high"], entry["num_test_images"])
            text += f"{separator}{gain}"
        rows.setdefault(_row_title(entry), []).append(text)
    return [["method", *map(shots_title, shots)], *([title, *cells] for title, cells in rows.items())]


def _cost_table(summary: list[dict]) -> list[list[str]]:
    entries = {}
    for entry in summary:
        entries.setdefault(_row_title(entry), []).append(entry)
    rows = [[title, *(_span([entry[cost] for entry in group]) for cost in COSTS)] for title, group in entries.items()]
    return [["method", "steps", "images seen", "seconds", "GPU-hours"], *rows]


def _span(values: list[float | None]) -> str:
    if None in values:
        return "not measured"
    texts = [f"{value:,.3f}" if value < 1 else f"{value:,.0f}" for value in (min(values), max(values))]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def _to_markdown(rows: list[list[str]]) -> str:
    """Return a table; the names are in its first column."""
    head, *body = (f"| {' | '.join([text(name), *cells])} |" for name, *cells in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def _row_title(entry: dict) -> str:
    return entry["method"] + ("" if entry["volume"] is None else f", {volume_title(entry['volume'])}")


def _describe(method: str) -> str:
    name, _, synthetic = method.partition("@")
    return METHODS[name].description + (f"; synthetic set {code(synthetic)}" if synthetic else "")


def _count_runs(summary: list[dict]) -> tuple[int, str]:
    """Return how many runs a mean is over, and what these are."""
    return len(summary[0]["values"]), "folds" if "num_folds" in summary[0] else "seeds"


def _shots(summary: list[dict]) -> list[int | None]:
    return list(dict.fromkeys(entry["num_shots"] for entry in summary))


@matplotlib.rc_context({"text.parse_math": False})  # dollars in a name are no formula
def plot_comparison(path: str | Path, summary: list[dict]) -> None:
    """Draw accuracy over shots (a point a method with one shot count) and, where there are several, over volumes.

    Dotted lines are methods without synthetic images.
    """
    volumes = sorted({entry["volume"] for entry in summary if entry["volume"] is not None})
    shots = _shots(summary)
    styles = _styles(list(dict.fromkeys(entry["method"] for entry in summary)))
    num_panels = len(shots) if len(volumes) > 1 else 0
    heights = [5 if len(shots) > 1 else 1.5 + 0.4 * len(styles), 4][: 1 + bool(num_panels)]
    figure = Figure(figsize=(max(10, 2.8 * num_panels), sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), max(num_panels, 1), height_ratios=heights)

    axis = figure.add_subplot(grid[0, :])
    top = [entry for entry in summary if entry["volume"] in (None, *volumes[-1:])]
    if len(shots) == 1:
        _plot_points(axis, top, styles)
    else:
        _plot_over_shots(axis, top, styles, shots)
    if volumes:
        axis.set_title(f"{volumes[-1]} synthetic images a class")
    panels = grid[1, :].subgridspec(1, num_panels).subplots(sharey=True, squeeze=False)[0] if num_panels else []
    for axis, num_shots in zip(panels, shots):
        entries = [entry for entry in summary if entry["num_shots"] == num_shots]
        _plot_over_volume(axis, entries, styles, volumes)
        axis.set(title=shots_title(num_shots), ylabel="test accuracy, %" if axis is panels[0] else "")
    if len(shots) > 1 or num_panels:  # the points have their names beside them
        handles = [Line2D([], [], **style) for style in styles.values()]
        figure.legend(handles=handles, loc="outside right upper")  # the axes have no corner that is always free
    figure.savefig(path, dpi=130)


def _styles(methods: list[str]) -> dict[str, dict]:
    colors = matplotlib.colormaps["tab10" if len(methods) <= 10 else "tab20"].colors
    return {
        method: {
            "color": colors[index % len(colors)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": "-" if method.startswith("bridged") else "--",
            "label": method,
        }
        for index, method in enumerate(methods)
    }


def _plot_points(axis, entries: list[dict], styles: dict[str, dict]) -> None:
    for position, entry in enumerate(reversed(entries)):
        style = styles[entry["method"]]
        axis.errorbar(entry["mean"], position, xerr=entry["std"] or 0, capsize=3, markersize=8, **style)
        if entry["std"] is not None:
            places = [position] * len(entry["values"])
            axis.plot(entry["values"], places, "|", color=style["color"], markersize=12, alpha=0.6)
    axis.set_yticks(range(len(entries)), [entry["method"] for entry in reversed(entries)])
    _, runs = _count_runs(entries)
    bars = f"bars: standard deviation over {runs}, ticks: each {runs[:-1]}"
    what = bars if entries[0]["std"] is not None else "one seed"
    axis.set(xlabel=f"test accuracy, %, {shots_title(entries[0]['num_shots'])} ({what})")
    axis.set_ylim(-0.6, len(entries) - 0.4)
    axis.grid(alpha=0.3, axis="x")


def _plot_over_shots(axis, entries: list[dict], styles: dict[str, dict], shots: list[int]) -> None:
    for method, style in styles.items():
        _plot_line(axis, [entry for entry in entries if entry["method"] == method], "num_shots", style, styles)
    _set_log_ticks(axis, shots)
    what = f" (bars: standard deviation over {_count_runs(entries)[1]})" if entries[0]["std"] is not None else ""
    axis.set(xlabel="real images per class", ylabel=f"test accuracy, %{what}")


def _plot_over_volume(axis, entries: list[dict], styles: dict[str, dict], volumes: list[int]) -> None:
    for method, style in styles.items():
        mine = [entry for entry in entries if entry["method"] == method]
        if mine[0]["volume"] is None:
            axis.axhline(mine[0]["mean"], color=style["color"], linestyle=":")
        else:
            _plot_line(axis, mine, "volume", style, styles)
    _set_log_ticks(axis, volumes)
    axis.set(xlabel="synthetic images a class")


def _plot_line(axis, entries: list[dict], key: str, style: dict, styles: dict[str, dict]) -> None:
    entries = sorted(entries, key=lambda entry: entry[key])
    # beside each other, else the error bars hide one another
    shift = 2 ** (0.04 * (list(styles).index(style["label"]) - (len(styles) - 1) / 2))
    places = [entry[key] * shift for entry in entries]
    means, spreads = [entry["mean"] for entry in entries], [entry["std"] or 0 for entry in entries]
    axis.errorbar(places, means, spreads, capsize=3, **style)


def _set_log_ticks(axis, values: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, values)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
