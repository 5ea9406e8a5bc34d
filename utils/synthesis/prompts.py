"""The prompt of image n of a class, and whether the generator's text encoders read all that matters. No torch."""

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
from utils.data.prompts import (
    AS_WRITTEN,
    CLASS_TOKEN,
    CONTEXT,
    CONTEXT_PLACE,
    add_context,
    check_template,
    fill_context,
    render_prompt,
    token_text,
)
from utils.synthesis.generators import Generator
from utils.synthesis.sources import Sources

PROMPT_SETS = ("single", "diverse")
ARTICLE = "article"  # among a set's settings

# the prompt set 'diverse': words for any object, without a medium or mood, which are up to the style token
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

    Variations follow the sentence, but precede 'in the style of {token}' at its end.
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
    `article` is that of `render_prompt`. `class_tokens` fill `{class_token}`, in the order of the label ids; empty if
    no prompt has it.
    """

    flag: ClassVar[str] = "--prompt_templates"
    templates: tuple[str, ...]
    nouns: tuple[str, ...]
    token_text: str = ""
    article: str = AS_WRITTEN
    class_tokens: tuple[str, ...] = ()

    def prompt(self, label: int, class_index: int) -> str:
        """Return the prompt of the `class_index`-th image of a class.

        A class uses all templates before it repeats one, so they have equal shares. The start of each round depends on
        noun and round, so that templates are not tied to other settings that alternate, such as guidance scales.
        """
        turn, place = divmod(class_index, len(self.templates))
        start = int.from_bytes(digest(f"{self.nouns[label]}:{turn}"))
        template = self._order[(start + place) % len(self._order)]
        others = _of_class(label, self.class_tokens)
        return render_prompt(template, self.nouns[label], self.token_text, self.article, **others)

    def longest(self) -> Iterator[tuple[str, int]]:
        """Yield prompts to check against a text encoder's limit, with the number of characters that must be read.

        They end with the class noun or the last token, whichever is later. Each template is combined with the longest
        noun, and each noun with the longest template, which covers all combinations.
        """
        labels = range(len(self.nouns))
        longest = max(labels, key=lambda label: _size(self.nouns[label]))
        longest_template = max(self.templates, key=lambda template: _size(_needed_part(template, "{class}")))
        combined = [(template, longest) for template in self.templates]
        for template, label in (*combined, *((longest_template, label) for label in labels)):
            others = _of_class(label, self.class_tokens)
            yield _measure(template, self.nouns[label], self.token_text, self.article, **others)

    @cached_property
    def _order(self) -> list[str]:
        # in random order: neighbours in a list of variants differ in only one word
        return sorted(self.templates, key=digest)


@dataclass(frozen=True)
class CaptionPrompts:
    """Prompts from a file: image n of a class has caption n modulo the number of captions.

    `captions` maps label ids to captions, which can have `{class}`, `{token}` and `{class_token}`.
    """

    flag: ClassVar[str] = "--prompts_file"
    captions: dict[int, tuple[str, ...]]
    nouns: tuple[str, ...]
    token_text: str = ""
    class_tokens: tuple[str, ...] = ()

    def prompt(self, label: int, class_index: int) -> str:
        """Return the prompt of the `class_index`-th image of a class."""
        captions, others = self.captions[label], _of_class(label, self.class_tokens)
        return render_prompt(captions[class_index % len(captions)], self.nouns[label], self.token_text, **others)

    def longest(self) -> Iterator[tuple[str, int]]:
        """Yield all prompts, with the number of characters that the text encoder must read.

        They end with the class noun or the last token, whichever is later; without the noun, the whole caption counts.
        """
        for label, captions in self.captions.items():
            for caption in captions:
                others = _of_class(label, self.class_tokens)
                yield _measure(caption, self.nouns[label], self.token_text, **others)

    @property
    def sha256(self) -> str:
        """The digest of everything that decides the prompts."""
        facts = {"captions": sorted(self.captions.items()), "nouns": self.nouns, "token_text": self.token_text}
        facts |= {"class_tokens": self.class_tokens} if self.class_tokens else {}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


Prompts = TemplatePrompts | CaptionPrompts


def _of_class(label: int, class_tokens: Sequence[str]) -> dict[str, str]:
    """Return what fills the further placeholders of a class's prompts."""
    return {CLASS_TOKEN: class_tokens[label]} if class_tokens else {}


def example_prompts(prompts: Prompts, label: int) -> list[str]:
    """Return the first 3 different prompts of a class, fewer if its first 100 images have fewer."""
    return list(dict.fromkeys(prompts.prompt(label, number) for number in range(100)))[:3]


def make_prompts(
    sources: Sources, labels: Sequence[int], templates: Sequence[str] | None, prompt_set: str, prompts_file: str | None,
    article: str, with_contexts: bool = False,
) -> tuple[Prompts, dict]:  # fmt: skip
    """Return the prompts, from a file or from templates (default: those of the sources), and their settings.

    `with_contexts` keeps `{context}` in the templates, to be filled later.

    Raises:
        UserError: a template or the file is wrong.
    """
    # the placeholder alone: diffusers expands it to all vectors
    placeholder, _ = sources.placeholder
    class_tokens = sources.class_token_names
    if prompts_file is not None:
        prompts = read_prompts_file(
            prompts_file, sources.class_names, sources.prompt_nouns, labels, placeholder, class_tokens
        )
        _warn_of_unused(class_tokens, prompts)
        return prompts, {"prompts_file_sha256": prompts.sha256}
    varied, others = [], ({CLASS_TOKEN: False} if class_tokens else {}) | ({CONTEXT: True} if with_contexts else {})
    for template in templates or _with_or_without_context(sources.prompt_templates, with_contexts):
        check_template(template, needs_token=placeholder is not None, others=others, flag="--prompt_templates")
        varied += build_templates(prompt_set, template)
    class_tokens_used = class_tokens if any(_has_class_token(template) for template in varied) else ()
    prompts = TemplatePrompts(
        tuple(varied), tuple(sources.prompt_nouns), placeholder or "", article, class_tokens_used
    )  # fmt: skip
    _warn_of_unused(class_tokens, prompts)
    return prompts, {"prompt_templates": varied, ARTICLE: article}


def _has_class_token(template: str) -> bool:
    return f"{{{CLASS_TOKEN}}}" in template


def _warn_of_unused(class_tokens: Sequence[str], prompts: Prompts) -> None:
    if class_tokens and not prompts.class_tokens:
        warn_once(f"{prompts.flag}: no prompt has {{{CLASS_TOKEN}}}, so the class tokens have no effect.")


def _with_or_without_context(templates: Sequence[str], with_context: bool) -> list[str]:
    """Return a style token's own templates with `{context}` or without it, whatever it was trained with."""
    if with_context:
        return [template if CONTEXT_PLACE in template else add_context(template) for template in templates]
    return [fill_context(template, "") if CONTEXT_PLACE in template else template for template in templates]


def read_prompts_file(
    path: str, class_names: Sequence[str], nouns: Sequence[str], labels: Sequence[int], placeholder: str | None,
    class_tokens: Sequence[str] = (),
) -> CaptionPrompts:  # fmt: skip
    """Return the captions of a JSON Lines file, with lines like `{"label": "suv", "prompt": "a suv in the rain"}`.

    `label` is a class name, in any spelling that `match_class_names` accepts; captions of classes not in `labels` are
    checked and left out. `nouns` fill `{class}`, and `class_tokens`, if any, `{class_token}`. With a style token, each
    caption must have `{token}`, which its `placeholder` fills.

    Raises:
        UserError: the file cannot be read; a line is not such an object, or its caption has a wrong placeholder; a
            class of `labels` has no caption.
    """
    flag, others = f"--prompts_file {path}:", {CLASS_TOKEN: False} if class_tokens else {}
    entries: list[tuple[str, str, str]] = []  # location, class name, caption
    # not splitlines(), which also splits at characters that JSON strings may have
    for number, line in enumerate(read_text(Path(path), flag).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{flag} line {number}:"
        name, caption = _read_caption(where, line)
        needs = {"needs_token": placeholder is not None, "needs_class": "{class}" in caption}
        check_template(caption, **needs, others=others, flag=where)
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
        raise UserError(f"{flag} has no prompt for {list_names(missing)}; each class needs at least one.")
    in_order = {label: tuple(captions[label]) for label in sorted(captions)}
    is_used = any(_has_class_token(caption) for of_class in in_order.values() for caption in of_class)
    return CaptionPrompts(in_order, tuple(nouns), placeholder or "", tuple(class_tokens) if is_used else ())


def _read_caption(where: str, line: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} must be JSON, such as {PROMPT_LINE} ({error}).") from None
    if not isinstance(entry, dict) or entry.keys() != {"label", "prompt"}:
        raise UserError(f"{where} must be an object with 'label' and 'prompt', such as {PROMPT_LINE}.")
    label, prompt = entry["label"], entry["prompt"]
    if not isinstance(label, str):
        raise UserError(f"{where} label {label!r}: must be text.")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where} prompt {prompt!r}: must be text.")
    return label, " ".join(prompt.split())


def check_prompts_fit(
    generator: Generator, prompts: Iterable[tuple[str, int]], placeholder: str | None, num_vectors: int,
    flag: str = "--prompt_templates", class_tokens: Sequence[str] = (),
) -> None:  # fmt: skip
    """Check that the text encoder reads each prompt up to a position, counted in characters.

    One warning counts the prompts that are truncated after it. `placeholder` counts as `num_vectors` tokens, each of
    `class_tokens` as one.

    Raises:
        UserError: a prompt is truncated before its position; the message begins with `flag` and shows the rest.
    """
    tokenizer, limit, expand = load_prompt_tokenizer(generator, placeholder, num_vectors, class_tokens)
    prompts, num_cut, example = iter(prompts), 0, ""
    while batch := list(islice(prompts, PROMPTS_AT_A_TIME)):
        texts = [expand(prompt) for prompt, _ in batch]
        for ids, text, (prompt, position) in zip(tokenizer(texts, verbose=False).input_ids, texts, batch):
            if len(ids) <= limit:
                continue
            left = _cut_text(tokenizer, text, limit)
            if len(left) < len(expand(prompt[:position]).rstrip()):
                raise UserError(
                    f"{flag}: '{prompt}' has {len(ids)} tokens, the text encoder takes {limit} and would only see "
                    f"'{left}', which lacks part of the class name or the style token; shorten it or put these first."
                )
            num_cut, example = num_cut + 1, example or left
    if num_cut:
        warn_once(
            f"{flag}: {num_cut} prompts are longer than {limit} tokens; they are truncated after class name and style "
            f"token, for example to '{example}'."
        )


def count_prompt_tokens(
    generator: Generator, prompts: Sequence[str], placeholder: str | None, num_vectors: int,
    class_tokens: Sequence[str] = (),
) -> list[int]:  # fmt: skip
    """Return the number of tokens of each prompt, with start and end; every vector of the style token counts."""
    tokenizer, _, expand = load_prompt_tokenizer(generator, placeholder, num_vectors, class_tokens)
    return [len(ids) for ids in tokenizer([expand(prompt) for prompt in prompts], verbose=False).input_ids]


def load_prompt_tokenizer(
    generator: Generator, placeholder: str | None, num_vectors: int, class_tokens: Sequence[str] = ()
) -> tuple:
    """Return the tokenizer whose text encoder reads the most tokens, their number, and a function that expands the
    placeholder in a prompt to all its vectors, as the pipeline does."""
    import transformers

    source, parameters, tokenizers = generator.source, generator.call_parameters, []
    for name, (library, kind) in generator.parts.items():
        if not name.startswith("tokenizer") or name.replace("tokenizer", "text_encoder") not in generator.parts:
            continue
        if library != "transformers":
            raise UserError(f"{source.flag} {source.name}: its tokenizer, {kind}, must be one of transformers.")
        options = source.load_options() | {"subfolder": name}
        with source.reading("has no usable tokenizer", also=(ValueError,)):
            tokenizer = getattr(transformers, kind).from_pretrained(source.name, **options)
        # the limit of CLIP is its tokenizer's (77), that of others (T5) the pipeline's
        is_cut_by_pipeline = not kind.startswith("CLIP") and "max_sequence_length" in parameters
        limit = parameters["max_sequence_length"].default if is_cut_by_pipeline else tokenizer.model_max_length
        tokenizers.append((tokenizer, limit))
    if not tokenizers:
        raise UserError(f"{source.flag} {source.name}: has no tokenizer with a text encoder.")
    tokenizer, limit = max(tokenizers, key=lambda pair: pair[1])
    tokenizer.add_tokens(list(class_tokens))
    if placeholder is None:
        return tokenizer, limit, str
    vectors = token_text(placeholder, num_vectors)
    tokenizer.add_tokens(vectors.split())
    return tokenizer, limit, lambda prompt: prompt.replace(placeholder, vectors)


def _cut_text(tokenizer, text: str, limit: int) -> str:
    """Return the part of a text before the first character that is not read when its tokens are cut to `limit`.

    Not up to the last one that is read: in T5, a token for a space has the position of the next character.
    """
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False).offset_mapping
    first_lost, _ = offsets[limit - tokenizer.num_special_tokens_to_add()]
    return text[:first_lost].rstrip()


def _needed_part(template: str, noun: str) -> str:
    """Return the beginning of a template up to class and tokens; all of it if the class is not named."""
    places = ("{class}", "{token}", f"{{{CLASS_TOKEN}}}")
    ends = [template.index(place) + len(place) for place in places if place in template]
    if "{class}" not in template:
        # a whole word, and not the placeholder '{token}' for a class of that name
        named = re.search(rf"(?<![\w{{]){re.escape(noun)}(?!\w)", template, re.IGNORECASE)
        ends.append(named.end() if named else len(template))
    return template[: max(ends)]


def _measure(
    template: str, noun: str, token_text: str, article: str = AS_WRITTEN, **others: str
) -> tuple[str, int]:  # fmt: skip
    """Return a prompt, and the number of its first characters that a text encoder must read."""
    needed = render_prompt(_needed_part(template, noun), noun, token_text, article, **others)
    return render_prompt(template, noun, token_text, article, **others), len(needed)


def _size(text: str) -> int:
    return len(text.encode())  # bytes, which tokens are made of


def digest(text: str) -> bytes:
    """Return a short hash, for random choices that are the same in every run."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
