"""What all cards share: names that Markdown does not change, the sources' licenses, and text that a person added.

A generated card is merged with an existing one: a person's text stays, the generated part is replaced.
"""

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import yaml

from utils.cli.errors import UserError
from utils.cli.records import write_text
from utils.hub.repositories import REPO_ID, Source, open_source

MAX_LENGTH = 200  # characters of a name in a card; the records have all of it
SPECIAL = re.compile(r"[\\`*~\[\]|$]|(?<![^\W_])_|_(?![^\W_])|&(?=[#\w]+;)|^[-+=#]|^\d+(?=[.)])")

BEGIN = "<!-- bridged-transfer: generated, is replaced on the next run -->"
END = "<!-- bridged-transfer: end -->"
# from the last BEGIN before an END: if a person removed an END, the text up to the next block is not ours
GENERATED = re.compile(f"{re.escape(BEGIN)}((?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)
METADATA = re.compile(r"\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)

GENERATED_KEYS = (
    "dataset_info", "configs", "model-index", "base_model", "base_model_relation", "datasets", "pipeline_tag",
    "library_name",
)  # fmt: skip
LICENSE_KEYS = ("license", "license_name", "license_link")
UNKNOWN = "unknown"
UNKNOWN_ADVICE = (
    "no license found in its card; look it up or ask its owner before you share this, and enter it as `license` at the "
    "top of this card, where later runs keep it"
)
NOT_SET = "not set"  # None in a card
UNNAMED_LICENSES = (None, "", UNKNOWN, [], [UNKNOWN])


def text(value: object, max_length: int | None = MAX_LENGTH) -> str:
    """Return a value as one line of Markdown, for a sentence, heading, list or table cell; cut at `max_length`."""
    return SPECIAL.sub(_escape, _line(value, max_length)).replace("<", "&lt;").replace(">", "&gt;")


def code(value: object) -> str:
    """Return a value as a code span, also in a table cell, where a code span cannot hold every character.

    None is `not set`, without the span; lists have no brackets, booleans are as on a command line.
    """
    if value is None:
        return NOT_SET
    line = _line(value)
    if line and not re.search(r"[`|]|<!--", line):
        return f"`{line}`"
    entities = re.sub(r"[^\w\s]|_", lambda match: f"&#{ord(match.group())};", line)
    return f"<code>{entities}</code>"


def fence(value: str, language: str) -> str:
    """Return a value as a code block, with a fence longer than any inside."""
    longest = max(map(len, re.findall("`+", value)), default=0)
    return "{0}{1}\n{2}\n{0}".format("`" * max(3, longest + 1), language, value)


def python_string(value: str) -> str:
    """Return a value as a Python string literal in double quotes."""
    return json.dumps(str(value), ensure_ascii=False)


# functions for the templates
FUNCTIONS = {"text": text, "code": code, "fence": fence, "python_string": python_string, "shell_word": shlex.quote}


def _line(value: object, max_length: int | None = MAX_LENGTH) -> str:
    line = " ".join(_show(value).split())
    return line if max_length is None or len(line) <= max_length else f"{line[: max_length - 1]}…"


def _show(value: object) -> str:
    """Return a value as people write it: no None, no brackets of a list, no quotes within."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_show(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_show, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return NOT_SET if value is None else str(value)


def _escape(match: re.Match) -> str:
    found = match.group()
    # in "1." the point is escaped, as digits cannot be
    return f"{found}\\" if found.isdigit() else f"\\{found}"


@dataclass(frozen=True)
class License:
    """A license as a card names it: the Hub's id, and for 'other' a name and a link."""

    id: str = UNKNOWN
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        if self == License():
            return f"{UNKNOWN} ({UNKNOWN_ADVICE})"
        words = text(f"{self.id} ({self.name})" if self.name else self.id)
        return f"[{words}]({quote(self.link, ':/?#&=%,;+@')})" if self.link else words

    def to_metadata(self) -> dict:
        """Return the card metadata: `license`, and `license_name` and `license_link` if there are any."""
        return {key: value for key, value in zip(LICENSE_KEYS, (self.id, self.name, self.link)) if value}


def read_license(name: str, repo_type: str, revision: str | None = None, token: str | None = None) -> License:
    """Return the license in the card of a folder or repository.

    It is 'unknown' if the card names none or cannot be read, or if the Hub is unreachable: no run fails over it.
    """
    try:
        return license_in_card(open_source(name, "license of", repo_type, revision, token))
    except (UserError, OSError):  # OSError: any other answer of the Hub
        return License()


def license_in_card(source: Source) -> License:
    """Return the license in a source's card, 'unknown' if it names none.

    Raises:
        UserError: there is no card, or it cannot be read.
    """
    metadata, _, _ = _parse_card(read_card(source.file("README.md")))
    ids, link = metadata.get("license") or UNKNOWN, str(metadata.get("license_link") or "")
    return License(
        id=", ".join(map(str, ids)) if isinstance(ids, list) else str(ids),
        name=str(metadata["license_name"]) if metadata.get("license_name") else None,
        # a relative link would be broken in our card
        link=link if re.match("https?://", link) else None,
    )


def read_licenses(sources: Iterable[tuple[str, str, str | None]], token: str | None = None) -> dict[str, License]:
    """Return name -> license of sources, given as name, repository type and revision."""
    return {name: read_license(name, repo_type, revision, token) for name, repo_type, revision in sources}


def common_license(licenses: Iterable[License]) -> License:
    """Return the license that all sources share; unknown if they differ or one names several."""
    different = set(licenses)
    common = different.pop() if len(different) == 1 else License()
    return License() if "," in common.id else common


def hub_ids(*names: str | None) -> list[str]:
    """Return the names that are repository ids, each once, without local folders."""
    return list(dict.fromkeys(name for name in names if name and REPO_ID.match(name) and not Path(name).is_dir()))


def read_card(path: str | Path) -> str:
    """Return the text of a card, its line endings unchanged.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the card cannot be read ({error}); save it as UTF-8 or move it away.") from None


def check_card(path: str | Path) -> None:
    """Check, before any work, that an existing card at `path` can be merged.

    Raises:
        UserError: it cannot be read, or its metadata is malformed.
    """
    if Path(path).exists():
        _parse_card(read_card(path), str(path))


def _parse_card(card: str, name: str = "README.md") -> tuple[dict, str, str]:
    """Return a card's metadata, its YAML as written, and the text below it. `name` is for messages."""
    card = card.replace("\r\n", "\n").removeprefix("\ufeff")
    match = METADATA.match(card)
    if not match:
        if re.match(r"\s*---[ \t]*\n", card):
            raise UserError(f"{name}: its metadata has no closing line '---'; add it.")
        return {}, "", card
    block = match.group(1)
    try:
        metadata = yaml.safe_load(block)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date like 2026-13-01
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name}: its metadata is not valid YAML ({reason}); fix the lines between the '---'."
        ) from None
    if not isinstance(metadata, dict | None):
        raise UserError(f"{name}: its metadata must be 'key: value' lines; fix the lines between the '---'.")
    return metadata or {}, block, card[match.end() :]


def merge_cards(ours: str, theirs: str, name: str = "README.md") -> str:
    """Return `theirs` with the generated parts of `ours`: GENERATED_KEYS and the text between the markers.

    Keys that only one card has stay, `tags` are combined, and a known license stays. Text around the markers stays; a
    card without markers keeps all of its text, above ours. Line endings are those of `theirs`, which messages call
    `name`.

    Raises:
        UserError: the metadata of `theirs` is malformed.
    """
    our_metadata, _, our_text = _parse_card(ours)
    their_metadata, their_block, their_text = _parse_card(theirs, name)
    metadata = _write_metadata(_merge_metadata(our_metadata, their_metadata), their_metadata, their_block)
    merged = f"---\n{metadata}---\n{_merge_text(our_text, their_text)}"
    return merged.replace("\n", "\r\n") if "\r\n" in theirs else merged


def save_card(card: object, path: str | Path) -> None:
    """Write a card (an object or its text) to `path`, merged with an existing one, whole or not at all.

    Raises:
        UserError: from `read_card` or `merge_cards`; the file then stays unchanged.
    """
    path, merged = Path(path), str(card)
    write_text(path, merge_cards(merged, read_card(path), str(path)) if path.exists() else merged)


def _merge_metadata(ours: dict, theirs: dict) -> dict:
    named_by = (
        ours if theirs.get("license") in UNNAMED_LICENSES and ours.get("license") not in UNNAMED_LICENSES else theirs
    )
    merged = {key: value for key, value in theirs.items() if key not in LICENSE_KEYS or key in named_by}
    for key, value in ours.items():
        if key in LICENSE_KEYS:
            # name and link belong to their license: never mix those of two cards
            if named_by is ours or "license" not in theirs:
                merged[key] = value
        elif key == "tags":
            merged[key] = list(dict.fromkeys([*_as_list(theirs.get("tags")), *_as_list(value)]))
        elif key in GENERATED_KEYS or key not in theirs:
            merged[key] = value
    return merged


def _as_list(value: object) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _write_metadata(metadata: dict, theirs: dict, their_block: str) -> str:
    """Return YAML for `metadata`; entries unchanged from `theirs` keep their quotes and comments."""
    entries = _written_entries(their_block)
    parts = []
    for key, value in metadata.items():
        if key in entries and theirs.get(key) == value:
            parts.append(entries[key].rstrip("\n") + "\n")
        else:
            parts += re.findall(r"^#.*\n", entries.get(key, ""), re.MULTILINE)
            parts.append(_dump({key: value}))
    written = "".join(parts)
    try:
        if yaml.safe_load(written) == metadata:
            return written
    except yaml.YAMLError:
        pass  # entries that share a line, as in {a: 1, b: 2}, or refer to a replaced one
    return _dump(metadata)


def _written_entries(block: str) -> dict[str, str]:
    """Return the lines of each entry of a YAML mapping, with the comments above it."""
    node = yaml.compose(block, Loader=yaml.SafeLoader)
    if node is None:
        return {}
    keys = [key for key, _ in node.value]
    comments_above = re.compile(r"(^#.*\n)*\Z", re.MULTILINE)
    starts = [comments_above.search(block[: key.start_mark.index]).start() for key in keys]
    return {key.value: block[start:end] for key, start, end in zip(keys, starts, [*starts[1:], len(block)])}


def _dump(metadata: dict) -> str:
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)


def _merge_text(ours: str, theirs: str) -> str:
    generated, there = GENERATED.search(ours), GENERATED.search(theirs)
    if not theirs.strip():
        return ours
    if generated is None:
        return _with_text(theirs, ours, theirs)
    if there:
        before, after = theirs[: there.start()], theirs[there.end() :]
    else:
        before, after = theirs.rstrip("\n") + "\n\n", "\n"
    # a card can be edited here and on the Hub
    before = _with_text(before, ours[: generated.start()], theirs)
    after = _with_text(after, ours[generated.end() :], theirs)
    return before + generated.group() + after


def _with_text(beginning: str, other: str, card: str) -> str:
    """Return `beginning` with `other` below it, unless `card` already contains it."""
    return beginning if other.strip() in card else f"{beginning.rstrip()}\n\n{other.strip()}\n\n"
