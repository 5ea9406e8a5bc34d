"""The results of a comparison for people: a table on the terminal, and a Markdown report."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from rich.console import Console
from rich.table import Table
from rich.text import Text

from utils.cli.records import write_text
from utils.cli.tables import print_table
from utils.comparison.costs import GENERATOR, STYLE_TOKEN, describe_sharing
from utils.comparison.grid import shots_key, shots_title, volume_title
from utils.comparison.statistics import COSTS, Gain, count_runs
from utils.hub.cards import FUNCTIONS, code, hub_ids, text
from utils.transfer.methods import METHODS, Method

TEMPLATE = Path(__file__).with_name("report.md.jinja")
NAMES = ("classifier", "method")  # columns of tables
NO_COST = "–"  # of a method without synthetic images
# columns next to the accuracy, by key of a summary; a column that no method has a value for is left out
SHOWN_COSTS = {
    "steps": "steps", "seconds": "seconds per run", GENERATOR: "generator seconds", STYLE_TOKEN: "style token seconds",
}  # fmt: skip


def print_comparison(summary: list[dict], findings: list[str], baseline: str | None) -> None:
    """Print the findings, then the table."""
    head, *rows = comparison_table(summary, "\n")
    console = Console(markup=False, emoji=False)
    for sentence in findings:
        console.print(Text(sentence), soft_wrap=True)  # Text: brackets in names and intervals are not markup
    num_runs, runs = count_runs(summary)
    title = f"test accuracy, %, {'one seed' if num_runs == 1 else f'mean ± deviation over {num_runs} {runs}'}"
    notes = [f"Below it the gain over {baseline} [95 % interval]."] if baseline else []
    notes += filter(None, [describe_sharing(summary)])
    table = Table(title=title, caption=Text("\n".join(notes)) if notes else None, show_lines=True)
    for name in head:
        table.add_column(name, justify="left" if name in NAMES else "right")
    for row in rows:
        table.add_row(*map(_unbroken, row))
    print_table(table, console)


def _unbroken(cell: str) -> Text:
    """Return a cell that rich does not wrap: a wrapped number is hard to read."""
    return Text(cell, no_wrap=True)


def write_markdown(path: str | Path, summary: list[dict], baseline: str | None, **facts) -> None:
    """Write the report, ready to be a README on the Hub: findings, table, costs, settings.

    `facts`: findings, seeds, sets (name -> path), own_sets (whether each seed has its own sets), classifiers (from
    `parse_classifiers`), real, chosen (the content of `chosen_settings.json` by classifier label), chosen_how, command,
    and num_folds with folds.
    """
    methods = list(dict.fromkeys(entry["method"] for entry in summary))
    real, models = facts["real"], hub_ids(*(classifier.name for classifier in facts["classifiers"]))
    metadata = ModelCardData(
        tags=["bridged-transfer", "image-classification", "synthetic-data"],
        base_model=models if len(models) > 1 else next(iter(models), None),
        datasets=hub_ids(real, *facts["sets"].values()) or None,
    )
    stage1 = {
        label: {key: value for key, value in chosen["stage1"].items() if value is not None}
        for label, chosen in facts["chosen"].items()
    }
    card = ModelCard.from_template(
        metadata, template_path=str(TEMPLATE), baseline=baseline, table=_to_markdown(comparison_table(summary, "<br>")),
        sharing=describe_sharing(summary), has_gains=any("gain" in entry for entry in summary),
        costs=_to_markdown(_cost_table(summary)), recipes=_to_markdown(_recipe_table(methods, facts["chosen"])),
        shots=_shots(summary),
        num_test_images=summary[0]["num_test_images"], methods={method: _describe(method) for method in methods},
        replays=any("replayed" in _method(method).kinds for method in methods), stage1=stage1, **facts, **FUNCTIONS,
    )  # fmt: skip
    write_text(path, f"{card}\n")


def _recipe_table(methods: list[str], chosen: dict[str, dict]) -> list[list[str]]:
    rows = [["method", "real images", "learning rate", "steps", "head learning rate"]]
    rows[0] = ["classifier", *rows[0]] if len(chosen) > 1 else rows[0]
    for label, of_one in chosen.items():
        for method in methods:
            for shots, entry in of_one.get(method, {}).items():
                factor = entry["head_learning_rate_factor"]
                rate = "10 x for a fresh head, 1 x otherwise" if factor is None else f"{factor:g} x"
                shown = "all" if shots == shots_key(None) else f"{shots} per class"
                row = [method, shown, str(entry["learning_rate"]), str(entry["max_steps"]), rate]
                rows.append([label, *row] if len(chosen) > 1 else row)
    return rows


def comparison_table(summary: list[dict], separator: str) -> list[list[str]]:
    """Return head and rows: one row per classifier, method and volume; one column per shot count, then the costs.

    `separator` is between an accuracy and its gain.
    """
    costs = [cost for cost in SHOWN_COSTS if any(cost in entry for entry in summary)]
    rows = []
    for names, entries in group_by_row(summary).items():
        accuracies = [_describe_accuracy(entry, separator) for entry in entries]
        rows.append([*names, *accuracies, *(_span(cost, entries) for cost in costs)])
    return [[*_names_of(summary), *map(shots_title, _shots(summary)), *(SHOWN_COSTS[cost] for cost in costs)], *rows]


def _describe_accuracy(entry: dict, separator: str) -> str:
    described = f"{entry['mean']:.1f}" + ("" if entry["std"] is None else f" ± {entry['std']:.1f}")
    if "gain" not in entry:
        return described
    gain = Gain(entry["gain"], entry["gain_low"], entry["gain_high"], entry["num_test_images"])
    return f"{described}{separator}{gain}"


def _cost_table(summary: list[dict]) -> list[list[str]]:
    rows = [[*names, *(_span(cost, group) for cost in COSTS)] for names, group in group_by_row(summary).items()]
    return [[*_names_of(summary), "steps", "images seen", "seconds", "GPU-hours"], *rows]


def _names_of(summary: list[dict]) -> list[str]:
    """Return the headings of the columns that identify a row."""
    return [name for name in NAMES if name in summary[0]]


def group_by_row(summary: list[dict]) -> dict[tuple[str, ...], list[dict]]:
    """Return the entries of each row by its names: the classifier if there are several, method and volume."""
    groups = {}
    for entry in summary:
        names = [entry[name] for name in _names_of(summary)]
        if entry["volume"] is not None:
            names[-1] += f", {volume_title(entry['volume'])}"
        groups.setdefault(tuple(names), []).append(entry)
    return groups


def _span(cost: str, entries: list[dict]) -> str:
    values = [entry.get(cost, NO_COST) for entry in entries]
    if NO_COST in values:
        return NO_COST
    if None in values:
        return "not measured" if cost in COSTS else "not recorded"
    texts = [f"{value:,.3f}" if 0 < value < 1 else f"{value:,.0f}" for value in (min(values), max(values))]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def _to_markdown(rows: list[list[str]]) -> str:
    """Return a Markdown table; cells of columns with names are escaped."""
    num_names = sum(head in NAMES for head in rows[0])
    head, *body = (f"| {' | '.join([*map(text, row[:num_names]), *row[num_names:]])} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def _describe(method: str) -> str:
    synthetic = method.partition("@")[2]
    return _method(method).description + (f"; synthetic set {code(synthetic)}" if synthetic else "")


def _method(label: str) -> Method:
    return METHODS[label.partition("@")[0]]


def _shots(summary: list[dict]) -> list[int | None]:
    return list(dict.fromkeys(entry["num_shots"] for entry in summary))
