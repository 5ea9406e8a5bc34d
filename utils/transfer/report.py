"""What people read of a run: curves, confusions and calibration, a table of results and costs, the model card."""

import math
from dataclasses import asdict
from pathlib import Path

import matplotlib
import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sklearn.calibration import calibration_curve
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

from utils.cli.records import image_set_name
from utils.cli.tables import print_table, shorten
from utils.hub.cards import FUNCTIONS, License, code, common_license, hub_ids, save_card
from utils.transfer.evaluation import NUM_CALIBRATION_BINS, confidences
from utils.transfer.methods import METHODS, stage_names

TEMPLATE = Path(__file__).with_name("card.md.jinja")
METRIC_NAMES = {
    "accuracy": "Accuracy", "top5_accuracy": "Top-5 accuracy", "mean_per_class_accuracy": "Mean per-class accuracy",
    "macro_f1": "Macro F1", "expected_calibration_error": "Expected calibration error",
}  # fmt: skip
MEANS_OVER_CLASSES = ("mean_per_class_accuracy", "macro_f1")
MAX_CLASSES_IN_MATRIX = 20  # with more, the names would overlap
MAX_CONFUSIONS = 20  # in the list that replaces the matrix
NAME_LENGTH = 20
CURVES = {
    "loss": ("training loss", True, "tab:blue"),
    "eval_loss": ("validation loss", True, "tab:orange"),
    "eval_accuracy": ("validation accuracy", False, "--g"),
}
COSTS = {
    "steps": "steps", "images_seen": "images seen", "seconds": "seconds", "seconds_waiting": "s waiting",
    "gpu_hours": "GPU-hours",
}  # fmt: skip


@matplotlib.rc_context({"text.parse_math": False, "font.size": 9, "axes.titlesize": 9})  # `$` in a name is no formula
def plot_report(
    path: str | Path, log_histories: dict[str, list[dict]], logits: np.ndarray, labels: np.ndarray, class_names: list
) -> None:
    """Draw the learning curves of each stage; of the test images, what is confused and the calibration.

    Up to `MAX_CLASSES_IN_MATRIX` classes have a confusion matrix, more a list of the most frequent confusions.
    `log_histories` maps a stage's name to its Trainer log; `logits` is `(n, classes)`, `labels` `(n,)`.
    """
    num_columns = 1 if len(log_histories) < 3 else 2
    widths = (3.4 * num_columns, 5.6, 3)
    figure = Figure(figsize=(sum(widths), 5.4), layout="constrained")
    curves, confusions, calibration = figure.subfigures(1, 3, width_ratios=widths)
    _plot_curves(curves, log_histories, num_columns)
    plot_confusions = _plot_matrix if len(class_names) <= MAX_CLASSES_IN_MATRIX else _list_confusions
    plot_confusions(confusions.subplots(), logits.argmax(1), labels, class_names)
    _plot_calibration(calibration.subplots(2, height_ratios=(3, 2), sharex=True), logits, labels)
    figure.savefig(path, dpi=150)


def _plot_curves(figure, log_histories: dict[str, list[dict]], num_columns: int) -> None:
    num_rows = math.ceil(len(log_histories) / num_columns)
    lines = {}
    for position, (name, history) in enumerate(log_histories.items(), start=1):
        axis = figure.add_subplot(num_rows, num_columns, position, title=name, xlabel="step", ylabel="cross-entropy")
        twin = axis.twinx()
        for key, (label, is_loss, style) in CURVES.items():
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                (lines[label],) = (axis if is_loss else twin).plot(*zip(*points), style, marker=".")
        axis.update_datalim([(1, 0)])  # from 0, with a margin even above a flat curve
        axis.autoscale_view()
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if any("eval_accuracy" in entry for entry in history):
            twin.set(ylabel="accuracy (dashed)", ylim=(0, 1))
        else:
            twin.axis("off")
    if lines:  # below: in the panels, no corner is always free
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=2)


def _plot_matrix(axis, predictions: np.ndarray, labels: np.ndarray, class_names: list[str]) -> None:
    ConfusionMatrixDisplay.from_predictions(
        labels, predictions, labels=np.arange(len(class_names)),
        display_labels=[shorten(name, NAME_LENGTH) for name in class_names], normalize="true",
        include_values=len(class_names) <= 12, values_format=".2f", xticks_rotation="vertical", cmap="Blues", ax=axis,
        colorbar=False, text_kw={"fontsize": 8 if len(class_names) <= 10 else 6.5},
    )  # fmt: skip
    axis.tick_params(labelsize=8)
    axis.set_title(f"{len(labels):,} test images, rows sum to 1")


def _list_confusions(axis, predictions: np.ndarray, labels: np.ndarray, class_names: list[str]) -> None:
    """Draw a bar per confusion, the most frequent first: how many of a class's images were taken for another class."""
    matrix = confusion_matrix(labels, predictions, labels=np.arange(len(class_names)))
    totals, pairs = matrix.sum(1), np.argwhere(matrix * (1 - np.eye(len(matrix), dtype=int)))
    pairs = sorted(map(tuple, pairs), key=lambda pair: (-matrix[pair], totals[pair[0]]))
    shown = pairs[:MAX_CONFUSIONS]
    what = f"the {len(shown)} most frequent of {len(pairs):,}" if len(shown) < len(pairs) else f"all {len(pairs)}"
    axis.figure.suptitle(  # of the part, which is wider than the bars
        f"{len(labels):,} test images of {len(class_names)} classes\nconfusions, true → predicted: {what}", fontsize=9
    )
    counts = [matrix[pair] for pair in shown]
    bars = axis.barh(range(len(shown)), counts, color="tab:blue", height=0.6)
    axis.bar_label(bars, [f"{matrix[pair]} of {totals[pair[0]]}" for pair in shown], padding=3, fontsize=8)
    names = [" → ".join(shorten(class_names[label], NAME_LENGTH) for label in pair) for pair in shown]
    axis.set_yticks(range(len(shown)), names, fontsize=8)
    axis.set(xticks=[], xlim=(0, 1.4 * max(counts, default=1)), ylim=(MAX_CONFUSIONS - 0.4, -0.6))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _plot_calibration(axes, logits: np.ndarray, labels: np.ndarray) -> None:
    """Draw accuracy over confidence, and how many images have which confidence."""
    confidence, is_correct = confidences(logits), logits.argmax(1) == labels
    above, below = axes
    accuracies, means = calibration_curve(is_correct, confidence, n_bins=NUM_CALIBRATION_BINS)
    above.plot((0, 1), (0, 1), color="0.6", linestyle=":")
    above.plot(means, accuracies, marker="o")
    above.set(title="calibration, test images", ylabel="accuracy (dotted: as confident as right)", ylim=(0, 1))
    below.hist(confidence, NUM_CALIBRATION_BINS, range=(0, 1))
    below.set(xlabel="confidence", ylabel="images", xlim=(0, 1))


def add_totals(results: dict, stage_names: list[str]) -> dict:
    """Return `results` with `total_steps`, `total_images_seen`, `total_seconds` and `total_gpu_hours` of the stages.

    GPU-hours that a stage does not know (None, without a GPU) leave the total unknown.
    """
    totals = {}
    for cost in COSTS:
        values = [results[f"{name}_{cost}"] for name in stage_names]
        totals[f"total_{cost}"] = None if None in values else round(sum(values), 4)
    return results | totals


def print_results(title: str, results: dict) -> None:
    """Print the metrics on the test images, the LEEP scores, and the costs of each stage that there are."""
    table = Table(escape(title), "value")
    for metric, name in METRIC_NAMES.items():
        if f"test_{metric}" in results:
            table.add_row(name, _describe_metric(metric, results))
    table.add_row("Test images", f"{results['num_test_images']:,}")
    for key, name in (("pretrained", "LEEP before synthetic images"), ("bridged", "LEEP after synthetic images")):
        if results.get(f"leep_{key}") is not None:
            table.add_row(name, _describe_leep(key, results))
    console = Console()
    print_table(table, console)
    if "guard" in results:
        console.print(results["guard"]["finding"], highlight=False)
    stages = [name for name in (*stage_names(), "total") if f"{name}_steps" in results]
    if stages:
        print_table(_cost_table(stages, results), console)


def _describe_metric(metric: str, results: dict) -> str:
    value = f"{results[f'test_{metric}']:.4f}"
    if metric in MEANS_OVER_CLASSES and results.get("num_test_classes", 0) < results.get("num_classes", 0):
        return f"{value} (over {results['num_test_classes']} of {results['num_classes']} classes)"
    if metric != "accuracy":
        return value
    return f"{value} (95 % interval {results['test_accuracy_low']:.4f} to {results['test_accuracy_high']:.4f})"


def _describe_leep(key: str, results: dict) -> str:
    num_images, num_classes = results["leep_num_images"], results.get("leep_num_source_classes", 0)
    description = f"{results[f'leep_{key}']:.4f} on {num_images} images"
    if key == "bridged" or num_images >= num_classes:
        return description
    # each may be the only image of its source class, which then seems to tell the label
    return f"{description}, fewer than its {num_classes} source classes: too good to compare"


def _cost_table(stages: list[str], results: dict) -> Table:
    table = Table("stage")
    for heading in COSTS.values():
        table.add_column(heading, justify="right")
    for stage in stages:
        if stage == "total":
            table.add_section()
        values = (results[f"{stage}_{cost}"] for cost in COSTS)
        table.add_row(stage, *("not measured" if value is None else f"{round(value, 4):,}" for value in values))
    return table


def write_model_card(
    output_dir: str | Path, model_name: str, base_model: str, config: dict, results: dict,
    licenses: dict[str, License], command: str,
) -> None:  # fmt: skip
    """Write `README.md` with a `model-index`, the datasets and the base model linked.

    `config` is what `bridged_config.json` holds, `results` what `all_results.json` holds, `licenses` maps each source's
    name to its license, of which the classifier gets that of `base_model`. Local paths are named in the text only: the
    Hub takes ids in the metadata. A card that is there already is merged.

    Raises:
        UserError: that card's metadata are malformed.
    """
    real = image_set_name(config["real_images"])
    synthetic = config["synthetic_dataset"]["name"] if config["synthetic_dataset"] else None
    base_models = hub_ids(base_model)
    data = ModelCardData(
        **common_license([licenses[base_model]]).to_metadata(), model_name=model_name, library_name="transformers",
        pipeline_tag="image-classification", datasets=hub_ids(real, synthetic) or None,
        tags=["bridged-transfer", "image-classification", "synthetic-data", *(["lora"] if config["lora"] else [])],
        base_model=base_models[0] if base_models else None, base_model_relation="finetune" if base_models else None,
        eval_results=_eval_results(real, config.get("test_split"), results) or None,
    )  # fmt: skip
    card = ModelCard.from_template(
        data, template_path=str(TEMPLATE), model_name=model_name, model_path=base_model, base_link=_link(base_model),
        real_link=_link(real, "datasets/"), synthetic_link=synthetic and _link(synthetic, "datasets/"), config=config,
        method_text=_describe_method(config), results=results, metric_names=METRIC_NAMES, licenses=licenses,
        command=command, **FUNCTIONS,
    )  # fmt: skip
    save_card(card, Path(output_dir) / "README.md")


def _describe_method(config: dict) -> str:
    """Return the method's sentence where all of its row holds, else that flags changed it."""
    method = METHODS[config["method"]]
    stages = {stage["name"]: stage for stage in config["stages"]}
    is_left_out = config["stages"][-1].get("synthetic_share") == 0  # by a guard: no flag did what that did
    trained = method.without_synthetic if is_left_out else method
    settings = [(stage.name, *item) for stage in trained.stages for item in stage.settings.items()]
    holds = all(config.get(name) == value for name, value in method.flags.items()) and all(
        name == "head_warmup_steps"
        or stages[stage]["settings"][name] == value
        or (name == "batch_norm" and is_left_out)
        for stage, name, value in settings
    )
    holds &= all(
        stages[stage.name].get("alignment") == (stage.alignment and asdict(stage.alignment)) for stage in trained.stages
    )
    holds = holds and config["stages"][-1].get("average") == trained.stages[-1].average
    return method.description if holds else "changed by flags, as told here"


def _link(name: str, folder: str = "") -> str:
    return f"[{code(name)}]({constants.ENDPOINT}/{folder}{name})" if hub_ids(name) else code(name)


def _eval_results(dataset_name: str, split: str | None, results: dict) -> list[EvalResult]:
    """Return the test metrics of `results` that are numbers, for a `model-index`; a `split` of None has no name."""
    folder_or_repository = Path(dataset_name).resolve().name if Path(dataset_name).is_dir() else dataset_name
    return [
        EvalResult(
            task_type="image-classification", dataset_type=folder_or_repository, dataset_split=split,
            dataset_name=Path(folder_or_repository).name, metric_type=metric, metric_name=metric_name,
            metric_value=round(float(value), 4),
        )
        for metric, metric_name in METRIC_NAMES.items()
        if (value := results.get(f"test_{metric}")) is not None and math.isfinite(value)
    ]  # fmt: skip
