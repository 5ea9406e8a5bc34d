"""Turns class names into nouns for prompts. No torch."""

import difflib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from utils.cli.errors import UserError
from utils.cli.parsing import read_entries, read_text, suggestion
from utils.cli.processes import warn_once

# '001.Black_footed_Albatross', '3_dog', '12 - dog', '00-dog', 'n02085620-Chihuahua'; but not '18-wheeler', '737-200'
NUMBERING = re.compile(r"(?:n\d{8}[-_ ]+|\d+(?:\s*[._)]+\s*|\s+-\s+)|0\d*[- ]+)(?=[^\W\d_])")
# three letters are a word, as in 'boeing737' and '18wheeler'; fewer are a type, as in 'A320', 'ak47', '500ml'
GLUED_DIGITS = re.compile(r"(?<=[A-Za-z]{2}[a-z])(?=\d)|(?<=\d)(?=[A-Za-z][a-z]{2})")
MAX_LISTED = 10
SIMILARITY = 0.8  # two names this similar are taken for spellings of one


def propose_noun(class_name: str) -> str:
    """Return a noun made from a class name: without a leading number, in separate words.

    If nothing would be left, it is the class name itself.
    """
    text = separate_digits(drop_numbering(class_name).replace("_", " "))
    return split_camel_case(" ".join(text.split())) or class_name


def drop_numbering(class_name: str) -> str:
    """Return '001.Black_footed_Albatross' as 'Black_footed_Albatross'."""
    match = NUMBERING.match(class_name.lstrip())
    return class_name.lstrip()[match.end() :] if match else class_name


def separate_digits(text: str) -> str:
    """Return 'boeing737' as 'boeing 737'; short types such as 'A320' stay whole."""
    return GLUED_DIGITS.sub(" ", text)


def split_camel_case(text: str) -> str:
    """Return 'AnnualCrop' as 'annual crop' and 'TVStand' as 'TV stand', word by word."""
    return " ".join(_split_word(word) for word in text.split(" "))


def _split_word(word: str) -> str:
    """Split one word, unless a part is too short to be a word: 'iPhone', 'McLaren', 'WiFi', 'DeLorean'."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", word)
    is_split = (
        len(parts) > 1
        and "".join(parts) == word
        and all(len(part) > 2 or len(part) == 2 and part.isupper() for part in (parts[0], parts[-1]))
        and parts[0] != "Mac"
    )
    return " ".join(part if part.isupper() else part.lower() for part in parts) if is_split else word


def prompt_nouns(class_names: list[str], corrections: dict[str, str] | None = None) -> list[str]:
    """Return the nouns of classes in prompts: from `corrections`, or else by `propose_noun`.

    Raises:
        UserError: two classes would get the same noun, ignoring case as text encoders do.
    """
    corrections = corrections or {}
    nouns = [" ".join(corrections[name].split()) if name in corrections else propose_noun(name) for name in class_names]
    alike = group_names(class_names, map(str.casefold, nouns))
    for noun in nouns:
        names = alike[noun.casefold()]
        if len(names) > 1:
            raise UserError(
                f"classes {', '.join(repr(name) for name in names)}: all are '{noun}' in a prompt; rename them, or "
                "give each its own noun with --class_names_file."
            )
    return nouns


def match_class_names(
    names: Sequence[str], class_names: Sequence[str], flag: str, is_unique: bool = True
) -> dict[str, str]:
    """Return name -> its class in `class_names`, without names that match none.

    A match is the same name, or else the only one equal by `fold_class_name`; a warning counts the latter. Messages
    begin with `flag`. Unless `is_unique`, several of `names` may match one class.

    Raises:
        UserError: a name is not exactly a class name, and several are equal by `fold_class_name`.
    """
    spellings: dict[str, tuple[list[str], list[str]]] = {}
    for side, of_side in enumerate((names, class_names)):
        for name in dict.fromkeys(of_side):
            spellings.setdefault(fold_class_name(name), ([], []))[side].append(name)
    matched, folded = {}, {}
    for ours, theirs in spellings.values():
        matched |= {name: name for name in ours if name in theirs}
        left = [name for name in ours if name not in theirs]
        if left and theirs:
            if len(theirs) > 1 or (is_unique and len(ours) > 1):
                same = list_names(list(dict.fromkeys([*ours, *theirs])))
                raise UserError(
                    f"{flag} {list_names(left)}: ambiguous, as {same} differ only in case, spaces or Unicode form; "
                    "write the class name exactly."
                )
            folded |= dict.fromkeys(left, theirs[0])
    if folded:
        name, class_name = next(iter(folded.items()))
        number = "1 class name" if len(folded) == 1 else f"{len(folded)} class names"
        warn_once(f"{flag} {number} matched ignoring case, spaces and Unicode form: '{name}' is '{class_name}'.")
    return matched | folded


def fold_class_name(name: str) -> str:
    """Return a class name without case, in one Unicode form and with single spaces, to compare spellings.

    Underscores and hyphens stay: '737-200' and '737 200', or 'a_10' and 'a-10', may well be two classes.
    """
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).split())


def read_class_names_file(path: str, class_names: list[str]) -> dict[str, str]:
    """Return class name -> noun from a file: a mapping (of some or all classes), or a list with a noun per class.

    Mappings and lists are YAML or JSON, by suffix; any other file has one noun per line. Lists are in label order.
    Class names in a mapping are matched by `match_class_names`.

    Raises:
        UserError: the file cannot be read; a class is unknown, duplicate or ambiguous; a noun is empty or not text;
            there are too few or too many nouns.
    """
    flag = f"--class_names_file {path}:"
    entries = _read_names(path, flag)
    if isinstance(entries, list):
        if len(entries) != len(class_names):
            raise UserError(
                f"{flag} has {len(entries)} nouns for {len(class_names)} classes; expected one per class, in label "
                f"order, starting with '{class_names[0]}'."
            )
        entries = dict(zip(class_names, entries))
    for name, noun in entries.items():
        _check_text(flag, name, noun)
    matched = match_class_names(list(entries), class_names, flag)
    for name in entries:
        if name not in matched:
            raise UserError(f"{flag} entry '{name}': no such class{suggestion(name, class_names)}.")
    return {matched[name]: noun for name, noun in entries.items()}


def read_class_names(path: str) -> dict[str, str]:
    """Return class name -> noun in label order, for a synthetic dataset without real images.

    The file is a mapping of class names to nouns, or a list of class names, for which nouns are proposed; YAML or JSON
    by suffix, any other file has one class name per line.

    Raises:
        UserError: the file cannot be read or is empty; a class is duplicate; a name or noun is empty or not text; two
            classes would get the same noun.
    """
    flag = f"--class_names_file {path}:"
    entries = _read_names(path, flag)
    if not entries:
        raise UserError(f"{flag} has no classes.")
    if isinstance(entries, list):
        for number, name in enumerate(entries, 1):
            if not isinstance(name, str) or not name.strip():
                raise UserError(f"{flag} class {number} ({name!r}): must be text; in YAML, use quotes.")
        _check_single(flag, entries)
        return dict(zip(entries, prompt_nouns(entries)))
    for name, noun in entries.items():
        _check_text(flag, name, noun)
    return dict(zip(entries, prompt_nouns(list(entries), entries)))


def list_names(names: list[str]) -> str:
    """Return names in quotes for messages."""
    return join_names([repr(name) for name in names])


def _read_names(path: str, flag: str) -> dict | list:
    entries = read_entries(Path(path), flag)
    if not isinstance(entries, (dict, list)):
        raise UserError(f"{flag} must be a mapping of class names to nouns, or a list of nouns.")
    if isinstance(entries, dict):
        _check_single(flag, _read_keys(Path(path), flag))
    return entries


def _read_keys(path: Path, flag: str) -> list[str]:
    """Return the keys of a mapping as written, with duplicates, which parsing drops."""
    text = read_text(path, flag)
    if path.suffix == ".json":
        return [key for key, _ in json.loads(text, object_pairs_hook=list)]
    return [str(key.value) for key, _ in yaml.compose(text, Loader=yaml.SafeLoader).value]


def _check_single(flag: str, names: list[str]) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise UserError(f"{flag} class '{name}': duplicate.")
        seen.add(name)


def _check_text(flag: str, name: object, noun: object) -> None:
    if not isinstance(name, str) or not isinstance(noun, str):
        raise UserError(f"{flag} entry '{name}: {noun}': put quotes around words that are not text in YAML, as 'no'.")
    if not name.strip():
        raise UserError(f"{flag} entry '{name}: {noun}': its class name is empty.")
    if not noun.strip():
        raise UserError(f"{flag} entry '{name}': its noun is empty.")


def sort_class_names(names: Iterable[str]) -> list[str]:
    """Return class names in label order: alphabetical, but integers by value."""
    names = sorted(names)
    return sorted(names, key=int) if all(re.fullmatch(r"-?\d{1,18}", name) for name in names) else names


def find_similar_names(names: Sequence[str]) -> list[list[str]]:
    """Return the groups of names that differ only in case, spaces or Unicode form."""
    return [group for group in group_names(names, map(fold_class_name, names)).values() if len(group) > 1]


def group_names(names: Iterable[str], keys: Iterable[str]) -> dict[str, list[str]]:
    """Return key -> its names, both in order; `keys` has the key of each name."""
    groups: dict[str, list[str]] = {}
    for name, key in zip(names, keys):
        groups.setdefault(key, []).append(name)
    return groups


def match_labels(
    names: Sequence[str], class_names: Sequence[str], flag: str, what: str, allow_missing: bool = False,
    advice: str = "",
) -> dict[str, int]:  # fmt: skip
    """Return name -> its index in the real dataset's `class_names`, in the order of `names`.

    Messages begin with `flag`; `what` has the names, as in "the synthetic set"; `advice` ends the message on missing
    classes.

    Raises:
        UserError: names are ambiguous; classes are renamed, extra or, unless `allow_missing`, missing.
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
        raise UserError(f"{flag} its classes differ from those of the real set; {problems}{hint}.")
    places = {name: place for place, name in enumerate(class_names)}
    return {name: places[matched[name]] for name in names}


def _find_renamed(missing: list[str], extra: list[str]) -> dict[str, str]:
    """Return missing name -> the extra name that is equal apart from case and punctuation, or else very similar."""
    left = {re.sub(r"[\W_]", "", other.casefold()): other for other in extra}
    plain = {known: re.sub(r"[\W_]", "", known.casefold()) for known in missing}
    renamed = {known: left.pop(key) for known, key in plain.items() if key in left}
    for known in [known for known in missing if known not in renamed][:MAX_LISTED]:
        for key in difflib.get_close_matches(plain[known], left, n=1, cutoff=SIMILARITY):
            renamed[known] = left.pop(key)
    return renamed


def join_names(names: Sequence[str]) -> str:
    """Return the first ten names, and the number of further ones."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
