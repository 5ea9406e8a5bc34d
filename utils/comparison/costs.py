"""What synthetic images cost before a classifier is trained: seconds of generator and style token, from records."""

import hashlib
from collections.abc import Iterable

from utils.cli.errors import UserError
from utils.cli.records import RUN_CONFIG, read_record
from utils.comparison.grid import Row
from utils.comparison.statistics import summarise
from utils.hub.repositories import Source
from utils.style.families import LEARNED_EMBEDS
from utils.transfer.synthetic_images import FLAG, SyntheticSource, num_images

GENERATOR, STYLE_TOKEN = "generator_seconds", "style_token_seconds"  # in a summary


def summarise_all(
    results: dict[str, dict], correct: dict[str, dict], baseline: Row | None, **preparation
) -> list[dict]:
    """Return the entries of all classifiers with all costs, and with the classifier's label if there are several.

    `correct` maps each classifier to what `stack_correct` returns for its results.
    """
    summary = []
    for label, of_one in results.items():
        entries = summarise(of_one, baseline, correct[label])
        add_preparation(entries, of_one, **preparation)
        summary += [{"classifier": label, **entry} for entry in entries] if len(results) > 1 else entries
    return summary


def add_preparation(
    summary: list[dict], rows: Iterable[Row], sources: dict[tuple, SyntheticSource], seeds: list[int],
    token: str | None = None,
) -> None:  # fmt: skip
    """Add the seconds that making the synthetic images took, averaged over the seeds' sets, to methods that use them.

    A smaller volume takes its share of the generator's seconds. None means that no record says; without a style token
    there is no entry for it. `token` is an access token for the Hub.
    """
    known = {(source.name, source.revision): source for source in sources.values()}
    measured = {key: _seconds_of(source, token) for key, source in known.items()}
    for row in rows:
        if not row.method.uses_synthetic:
            continue
        sets = {
            (source.name, source.revision): source
            for (name, seed, *_), source in sources.items()
            if name == row.synthetic and seed in seeds
        }
        costs = {GENERATOR: [_share(measured[key][GENERATOR], known[key], row.volume) for key in sets]}
        costs[STYLE_TOKEN] = [measured[key][STYLE_TOKEN] for key in sets if STYLE_TOKEN in measured[key]]
        means = {
            name: None if None in values else sum(values) / len(values) for name, values in costs.items() if values
        }
        for entry in summary:
            if (entry["method"], entry["volume"]) == (row.label, row.volume):
                entry.update(means)


def describe_sharing(summary: list[dict]) -> str | None:
    """Return a sentence on which methods share the generator's seconds, or None if no two methods do."""
    methods = {entry["method"] for entry in summary if GENERATOR in entry}
    sets = {method.partition("@")[2] for method in methods}
    if len(methods) == len(sets):
        return None
    shared_by = "all methods with synthetic images" if len(sets) == 1 else "all methods with the same synthetic images"
    what = "generator and style token" if any(STYLE_TOKEN in entry for entry in summary) else "the generator"
    return f"The seconds of {what} are spent once and shared by {shared_by}."


def _share(seconds: float | None, source: SyntheticSource, volume: int | None) -> float | None:
    num_all, num_used = num_images(source), num_images(source, volume)
    return seconds if seconds is None or volume is None or not num_all else seconds * num_used / num_all


def _seconds_of(source: SyntheticSource, token: str | None) -> dict[str, float | None]:
    """Return the generator's seconds for a whole set, and the style token's if the set has one."""
    run, num_all = _read_run(Source(source.name, FLAG, "dataset", source.revision, token)) or {}, num_images(source)
    seconds, num_drawn = run.get("seconds"), run.get("num_drawn", num_all)
    if seconds is not None and num_drawn != num_all:  # the last run drew what was missing
        seconds = seconds * num_all / num_drawn if num_drawn else None
    style = source.record.get("token")
    return {GENERATOR: seconds} | ({STYLE_TOKEN: _style_seconds(style, token)} if style else {})


def _style_seconds(style: dict, token: str | None) -> float | None:
    """Return the seconds of a style token's training, or None if its folder now holds another token."""
    repository = Source(style["id"], "--learned_embeds", revision=style.get("revision"), token=token)
    run = _read_run(repository)
    return run["seconds"] if run and _sha256(repository) == style["sha256"] else None


def _sha256(repository: Source) -> str | None:
    try:
        return hashlib.sha256(repository.file(LEARNED_EMBEDS).read_bytes()).hexdigest()
    except UserError:
        return None


def _read_run(repository: Source) -> dict | None:
    try:
        return read_record(repository.file(RUN_CONFIG)) if repository.has_one_of([RUN_CONFIG]) else None
    except UserError:  # a comparison can do without it
        return None
