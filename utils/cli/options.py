"""The options of a run: as records store them, which affect the result, and how two runs differ."""

import dataclasses
import fnmatch
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

# options that may name a folder
INPUTS = (
    "dataset_name", "train_dir", "validation_dir", "synthetic_dataset", "learned_embeds", "model_name_or_path",
    "pretrained_model_name_or_path",
)  # fmt: skip
# the recorded commits are compared instead
REVISIONS = frozenset({"revision", "dataset_revision", "model_revision", "synthetic_dataset_revision"})
# recorded only by runs that use them, with what depends on them
SWITCHES = ("use_peft", "class_tokens")
STYLE_TOKEN_OPTIONS = ("placeholder_token", "initializer_token")  # not access tokens


@dataclasses.dataclass(frozen=True)
class Need:
    """What a flag needs to have an effect.

    `is_met` takes the flags' values by name. If it is not met, `lack` continues "--flag: does nothing", with values in
    braces; `remedy` comes before "leave --flag out".
    """

    lack: str
    is_met: Callable[[Mapping[str, object]], bool]
    remedy: str = ""


def with_flag(name: str) -> Need:
    """Return the need for another flag that is on."""
    return Need(f"without --{name}", lambda values: bool(values[name]), "add it or ")


def without_flag(name: str) -> Need:
    """Return the need for the absence of another flag, which replaces this one."""
    return Need(f"with --{name}", lambda values: not values[name])


def with_value(name: str, *right: str) -> Need:
    """Return the need for another flag with one of these values."""
    return Need(
        f"with --{name} {{{name}}}",
        lambda values: values[name] in right,
        f"give another --{name} ({', '.join(right)}) or ",
    )


def option(
    default: object, help_text: str, affects_result: bool = True, needs: Sequence[Need] = (), **options
) -> dataclasses.Field:
    """Return the dataclass field of a flag. A list or function as default gives each run its own list or value.

    A flag without `affects_result` may differ between runs with the same result. A flag whose `needs` are not met has
    no effect and is refused. `options` are those of `ArgumentParser.add_argument`, such as `choices`, and
    `parse`, a function from the flag's text to its value, which may raise a `UserError`.
    """
    metadata = {"help": help_text, "affects_result": affects_result, "needs": needs, **options}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def list_needs(group: type) -> Iterator[tuple[dataclasses.Field, Sequence[Need]]]:
    """Yield the flags of a group with their needs; `_inherited_needs` has those of inherited flags."""
    inherited = getattr(group, "_inherited_needs", {})
    for field in dataclasses.fields(group):
        yield field, field.metadata.get("needs") or inherited.get(field.name, ())


def absolute_if_local(name: str | None) -> str | None:
    """Return a folder's absolute path, since records are read in other directories; other names unchanged."""
    return os.path.abspath(name) if name is not None and Path(name).is_dir() else name


def resolve_options(groups: Iterable) -> dict:
    """Return flag -> value of argument dataclasses as JSON values, without access tokens, folders absolute."""
    resolved = {}
    for group in groups:
        values = group.to_dict() if hasattr(group, "to_dict") else dataclasses.asdict(group)
        resolved.update(
            {key: value for key, value in values.items() if not key.endswith("token") or key in STYLE_TOKEN_OPTIONS}
        )
    resolved |= {name: absolute_if_local(resolved[name]) for name in INPUTS if isinstance(resolved.get(name), str)}
    return json.loads(json.dumps(resolved))


def free_options(groups: Iterable) -> frozenset[str]:
    """Return the names of the options that do not affect the result.

    These are the flags declared so, and inherited flags that match a pattern in a group's `_inherited_free_options`.
    """
    free = set()
    for group in groups:
        patterns = getattr(group, "_inherited_free_options", ())
        for field in dataclasses.fields(group):
            inherited_free = any(fnmatch.fnmatch(field.name, pattern) for pattern in patterns)
            if inherited_free or not field.metadata.get("affects_result", True):
                free.add(field.name)
    return frozenset(free)


def differing_options(before: dict, now: dict, free: Iterable[str] = ()) -> list[str]:
    """Return 'name was value, now value' for each option of `now` that differs from before, except those in `free`."""
    now = json.loads(json.dumps(now))
    # earlier versions recorded folders as given
    before = before | {name: absolute_if_local(before[name]) for name in INPUTS if isinstance(before.get(name), str)}
    now = {name: None for name in SWITCHES if before.get(name)} | now
    names = [name for name in now if name not in free and before.get(name) != now[name]]
    return [f"{name} was {_shorten(before.get(name))}, now {_shorten(now[name])}" for name in names]


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
