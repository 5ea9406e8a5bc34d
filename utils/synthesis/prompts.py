"""Which prompt image n of a class is drawn from: a function of class and number, without a list of images. No torch."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

from utils.cli.errors import UserError
from utils.cli.parsing import read_text, suggestion
from utils.data.class_names import list_names, match_class_names
from utils.data.prompts import check_template, render_prompt

PROMPT_SETS = ("single", "diverse")

# the prompt set 'diverse': words that suit any object, and that name no medium or mood, which the style token is for
VIEWPOINTS = ("from the front", "from the side", "from behind", "from above", "from a low angle", "at an angle",
              "up close", "from a distance")  # fmt: skip
BACKGROUNDS = ("on a plain background", "on a cluttered background", "on a blurred background", "outdoors", "indoors",
               "among other things")  # fmt: skip
LIGHTS = ("in soft light", "in bright light", "in dim light", "with strong shadows")

STYLE_ENDING = re.compile(r"(?P<base>.*?)(?P<style>,? in the style of \{token\})?(?P<stop>[.\s]*)", re.DOTALL)
NUM_EXAMPLES = 3
PROMPT_LINE = '{"label": "suv", "prompt": "a suv in the rain"}'


def build_templates(prompt_set: str, template: str) -> list[str]:
    """Return the templates of a prompt set: `template` alone ('single'), or 192 variants of it ('diverse').

    What varies stands behind the sentence, in front of 'in the style of {token}' where the template ends so.
    """
    assert prompt_set in PROMPT_SETS
    if prompt_set == "single":
        return [template]
    parts = STYLE_ENDING.fullmatch(template)
    style = f", {parts['style'].lstrip(', ')}" if parts["style"] else ""
    return [
        f"{parts['base']}, {viewpoint}, {background}, {light}{style}{parts['stop'].strip()}"
        for viewpoint, background, light in product(VIEWPOINTS, BACKGROUNDS, LIGHTS)
    ]


@dataclass(frozen=True)
class TemplatePrompts:
    """Prompts from templates with `{class}` and, for a style token, `{token}`.

    `nouns` are those of all classes in the order of the label ids; `token_text` is the placeholder, empty without one.
    """

    templates: tuple[str, ...]
    nouns: tuple[str, ...]
    token_text: str = ""

    def prompt(self, label: int, class_index: int) -> str:
        """Return the prompt of the `class_index`-th image of a class.

        A class goes through all templates before one comes again, so each has an equal share. Where a round starts is
        drawn from the noun and the round: what else alternates with the number, as guidance does, meets all of them.
        """
        turn, place = divmod(class_index, len(self.templates))
        start = int.from_bytes(_digest(f"{self.nouns[label]}:{turn}"))
        return render_prompt(self._order[(start + place) % len(self._order)], self.nouns[label], self.token_text)

    def examples(self, label: int) -> list[str]:
        """Return the first prompts of a class, up to 3, all different."""
        return [self.prompt(label, number) for number in range(min(NUM_EXAMPLES, len(self.templates)))]

    def longest(self) -> Iterator[tuple[str, int]]:
        """Yield the prompts to check against a text encoder's limit, with the number of characters that must survive.

        These reach to the end of class noun and token. Each template comes with the longest noun and each noun with
        the longest template, which stands for all combinations.
        """
        longest_noun = max(self.nouns, key=_size)
        longest_template = max(self.templates, key=lambda template: _size(_needed_part(template, "{class}")))
        for template in self.templates:
            yield _measure(template, longest_noun, self.token_text)
        for noun in self.nouns:
            yield _measure(longest_template, noun, self.token_text)

    @cached_property
    def _order(self) -> list[str]:
        # mixed by their digests: neighbours in a list of variants differ in one word only
        return sorted(self.templates, key=_digest)


@dataclass(frozen=True)
class CaptionPrompts:
    """Prompts that a file gives for each class: image n of a class has caption n modulo their number.

    `captions` maps a label id to its captions, which may have `{class}` and `{token}`.
    """

    captions: dict[int, tuple[str, ...]]
    nouns: tuple[str, ...]
    token_text: str = ""

    def prompt(self, label: int, class_index: int) -> str:
        """Return the prompt of the `class_index`-th image of a class."""
        captions = self.captions[label]
        return render_prompt(captions[class_index % len(captions)], self.nouns[label], self.token_text)

    def examples(self, label: int) -> list[str]:
        """Return the first prompts of a class, up to 3, all different."""
        different = list(dict.fromkeys(self.captions[label]))
        return [render_prompt(caption, self.nouns[label], self.token_text) for caption in different[:NUM_EXAMPLES]]

    def longest(self) -> Iterator[tuple[str, int]]:
        """Yield all prompts, with the number of characters that must survive a text encoder's limit.

        These reach to the end of class noun and token; without the noun, the whole caption stands for the class.
        """
        for label, captions in self.captions.items():
            for caption in captions:
                yield _measure(caption, self.nouns[label], self.token_text)

    @property
    def sha256(self) -> str:
        """The digest of all that decides the prompts."""
        facts = {"captions": sorted(self.captions.items()), "nouns": self.nouns, "token_text": self.token_text}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_prompts_file(
    path: str, class_names: Sequence[str], nouns: Sequence[str], labels: Sequence[int], placeholder: str | None
) -> CaptionPrompts:
    """Return the captions of a JSON Lines file, whose lines are as `{"label": "suv", "prompt": "a suv in the rain"}`.

    `label` is a class name, or a spelling of one as `match_class_names` has it; captions of classes that are not among
    `labels` are checked and left out. `nouns` fills
    `{class}`; `{token}` must be in each caption where there is a style token, whose `placeholder` fills it.

    Raises:
        UserError: the file cannot be read; a line is no such object, or its caption has a place too many or too few; a
            class of `labels` has no caption.
    """
    flag = f"--prompts_file {path}:"
    entries: list[tuple[str, str, str]] = []  # where it is, class name, caption
    # not splitlines(): JSON strings may hold the other characters that end a line for it
    for number, line in enumerate(read_text(Path(path), flag).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{flag} line {number}:"
        name, caption = _read_caption(where, line)
        check_template(caption, needs_token=placeholder is not None, needs_class="{class}" in caption, flag=where)
        entries.append((where, name, caption))
    matched = match_class_names([name for _, name, _ in entries], class_names, flag, is_unique=False)
    label_ids = {name: label for label, name in enumerate(class_names)}
    captions: dict[int, list[str]] = {label: [] for label in labels}
    for where, name, caption in entries:
        if name not in matched:
            raise UserError(f"{where} label {name!r}: no such class{suggestion(name, class_names)}.")
        if label_ids[matched[name]] in captions:
            captions[label_ids[matched[name]]].append(caption)
    missing = [class_names[label] for label in labels if not captions[label]]
    if missing:
        raise UserError(f"{flag} has no prompt for {list_names(missing)}; right is at least one for each class.")
    return CaptionPrompts(
        {label: tuple(captions[label]) for label in sorted(captions)}, tuple(nouns), placeholder or ""
    )


def _read_caption(where: str, line: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is no JSON ({error}); right is {PROMPT_LINE}.") from None
    if not isinstance(entry, dict) or entry.keys() != {"label", "prompt"}:
        raise UserError(f"{where} must be an object with 'label' and 'prompt'; right is {PROMPT_LINE}.")
    label, prompt = entry["label"], entry["prompt"]
    if not isinstance(label, str):
        raise UserError(f"{where} label {label!r}: no such class, a class name is text.")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where} prompt {prompt!r}: must be text.")
    return label, " ".join(prompt.split())


def _needed_part(template: str, noun: str) -> str:
    """Return the beginning of a template that has the class and the token; all of it where the class is not named."""
    ends = [template.index(place) + len(place) for place in ("{class}", "{token}") if place in template]
    if "{class}" not in template:
        # not a word's part, and not the place '{token}' for a class of that name
        named = re.search(rf"(?<![\w{{]){re.escape(noun)}(?!\w)", template, re.IGNORECASE)
        ends.append(named.end() if named else len(template))
    return template[: max(ends)]


def _measure(template: str, noun: str, token_text: str) -> tuple[str, int]:
    """Return a prompt, and the number of its characters that a text encoder must not cut off."""
    needed = render_prompt(_needed_part(template, noun), noun, token_text)
    return render_prompt(template, noun, token_text), len(needed)


def _size(text: str) -> int:
    return len(text.encode())  # bytes: what a tokenizer makes its tokens of


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
