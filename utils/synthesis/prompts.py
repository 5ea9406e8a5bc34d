"""Which prompt image n of a class is drawn from, and how much of it the generator's text encoders read. No torch."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, product
from pathlib import Path
from typing import ClassVar

from utils.cli.errors import UserError
from utils.cli.parsing import read_text, suggestion
from utils.cli.processes import warn_once
from utils.data.class_names import list_names, match_class_names
from utils.data.prompts import AS_WRITTEN, check_template, render_prompt, token_text
from utils.synthesis.generators import Generator
from utils.synthesis.sources import Sources

PROMPT_SETS = ("single", "diverse")
ARTICLE = "article"  # among a set's settings

# the prompt set 'diverse': words that suit any object, and that name no medium or mood, which the style token is for
VIEWPOINTS = ("from the front", "from the side", "from behind", "from above", "from a low angle", "at an angle",
              "up close", "from a distance")  # fmt: skip
BACKGROUNDS = ("on a plain background", "on a cluttered background", "on a blurred background", "outdoors", "indoors",
               "among other things")  # fmt: skip
LIGHTS = ("in soft light", "in bright light", "in dim light", "with strong shadows")

STYLE_ENDING = re.compile(r"(?P<base>.*?)(?P<style>,? in the style of \{token\})?(?P<stop>[.\s]*)", re.DOTALL)
PROMPTS_AT_A_TIME = 1000
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
    `article` is that of `render_prompt`.
    """

    flag: ClassVar[str] = "--prompt_templates"
    templates: tuple[str, ...]
    nouns: tuple[str, ...]
    token_text: str = ""
    article: str = AS_WRITTEN

    def prompt(self, label: int, class_index: int) -> str:
        """Return the prompt of the `class_index`-th image of a class.

        A class goes through all templates before one comes again, so each has an equal share. Where a round starts is
        drawn from the noun and the round: what else alternates with the number, as guidance does, meets all of them.
        """
        turn, place = divmod(class_index, len(self.templates))
        start = int.from_bytes(digest(f"{self.nouns[label]}:{turn}"))
        template = self._order[(start + place) % len(self._order)]
        return render_prompt(template, self.nouns[label], self.token_text, self.article)

    def longest(self) -> Iterator[tuple[str, int]]:
        """Yield the prompts to check against a text encoder's limit, with the number of characters that must survive.

        These reach to the end of class noun and token. Each template comes with the longest noun and each noun with
        the longest template, which stands for all combinations.
        """
        longest_noun = max(self.nouns, key=_size)
        longest_template = max(self.templates, key=lambda template: _size(_needed_part(template, "{class}")))
        for template in self.templates:
            yield _measure(template, longest_noun, self.token_text, self.article)
        for noun in self.nouns:
            yield _measure(longest_template, noun, self.token_text, self.article)

    @cached_property
    def _order(self) -> list[str]:
        # mixed by their digests: neighbours in a list of variants differ in one word only
        return sorted(self.templates, key=digest)


@dataclass(frozen=True)
class CaptionPrompts:
    """Prompts that a file gives for each class: image n of a class has caption n modulo their number.

    `captions` maps a label id to its captions, which may have `{class}` and `{token}`.
    """

    flag: ClassVar[str] = "--prompts_file"
    captions: dict[int, tuple[str, ...]]
    nouns: tuple[str, ...]
    token_text: str = ""

    def prompt(self, label: int, class_index: int) -> str:
        """Return the prompt of the `class_index`-th image of a class."""
        captions = self.captions[label]
        return render_prompt(captions[class_index % len(captions)], self.nouns[label], self.token_text)

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


Prompts = TemplatePrompts | CaptionPrompts


def example_prompts(prompts: Prompts, label: int) -> list[str]:
    """Return the first 3 different prompts of a class; fewer where its first 100 images have fewer."""
    return list(dict.fromkeys(prompts.prompt(label, number) for number in range(100)))[:3]


def make_prompts(
    sources: Sources, labels: Sequence[int], templates: Sequence[str] | None, prompt_set: str, prompts_file: str | None,
    article: str,
) -> tuple[Prompts, dict]:  # fmt: skip
    """Return the prompts of a file, or of templates (those of the sources where none are given) and a prompt set.

    With them comes what decides them, for the record.

    Raises:
        UserError: a template or the file is wrong.
    """
    # the placeholder once: diffusers itself expands it to all vectors
    placeholder, _ = sources.placeholder
    if prompts_file is not None:
        prompts = read_prompts_file(prompts_file, sources.class_names, sources.prompt_nouns, labels, placeholder)
        return prompts, {"prompts_file_sha256": prompts.sha256}
    varied = []
    for template in templates or sources.prompt_templates:
        check_template(template, needs_token=placeholder is not None, flag="--prompt_templates")
        varied += build_templates(prompt_set, template)
    prompts = TemplatePrompts(tuple(varied), tuple(sources.prompt_nouns), placeholder or "", article)
    return prompts, {"prompt_templates": varied, ARTICLE: article}


def read_prompts_file(
    path: str, class_names: Sequence[str], nouns: Sequence[str], labels: Sequence[int], placeholder: str | None
) -> CaptionPrompts:
    """Return the captions of a JSON Lines file, whose lines are as `{"label": "suv", "prompt": "a suv in the rain"}`.

    `label` is a class name, or a spelling of one as `match_class_names` has it; captions of classes that are not among
    `labels` are checked and left out. `nouns` fills `{class}`; `{token}` must be in each caption where there is a style
    token, whose `placeholder` fills it.

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
    in_order = {label: tuple(captions[label]) for label in sorted(captions)}
    return CaptionPrompts(in_order, tuple(nouns), placeholder or "")


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


def check_prompts_fit(
    generator: Generator, prompts: Iterable[tuple[str, int]], placeholder: str | None, num_vectors: int,
    flag: str = "--prompt_templates",
) -> None:  # fmt: skip
    """Check that the text encoder reads what matters of each prompt: all before a position, counted in characters.

    One warning tells how many prompts are cut behind that position. `placeholder` counts as `num_vectors` tokens.

    Raises:
        UserError: a prompt is cut before its position; the message begins with `flag` and shows what would be left.
    """
    tokenizer, limit, expand = _load_prompt_tokenizer(generator, placeholder, num_vectors)
    prompts, num_cut, example = iter(prompts), 0, ""
    while batch := list(islice(prompts, PROMPTS_AT_A_TIME)):
        texts = [expand(prompt) for prompt, _ in batch]
        for ids, text, (prompt, position) in zip(tokenizer(texts, verbose=False).input_ids, texts, batch):
            if len(ids) <= limit:
                continue
            left = _cut_text(tokenizer, text, limit)
            if len(left) < len(expand(prompt[:position]).rstrip()):
                raise UserError(
                    f"{flag}: '{prompt}' has {len(ids)} tokens, the text encoder takes {limit} and would see '{left}' "
                    "only, without all of the class name and the style token; shorten it or put these first."
                )
            num_cut, example = num_cut + 1, example or left
    if num_cut:
        warn_once(
            f"{flag}: prompts longer than {limit} tokens are cut behind what matters: {num_cut}, for example to "
            f"'{example}'."
        )


def count_prompt_tokens(
    generator: Generator, prompts: Sequence[str], placeholder: str | None, num_vectors: int
) -> list[int]:
    """Return the tokens of each prompt with start and end; every vector of the style token counts as one."""
    tokenizer, _, expand = _load_prompt_tokenizer(generator, placeholder, num_vectors)
    return [len(ids) for ids in tokenizer([expand(prompt) for prompt in prompts], verbose=False).input_ids]


def _load_prompt_tokenizer(generator: Generator, placeholder: str | None, num_vectors: int) -> tuple:
    """Return the tokenizer of the text encoder that reads furthest, how many tokens that is, and what writes all tokens
    of the placeholder out in a prompt, as the pipeline does."""
    import transformers

    source, parameters, tokenizers = generator.source, generator.call_parameters, []
    for name, (library, kind) in generator.parts.items():
        if not name.startswith("tokenizer") or name.replace("tokenizer", "text_encoder") not in generator.parts:
            continue
        if library != "transformers":
            raise UserError(f"{source.flag} {source.name}: its tokenizer, {kind}, is not one of transformers.")
        options = source.load_options() | {"subfolder": name}
        with source.reading("has no usable tokenizer", also=(ValueError,)):
            tokenizer = getattr(transformers, kind).from_pretrained(source.name, **options)
        # CLIP reads as many as its tokenizer says (77), others (T5) up to what the pipeline says
        is_cut_by_pipeline = not kind.startswith("CLIP") and "max_sequence_length" in parameters
        limit = parameters["max_sequence_length"].default if is_cut_by_pipeline else tokenizer.model_max_length
        tokenizers.append((tokenizer, limit))
    if not tokenizers:
        raise UserError(f"{source.flag} {source.name}: has no tokenizer with a text encoder.")
    tokenizer, limit = max(tokenizers, key=lambda pair: pair[1])
    if placeholder is None:
        return tokenizer, limit, str
    vectors = token_text(placeholder, num_vectors)
    tokenizer.add_tokens(vectors.split())
    return tokenizer, limit, lambda prompt: prompt.replace(placeholder, vectors)


def _cut_text(tokenizer, text: str, limit: int) -> str:
    """Return what is left of a text whose tokens are cut to `limit`, up to the first letter that is not read.

    Not up to the last that is: a token of T5 for the space in front has the place of the letter behind it.
    """
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False).offset_mapping
    first_lost, _ = offsets[limit - tokenizer.num_special_tokens_to_add()]
    return text[:first_lost].rstrip()


def _needed_part(template: str, noun: str) -> str:
    """Return the beginning of a template that has the class and the token; all of it where the class is not named."""
    ends = [template.index(place) + len(place) for place in ("{class}", "{token}") if place in template]
    if "{class}" not in template:
        # not a word's part, and not the place '{token}' for a class of that name
        named = re.search(rf"(?<![\w{{]){re.escape(noun)}(?!\w)", template, re.IGNORECASE)
        ends.append(named.end() if named else len(template))
    return template[: max(ends)]


def _measure(template: str, noun: str, token_text: str, article: str = AS_WRITTEN) -> tuple[str, int]:
    """Return a prompt, and the number of its characters that a text encoder must not cut off."""
    needed = render_prompt(_needed_part(template, noun), noun, token_text, article)
    return render_prompt(template, noun, token_text, article), len(needed)


def _size(text: str) -> int:
    return len(text.encode())  # bytes: what a tokenizer makes its tokens of


def digest(text: str) -> bytes:
    """Return a short hash, for what is drawn by chance but is the same in every run."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
