"""A generated card and the card that is already there: what a person wrote stays, what a run measured is replaced."""

import os
import re
from pathlib import Path

import yaml

from utils.cli.errors import UserError

BEGIN = "<!-- bridged-transfer: generated, is replaced on the next run -->"
END = "<!-- bridged-transfer: end -->"
# from the last BEGIN before an END: where a person took an END away, the text up to the next block is not ours
GENERATED = re.compile(f"{re.escape(BEGIN)}((?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)
METADATA = re.compile(r"\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)

OUR_KEYS = (
    "dataset_info", "configs", "model-index", "base_model", "base_model_relation", "datasets", "pipeline_tag",
    "library_name",
)  # fmt: skip
LICENSE_KEYS = ("license", "license_name", "license_link")
NO_LICENSE = (None, "", "unknown", [], ["unknown"])


def read_card(path: str | Path) -> str:
    """Return the text of a card with its own line ends.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the card cannot be read ({error}); save it as UTF-8 or move it away.") from None


def check_card(path: str | Path) -> None:
    """Check, before the work that ends with a card, that one already at `path` can be merged.

    Raises:
        UserError: it cannot be read, or its metadata are malformed.
    """
    if Path(path).exists():
        parse_card(read_card(path), str(path))


def parse_card(text: str, name: str = "README.md") -> tuple[dict, str, str]:
    """Return a card's metadata, their YAML as it was written, and the text below them. `name` is for messages.

    Raises:
        UserError: there is a metadata block that is no YAML mapping, or does not end.
    """
    text = text.replace("\r\n", "\n").removeprefix("\ufeff")
    match = METADATA.match(text)
    if not match:
        if re.match(r"\s*---[ \t]*\n", text):
            raise UserError(f"{name}: its metadata start with a line '---' and do not end with one; add it.")
        return {}, "", text
    block = match.group(1)
    try:
        metadata = yaml.safe_load(block)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is a date like 2026-13-01
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: its metadata are no YAML ({reason}); repair what is between the '---'.") from None
    if not isinstance(metadata, dict | None):
        raise UserError(f"{name}: its metadata are no 'key: value' lines; repair what is between the '---'.")
    return metadata or {}, block, text[match.end() :]


def merge_cards(ours: str, theirs: str, name: str = "README.md") -> str:
    """Return `theirs` with the parts of `ours` that a run decides: OUR_KEYS of the metadata, the text between markers.

    Keys that only one has stay; `tags` are both's; a licence that is named stays. Text around the markers stays, a card
    without markers keeps its whole text above ours. Line ends are those of `theirs`, which is `name` in messages.

    Raises:
        UserError: the metadata of `theirs` are malformed.
    """
    our_metadata, _, our_text = parse_card(ours)
    their_metadata, their_block, their_text = parse_card(theirs, name)
    metadata = _write_metadata(_merge_metadata(our_metadata, their_metadata), their_metadata, their_block)
    merged = f"---\n{metadata}---\n{_merge_text(our_text, their_text)}"
    return merged.replace("\n", "\r\n") if "\r\n" in theirs else merged


def save_card(card: object, path: str | Path) -> None:
    """Write a card (a card class or its text) to `path`, merged with one that is there; whole or not at all.

    Raises:
        UserError: what `read_card` and `merge_cards` raise; the file then stays as it is.
    """
    path, text = Path(path), str(card)
    text = merge_cards(text, read_card(path), str(path)) if path.exists() else text
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(text.encode("utf-8"))
    os.replace(temporary, path)


def _merge_metadata(ours: dict, theirs: dict) -> dict:
    named_by = ours if theirs.get("license") in NO_LICENSE and ours.get("license") not in NO_LICENSE else theirs
    merged = {key: value for key, value in theirs.items() if key not in LICENSE_KEYS or key in named_by}
    for key, value in ours.items():
        if key in LICENSE_KEYS:
            # name and link belong to the licence: never those of one card to that of the other
            if named_by is ours or "license" not in theirs:
                merged[key] = value
        elif key == "tags":
            merged[key] = list(dict.fromkeys([*_as_list(theirs.get("tags")), *_as_list(value)]))
        elif key in OUR_KEYS or key not in theirs:
            merged[key] = value
    return merged


def _as_list(value: object) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _write_metadata(metadata: dict, theirs: dict, their_block: str) -> str:
    """Return YAML for `metadata`: entries that `theirs` has too as they were written, with quotes and comments."""
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
        pass  # entries that are not lines of their own, as in {a: 1, b: 2}, or that refer to a replaced one
    return _dump(metadata)


def _written_entries(block: str) -> dict[str, str]:
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
    # a card can be both: edited here, and once more where it is published
    before = _with_text(before, ours[: generated.start()], theirs)
    after = _with_text(after, ours[generated.end() :], theirs)
    return before + generated.group() + after


def _with_text(text: str, other: str, card: str) -> str:
    """Return `text` with `other` below it, unless `card` has that already."""
    return text if other.strip() in card else f"{text.rstrip()}\n\n{other.strip()}\n\n"
