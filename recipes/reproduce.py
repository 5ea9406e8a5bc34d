"""Reproduces the paper's table: `make reproduce RECIPE=cars MODEL=resnet18`, resumable; `DRY_RUN=1` prints the plan.

It runs the three steps and the comparison, each a command that you could type. The style token and the synthetic images
are made once for all classifiers. The paper's third column, bridged without DSI, needs a second set: `CONTROL=1`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.plan import RATES, make_plan, print_plans, read_models, read_rates, read_recipe, read_sets
from utils.cli.errors import UserError, run_script
from utils.cli.parsing import read_mapping
from utils.cli.records import (
    BRIDGED_CONFIG,
    COMPARISON,
    DSI_CONFIG,
    GENERATION_CONFIG,
    RUN_CONFIG,
    read_record,
    write_text,
)
from utils.cli.step_runner import Step, StepRunner

ROOT = Path(__file__).resolve().parent.parent
# our row -> the paper's row
PAPER_ROWS = {"vanilla": "vanilla", "bridged@plain": "bridged", "bridged": "bridged_dsi"}
RESUME = ("--resume_from_checkpoint", "latest")
PRECISION_FLAGS = {"no": (), "bf16": ("--bf16",), "fp16": ("--fp16",)}  # of the comparison


def list_steps(
    name: str, model: str, num_images_per_class: int, control: bool, folder: Path, config_flags: Sequence[str] = ()
) -> list[Step]:
    """Return the steps for a dataset and a classifier, the comparison last; `folder` is the dataset's.

    `config_flags` are flags of the comparison, from `flags_from_config`.
    """
    flags, excluded = read_models()[model], read_sets()[name].get("exclude_classes", [])
    exclude, allow = (("--exclude_classes", *excluded), ("--allow_missing_classes",)) if excluded else ((), ())
    style, images, plain = folder / "style", folder / "synthetic", folder / "plain"
    trained = folder / f"{model}-{num_images_per_class}"
    generate = ("generate_synthetic.py", "recipes/synthetic.yaml", "--learned_embeds", str(style), *exclude)

    def draw(images: Path) -> tuple[str, ...]:
        """Return the flags of a synthetic set. It can only grow; training takes as many images as requested."""
        there = images / GENERATION_CONFIG
        num_there = read_record(there)["num_images_per_class"] if there.exists() else 0
        number = max(num_images_per_class, num_there)
        return ("--num_images_per_class", str(number), "--output_dir", str(images))

    classifier = ("--model_name_or_path", flags["model_name_or_path"])
    rate, bridge_rate = str(flags["learning_rate"]), str(flags["bridge_learning_rate"])
    steps = [
        Step(
            "style token", "the style of the training images becomes one token", style / DSI_CONFIG,
            ("train_dsi.py", f"recipes/{name}/dsi.yaml", "--output_dir", str(style), *RESUME),
        ),
        Step(
            f"synthetic set, {num_images_per_class} a class", "images of all classes in that style",
            images / RUN_CONFIG, (*generate, *draw(images)),
        ),
    ]  # fmt: skip
    sets, methods = [f"dsi={images}"], read_recipe("compare")["methods"]
    if control:
        steps.append(
            Step(
                f"control set, {num_images_per_class} a class", "the same number without the token", plain / RUN_CONFIG,
                (*generate, *draw(plain), "--use_style_token", "false"),
            )
        )  # fmt: skip
        sets, methods = [*sets, f"plain={plain}"], [*methods, "bridged@plain"]
    return [
        *steps,
        Step(
            f"bridged transfer, {trained.name}", "a classifier trained on the synthetic, then on the real images",
            trained / "bridged" / BRIDGED_CONFIG,
            ("train_bridged.py", "recipes/bridged.yaml", "--synthetic_dataset", str(images), *allow, *classifier,
             "--max_synthetic_samples_per_class", str(num_images_per_class), "--learning_rate", rate,
             "--bridge_learning_rate", bridge_rate, "--output_dir", str(trained / "bridged"), *RESUME),
        ),
        Step(
            f"comparison, {trained.name}", "the methods on the same images",
            trained / "comparison" / COMPARISON,
            ("compare_transfer.py", "recipes/compare.yaml", "--synthetic_dataset", *sets, *allow, "--methods", *methods,
             "--volumes", str(num_images_per_class), *classifier, "--learning_rates", rate, "--bridge_learning_rates",
             bridge_rate, "--output_dir", str(trained / "comparison"), *config_flags),
            is_launched=False,  # it starts its own processes
            from_scratch=(),
        ),
    ]  # fmt: skip


def flags_from_config(config: dict) -> tuple[str, ...]:
    """Return the comparison's flags for an accelerate configuration: a worker per process, and the precision.

    The other steps run under `accelerate launch`. The comparison must not: with a configuration for several GPUs, all
    of its workers would join one process group as its first process.

    Raises:
        UserError: the comparison does not support the configuration's precision.
    """
    precision = str(config.get("mixed_precision") or "no")  # YAML reads a bare `no` as False
    if precision not in PRECISION_FLAGS:
        raise UserError(f"--config_file: mixed_precision {precision}: must be one of {', '.join(PRECISION_FLAGS)}.")
    num_workers = config.get("num_processes", 1) // config.get("num_machines", 1)
    return ("--num_workers", str(num_workers), *PRECISION_FLAGS[precision])


def compare_with_paper(summary: list[dict], paper: dict[str, float], title: str) -> str:
    """Return a Markdown table of measured accuracies and the paper's, `?` if that is unknown."""
    lines = [f"| {title}, top-1 % | here | the paper |", "|---|---|---|"]
    for entry in summary:
        spread = "" if entry["std"] is None else f" ± {entry['std']:.1f}"
        figure = paper.get(PAPER_ROWS.get(entry["method"]), "?" if entry["method"] in PAPER_ROWS else "")
        lines.append(f"| {entry['method']} | {entry['mean']:.1f}{spread} | {figure} |")
    return "\n".join(lines) + "\n"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=list(read_sets()), help="dataset (default with --dry_run: all)")
    parser.add_argument("--model", choices=list(read_models()), default="resnet18", help="classifier")
    parser.add_argument("--num_images_per_class", type=int, default=1000, help="synthetic images per class")
    parser.add_argument("--control", action="store_true", help="add a set without the style token")
    parser.add_argument("--dry_run", action="store_true", help="print the plan")
    parser.add_argument("--rates", type=Path, default=RATES, help="file with the speed of your GPU, for the plan")
    parser.add_argument("--config_file", help="accelerate configuration (default: accelerate's own)")
    parser.add_argument("--output_dir", type=Path, default=Path("reproduced"), help="folder for the results")
    args = parser.parse_args(argv)
    if args.recipe is None and not args.dry_run:
        parser.error(f"--recipe is missing: one of {', '.join(read_sets())}")
    if args.num_images_per_class < 1:
        parser.error(f"--num_images_per_class {args.num_images_per_class}: must be above 0")
    return args


def main(argv: Sequence[str] | None = None) -> str | None:
    """Print the plan, or run it and return the table."""
    args = parse_arguments(argv)
    if args.dry_run:
        rates = read_rates(args.rates, args.model)
        names = [args.recipe] if args.recipe else list(read_sets())
        plans = [make_plan(name, args.model, rates, args.num_images_per_class, args.control) for name in names]
        print_plans(plans, args.model, rates, args.num_images_per_class)
        return None
    folder = args.output_dir / args.recipe
    launch, config_flags, gpus = (), (), {}
    if args.config_file:
        config = read_mapping(Path(args.config_file), "configuration of accelerate")
        launch, config_flags = ("--config_file", args.config_file), flags_from_config(config)
        if config.get("gpu_ids", "all") != "all":
            gpus = {"CUDA_VISIBLE_DEVICES": str(config["gpu_ids"])}  # as `accelerate launch` does
    runner = StepRunner(ROOT, folder, launch, gpus)
    steps = list_steps(args.recipe, args.model, args.num_images_per_class, args.control, folder, config_flags)
    for step in steps:
        runner.run(step, show=True)
    facts, comparison = read_sets()[args.recipe], steps[-1].finished
    table = compare_with_paper(
        read_record(comparison)["summary"], facts.get("paper", {}) if args.model == "resnet18" else {},
        f"{facts['title']}, {args.model}, {args.num_images_per_class:,} synthetic images per class",
    )  # fmt: skip
    from recipes.final_report import Results, write_report  # takes seconds, which a dry run does not need

    trained = comparison.parent.parent
    write_text(trained / "reproduced.md", table)
    results = Results(folder / "style", folder / "synthetic", comparison.parent, trained / "bridged")
    command = f"make reproduce RECIPE={args.recipe} MODEL={args.model} NUM_IMAGES={args.num_images_per_class}"
    write_report(trained / "report.html", f"{facts['title']}, {args.model}", results, runner, command)
    print(f"\n{table}\n{trained / 'reproduced.md'}, and with pictures and costs {trained / 'report.html'}")
    return table


if __name__ == "__main__":
    try:
        run_script(main)
    except RuntimeError as error:
        sys.exit(f"reproduce: {error}")
