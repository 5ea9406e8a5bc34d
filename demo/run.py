"""The whole pipeline on real images, on two CPU cores, without network: `make demo` and `make demo-full`.

Each step is a command that you could type. Finished steps are not repeated, so an interrupted run resumes. Two steps
run at a time, each on one core: small networks are bound by the overhead of each call and gain little from a second.
"""

import argparse
import sys
import time
from pathlib import Path

from utils.cli.records import ALL_RESULTS, COMPARISON, DSI_CONFIG, RUN_CONFIG, read_record
from utils.cli.step_runner import NUM_LANES, Step, StepRunner

ROOT = Path(__file__).resolve().parent.parent
NUM_SEEDS, NUM_SEEDS_FULL = 3, 5
# one process on one core needs no `accelerate launch`, which would take four seconds to start in each step
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
PICTURES = {
    "style.png": "real images, then synthetic images without and with the style token",
    "style-0/training.png": "the style token's learning curve",
    "synthetic-0/preview.png": "the synthetic set, one row per class",
    "bridged-0/report.png": "learning curves of both stages and confusion matrix",
    "comparison/comparison.png": "accuracy over the number of real images, one line per method",
    "comparison/gain.png": "what each method gains over real images alone, with 95 % intervals",
}


def learn_style(runs_dir: Path, seed: int, suffix: str = "") -> Step:
    """Return the step that learns the style of a seed's 1-shot images, by the recipe `dsi<suffix>.yaml`."""
    style = runs_dir / f"style-{seed}"
    return Step(
        f"style token, seed {seed}", "ten real images, one of each class, become one token", style / DSI_CONFIG,
        ("train_dsi.py", f"demo/recipes/dsi{suffix}.yaml", "--few_shot_seed", str(seed), "--seed", str(seed),
         "--output_dir", str(style), "--overwrite_output_dir"),
        is_launched=False,
    )  # fmt: skip


def draw_set(runs_dir: Path, seed: int, images_per_class: int, suffix: str = "", with_token: bool = True) -> Step:
    """Return the step that draws the set of a seed; without the token it is the control by the same generator."""
    if with_token:
        kind, folder, flags = "synthetic", "synthetic", ()
        why = f"the generator draws {images_per_class} images of each class in that style"
    else:
        kind, folder, flags = "control", "plain", ("--use_style_token", "false")
        why = f"{images_per_class} images of each class without the token: the generator's own style"
    images = runs_dir / f"{folder}-{seed}"
    return Step(
        f"{kind} set, seed {seed}", why, images / RUN_CONFIG,
        ("generate_synthetic.py", f"demo/recipes/generate{suffix}.yaml", "--learned_embeds",
         str(runs_dir / f"style-{seed}"), *flags, "--seed", str(seed), "--num_images_per_class", str(images_per_class),
         "--output_dir", str(images)),
        is_launched=False,
    )  # fmt: skip


def style_figures(runs_dir: Path) -> Step:
    return Step(
        "style figures", "how similar are the synthetic images to the real ones? Border, colour, Frechet distance",
        runs_dir / "style.png",
        ("demo/style_figures.py", "--real", "demo/fashion-mnist", "--with_token", str(runs_dir / "synthetic-0"),
         "--without_token", str(runs_dir / "plain-0"), "--classifier", "demo/classifier",
         "--output_dir", str(runs_dir)),
        is_launched=False, from_scratch=(),
    )  # fmt: skip


def train_bridged(runs_dir: Path) -> Step:
    return Step(
        "bridged transfer", "an ImageNet classifier is fine-tuned on the synthetic images, then on ten real ones",
        runs_dir / "bridged-0" / ALL_RESULTS,
        ("train_bridged.py", "demo/recipes/bridged.yaml", "--synthetic_dataset", str(runs_dir / "synthetic-0"),
         "--output_dir", str(runs_dir / "bridged-0"), "--overwrite_output_dir"),
        is_launched=False,
    )  # fmt: skip


def compare(runs_dir: Path, recipe: str, sets: list[str]) -> Step:
    return Step(
        "comparison", "all methods on the same real images", runs_dir / "comparison" / "comparison.md",
        ("compare_transfer.py", recipe, "--synthetic_dataset", *sets, "--num_workers", str(NUM_LANES),
         "--output_dir", str(runs_dir / "comparison")),
        is_launched=False, from_scratch=(),
    )  # fmt: skip


def print_ending(runner: StepRunner, seconds: float) -> None:
    """Print which method to use, as the comparison's record says it, then costs, style figures and pictures."""
    answer = read_record(runner.runs_dir / "comparison" / COMPARISON)["findings"][0]
    print(f"\n\033[1m{answer}\033[0m")
    print("\n\033[1mSeconds and peak memory\033[0m (two steps at a time)")
    runner.print_costs()
    print(f"  {'this run, start to end':36s} {seconds:7.0f} s")
    print("\n\033[1mStyle\033[0m")
    print((runner.runs_dir / "style.txt").read_text(), end="")
    print("\n\033[1mPictures\033[0m")
    for name, what in PICTURES.items():
        print(f"  {runner.runs_dir / name}: {what}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--full",
        action="store_true",
        help="the table of docs/results.md: 1 to 200 shots, five seeds, a recipe search",
    )
    args = parser.parse_args()
    started = time.time()
    runs_dir = Path("demo/runs-full" if args.full else "demo/runs")
    images_per_class, num_seeds, suffix = (100, NUM_SEEDS_FULL, "_full") if args.full else (60, NUM_SEEDS, "")
    runner = StepRunner(ROOT, runs_dir, environment=ENVIRONMENT)
    seeds = range(num_seeds)
    drawn = [draw_set(runs_dir, seed, images_per_class, suffix) for seed in seeds]
    controls = [draw_set(runs_dir, 0, images_per_class if args.full else 20, suffix, with_token=False)]
    sets, recipe = [f"dsi={runs_dir / 'synthetic-{seed}'}"], f"demo/recipes/compare{suffix}.yaml"
    if args.full:
        controls += [draw_set(runs_dir, seed, images_per_class, suffix, with_token=False) for seed in seeds[1:]]
        sets += [f"plain={runs_dir / 'plain-{seed}'}"]
    # what takes long comes first, so that both cores have work to the end
    runner.run_in_parallel(
        [*(learn_style(runs_dir, seed, suffix) for seed in seeds), train_bridged(runs_dir), style_figures(runs_dir)]
        + drawn + controls
    )  # fmt: skip
    runner.run(compare(runs_dir, recipe, sets), show=True)
    print_ending(runner, time.time() - started)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(f"demo: {error}")
