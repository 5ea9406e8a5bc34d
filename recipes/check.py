"""Checks that the recipes' datasets on the Hub match the recipes: `make check-recipes`; `RECIPE=cars` checks one.

Reads the card, the features and the parquet footers of each dataset at the recipe's commit, but no image. The exit
status is 0 if all datasets agree, 1 if one differs, and 2 if none differs but something could not be checked, for
example without a network.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import datasets
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image, load_dataset_builder
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi, HfFileSystem, constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recipes.plan import read_class_names, read_recipe, read_sets
from utils.cli.errors import UserError, run_script
from utils.cli.tables import print_table
from utils.data.class_names import match_labels
from utils.hub.cards import UNKNOWN, license_in_card
from utils.hub.repositories import Source, open_source
from utils.hub.targets import pause_after

NUM_THREADS = 16  # mostly waiting for the Hub
HUGGINGFACE = b"huggingface"  # the key of a schema's metadata with the features
SET_ERRORS = (RepositoryNotFoundError, RevisionNotFoundError, DatasetsError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Expected:
    """What the recipes say about a dataset; `license` is the id in its card."""

    dataset_name: str
    config_name: str | None
    revision: str | None
    image_column: str
    label_column: str
    class_names: list[str]
    num_images: dict[str, int]
    license: str


@dataclass(frozen=True)
class Found:
    """What is on the Hub: the features in the card and in each parquet file, and the images per split in both."""

    id: str
    license: str
    card_features: Features | None
    card_num_images: dict[str, int]
    file_features: dict[str, Features]
    describing_files: set[str]  # files that contain their features
    num_images: dict[str, int | None]  # None if the files are not parquet


@dataclass
class Report:
    """The result for a dataset: differences from its recipe, what could not be checked, and notes."""

    dataset_name: str
    commit: str | None = None
    differences: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_expected(name: str) -> Expected:
    """Return what the recipes say about the dataset `name`."""
    facts, recipe = read_sets()[name], read_recipe(f"{name}/dsi")
    return Expected(
        recipe["dataset_name"], recipe.get("dataset_config_name"), recipe.get("dataset_revision"),
        recipe["image_column_name"], recipe["label_column_name"], list(read_class_names(name)), facts["num_images"],
        facts.get("card_license", UNKNOWN),
    )  # fmt: skip


def check_set(name: str) -> Report:
    """Compare a dataset on the Hub with its recipes."""
    expected = read_expected(name)
    report = Report(expected.dataset_name)
    source = Source(expected.dataset_name, "dataset_name", "dataset", expected.revision)
    try:
        if not source.is_reachable():
            report.unseen.append(f"everything, as the Hub ({constants.ENDPOINT}) cannot be reached")
            return report
        source = open_source(source.name, source.flag, source.repo_type, source.revision)
        source.check_access()  # for a gated dataset, datasets says that there is none
        report.commit = source.revision
        newest = open_source(source.name, source.flag, source.repo_type).revision
        found = read_found(source, expected.config_name)
    except UserError as error:
        problem = " ".join(str(error).split())
        (report.differences if _is_set_at_fault(error.__context__) else report.unseen).append(problem)
        return report
    if expected.revision is None:
        report.notes.append("the recipe names no commit")
    elif newest != expected.revision:
        report.notes.append(f"the newest commit is {newest}")
    compare(expected, found, report, f"recipes/{name}/class_names.yaml:")
    return report


def _is_set_at_fault(cause: BaseException | None) -> bool:
    """Return whether a failure is the dataset's own, and not of a Hub that is busy, unreachable or needs a login."""
    is_closed = isinstance(cause, (GatedRepoError, LocalEntryNotFoundError))
    return isinstance(cause, SET_ERRORS) and not is_closed and pause_after(cause, 1) is None


def read_found(source: Source, config_name: str | None) -> Found:
    """Return what the Hub has of a dataset at a commit.

    Raises:
        UserError: it cannot be read.
    """
    filesystem = HfFileSystem(token=source.token)

    def read_footer(path: str) -> tuple[Features, bool, int]:
        with filesystem.open(path) as file, pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            has_features = HUGGINGFACE in (schema.metadata or {})
            return Features.from_arrow_schema(schema), has_features, parquet.metadata.num_rows

    with source.reading("cannot be loaded", also=(DatasetsError, ValueError, RuntimeError)):
        info = HfApi().dataset_info(source.name, revision=source.revision, token=source.token)
        builder = load_dataset_builder(source.name, config_name, revision=source.revision, token=source.token)
        if builder.config.data_files is None:  # datasets fell back to its cache
            raise UserError(f"{source.flag} {source.name}: the Hub failed while it was read; try again later.")
        files = {str(split): list(map(str, paths)) for split, paths in builder.config.data_files.items()}
        every_file = [path for paths in files.values() for path in paths if path.endswith(".parquet")]
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            footers = dict(zip(every_file, threads.map(read_footer, every_file)))
    num_images = {
        split: sum(footers[path][2] for path in paths) if all(path in footers for path in paths) else None
        for split, paths in files.items()
    }
    has_card = source.has_one_of(["README.md"])
    return Found(
        id=info.id,
        license=license_in_card(source).id if has_card else UNKNOWN,
        card_features=builder.info.features,
        # a number missing from the card is 0
        card_num_images={
            name: part.num_examples for name, part in (builder.info.splits or {}).items() if part.num_examples
        },
        file_features={path: features for path, (features, _, _) in footers.items()},
        describing_files={path for path, (_, has_features, _) in footers.items() if has_features},
        num_images=num_images,
    )


def compare(expected: Expected, found: Found, report: Report, names_flag: str) -> None:
    """Add to the report where the Hub differs from the recipes; `names_flag` begins messages on names."""
    if found.id != expected.dataset_name:
        report.differences.append(f"the repository is called {found.id} now")
    if found.license != expected.license:
        report.differences.append(f"the card's license is '{found.license}', not '{expected.license}'")
    compare_splits(expected, found, report)
    described = {"the card": found.card_features} if found.card_features is not None else {}
    described |= {
        PurePosixPath(path).name: features
        for path, features in found.file_features.items()
        # files without features have those of the card
        if path in found.describing_files or found.card_features is None
    }
    if not described:
        report.unseen.append("columns and class names: neither the card nor a parquet file describes them")
    said = set()
    for where, features in described.items():
        problems = find_problems(expected, features, report, names_flag)
        report.differences += [f"{where}: {problem}" for problem in problems if problem not in said]
        said |= set(problems)  # the first of many files is enough


def compare_splits(expected: Expected, found: Found, report: Report) -> None:
    """Add to the report which splits are missing, unknown, or of another size."""
    splits = found.num_images or found.card_num_images
    for split in dict.fromkeys([*expected.num_images, *splits]):
        wanted, of_card = expected.num_images.get(split), found.card_num_images.get(split)
        number = found.num_images.get(split)
        if wanted is None or split not in splits:
            here, there = ("sets.yaml", "the Hub") if wanted is None else ("the Hub", "sets.yaml")
            report.differences.append(f"split '{split}': not in {here}, but in {there}")
            continue
        if number is None and of_card is None:
            report.unseen.append(f"split '{split}': its images are not counted, the files are not parquet")
        if number not in (None, wanted):
            report.differences.append(f"split '{split}': {number:,} images, not {wanted:,}")
        if of_card not in (None, wanted):
            report.differences.append(f"split '{split}': {of_card:,} images by the card, not {wanted:,}")


def find_problems(expected: Expected, features: Features, report: Report, names_flag: str) -> list[str]:
    """Return the problems of columns and class names; a note counts names in another case or order."""
    problems = []
    for column, kind in ((expected.image_column, Image), (expected.label_column, ClassLabel)):
        if column not in features:
            problems.append(f"no column '{column}'; columns are {', '.join(features)}")
        elif not isinstance(features[column], kind):
            problems.append(f"column '{column}' is of type {features[column]}, not {kind.__name__}")
    if problems:
        return problems
    names = features[expected.label_column].names
    try:
        places = match_labels(expected.class_names, names, names_flag, "the recipe")
    except UserError as error:
        return [str(error)]
    respelled = [name for name, place in places.items() if name != names[place]]
    notes = []
    if respelled:
        first = f"'{names[places[respelled[0]]]}' is '{respelled[0]}' in the recipe"
        notes.append(f"{len(respelled)} class names have another spelling: {first}")
    if list(places.values()) != list(range(len(names))):
        notes.append("the classes are in another order than in class_names.yaml")
    report.notes += [note for note in notes if note not in report.notes]
    return []


def print_reports(reports: dict[str, Report]) -> None:
    """Print a row per dataset, and a line with their counts."""
    table = Table("set", "repository, commit", "result", "differs, not seen, to know", title="recipes and the Hub")
    counts = {"agrees": 0, "differs": 0, "not seen": 0}
    for name, report in reports.items():
        result = "differs" if report.differences else "not seen" if report.unseen else "agrees"
        counts[result] += 1
        lines = [
            *report.differences,
            *(f"not seen: {line}" for line in report.unseen),
            *(f"note: {line}" for line in report.notes),
        ]
        place = f"{report.dataset_name}\n{report.commit or '?'}"
        table.add_row(name, Text(place), result, Text("\n".join(lines)))  # Text: brackets in names are not markup
    console = Console()
    print_table(table, console)
    console.print(
        f"{counts['agrees']} of {len(reports)} datasets agree with their recipes, {counts['differs']} differ, "
        f"{counts['not seen']} could not be checked in full.",
        soft_wrap=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Check the datasets, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=list(read_sets()), help="dataset (default: all)")
    args = parser.parse_args(argv)
    datasets.disable_progress_bars()
    names = [args.recipe] if args.recipe else list(read_sets())
    with Console(stderr=True).status(f"reading {len(names)} datasets on the Hub"):
        reports = {name: check_set(name) for name in names}
    print_reports(reports)
    if any(report.differences for report in reports.values()):
        return 1
    return 2 if any(report.unseen for report in reports.values()) else 0


if __name__ == "__main__":
    logging.getLogger("utils").setLevel(logging.ERROR)  # the table lists names that match ignoring case
    run_script(lambda: sys.exit(main()))
