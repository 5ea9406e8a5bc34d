"""Contexts: what surrounds the object in each training image, in words without its class. No torch."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.cli.errors import UserError
from utils.cli.parsing import read_text
from utils.cli.records import write_text
from utils.data.prompts import fill_context

FLAG = "--contexts_file"
# the keys of a line
KEY, LABEL, CONTEXT = "image_sha256", "label", "context"
LINE = '{"image_sha256": "9f86...", "label": "suv", "context": "on a gravel road, seen from the side"}'
MIN_WORDS = 2  # of a part that named the class: less is left over from words about the object

# marks that mean something in prompts, or belong to Markdown
MARKS = re.compile(r"[{}<>*_`#\"“”|]+")
# 'Background: a field. View: from above'
HEADING = re.compile(r"(^|[\n.,;]\s*)[A-Z]\w*(?: \w+)?:\s")
# what a part of an answer may begin with, before it says anything
OPENING = re.compile(
    r"(?:[-–•]\s*|\d+[.)]\s+|(?:in|of) (?:the|this) (?:image|photo|picture)\b,?\s*"
    r"|(?:the|this) (?:image|photo|picture|scene|background|setting|view|viewpoint|pose) (?:is|shows|has|features)\b\s*"
    r"|(?:there|it) (?:is|are)\b\s*|and\b\s*|which\b\s*)+",
    re.IGNORECASE,
)
# what a part must not end with
DANGLING = re.compile(r"(?:\s+|^)(?:an?|the|this|that|its|and|or|of|with|in|on|at|by|is|are|behind|near)$", re.I)


@dataclass(frozen=True)
class ImageContext:
    """The context of an image; `key` is the SHA-256 of its encoded bytes, `label` its class name."""

    key: str
    label: str
    context: str


@dataclass(frozen=True)
class Contexts:
    """The contexts in a file, in its order; `about` says how they were made, {} if the file does not."""

    images: tuple[ImageContext, ...]
    about: dict

    @property
    def sha256(self) -> str:
        """The hash of all contexts, in any order."""
        facts = sorted((image.key, image.label, image.context) for image in self.images)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def of_images(self, keys: Sequence[str], where: str) -> list[str]:
        """Return the context of each image, given as keys; `where` begins the message.

        Raises:
            UserError: the file has no line for some of them.
        """
        known = {image.key: image.context for image in self.images}
        missing = [key for key in keys if key not in known]
        if missing:
            raise UserError(
                f"{where} has no context for {len(missing):,} of the {len(keys):,} training images, so it is of other "
                "images; run describe_images.py with the same flags for the real images."
            )
        return [known[key] for key in keys]


def read_contexts(path: str | Path) -> Contexts:
    """Return the contexts in a JSON Lines file of describe_images.py.

    A first line without the key of an image says how they were made.

    Raises:
        UserError: the file cannot be read, has no contexts, or a line has other keys.
    """
    flag = f"{FLAG} {path}:"
    about, images = {}, {}
    for number, line in enumerate(read_text(Path(path), flag).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{flag} line {number}: must be JSON, such as {LINE} ({error}).") from None
        if number == 1 and isinstance(entry, dict) and KEY not in entry and "model" in entry:
            about = entry
            continue
        values = [entry.get(name) for name in (KEY, LABEL, CONTEXT)] if isinstance(entry, dict) else [None]
        if not all(isinstance(value, str) for value in values):
            raise UserError(f"{flag} line {number}: must have texts '{KEY}', '{LABEL}' and '{CONTEXT}', as {LINE}.")
        image = ImageContext(values[0], values[1], " ".join(MARKS.sub(" ", values[2]).split()))
        images[image.key, image.label] = image
    if not images:
        raise UserError(f"{flag} has no contexts; write it with describe_images.py.")
    return Contexts(tuple(images.values()), about)


def write_contexts(path: str | Path, contexts: Contexts) -> None:
    """Write the file that `read_contexts` reads, whole or not at all."""
    names = {"key": KEY, "label": LABEL, "context": CONTEXT}
    lines = [{names[name]: value for name, value in asdict(image).items()} for image in contexts.images]
    everything = [contexts.about, *lines] if contexts.about else lines
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in everything))


def clean_answer(answer: str, noun: str, max_words: int) -> tuple[str, bool]:
    """Return the context in a model's answer, at most `max_words` words, and whether the answer named the class.

    The answer is split at its commas and full stops. Of a part that names the class, what follows the name is kept, or
    else what precedes it. An answer that says nothing else gives an empty context.
    """
    named, kept = _naming_pattern(noun), []
    is_named = False
    for part in re.split(r"\n+|[,;:.!?]+(?=\s|$)", HEADING.sub(r"\1", MARKS.sub(" ", answer))):
        least, found = 1, named.search(part)
        while found is not None:
            is_named, least = True, MIN_WORDS
            part = part[found.end() :] if _num_words(part[found.end() :]) >= MIN_WORDS else part[: found.start()]
            found = named.search(part)
        part = _tidy(part)
        if _num_words(part) >= least and part not in kept:
            kept.append(part)
    words = ", ".join(kept).split()
    return _cut(words, min(max_words, len(words))), is_named


def _naming_pattern(noun: str) -> re.Pattern:
    """Return the pattern of a class's name: its noun, the noun's last word, or a word of it that is a name itself.

    These words begin with a capital letter or have a digit, as in 'Boeing 737-200', where '737' counts too. So do
    plurals.
    """
    words = noun.split()
    alone = [word for word in words if word[0].isupper() or re.search(r"\d", word)] if len(words) > 1 else []
    alone += [piece for word in alone for piece in word.split("-") if len(piece) > 1]
    names = sorted({noun, words[-1], *alone}, key=lambda name: (-len(name), name))
    escaped = "|".join(re.escape(name) for name in names if re.search(r"\w", name))
    return re.compile(rf"(?<![\w-])(?:{escaped or '(?!)'})(?:'s|e?s)?(?![\w-])", re.IGNORECASE)


def _tidy(part: str) -> str:
    """Return a part of an answer without empty words at its ends, in lower case at its start."""
    part = OPENING.sub("", " ".join(part.split()), count=1) if OPENING.match(part.strip()) else " ".join(part.split())
    part = _drop_ending(part.strip(" ,;:.-'"))
    # 'On a road' continues a prompt, but 'USA' and 'X-ray' stay
    return part[0].lower() + part[1:] if re.match(r"[A-Z](?:[a-z]|\s)", part) else part


def _cut(words: list[str], number: int) -> str:
    """Return the first words of a context, without what the cut leaves dangling."""
    text = " ".join(words[:number])
    return text if number == len(words) else _drop_ending(text.rstrip(" ,;:-"))


def _drop_ending(text: str) -> str:
    while shorter := DANGLING.search(text):
        text = text[: shorter.start()].rstrip(" ,;:-")
    return text


def _num_words(text: str) -> int:
    return len(re.findall(r"\w[\w'-]*", text))


def fill_contexts(
    prompts: Sequence[str], contexts: Sequence[str], fits: Callable[[list[str]], Iterable[bool]]
) -> tuple[list[str], list[str], int]:
    """Fill `{context}` in each prompt; return the prompts, the contexts in them, and how many were shortened.

    A prompt that does not fit loses the last words of its context, all of them if need be; `fits` judges prompts.
    """
    words = [context.split() for context in contexts]
    left = [len(each) for each in words]

    def cut(row: int) -> str:
        return _cut(words[row], left[row])

    filled = [fill_context(prompt, cut(row)) for row, prompt in enumerate(prompts)]
    open_rows = list(range(len(prompts)))
    while open_rows:
        fitting = fits([filled[row] for row in open_rows])
        open_rows = [row for row, is_fitting in zip(open_rows, fitting, strict=True) if not is_fitting and left[row]]
        for row in open_rows:
            left[row] -= 1
            filled[row] = fill_context(prompts[row], cut(row))
    used = [cut(row) for row in range(len(prompts))]
    return filled, used, sum(number < len(each) for each, number in zip(words, left))
