"""From a folder of photos to an answer: `make bridge IMAGES=photos`, resumable; `DRY_RUN=1` gives hours and disk first.

It runs what docs/your_images.md describes, each step a command that you could type: audit, style token, synthetic set,
quality report and scores, comparison (by cross-validation if images are few), and the recommended classifier. It stops
after the audit if a class name is doubtful, so that you can edit its noun. All results are on one page, report.html.
"""

import argparse
import importlib
import math
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from recipes.final_report import Results, read_answer, training_flags, write_report
from recipes.reproduce import RESUME, ROOT, flags_from_config
from utils.cli.errors import UserError, run_script
from utils.cli.parsing import read_mapping
from utils.cli.records import (
    ALL_RESULTS,
    COMPARISON,
    DSI_CONFIG,
    GENERATION_CONFIG,
    RUN_CONFIG,
    read_record,
    write_record,
)
from utils.cli.step_runner import Step, StepRunner
from utils.cli.tables import print_table
from utils.data.class_names import list_names, propose_noun, read_class_names
from utils.data.image_set import PARTS, RealImages, RealImagesRecord
from utils.data.left_out import SCORES
from utils.data.name_doctor import diagnose
from utils.forecast.costs import GIB
from utils.forecast.report import describe_hours
from utils.transfer.methods import METHODS, StageSettings, steps_per_epoch

# real images alone first
COMPARED = ("vanilla_mixup", "linear_probe", "lp_ft", "mix", "bridged", "bridged_replay")
NUM_FOLDS, NUM_REPEATS = 5, 2
FEW = 50  # real images per class (median); with fewer, a held-out tenth is too small to tell


@dataclass(frozen=True)
class Job:
    """What to do: `images` are a folder or a dataset id, `folder` takes everything that is made.

    Recipes are files with further flags of a script; `drop_share` is that of filter_synthetic.py. `config_flags` are
    flags of the comparison, from `flags_from_config`.
    """

    images: str
    folder: Path
    num_images_per_class: int
    drop_share: float = 0.0
    dsi_recipe: str | None = None
    synthesis_recipe: str | None = None
    comparison_recipe: str | None = None
    config_flags: tuple[str, ...] = ()

    @cached_property
    def comparison_options(self) -> dict:
        """The flags in the comparison's recipe."""
        return read_mapping(Path(self.comparison_recipe), "recipe") if self.comparison_recipe else {}

    @property
    def classifier_flags(self) -> tuple[str, ...]:
        """The flags that name the comparison's first classifier, if its recipe names one."""
        names = self.comparison_options.get("model_name_or_path", [])
        return tuple(["--model_name_or_path", *([names] if isinstance(names, str) else names)][:2] if names else [])

    @property
    def names_file(self) -> Path:
        return self.folder / "names.yaml"

    @property
    def results(self) -> Results:
        places = {name: self.folder / name for name in ("style", "synthetic", "comparison", "model", "quality")}
        return Results(**places)


def recipe_word(path: str | None) -> tuple[str, ...]:
    """Return what a command has of a recipe: its path, or nothing."""
    return () if path is None else (path,)


def with_slash(path: str | None) -> str | None:
    """Return a path in this folder as `./path`: the runner looks at words with a slash for changes."""
    return f"./{path}" if path and Path(path).exists() and len(Path(path).parts) == 1 and path[0] not in "/." else path


def audit(job: Job) -> Step:
    return Step(
        "audit", "damaged images, copies, leaks between splits, and class names that may mislead the generator",
        job.names_file,
        ("train_bridged.py", "--dataset_name", job.images, "--audit", "--write_class_names", str(job.names_file)),
        is_launched=False, from_scratch=(),
    )  # fmt: skip


def learn_style(job: Job) -> Step:
    style = job.results.style
    return Step(
        "style token", "the style of the training images becomes one token", style / DSI_CONFIG,
        ("train_dsi.py", *recipe_word(job.dsi_recipe), "--dataset_name", job.images, "--class_names_file",
         str(job.names_file), "--output_dir", str(style), *RESUME),
    )  # fmt: skip


def draw_set(job: Job) -> Step:
    images, number = job.results.synthetic, job.num_images_per_class
    there = read_record(images / GENERATION_CONFIG) if (images / GENERATION_CONFIG).exists() else {}
    if there.get("num_images_per_class", 0) > number:
        number = there["num_images_per_class"]
        print(f"{images}: has {number:,} images per class; a set can only grow, so all of them are used.")
    return Step(
        "synthetic set", f"{number:,} images of each class in that style", images / RUN_CONFIG,
        ("generate_synthetic.py", *recipe_word(job.synthesis_recipe), "--learned_embeds", str(job.results.style),
         "--num_images_per_class", str(number), "--output_dir", str(images)),
    )  # fmt: skip


def judge_set(job: Job) -> list[Step]:
    """Return the scores and the quality report of the synthetic set; both are repeated when it changes."""
    images, quality = job.results.synthetic, job.results.quality
    return [  # the scores first, as they are in the set's folder, which the report reads
        Step(
            "scores", f"which synthetic images do not show their class? {job.drop_share:.0%} of them are left out",
            images / SCORES,
            ("filter_synthetic.py", "--synthetic_dataset", str(images), *job.classifier_flags, "--drop_share",
             str(job.drop_share)),
            is_launched=False, from_scratch=(), also_reads=(images / GENERATION_CONFIG,),
        ),
        Step(
            "quality report", "how similar are the synthetic images to the real ones?", quality / "quality.json",
            ("quality_report.py", "--synthetic_dataset", str(images), *job.classifier_flags, "--output_dir",
             str(quality)),
            is_launched=False, from_scratch=(),
        ),
    ]  # fmt: skip


def compare(job: Job, num_folds: int | None) -> Step:
    """Return the comparison; flags that its recipe has are left to it."""
    own = job.comparison_options
    flags = [] if "methods" in own else ["--methods", *COMPARED]
    if num_folds and not own.keys() & {"num_folds", "num_shots"}:
        flags += ["--num_folds", str(num_folds), "--num_repeats", str(NUM_REPEATS)]
    return Step(
        "comparison", "which method is best, with synthetic images or without?", job.results.comparison / COMPARISON,
        ("compare_transfer.py", *recipe_word(job.comparison_recipe), "--synthetic_dataset", str(job.results.synthetic),
         *flags, "--output_dir", str(job.results.comparison), *job.config_flags),
        is_launched=False, from_scratch=(),
    )  # fmt: skip


def train_recommended(job: Job) -> Step:
    """Return the training of the classifier that the finished comparison recommends."""
    answer = read_answer(job.results.comparison)
    flags = training_flags(job.results.comparison, answer)
    uses_synthetic = METHODS[answer.method.partition("@")[0]].uses_synthetic
    images = ("--synthetic_dataset", str(job.results.synthetic)) if uses_synthetic else ("--dataset_name", job.images)
    return Step(
        "classifier", f"{answer.method}, as the comparison trained it", job.results.model / ALL_RESULTS,
        ("train_bridged.py", *images, *flags, "--output_dir", str(job.results.model), "--overwrite_output_dir"),
    )  # fmt: skip


def choose_num_folds(real: RealImages) -> int | None:
    """Return the number of folds of the comparison; None if the images have test images of their own, or are many."""
    if not real.parts["test"].is_carved:
        return None
    counts = sum(np.bincount(getattr(real, part)["label"], minlength=len(real.class_names)) for part in PARTS)
    num_folds = min(NUM_FOLDS, int(counts.min()))
    return num_folds if np.median(counts) < FEW and num_folds > 1 else None


def check_names(job: Job, class_names: list[str]) -> None:
    """Stop once for each class whose noun is doubtful; later, say which of these were left as they are.

    Raises:
        UserError: there are some that no earlier run has stopped for.
    """
    chosen = read_class_names(str(job.names_file))
    nouns = [chosen.get(name) or propose_noun(name) for name in class_names]  # a class may be new
    findings = diagnose(class_names, nouns)
    doubtful = sorted({finding.class_name for finding in findings if finding.is_warning})
    seen_file = job.folder / "names_seen.json"
    seen = read_record(seen_file)["class_names"] if seen_file.exists() else []
    if set(doubtful) - set(seen):
        write_record(seen_file, {"class_names": sorted({*seen, *doubtful})})
        raise UserError(
            f"{job.names_file}: doubtful nouns for {list_names(doubtful)}; edit them there, then run the same command "
            "again. Nouns that stay are used as they are."
        )
    if doubtful:
        print(f"{job.names_file}: doubtful nouns of {list_names(doubtful)} are used as they are.")


def check_comparable(images: str, real: RealImages, num_folds: int | None) -> None:
    """Check that there are images to test on, before hours of training.

    Raises:
        UserError: there are none.
    """
    if num_folds is None and not len(real.test):
        raise UserError(
            f"--images {images}: {len(real.train):,} images of {len(real.class_names)} classes leave none to test on; "
            "add some: two per class at least, twenty to learn something."
        )


def call_dry_run(module: str, flags: Sequence[str]) -> dict:
    return importlib.import_module(module).main([*flags, "--dry_run"])


def forecast(job: Job, real: RealImages, num_folds: int | None) -> list[tuple[str, float | None, float | None]]:
    """Return each step's name, hours and GiB on one process, measured by the scripts' dry runs; unknown ones are None.

    The comparison is likely less: its runs share their first stages.
    """
    from train_dsi import ModelArguments

    base = read_mapping(Path(job.dsi_recipe), "recipe") if job.dsi_recipe else {}
    own = {key: value if isinstance(value, list) else [value] for key, value in job.comparison_options.items()}
    generator = base.get("pretrained_model_name_or_path", ModelArguments.pretrained_model_name_or_path)
    num_drawn = job.num_images_per_class * len(real.class_names)
    bridge_steps = 5 * steps_per_epoch(num_drawn, StageSettings.per_device_train_batch_size)  # as in the comparison
    steps = ("--max_steps", str(max(own["step_counts"]))) if "step_counts" in own else ()
    dry_runs = {
        "train_dsi": [*recipe_word(job.dsi_recipe), "--dataset_name", job.images],
        "generate_synthetic": [
            *recipe_word(job.synthesis_recipe), "--dataset_name", job.images,
            "--pretrained_model_name_or_path", generator, "--num_images_per_class", str(job.num_images_per_class),
        ],
        "train_bridged": [
            "--dataset_name", job.images, "--method", "vanilla_matched", "--bridge_max_steps",
            str(max(own.get("bridge_step_counts", [bridge_steps]))), *steps, *job.classifier_flags,
        ],
    }  # fmt: skip
    needs = {}
    for module, flags in dry_runs.items():
        command = shlex.join(["python", f"{module}.py", *flags, "--dry_run"])
        print(f"\n\033[1m{module}\033[0m\n  $ {command}", flush=True)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # each with a fresh accelerate
            needs[module] = pool.submit(call_dry_run, module, flags).result()
    num_folds = own.get("num_folds", [None if "num_shots" in own else num_folds])[0]
    num_draws = num_folds * own.get("num_repeats", [NUM_REPEATS])[0] if num_folds else len(own.get("seeds", [0, 1, 2]))
    num_rows = math.prod(len(own.get(name, [None])) for name in ("num_shots", "volumes", "model_name_or_path"))
    num_runs = len(own.get("methods", COMPARED)) * num_draws * num_rows
    token, drawn, trained = needs.values()

    def gib(num_bytes: int | None) -> float | None:
        return None if num_bytes is None else num_bytes / GIB

    hours = trained["hours"]
    return [
        ("style token", token["hours"], gib(token["disk_bytes"])),
        ("synthetic set", drawn["seconds"] / 3600, drawn["disk_gib"]),
        (f"comparison, {num_runs} runs", hours and num_runs * hours, gib(trained["disk_bytes"])),
        ("classifier", hours, None),
    ]


def print_plan(steps: list[tuple[str, float | None, float | None]]) -> dict:
    """Print the hours and disk space of the steps, and return their sums."""
    table = Table("step", "time", "disk, GiB", title="from photos to an answer, on this machine")
    for name, hours, gib in steps:
        table.add_row(name, "unknown" if hours is None else describe_hours(hours), "" if gib is None else f"{gib:.2f}")
    hours, gib = (sum(step[place] or 0 for step in steps) for place in (1, 2))
    table.add_row("all", describe_hours(hours), f"{gib:.2f}")
    print()
    print_table(table, Console())
    print("The audit, the quality report and the scores take minutes more. Nothing was written.")
    return {"hours": hours, "disk_gib": gib}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder with a subfolder per class, or a dataset id on the Hub")
    parser.add_argument("--num_images_per_class", type=int, default=200, help="synthetic images per class")
    parser.add_argument(
        "--drop_share", type=float, default=0.0, help="share of each class that is left out as its worst"
    )
    parser.add_argument("--dsi_recipe", help="file with more flags of train_dsi.py")
    parser.add_argument("--synthesis_recipe", help="file with more flags of generate_synthetic.py")
    parser.add_argument("--comparison_recipe", help="file with more flags of compare_transfer.py")
    parser.add_argument("--dry_run", action="store_true", help="print hours and disk space, write nothing")
    parser.add_argument("--config_file", help="accelerate configuration (default: accelerate's own)")
    parser.add_argument("--output_dir", type=Path, help="folder for everything (default: bridged/<name of the images>)")
    args = parser.parse_args(argv)
    if args.num_images_per_class < 1:
        parser.error(f"--num_images_per_class {args.num_images_per_class}: must be above 0")
    if not 0 <= args.drop_share < 1:
        parser.error(f"--drop_share {args.drop_share:g}: must be in [0, 1)")
    return args


def main(argv: Sequence[str] | None = None) -> dict | str:
    """Print the plan, or run it and return the answer."""
    args = parse_arguments(argv)
    images, name = with_slash(args.images), Path(args.images).resolve().name
    folder = args.output_dir or Path("bridged") / name
    launch, config_flags = (), ()
    if args.config_file:
        config = read_mapping(Path(args.config_file), "configuration of accelerate")
        launch, config_flags = ("--config_file", args.config_file), flags_from_config(config)
    recipes = [with_slash(path) for path in (args.dsi_recipe, args.synthesis_recipe, args.comparison_recipe)]
    for path in filter(None, recipes):
        read_mapping(Path(path), "recipe")  # now, not when its step begins
    job = Job(images, folder, args.num_images_per_class, args.drop_share, *recipes, config_flags)
    from utils.data.real_images import load_real_images  # takes seconds

    record = RealImagesRecord(dataset_name=images)
    real = load_real_images(record)
    num_folds = choose_num_folds(real)
    check_comparable(args.images, real, num_folds)
    if args.dry_run:
        return print_plan(forecast(job, real, num_folds))

    runner = StepRunner(ROOT, folder, launch)
    checked = audit(job)
    if (before := runner.costs.get(checked.name)) and before["command"] != checked.text:
        raise UserError(
            f"--images {args.images}: {folder} is of other images ({before['command']}); choose another folder with "
            "--output_dir (make bridge: OUTPUT=)."
        )
    if runner.run(checked):
        print(runner.read_log(checked))
    check_names(job, real.class_names)
    runner.run(learn_style(job))
    for step in (draw_set(job), *judge_set(job)):
        runner.run(step)
    runner.run(compare(job, num_folds), show=True)
    runner.run(train_recommended(job))
    command = shlex.join(["python", "-m", "recipes.bridge", *(sys.argv[1:] if argv is None else argv)])
    logs = {
        "What the audit found": runner.read_log(checked),
        "Nouns in prompts": job.names_file.read_text(encoding="utf-8"),
    }
    answer = write_report(folder / "report.html", f"Bridged transfer: {name}", job.results, runner, command, logs)
    print(f"\n\033[1m{answer.sentence}\033[0m\n{folder / 'report.html'}: this answer with pictures and costs")
    return answer.sentence


if __name__ == "__main__":
    try:
        run_script(main)
    except RuntimeError as error:
        sys.exit(f"bridge: {error}")
