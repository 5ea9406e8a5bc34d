"""What people look at after a run: learning curves, confusion matrix, accuracy over shots, and tables."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from sklearn.metrics import ConfusionMatrixDisplay

from utils.transfer.comparison import shots_title, table_rows

MAX_CLASSES_WITH_NAMES = 30


def plot_report(
    path: str | Path, log_histories: dict[str, list[dict]], logits: np.ndarray, labels: np.ndarray, class_names: list
) -> None:
    """Draw the learning curves of each stage and the confusion matrix on the test images.

    `log_histories` maps a stage's name to its Trainer log; `logits` is `(n, classes)`, `labels` `(n,)`.
    """
    width = 4 * len(log_histories) + 7
    figure, axes = plt.subplots(1, len(log_histories) + 1, figsize=(width, 6), layout="constrained", squeeze=False)
    for axis, (name, history) in zip(axes[0], log_histories.items()):
        _plot_curves(axis, name, history)
    named = len(class_names) <= MAX_CLASSES_WITH_NAMES
    ConfusionMatrixDisplay.from_predictions(
        labels,
        logits.argmax(1),
        labels=np.arange(len(class_names)),
        display_labels=class_names if named else None,
        normalize="true",
        include_values=len(class_names) <= 12,
        values_format=".2f",
        xticks_rotation="vertical",
        cmap="Blues",
        ax=axes[0, -1],
        colorbar=False,
    )
    axes[0, -1].set_title("test images, rows sum to 1")
    if not named:
        axes[0, -1].set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_curves(axis, name: str, history: list[dict]) -> None:
    for key, label in (("loss", "training loss"), ("eval_loss", "validation loss")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axis.plot(*zip(*points), label=label)
    axis.set(title=name, xlabel="step", ylabel="cross-entropy")
    axis.set_ylim(bottom=0)
    accuracy = [(entry["step"], entry["eval_accuracy"]) for entry in history if "eval_accuracy" in entry]
    if accuracy:
        twin = axis.twinx()
        twin.plot(*zip(*accuracy), color="tab:green", linestyle="--")
        twin.set(ylabel="validation accuracy (dashed)", ylim=(0, 1))
    axis.legend()


def print_results(title: str, results: dict) -> None:
    """Print results as a table, floats with four digits."""
    table = Table("", "value", title=title)
    for name, value in results.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


def plot_comparison(path: str | Path, summary: dict) -> None:
    """Draw accuracy over shots, a line a method, with the spread over seeds."""
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    shots = list(next(iter(summary.values())))
    for position, (method, by_shots) in enumerate(summary.items()):
        # beside each other, else the error bars hide one another
        x = np.array(shots) * 2 ** (0.04 * (position - (len(summary) - 1) / 2))
        means = [entry["mean"] for entry in by_shots.values()]
        spreads = [entry["std"] or 0 for entry in by_shots.values()]
        style = "--" if method.startswith(("vanilla", "synthetic_only")) else "-"
        axis.errorbar(x, means, spreads, marker="o", capsize=3, linestyle=style, label=method)
    axis.set_xscale("log", base=2)
    axis.set_xticks(shots, shots)
    axis.minorticks_off()
    axis.set(xlabel="real images per class", ylabel="test accuracy, % (bars: standard deviation over seeds)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper")  # beside the lines: the axes have no corner that is always free
    figure.savefig(path, dpi=130)
    plt.close(figure)


def print_comparison(summary: dict, findings: str, baseline: str | None) -> None:
    """Print what was found, then the table."""
    console = Console()
    console.print(findings, soft_wrap=True, highlight=False)
    table = Table("method", title=f"test accuracy, % (gain over {baseline})" if baseline else "test accuracy, %")
    for count in next(iter(summary.values())):
        table.add_column(shots_title(count), justify="right")
    for row in table_rows(summary):
        table.add_row(*row)
    console.print(table)
