"""Images of a synthetic set that are not trained on: rejected by people, or left out by their scores.

Both lie beside the images: `review.json` has the verdicts of reviewers, `scores.parquet` the scores of
filter_synthetic.py. Images are named by their class and `class_index`, so verdicts stay right when a set grows.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from utils.cli.errors import UserError
from utils.cli.records import GENERATION_CONFIG, read_record
from utils.hub.repositories import Source, open_source

REVIEW, SCORES, FILTER_PICTURE = "review.json", "scores.parquet", "filter.png"
ACCEPT, REJECT = "accept", "reject"
SCORES_KEY = b"bridged_transfer"  # of the scores' metadata: JSON with `fingerprint` and how they were made

Key = tuple[str, int]  # class name, class_index


@dataclass(frozen=True)
class LeftOut:
    """The images that are left out, by who did so; some by both."""

    rejected: frozenset[Key] = frozenset()
    filtered: frozenset[Key] = frozenset()

    @cached_property
    def by_class(self) -> dict[str, np.ndarray]:
        """The class_index of all that are left out, by class, sorted."""
        indices: dict[str, list[int]] = {}
        for name, index in sorted(self.rejected | self.filtered):
            indices.setdefault(name, []).append(index)
        return {name: np.array(of_class) for name, of_class in indices.items()}

    def __bool__(self) -> bool:
        return bool(self.rejected or self.filtered)

    def __len__(self) -> int:
        return sum(map(len, self.by_class.values()))

    @property
    def identity(self) -> str:
        """What tells these images from others: their number and a hash of their keys."""
        keys = json.dumps(sorted(self.rejected | self.filtered)).encode()
        return f"without {len(self):,} of them, sha256 {hashlib.sha256(keys).hexdigest()[:16]}"

    def counts(self) -> dict[str, int]:
        """Return how many images are left out by whom, as results hold it; nothing where none are."""
        return {"num_rejected": len(self.rejected), "num_filtered": len(self.filtered)} if self else {}

    def describe(self, name: str) -> str:
        """Return a line about a set of that name."""
        by_whom = [
            f"{len(keys):,} {how}"
            for keys, how in ((self.rejected, f"rejected in {REVIEW}"), (self.filtered, f"by their scores in {SCORES}"))
            if keys
        ]
        both = len(self.rejected & self.filtered)
        by_whom += [f"{both:,} of them both"] if both else []
        return f"{name}: {len(self):,} images are left out ({', '.join(by_whom)}); --use_rejected takes all images."

    def mask(self, class_names: Iterable[str], labels: np.ndarray, class_indices: np.ndarray) -> np.ndarray:
        """Return which images `(n,)` are left out, by their labels and `class_index`."""
        found = np.zeros(len(labels), bool)
        for label, name in enumerate(class_names):
            if name in self.by_class:
                rows = np.flatnonzero(labels == label)
                found[rows] = np.isin(class_indices[rows], self.by_class[name])
        return found


def open_judged_set(name: str | None) -> tuple[Source, dict]:
    """Return the folder and the record of a synthetic set whose images are to be judged.

    Raises:
        UserError: it is not a folder of generate_synthetic.py, or is of an old version.
    """
    flag = "--synthetic_dataset"
    if name is None:
        raise UserError(f"{flag} is missing: a folder of generate_synthetic.py.")
    if not Path(name).is_dir():
        raise UserError(
            f"{flag} {name}: not a folder; download a set with `hf download {name} --repo-type dataset --local-dir "
            "FOLDER`."
        )
    source = open_source(name, flag, "dataset")
    record = read_record(source.file(GENERATION_CONFIG, "a synthetic set of generate_synthetic.py"))
    if not {"fingerprint", "class_names", "real_images"} <= set(record):
        raise UserError(f"{flag} {name}: its {GENERATION_CONFIG} is of an old version; draw the set again.")
    return source, record


def read_left_out(source: Source, fingerprint: str | None) -> LeftOut:
    """Return what is left out of a set, by the files beside it; nothing where there are none.

    `fingerprint` is that of the set's record.

    Raises:
        UserError: a file is about other images, or is none of ours.
    """
    rejected, filtered = frozenset(), frozenset()
    if _is_there(source, REVIEW):
        review = read_record(source.file(REVIEW))
        _check_fingerprint(source, REVIEW, review.get("fingerprint"), fingerprint)
        rejected = list_rejected(review["verdicts"])
    if _is_there(source, SCORES):
        try:
            table = pq.read_table(source.file(SCORES), columns=["class", "class_index", "left_out"])
        except (pa.ArrowInvalid, KeyError) as error:
            raise UserError(
                f"{source.flag} {source.name}: {SCORES} cannot be read ({error}); run filter_synthetic.py again."
            ) from None
        about = json.loads((table.schema.metadata or {}).get(SCORES_KEY, b"{}"))
        _check_fingerprint(source, SCORES, about.get("fingerprint"), fingerprint)
        table = table.filter(table["left_out"])
        filtered = frozenset(zip(table["class"].to_pylist(), table["class_index"].to_pylist()))
    return LeftOut(rejected, filtered)


def _is_there(source: Source, filename: str) -> bool:
    try:
        return source.has_one_of([filename])
    except UserError:
        if source.is_reachable():
            raise
        return False  # else the cache would have it since the set was loaded


def list_rejected(verdicts: Mapping[str, Mapping[str, Mapping[str, dict]]]) -> frozenset[Key]:
    """Return the images that more reviewers rejected than accepted.

    `verdicts` maps class -> class_index (a string, as JSON holds it) -> reviewer -> `{"verdict": ..., "time": ...}`.
    """
    rejected = set()
    for name, of_class in verdicts.items():
        for index, by_reviewer in of_class.items():
            votes = Counter(given["verdict"] for given in by_reviewer.values())
            if votes[REJECT] > votes[ACCEPT]:
                rejected.add((name, int(index)))
    return frozenset(rejected)


def _check_fingerprint(source: Source, filename: str, about: str | None, fingerprint: str | None) -> None:
    if fingerprint is None or about != fingerprint:
        raise UserError(
            f"{source.flag} {source.name}: {filename} is about other images, of a set with other settings; remove it, "
            "or give --use_rejected."
        )
