"""What balanced synthetic sets and class weights do on a long-tailed image set: mean per-class accuracy.

    python -m benchmarks.long_tail
    python -m benchmarks.long_tail --seeds 0  # in pieces: what is finished is kept

The demo's classes get 50 to 2 real training images, which class how many by the seed. A style token is learned from
these images. Then the same classifier is trained for the same number of steps on the real images alone, and with
a synthetic set of 60 images per class or with as many images in `--num_images_per_class balance:N`; each with and
without `--class_weights balanced`. Test and validation images are the demo's, as many of each class.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, load_dataset

from benchmarks.commands import make_parser
from benchmarks.report import format_table
from demo.run import ENVIRONMENT
from utils.cli.records import ALL_RESULTS, BRIDGED_CONFIG, DSI_CONFIG, RUN_CONFIG, read_record
from utils.cli.step_runner import Step, StepRunner

ROOT = Path(__file__).parents[1]
REAL = ROOT / "demo" / "fashion-mnist"
WORK = Path("benchmarks/work/long-tail")
COUNTS = np.rint(np.geomspace(50, 2, 10)).astype(int)  # of the real images, by rank
NUM_PER_CLASS = 60  # synthetic images in the even set
NUM_RARE = 5
DSI_FLAGS = (  # of demo/recipes/dsi.yaml, without its shots
    "--max_train_steps", "200", "--train_batch_size", "32", "--learning_rate", "1e-2", "--lr_scheduler", "cosine",
    "--lr_warmup_steps", "10", "--article", "as_written",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of the table: a method, the kind of its synthetic set, and flags."""

    title: str
    method: str
    kind: str = "even"
    flags: tuple[str, ...] = ()


WEIGHTED = ("--class_weights", "balanced")
ROWS = (
    Row("real images alone (`vanilla_matched`)", "vanilla_matched"),
    Row("real images alone, class weights", "vanilla_matched", flags=WEIGHTED),
    Row("`mix`, even set", "mix"),
    Row("`mix`, even set, class weights", "mix", flags=WEIGHTED),
    Row("`mix`, balanced set", "mix", "balanced"),
    Row("`bridged_replay`, even set", "bridged_replay"),
    Row("`bridged_replay`, even set, class weights", "bridged_replay", flags=WEIGHTED),
    Row("`bridged_replay`, balanced set", "bridged_replay", "balanced"),
    Row("`bridged_replay`, balanced set, class weights", "bridged_replay", "balanced", WEIGHTED),
)


def class_counts(seed: int) -> np.ndarray:
    """Return the number of real images of each class, by label; the seed decides which classes are rare."""
    return COUNTS[np.random.default_rng(seed).permutation(len(COUNTS))]


def save_long_tail(folder: Path, seed: int) -> None:
    """Write the demo's images with few training images of some classes, drawn by the seed; others stay as they are."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for path in sorted(REAL.glob("data/*.parquet")):
        images = load_dataset("parquet", data_files=str(path), split="train").cast_column("image", Image(decode=False))
        if path.name.startswith("train"):
            labels, rng = np.asarray(images["label"]), np.random.default_rng([seed, 1])
            rows = [
                rng.permutation(np.flatnonzero(labels == label))[:count]
                for label, count in enumerate(class_counts(seed))
            ]
            images = images.select(np.sort(np.concatenate(rows)))
        features = Features({"image": Image(), "label": images.features["label"]})
        rows = {"image": list(images["image"]), "label": list(images["label"])}
        Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / path.name)


def list_steps(seed: int, work_dir: Path) -> tuple[list[Step], list[Step]]:
    """Return the steps that make a style token and two sets, and those that train the classifiers."""
    folder = work_dir / f"seed-{seed}"
    photos, style = folder / "photos", folder / "style"
    if not photos.exists():
        save_long_tail(photos, seed)
    least = NUM_PER_CLASS - round(float((COUNTS.max() - COUNTS).mean()))  # as many images in all
    made = [
        Step(
            f"style token, seed {seed}", "all real images", style / DSI_CONFIG,
            ("train_dsi.py", "--pretrained_model_name_or_path", "demo/generator", "--dataset_name", str(photos),
             *DSI_FLAGS, "--seed", str(seed), "--output_dir", str(style), "--overwrite_output_dir"), False,
        )
    ]  # fmt: skip
    for kind, number in (("even", str(NUM_PER_CLASS)), ("balanced", f"balance:{least}")):
        made.append(
            Step(
                f"{kind} set, seed {seed}", f"{number} images per class", folder / kind / RUN_CONFIG,
                ("generate_synthetic.py", "demo/recipes/generate.yaml", "--learned_embeds", str(style),
                 "--num_images_per_class", number, "--seed", str(seed), "--output_dir", str(folder / kind)), False,
            )
        )  # fmt: skip
    trained = []
    for number, row in enumerate(ROWS):
        output_dir = folder / f"row-{number}"
        trained.append(
            Step(
                f"{row.title}, seed {seed}", "fine-tune and test", output_dir / ALL_RESULTS,
                ("train_bridged.py", "demo/recipes/bridged.yaml", "--method", row.method, *row.flags,
                 "--synthetic_dataset", str(folder / row.kind), "--seed", str(seed),
                 "--output_dir", str(output_dir), "--overwrite_output_dir"), False,
            )
        )  # fmt: skip
    return made, trained


def class_accuracies(classifier: Path) -> np.ndarray:
    """Return the accuracy on the test images of each class, `(classes,)`, in percent."""
    from utils.transfer.classifiers import load_classifier, load_image_processor
    from utils.transfer.evaluation import predict
    from utils.transfer.image_format import EvalImages

    names = read_record(classifier / BRIDGED_CONFIG)["class_names"]
    model = load_classifier(str(classifier), names, False, 0)
    tested = load_dataset("parquet", data_files=str(REAL / "data" / "test-00000.parquet"), split="train")
    logits, labels = predict(model, EvalImages(tested, load_image_processor(str(classifier))))
    is_right = logits.argmax(1) == labels
    return 100 * np.array([is_right[labels == label].mean() for label in range(len(names))])


def describe_row(row: Row, accuracies: dict[int, np.ndarray], reference: dict[int, np.ndarray]) -> dict[str, str]:
    """Return a row of the table from the accuracies of each class, by seed; gains are over those of `reference`."""
    parts = {"all classes": [], f"the {NUM_RARE} rare ones": [], f"the {NUM_RARE} others": []}
    for seed, of_class in accuracies.items():
        rarest_first = np.argsort(class_counts(seed), kind="stable")
        for part, labels in zip(parts, (rarest_first, rarest_first[:NUM_RARE], rarest_first[NUM_RARE:])):
            parts[part].append(of_class[labels].mean())
    shown = {part: f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" for part, values in parts.items()}
    gains = [f"{(of_class - reference[seed]).mean():+.1f}" for seed, of_class in accuracies.items()]
    return {"mean accuracy of": row.title, **shown, "gain by seed": ", ".join(gains)}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of images, order and training")
    args = parser.parse_args()
    rows = ROWS[:1] if args.small else ROWS
    accuracies = {row: {} for row in rows}
    for seed in args.seeds:
        made, trained = list_steps(seed, WORK)
        runner = StepRunner(ROOT, WORK, environment=ENVIRONMENT)
        for step in [*made, *trained[: len(rows)]]:
            runner.run(step)
        for row, step in zip(rows, trained):
            accuracies[row][seed] = class_accuracies(ROOT / step.finished.parent)
    if len(args.seeds) > 1:
        print(format_table([describe_row(row, accuracies[row], accuracies[ROWS[0]]) for row in rows]))


if __name__ == "__main__":
    main()
