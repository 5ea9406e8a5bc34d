"""A style token and a synthetic set for each fold, made from the fold's training part only."""

import os
from dataclasses import fields
from itertools import product
from pathlib import Path

from utils.cli.errors import UserError
from utils.cli.options import INPUTS
from utils.cli.records import DSI_CONFIG, RUN_CONFIG
from utils.cli.step_runner import Step, StepRunner
from utils.comparison.folds import PLACEHOLDER
from utils.data.arguments import RealDataArguments, check_real_images_given
from utils.data.image_set import RealImagesRecord
from utils.data.real_images import load_for_folds

SCRIPTS = Path(__file__).parents[2]


def check_fold_sets(sets: dict[str, str], seeds: list[int], real_args: RealDataArguments) -> None:
    """Check what `--token_per_fold` needs.

    Raises:
        UserError: no path has a place for the fold, folds or repeats would share a path, or real images are missing.
    """
    if not any(PLACEHOLDER in path for path in sets.values()):
        raise UserError(
            f"--token_per_fold: makes the synthetic sets whose --synthetic_dataset path contains '{PLACEHOLDER}', but "
            f"none does; give for example --synthetic_dataset 'syn-{PLACEHOLDER}'."
        )
    for path in sets.values():
        if PLACEHOLDER in path and len(seeds) > 1 and "{seed}" not in path:
            raise UserError(f"--synthetic_dataset {path}: each repeat has its own folds; must contain '{{seed}}' too.")
    check_real_images_given(real_args)


def list_steps(
    sets: dict[str, str], seeds: list[int], num_folds: int, real_args: RealDataArguments, dsi_recipe: str | None,
    synthesis_recipe: str | None,
) -> list[Step]:  # fmt: skip
    """Return the commands that make the sets, in order; the token of `<set>` is in `<set>-style`."""
    flags = []
    for field in fields(real_args):
        value = getattr(real_args, field.name)
        if field.init and value != field.default:
            value = os.path.abspath(value) if field.name in INPUTS and os.path.isdir(value) else value
            flags += [f"--{field.name}", str(value).lower() if isinstance(value, bool) else str(value)]
    learn = [str(SCRIPTS / "train_dsi.py"), *([dsi_recipe] if dsi_recipe else []), *flags]
    draw = [str(SCRIPTS / "generate_synthetic.py"), *([synthesis_recipe] if synthesis_recipe else [])]
    steps = []
    paths = {name: path for name, path in sets.items() if PLACEHOLDER in path}
    for seed, number, (name, path) in product(seeds, range(1, num_folds + 1), paths.items()):
        images = path.replace("{seed}", str(seed)).replace(PLACEHOLDER, str(number))
        style, which = f"{images}-style", f"{name}, seed {seed}, fold {number} of {num_folds}"
        steps.append(
            Step(
                f"style token {which}", "one token of the fold's training part", Path(style).absolute() / DSI_CONFIG,
                (*learn, "--fold", f"{number}/{num_folds}", "--fold_seed", str(seed), "--seed", str(seed),
                 "--output_dir", style, "--resume_from_checkpoint", "latest"),
            )
        )  # fmt: skip
        steps.append(
            Step(
                f"synthetic set {which}", "images in that style", Path(images).absolute() / RUN_CONFIG,
                (*draw, "--learned_embeds", style, "--seed", str(seed), "--output_dir", images),
            )
        )  # fmt: skip
    return steps


def make_fold_sets(steps: list[Step], output_dir: Path, token: str | None) -> None:
    """Run the steps that are not done yet, one after another; logs are in `output_dir`.

    Raises:
        UserError: a step failed.
    """
    environment = {"HF_TOKEN": token} if token else {}
    runner = StepRunner(Path.cwd(), output_dir / "fold_sets", environment=environment)
    for step in steps:
        try:
            runner.run(step)
        except RuntimeError as error:
            failed = str(error).partition(";")[0]
            raise UserError(f"--token_per_fold: {failed}; run the same command again to resume.") from None


def check_folds(real_args: RealDataArguments, num_folds: int, token: str | None) -> None:
    """Check that the real images can be divided into folds, without reading them.

    Raises:
        UserError: what `load_for_folds` raises.
    """
    load_for_folds(RealImagesRecord.from_arguments(real_args), num_folds, token)
