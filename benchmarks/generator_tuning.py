"""What a LoRA, class tokens and images from images add to the style token, at 1, 4 and 16 real images per class.

    python -m benchmarks.generator_tuning
    python -m benchmarks.generator_tuning --num_shots 16 --seeds 0  # in pieces: what is finished is kept

Everything is learned from the few-shot images of its shot count and seed, by the demo's recipes, and each kind of set
has as many images. A comparison per shot count trains the same methods on each, step-matched, with the demo's
settings. Frechet distance, precision and recall of a set are measured against the real validation images.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.commands import make_parser
from benchmarks.quality_scores import open_judge
from benchmarks.report import format_table
from demo.run import ENVIRONMENT
from utils.cli.records import COMPARISON, DSI_CONFIG, RUN_CONFIG, read_record
from utils.cli.step_runner import NUM_LANES, Step, StepRunner

ROOT = Path(__file__).parents[1]
CLASSIFIER = ROOT / "demo" / "classifier"
WORK = Path("benchmarks/work/generator-tuning")
NUM_PER_CLASS = 60
# kind of set -> flags of train_dsi.py, flags of generate_synthetic.py; a kind without the former uses the first token
KINDS = {
    "dsi": ((), ()),
    "lora": (("--use_peft",), ()),
    "class_tokens": (("--class_tokens",), ()),
    "from_images": (None, ("--init_images", "real", "--strength", "0.5", "0.7")),
}
METHODS = ("synthetic_only", "bridged_replay")
REAL_ONLY = ("vanilla_matched", "vanilla_mixup")


def place(work_dir: Path, num_shots: int, kind: str, seed: int | str) -> Path:
    return work_dir / f"{num_shots}-shots" / f"{kind}-{seed}"


def list_steps(work_dir: Path, num_shots: int, seeds: list[int]) -> Iterator[Step]:
    """Yield the steps that learn the tokens of a shot count and draw the sets."""
    for seed in seeds:
        for kind, (learned, drawn) in KINDS.items():
            style = place(work_dir, num_shots, f"style-{'dsi' if learned is None else kind}", seed)
            images = place(work_dir, num_shots, kind, seed)
            about = f"{kind}, {num_shots} shots, seed {seed}"
            if learned is not None:
                yield Step(
                    f"token of {about}", "learned from the few-shot images", style / DSI_CONFIG,
                    ("train_dsi.py", "demo/recipes/dsi.yaml", "--num_shots", str(num_shots), "--few_shot_seed",
                     str(seed), "--seed", str(seed), "--num_validation_images", "0", *learned, "--output_dir",
                     str(style), "--overwrite_output_dir"), is_launched=False,
                )  # fmt: skip
            yield Step(
                f"set of {about}", f"{NUM_PER_CLASS} images per class", images / RUN_CONFIG,
                ("generate_synthetic.py", "demo/recipes/generate_full.yaml", "--learned_embeds", str(style), *drawn,
                 "--seed", str(seed), "--num_images_per_class", str(NUM_PER_CLASS), "--output_dir", str(images)),
                is_launched=False,
            )  # fmt: skip


def compare(work_dir: Path, num_shots: int, seeds: list[int]) -> Step:
    sets = [f"{kind}={place(work_dir, num_shots, kind, '{seed}')}" for kind in KINDS]
    methods = [*REAL_ONLY, *(f"{method}@{kind}" for method in METHODS for kind in KINDS)]
    folder = work_dir / f"{num_shots}-shots" / "comparison"
    return Step(
        f"comparison, {num_shots} shots", "the same methods on each kind of set", folder / COMPARISON,
        ("compare_transfer.py", "--model_name_or_path", "demo/classifier", "--settings",
         "demo/recipes/chosen_settings.json", "--max_eval_samples", "1000", "--num_shots", str(num_shots), "--seeds",
         *map(str, seeds), "--methods", *methods, "--synthetic_dataset", *sets, "--num_workers", str(NUM_LANES),
         "--output_dir", str(folder)), is_launched=False, from_scratch=(),
    )  # fmt: skip


def list_accuracies(work_dir: Path, shots: list[int]) -> list[dict[str, str]]:
    """Return a row per method and kind of set, with the gain over the same method on the first kind, seed by seed."""
    summaries = [
        {entry["method"]: entry for entry in read_record(compare(work_dir, num_shots, []).finished)["summary"]}
        for num_shots in shots
    ]
    rows = []
    for method in summaries[0]:
        row = {"method and set": f"`{method}`"}
        for num_shots, summary in zip(shots, summaries):
            values, usual = (
                np.array(summary[name]["values"]) if name in summary else None
                for name in (method, f"{method.partition('@')[0]}@{next(iter(KINDS))}")
            )
            spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            is_other = usual is not None and not method.endswith(f"@{next(iter(KINDS))}")
            gains = f" ({', '.join(f'{gain:+.1f}' for gain in values - usual)})" if is_other else ""
            row[title(num_shots)] = f"{values.mean():.1f}{spread}{gains}"
        rows.append(row)
    return rows


def title(num_shots: int) -> str:
    return f"{num_shots} shot{'s' * (num_shots > 1)}"


def list_scores(work_dir: Path, shots: list[int], seeds: list[int]) -> list[dict[str, str]]:
    """Return a row per shot count and kind of set: seconds and distances to the real images, means over seeds."""
    judge, rows = open_judge(str(ROOT / "demo" / "fashion-mnist"), CLASSIFIER, work_dir, NUM_PER_CLASS), []
    for num_shots in shots:
        for kind, (learned, _) in KINDS.items():
            style = f"style-{next(iter(KINDS)) if learned is None else kind}"
            folders = [place(work_dir, num_shots, kind, seed) for seed in seeds]
            tokens = [place(work_dir, num_shots, style, seed) for seed in seeds]
            scores = [judge.compare(folder, f"{kind}, {title(num_shots)}")["set"] for folder in folders]
            row = {"set": kind, "learned from": title(num_shots)}
            for what, group in (("token", tokens), ("set", folders)):
                seconds = np.mean([read_record(folder / RUN_CONFIG)["seconds"] for folder in group])
                row[f"seconds, {what}"] = f"{seconds:.0f}"
            for name, digits in (("frechet", 0), ("precision", 2), ("recall", 2)):
                row[name] = f"{np.mean([score[name] for score in scores]):.{digits}f}"
            rows.append(row)
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--num_shots", type=int, nargs="+", default=[1, 4, 16], help="real images per class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of images, order and training")
    args = parser.parse_args()
    shots, seeds = ([1], [0]) if args.small else (args.num_shots, args.seeds)
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = Path(temporary) if args.small else WORK
        runner = StepRunner(ROOT, work_dir, environment=ENVIRONMENT)
        for num_shots in shots:
            runner.run_in_parallel(list(list_steps(work_dir, num_shots, seeds)))
            runner.run(compare(work_dir, num_shots, seeds), show=True)
        print(format_table(list_accuracies(work_dir, shots)))
        print(f"\n{format_table(list_scores(work_dir, shots, seeds))}")


if __name__ == "__main__":
    main()
