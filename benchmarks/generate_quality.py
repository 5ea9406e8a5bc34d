"""Quality per second of generate_synthetic.py: steps, guidance, guidance interval and solver, in one table and picture.

    python -m benchmarks.generate_quality --num_workers 2
    python -m benchmarks.generate_quality --style_tokens 'demo/runs-full/style-{seed}' --settings dpm-8 ddim-6

It uses the demo's generator and prompts, and a style token for each seed. Each set is drawn by the real command on one
thread, and the plain loop is timed between the sets. Sets, measurements and classifiers are kept in `--output_dir` and
reused. The real images are the validation images; the test images are not used.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.commands import make_parser
from benchmarks.quality_plot import draw_results
from benchmarks.quality_scores import CHOSEN_SETTINGS, SCORES, Judge, open_judge, train_classifiers
from benchmarks.quality_sets import SETS_PER_LOOP, SetToDraw, draw_sets
from benchmarks.quality_settings import (
    LOOP,
    ROOT,
    Result,
    Setting,
    describe_choice,
    list_rows,
    select_settings,
)
from benchmarks.report import FOLDER, format_table, publish_section
from demo.run import ENVIRONMENT, learn_style
from utils.cli.records import DSI_CONFIG, read_record
from utils.cli.step_runner import NUM_LANES, StepRunner
from utils.comparison.statistics import paired_gain

DEMO = ROOT / "demo"
TITLE = "Quality per second: steps, guidance and solver"
PICTURE = "generate_quality.png"
METHOD = (
    "The demo's generator and prompts, a style token for each seed ({seeds}), {num_images} images per set, drawn by "
    "`generate_synthetic.py` on one thread each, {num_workers} sets in parallel. Each worker timed the plain loop "
    "(`benchmarks/peer_loop.py`, DDIM with 12 steps and guidance 1.2) before every {sets_per_loop} sets; speeds are "
    "multiples of the loop's at that time, medians over seeds (smallest to largest). Accuracy is measured on "
    "{num_real:,} real validation images, for the demo's classifier trained for {num_steps} steps on the set alone: "
    "mean and standard deviation over seeds. The difference to the loop's setting is paired by seed and image, with "
    "its 95 % interval. Frechet and kernel distance, precision and recall (3 neighbours) are measured against the same "
    "validation images, in the features of that classifier before training; diversity is the mean cosine distance "
    "within a class; all are means over seeds. The last row is for the same number of real training images, as a "
    "bound. No test images were used."
)


def parse_arguments(argv=None) -> tuple[argparse.Namespace, list[Setting]]:
    """Return the arguments, and the settings that can be drawn; print those that cannot."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--style_tokens", help="folders of style tokens, with '{seed}' for the seed (default: train them)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", help="names of rows; the loop is always included (default: all)")
    parser.add_argument("--num_images_per_class", type=int, default=60)
    parser.add_argument(
        "--num_workers", type=int, default=1, help="sets drawn, and classifiers trained, in parallel (default: 1)"
    )
    parser.add_argument("--max_steps", type=int, help="training steps of each classifier (default: the demo's)")
    parser.add_argument("--max_eval_samples", type=int, help="real validation images, evenly spaced (default: all)")
    parser.add_argument(
        "--real_images",
        default=str(DEMO / "fashion-mnist"),
        help="real images of the style tokens (default: the demo's)",
    )
    parser.add_argument(
        "--classifier",
        type=Path,
        default=DEMO / "classifier",
        help="folder of a pretrained classifier (default: the demo's)",
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks" / "work" / "generate_quality")
    args = parser.parse_args(argv)
    try:
        settings, lacking = select_settings(args.settings)
    except ValueError as error:
        parser.error(str(error))
    for name in ("num_images_per_class", "num_workers", "max_steps", "max_eval_samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1.")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {' '.join(map(str, args.seeds))}: duplicate values.")
    for seed in args.seeds if args.style_tokens else []:
        token = args.style_tokens.replace("{seed}", str(seed))
        if not (Path(token) / DSI_CONFIG).exists():
            parser.error(
                f"--style_tokens {args.style_tokens}: {token} has no {DSI_CONFIG}; must be folders of style tokens."
            )
    if not (args.classifier / "config.json").exists():  # before the sets are drawn
        parser.error(f"--classifier {args.classifier}: has no config.json; `make install` makes the demo's.")
    for setting in lacking:
        print(f"{setting.name} is left out: its adapter {setting.flags['lora']} does not exist.")
    return args, settings


def get_tokens(args: argparse.Namespace) -> dict[int, Path]:
    """Return the folder of each seed's style token; missing ones of the demo are trained first."""
    if args.style_tokens:
        return {seed: Path(args.style_tokens.replace("{seed}", str(seed))) for seed in args.seeds}
    runner = StepRunner(ROOT, args.output_dir, environment=ENVIRONMENT)
    steps = [learn_style(args.output_dir, seed, "_full") for seed in args.seeds]
    runner.run_in_parallel(steps, min(NUM_LANES, args.num_workers))
    return {seed: args.output_dir / f"style-{seed}" for seed in args.seeds}


def collect_results(
    sets: list[SetToDraw], judge: Judge, correct: dict[SetToDraw, np.ndarray]
) -> tuple[list[Result], dict[str, float]]:
    """Return the measurements of each setting, and the scores of real images, averaged over sets."""
    by_setting: dict[Setting, list[SetToDraw]] = {}
    for each in sets:
        by_setting.setdefault(each.setting, []).append(each)
    stacked = {setting: np.stack([correct[each] for each in members]) for setting, members in by_setting.items()}
    results, floors = [], []
    for setting, members in by_setting.items():
        drawn = [read_record(each.record_path) for each in members]
        measured = [judge.measure(each) for each in members]
        floors += [floor for _, floor in measured]
        results.append(
            Result(
                setting,
                speeds=[record["images_per_second"] for record in drawn],
                times=[record["images_per_second"] / record["loop_images_per_second"] for record in drawn],
                accuracies=(100 * stacked[setting].mean(1)).tolist(),
                gain=paired_gain(stacked[setting], stacked[LOOP]),
                scores={name: [of_set[name] for of_set, _ in measured] for name in SCORES},
            )
        )
    return results, {name: float(np.mean([floor[name] for floor in floors])) for name in SCORES}


def main(argv=None) -> list[Result]:
    started = time.perf_counter()
    args, settings = parse_arguments(argv)
    work_dir = args.output_dir = args.output_dir.resolve()
    tokens = get_tokens(args)
    sets = [
        SetToDraw(setting, seed, tokens[seed], args.num_images_per_class, work_dir)
        for seed in args.seeds
        for setting in settings
    ]
    draw_sets(sets, args.num_workers)
    torch.set_num_threads(1)  # with workers, more threads would wait for each other
    judge = open_judge(args.real_images, args.classifier, work_dir, args.num_images_per_class, args.max_eval_samples)
    for each in sets:
        judge.measure(each)
    correct = train_classifiers(sets, judge, args.num_workers, args.max_steps)
    results, floor = collect_results(sets, judge, correct)

    answer, reason = describe_choice(results)
    num_steps = args.max_steps or read_record(CHOSEN_SETTINGS)["stage1"]["max_steps"]
    method = METHOD.format(
        seeds=" ".join(map(str, args.seeds)), num_images=sets[0].num_images, num_workers=args.num_workers,
        sets_per_loop=SETS_PER_LOOP, num_real=len(judge.real.validation), num_steps=num_steps,
    )  # fmt: skip
    flags = "\n".join(f"- `{setting.name}`: `{' '.join(setting.words)}`" for setting in settings)
    picture = (work_dir if args.small else FOLDER) / PICTURE
    draw_results(results, answer.replace("**", "").replace("`", "")).savefig(picture, dpi=130)
    body = (
        f"{answer} {reason}\n\n{format_table(list_rows(results, floor))}\n\n![quality over speed]({PICTURE})\n\n"
        f"{method}\n\n{flags}\n\n{time.perf_counter() - started:.0f} s for everything that was not cached."
    )
    publish_section("generate_synthetic", TITLE, body, args.small)
    print(f"picture: {picture}")
    return results


if __name__ == "__main__":
    main()
