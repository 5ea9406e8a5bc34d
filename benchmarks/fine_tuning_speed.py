"""train_bridged.py --method vanilla compared with transformers' script, run_image_classification.py.

    git clone --depth 1 --branch v5.23.0 https://github.com/huggingface/transformers
    pip install evaluate  # imported by that script
    python -m benchmarks.fine_tuning_speed --transformers transformers

Weights, images, steps, batch, precision, loader workers, optimiser and augmentation (random crop and flip) are the
same; runs alternate, each in its own process. Both classifiers are then evaluated on the same test images.
"""

import json
import re
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification

from benchmarks.children import Child, gpu_column, median_peaks, run_child
from benchmarks.commands import environment_of, make_parser, parse_with_checkout, python_command
from benchmarks.fine_tuning_cases import IMAGE_SIZE, NUM_TEST_IMAGES, Case, make_cases
from benchmarks.report import format_table, publish_section
from utils.transfer.evaluation import classification_metrics, predict
from utils.transfer.image_format import EvalImages

OUR_SCRIPT = Path(__file__).parents[1] / "train_bridged.py"
THEIR_SCRIPT = "examples/pytorch/image-classification/run_image_classification.py"
VERSION = "v5.23.0"

# names that transformers 5 and datasets 4 removed, in the script of transformers 4; nothing else is replaced
REPLACED = (
    (", send_example_telemetry", ""),
    (r"\n +send_example_telemetry\(.*\)", ""),
    ("tokenizer=image_processor", "processing_class=image_processor"),
    (r'\n +from_tf=bool\("\.ckpt" in model_args\.model_name_or_path\),', ""),
    (r"(data_args\.dataset_config_name,[^)]*)\n +trust_remote_code=model_args\.trust_remote_code,", r"\1"),
    (r" and not training_args\.overwrite_output_dir", ""),
)
# without network, `evaluate.load("accuracy")` finds it in the working directory
ACCURACY = """
import datasets
import evaluate


class Accuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features({name: datasets.Value("int32") for name in ("predictions", "references")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": sum(map(int.__eq__, predictions, references)) / len(references)}
"""


@dataclass(frozen=True)
class Run:
    """One run: the Trainer's images/s over all steps, the accuracy in [0, 1], the process."""

    images_per_second: float
    accuracy: float
    child: Child


def shared_flags(case: Case, output_dir: Path) -> dict:
    return {
        "model_name_or_path": case.model_dir, "dataset_name": case.images_dir, "output_dir": output_dir,
        "per_device_train_batch_size": case.batch_size, "max_steps": case.num_steps,
        "learning_rate": case.learning_rate, "weight_decay": 0.0, "warmup_steps": 0, "lr_scheduler_type": "cosine",
        "dataloader_num_workers": case.num_workers, "bf16": case.bf16, "seed": 0, "report_to": "none",
        "save_strategy": "no", "logging_strategy": "no",
    }  # fmt: skip


def build_our_command(case: Case, output_dir: Path) -> list[str]:
    flags = shared_flags(case, output_dir) | {
        "method": "vanilla", "augmentation": "basic", "batch_norm": "train", "mixup_alpha": 0.0,
        "head_learning_rate": case.learning_rate,
    }  # fmt: skip
    return python_command(OUR_SCRIPT, flags)


def build_their_command(script: Path, case: Case, output_dir: Path) -> list[str]:
    flags = shared_flags(case, output_dir) | {
        "do_train": True, "remove_unused_columns": False, "ignore_mismatched_sizes": True,
    }  # fmt: skip
    metric_dir = output_dir.parent / "accuracy"
    metric_dir.mkdir(exist_ok=True)
    (metric_dir / "accuracy.py").write_text(ACCURACY)
    return ["env", "-C", str(metric_dir.parent), *python_command(script, flags)]


def current_copy(script: Path, folder: Path) -> tuple[Path, bool]:
    """Return the script, or of one for transformers 4 a copy that runs with 5, and whether it is a copy."""
    text = script.read_text()
    if int(re.search(r'check_min_version\("(\d+)', text)[1]) >= 5:
        return script.resolve(), False
    for old, new in REPLACED:
        text = re.sub(old, new, text)
    copy = folder / script.name
    copy.write_text(text)
    return copy, True


def judge(model_dir: Path, case: Case) -> float:
    """Return a saved classifier's accuracy on the test images, with the given checkpoint's image processor."""
    model = AutoModelForImageClassification.from_pretrained(model_dir, dtype=torch.float32)
    images = load_dataset(str(case.images_dir), split="test")
    logits, labels = predict(model, EvalImages(images, AutoImageProcessor.from_pretrained(case.model_dir)))
    return classification_metrics(logits, labels)["accuracy"]


def train_ours(case: Case, work_dir: Path, environment: dict[str, str]) -> tuple[float, Child]:
    """Train with our script into `work_dir`/ours; return images/s and the process."""
    child = run_child(build_our_command(case, work_dir / "ours"), work_dir / "ours.log", environment)
    results = json.loads((work_dir / "ours" / "all_results.json").read_text())
    return results["vanilla_images_seen"] / results["vanilla_seconds"], child


def run_ours(case: Case, work_dir: Path, environment: dict[str, str]) -> Run:
    rate, child = train_ours(case, work_dir, environment)
    return Run(rate, judge(work_dir / "ours", case), child)


def train_theirs(script: Path, case: Case, work_dir: Path, environment: dict[str, str]) -> tuple[float, Child]:
    """Train with their script into `work_dir`/theirs; return images/s and the process."""
    child = run_child(build_their_command(script, case, work_dir / "theirs"), work_dir / "theirs.log", environment)
    results = json.loads((work_dir / "theirs" / "train_results.json").read_text())
    # the images are a multiple of the batch, so all steps have the same number of images
    return case.num_steps * case.batch_size / results["train_runtime"], child


def run_theirs(script: Path, case: Case, work_dir: Path, environment: dict[str, str]) -> Run:
    rate, child = train_theirs(script, case, work_dir, environment)
    return Run(rate, judge(work_dir / "theirs", case), child)


def alternate(script: Path, case: Case, rounds: int, device: str) -> tuple[list[Run], list[Run]]:
    """Run both scripts in turn; who goes first alternates."""
    our_runs, their_runs = [], []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            work_dir = Path(folder)
            environment = environment_of(work_dir, device)
            if number % 2 == 0:
                our_runs.append(run_ours(case, work_dir, environment))
            their_runs.append(run_theirs(script, case, work_dir, environment))
            if number % 2 == 1:
                our_runs.append(run_ours(case, work_dir, environment))
        rates = [runs[-1].images_per_second for runs in (our_runs, their_runs)]
        print(f"{case.name}, round {number + 1} of {rounds}: {rates[0]:.1f} and {rates[1]:.1f} images/s", flush=True)
    return our_runs, their_runs


def describe(name: str, runs: list[Run]) -> dict[str, str]:
    """Return a table row: medians over the runs of a script."""
    accuracies = [run.accuracy for run in runs]
    peaks = median_peaks(run.child.peaks for run in runs)
    return {
        "": name,
        "images/s": f"{statistics.median(run.images_per_second for run in runs):.1f}",
        "whole command, s": f"{statistics.median(run.child.seconds for run in runs):.0f}",
        "anonymous memory, GiB": f"{peaks['RssAnon'] / 1024:.2f}",
        **gpu_column(peaks),
        "test accuracy": f"{statistics.mean(accuracies):.3f} ({min(accuracies):.3f} to {max(accuracies):.3f})",
    }


def compare(script: Path, case: Case, rounds: int, device: str) -> str:
    """Measure a case; return its part of the report."""
    our_runs, their_runs = alternate(script, case, rounds, device)
    ratios = [first.images_per_second / second.images_per_second for first, second in zip(our_runs, their_runs)]
    rows = [describe("`train_bridged.py`", our_runs), describe("transformers", their_runs)]
    return (
        f"**{case.name}: {statistics.median(ratios):.2f} times transformers' images/s** (in single rounds "
        f"{min(ratios):.2f} to {max(ratios):.2f}).\n\n{format_table(rows)}"
    )


def describe_method(script: Path, is_copy: bool, rounds: int, device: str) -> str:
    version = re.search(r'check_min_version\("(.+)"\)', script.read_text())[1]
    how = "in a copy with the names that transformers 5 removed replaced" if is_copy else "unmodified"
    threads = ", on one CPU thread as under `accelerate launch`" if device == "cpu" else ""
    return (
        f"Against `run_image_classification.py` of transformers {version}, {how}. Medians of {rounds} rounds with "
        f"both scripts in turn{threads}. Random weights; {IMAGE_SIZE[0]} x {IMAGE_SIZE[1]} px JPEGs; random crop and "
        "flip in both. Images/s are those of the whole training, including the loader's start. Accuracy is that of the "
        f"saved classifiers on {NUM_TEST_IMAGES} images, measured by our code for both."
    )


def main():
    parser = make_parser(__doc__, rounds=4)
    parser.add_argument("--num_workers", type=int, help="loader workers (default: 2 on a CPU, 12 on a GPU)")
    args, script = parse_with_checkout(parser, "transformers", VERSION, THEIR_SCRIPT)
    num_workers = args.num_workers if args.num_workers is not None else (2 if args.device == "cpu" else 12)
    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder)
        script, is_copy = current_copy(script, work_dir)
        cases = make_cases(work_dir, args.device, args.small, num_workers)
        parts = [compare(script, case, args.rounds, args.device) for case in cases]
        method = describe_method(script, is_copy, args.rounds, args.device)
    title = f"Speed compared with transformers, on a {'GPU' if args.device == 'cuda' else 'CPU'}"
    body = "\n\n".join([method, *parts])
    publish_section("train_bridged", title, body, args.small)


if __name__ == "__main__":
    main()
