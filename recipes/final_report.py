"""The last page of `make bridge` and `make reproduce`: report.html, self-contained, with the answer first."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import jinja2
import PIL.Image

from utils.cli.records import COMPARISON, RUN_CONFIG, read_record, write_text
from utils.cli.step_runner import StepRunner
from utils.comparison.arguments import SharedStageArguments
from utils.comparison.classifiers import parse_classifiers
from utils.comparison.grid import Row, look_up_recipe, shots_title
from utils.comparison.report import comparison_table
from utils.comparison.search import split_classifiers
from utils.comparison.statistics import count_runs
from utils.transfer.arguments import has_stage_1_steps
from utils.transfer.methods import DEFAULT_METHOD, METHODS

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MAX_WIDTH, MAX_BYTES, JPEG_QUALITY = 1600, 300_000, 85  # of an embedded picture; larger ones become JPEG
SHARED_FLAGS = ("batch_norm", "augmentation", "label_smoothing_factor", "per_device_train_batch_size", "weight_decay")


@dataclass(frozen=True)
class Results:
    """The folders of finished steps. `model` is that of the trained classifier; `quality` is None if there is none."""

    style: Path
    synthetic: Path
    comparison: Path
    model: Path
    quality: Path | None = None

    @property
    def pictures(self) -> list[tuple[str, Path]]:
        """Titles and files; those that do not exist are left out of the report."""
        pictures = [
            ("Accuracy of each method", self.comparison / "comparison.png"),
            ("Gain of each method, with 95 % intervals", self.comparison / "gain.png"),
            ("Style: real images, without the token, with it", self.style / "style.png"),
            ("The synthetic set, one row per class", self.synthetic / "preview.png"),
            ("The worst and the best synthetic images, by their scores", self.synthetic / "filter.png"),
        ]
        if self.quality is not None:
            pictures += [
                ("Synthetic and real images compared", self.quality / "quality.png"),
                ("The most similar synthetic and real images", self.quality / "duplicates.png"),
            ]
        return [*pictures, ("The trained classifier: learning curves and confusion matrix", self.model / "report.png")]


@dataclass(frozen=True)
class Answer:
    """What a comparison found for its first classifier and most images.

    `method` is the method to train: the recommended one, or the default if it cannot be judged.
    """

    sentence: str
    method: str
    num_shots: int | None
    classifier: str


def read_answer(comparison_dir: Path) -> Answer:
    """Return the answer in the record of a comparison."""
    comparison = read_record(comparison_dir / COMPARISON)
    label, recommendations = next(iter(comparison["recommendations"].items()))
    found = recommendations[-1]
    entries = [entry for entry in comparison["summary"] if entry.get("classifier", label) == label]
    _, runs = count_runs(entries)

    def accuracy(row: dict) -> str:
        entry = next(
            entry for entry in entries
            if (entry["method"], entry["volume"], entry["num_shots"])
            == (row["method"], row["volume"], found["num_shots"])
        )  # fmt: skip
        spread = "" if entry["std"] is None else f" ± {entry['std']:.1f}"
        return f"{entry['mean']:.1f}{spread} %"

    use, real_only, synthetic, gain = (found[name] for name in ("use", "real_only", "synthetic", "gain"))
    with_interval = ""
    if gain is not None:
        interval = "" if gain["low"] is None else f" [{gain['low']:.1f}, {gain['high']:.1f}]"
        with_interval = f"{gain['mean']:+.1f} points{interval}"
    if real_only is None or synthetic is None:
        sentence = f"Use {use['method']}: {accuracy(use)}; nothing was compared with it."
    elif use is None:
        sentence = (
            f"It cannot be judged whether synthetic images help: {synthetic['method']} gives {accuracy(synthetic)}, "
            f"real images alone {accuracy(real_only)} ({real_only['method']}): {with_interval}."
        )
    elif use == real_only:
        sentence = (
            f"Use {use['method']}, real images alone: {accuracy(use)}; with synthetic images, the best method "
            f"({synthetic['method']}) gives {accuracy(synthetic)}, {with_interval}."
        )
    else:
        sentence = (
            f"Use {use['method']}: {accuracy(use)} where real images alone give {accuracy(real_only)} "
            f"({real_only['method']}): {with_interval}."
        )
    if found["num_shots"] is not None:
        sentence = f"With {shots_title(found['num_shots'])}: {sentence[0].lower()}{sentence[1:]}"
    sentence += f" ± is the standard deviation over {runs}." if "±" in sentence else ""
    sentence += " Brackets are a 95 % interval." if "[" in sentence else ""
    return Answer(sentence, use["method"] if use else DEFAULT_METHOD, found["num_shots"], label)


def training_flags(comparison_dir: Path, answer: Answer) -> list[str]:
    """Return the flags with which train_bridged.py trains the method of an answer as the comparison did."""
    comparison = read_record(comparison_dir / COMPARISON)
    options = read_record(comparison_dir / RUN_CONFIG)["options"]
    by_classifier = split_classifiers(comparison["settings"])
    chosen = by_classifier.get(answer.classifier) or next(iter(by_classifier.values()))
    name, _, synthetic = answer.method.partition("@")
    method, stage1 = METHODS[name], chosen["stage1"]
    names = options["model_name_or_path"]  # a single one is recorded as text
    given = parse_classifiers([names] if isinstance(names, str) else names, options["model_revision"])
    classifier = next(item for item in given if item.label == answer.classifier)
    flags = {"model_name_or_path": classifier.name, "model_revision": classifier.revision, "method": name}
    if answer.num_shots is not None:
        flags["num_shots"] = answer.num_shots
    if method.takes_recipe:
        recipe = look_up_recipe(chosen, Row(answer.method, name, synthetic), answer.num_shots)
        flags |= {"learning_rate": recipe.learning_rate, "max_steps": recipe.max_steps}
        if recipe.head_learning_rate_factor is not None:
            flags["head_learning_rate_factor"] = recipe.head_learning_rate_factor
    if has_stage_1_steps(method):
        flags["bridge_max_steps"] = stage1["max_steps"]
    if "synthetic" in method.kinds:
        flags["bridge_learning_rate"] = stage1["learning_rate"]
    if method.takes_steps:
        usual = SharedStageArguments()
        flags |= {key: options[key] for key in SHARED_FLAGS if options[key] != getattr(usual, key)}
    return [word for key, value in flags.items() if value is not None for word in (f"--{key}", str(value))]


def embed_picture(path: Path) -> str:
    """Return a picture as a data URL; a large one is scaled down and stored as JPEG."""
    content, kind = path.read_bytes(), "png"
    with PIL.Image.open(io.BytesIO(content)) as image:
        if len(content) > MAX_BYTES or image.width > MAX_WIDTH:
            image = image.convert("RGB")
            image.thumbnail((MAX_WIDTH, 100 * MAX_WIDTH))
            buffer, kind = io.BytesIO(), "jpeg"
            image.save(buffer, "JPEG", quality=JPEG_QUALITY)
            content = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def write_report(
    path: Path, title: str, results: Results, runner: StepRunner, command: str,
    logs: Mapping[str, str] = MappingProxyType({}),
) -> Answer:  # fmt: skip
    """Write the report of finished steps, and return its answer.

    `command` is what made it; `logs` maps a heading to the output of a step, shown as it is.
    """
    comparison = read_record(results.comparison / COMPARISON)
    head, *rows = comparison_table(comparison["summary"], " ")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    answer = read_answer(results.comparison)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title, answer=answer, findings=comparison["findings"], baseline=comparison["baseline"], head=head,
        rows=rows, costs=runner.costs, seconds=sum(cost["seconds"] for cost in runner.costs.values()),
        pictures=[(what, embed_picture(file)) for what, file in results.pictures if file.is_file()],
        logs=logs, command=command, model=results.model,
    )  # fmt: skip
    write_text(path, page)
    return answer
