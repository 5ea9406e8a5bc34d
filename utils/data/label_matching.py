"""The labels of another set or classifier, found by the names of the real set's classes."""

import difflib
import re
from collections.abc import Sequence

from utils.cli.errors import UserError
from utils.data.class_names import MAX_LISTED, match_class_names

SIMILARITY = 0.8  # from which on two names are taken for spellings of one


def match_labels(
    names: Sequence[str],
    class_names: Sequence[str],
    flag: str,
    what: str,
    allow_missing: bool = False,
    advice: str = "",
) -> dict[str, int]:
    """Return each of `names`, in its order, with its place in the real set's `class_names`.

    `flag` begins the messages; `what` has the names, as in "the synthetic set"; `advice` ends what is said of missing
    classes.

    Raises:
        UserError: names are not clear; classes are renamed, extra or, unless `allow_missing`, missing.
    """
    matched = match_class_names(names, class_names, flag)
    missing = sorted(set(class_names) - set(matched.values()))
    extra = sorted(set(names) - set(matched))
    renamed = _find_renamed(missing, extra)
    missing = [known for known in missing if known not in renamed and not allow_missing]
    extra = [other for other in extra if other not in renamed.values()]
    found = {
        "renamed": [f"'{known}' is '{other}' in {what}" for known, other in renamed.items()],
        "missing": missing,
        "extra": extra,
    }
    problems = "; ".join(f"{kind}: {join_names(listed)}" for kind, listed in found.items() if listed)
    if problems:
        hint = f"; {advice}" if missing and advice else ""
        raise UserError(f"{flag} its classes are not those of the real set; {problems}{hint}.")
    places = {name: place for place, name in enumerate(class_names)}
    return {name: places[matched[name]] for name in names}


def _find_renamed(missing: list[str], extra: list[str]) -> dict[str, str]:
    """Return missing name -> the extra one that is the same but for case and signs, else much alike."""
    left = {re.sub(r"[\W_]", "", other.casefold()): other for other in extra}
    plain = {known: re.sub(r"[\W_]", "", known.casefold()) for known in missing}
    renamed = {known: left.pop(key) for known, key in plain.items() if key in left}
    for known in [known for known in missing if known not in renamed][:MAX_LISTED]:
        for key in difflib.get_close_matches(plain[known], left, n=1, cutoff=SIMILARITY):
            renamed[known] = left.pop(key)
    return renamed


def join_names(names: Sequence[str]) -> str:
    """Return names as these messages list them: without quotes, the first ten, and how many more there are."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
