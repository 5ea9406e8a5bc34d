"""The classifiers of a comparison: their labels in its tables, and their revisions. No torch."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from utils.cli.errors import UserError


@dataclass(frozen=True)
class Classifier:
    """A pretrained classifier as it was `given`; `label` is short and unique among those compared."""

    label: str
    given: str
    name: str
    revision: str | None


def parse_classifiers(values: list[str], revision: str | None = None) -> list[Classifier]:
    """Return the classifiers for values like `user/name`, `user/name@revision` or a folder; `revision` applies to all.

    A label is the last part of the path, with the revision, or the whole value if two labels would be equal.

    Raises:
        UserError: a classifier has two revisions.
    """
    parsed = []
    for value in values:
        name, _, own = (value, "", "") if Path(value).is_dir() else value.partition("@")
        if own and revision:
            raise UserError(f"--model_revision {revision}: {value} names a revision too; leave one of them out.")
        label = (Path(name).name or name) + (f"@{own}" if own else "")
        parsed.append(Classifier(label, value, name, own or revision))
    count = Counter(classifier.label for classifier in parsed)
    return [
        classifier if count[classifier.label] == 1 else Classifier(value, value, classifier.name, classifier.revision)
        for value, classifier in zip(values, parsed)
    ]
