"""Cross-validation in a comparison: how seeds and folds combine, and how the protocol is described."""

from collections.abc import Mapping
from itertools import product

from utils.cli.errors import UserError
from utils.comparison.arguments import SEARCHED
from utils.comparison.cells import CellRunner
from utils.comparison.grid import shots_title
from utils.data.real_images import is_same_image_set
from utils.transfer.synthetic_images import count_leaked_images, describe_seeing

PLACEHOLDER = "{fold}"


def check_fold_values(values: Mapping[str, object]) -> None:
    """Check the flags that concern folds, given as flag -> value.

    Raises:
        UserError: synthetic sets per fold without folds, or a search with folds.
    """
    if values["num_folds"] is None:
        if with_fold := [path for path in values["synthetic_dataset"] if PLACEHOLDER in path]:
            raise UserError(f"--synthetic_dataset {with_fold[0]}: '{PLACEHOLDER}' needs --num_folds.")
        return
    searched = ["search_learning_rate"] if values["search_learning_rate"] else []
    searched += [name for name in SEARCHED if len(values[name] or []) > 1]
    if searched:
        raise UserError(
            f"--{searched[0]}: needs validation images, but --num_folds {values['num_folds']} leaves none; "
            "give one value per flag, or --settings."
        )


def choose_seeds(seeds: list[int], num_repeats: int, given: set[str]) -> list[int]:
    """Return one seed per repeat; `given` are the names of the flags on the command line.

    Raises:
        UserError: the numbers of seeds and repeats differ.
    """
    if "seeds" not in given:
        return list(range(num_repeats))
    if "num_repeats" in given and len(seeds) != num_repeats:
        raise UserError(
            f"--num_repeats {num_repeats}: --seeds must have one value per repeat, has {len(seeds)}; leave out one of "
            "the two flags."
        )
    return seeds


def list_test_indices(runner: CellRunner, seeds: list[int]) -> list:
    """Return the indices into `real.train` that are tested, by seed and then by fold."""
    return [runner.folds.split(fold, seed)[1] for seed, fold in product(seeds, runner.folds.names)]


def describe_protocol(runner: CellRunner, seeds: list[int], shots: list[int | None], settings: str | None) -> list[str]:
    """Return sentences on which images were trained and tested on, and which of them the style tokens had seen."""
    num_images, num_folds = len(runner.real.train), runner.folds.num_folds
    trained = sorted({num_images - len(tested) for tested in list_test_indices(runner, seeds)})
    repeats = "" if len(seeds) == 1 else f" x {len(seeds)} repeats"
    times = {1: "once", 2: "twice"}.get(len(seeds), f"{len(seeds)} times")
    numbers = " to ".join(f"{number:,}" for number in dict.fromkeys([trained[0], trained[-1]]))
    few = "" if shots == [None] else ", of which the shots are drawn"
    recipes = "Recipes are given, the same in every fold, and not searched on these images"
    if settings is not None:
        recipes = (
            f"Recipes are from {settings}, the same in every fold; if chosen on some of these images, they favour them"
        )
    return [
        f"{num_folds} folds{repeats} over {num_images:,} images: every image is tested {times}, by models that have "
        f"trained on other folds only ({numbers} images{few}). A repeat's seed draws its folds, shots and training.",
        f"{recipes}.",
        *_describe_leaks(runner, shots[0]),
    ]


def _describe_leaks(runner: CellRunner, num_shots: int | None) -> list[str]:
    """Return a sentence for each set whose style token saw test images, or images beyond the fewest shots."""
    rows, record = runner.real.train_indices, runner.real.record
    seen, tested, beyond, seeing = {}, {}, {}, {}
    for (name, seed, fold), source in runner.sources.items():
        recorded = source.record["real_images"]
        if not recorded or not is_same_image_set(recorded, record.dataset_name, record.train_dir):
            continue
        saw = describe_seeing(source.record, name)
        seeing[name] = saw[0].upper() + saw[1:]
        trained_here, tested_here = runner.folds.split(fold, seed)
        num_elsewhere = count_leaked_images(source.record, rows)
        num_seen = count_leaked_images(source.record, rows[trained_here]) - num_elsewhere
        shots = rows[runner.few_shot_rows(num_shots, seed, fold)]
        seen[name] = seen.get(name, 0) + num_seen
        tested[name] = tested.get(name, 0) + len(tested_here)
        beyond[name] = max(beyond.get(name, 0), count_leaked_images(source.record, shots) - num_seen)
    sentences = []
    for name in seen:
        if seen[name]:
            number = "all" if seen[name] == tested[name] else f"{seen[name]:,} of the {tested[name]:,}"
            sentences.append(
                f"{seeing[name]} {number} test images of the models that use its images: their "
                "gains may be too high; --token_per_fold learns one token per fold."
            )
        if beyond[name]:
            sentences.append(
                f"{seeing[name]} up to {beyond[name]:,} real images that the runs with "
                f"{shots_title(num_shots)} do not train on: vanilla has seen fewer images."
            )
    return sentences
