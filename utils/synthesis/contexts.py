"""The contexts of real images in the prompts of synthetic ones: of any class, or of the same. No torch."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from utils.cli.errors import UserError
from utils.cli.parsing import suggestion
from utils.cli.processes import warn_once
from utils.data.class_names import list_names, match_class_names
from utils.data.contexts import Contexts, ImageContext, fill_contexts, read_contexts
from utils.data.prompts import fill_context
from utils.synthesis.prompts import TemplatePrompts, digest, load_prompt_tokenizer
from utils.synthesis.sources import Sources

ALL, OWN = "all", "own"  # values of --contexts_of
# what decides which real images a file describes
CHOICES = ("dataset_name", "train_dir", "train_split", "num_shots", "max_train_samples", "fold")
SEEDS = {"few_shot_seed": ("num_shots", "max_train_samples"), "fold_seed": ("fold",)}


@dataclass(frozen=True)
class ContextPrompts:
    """Prompts from templates with `{context}`, which the contexts of real images fill.

    `contexts` maps label ids to the contexts that a class's images get in turn, starting at `starts`. If classes share
    contexts, evenly spaced starts in an order that is random, but always the same, give each context an equal share of
    all images, and make class and context independent.
    """

    prompts: TemplatePrompts
    contexts: dict[int, tuple[str, ...]]
    starts: dict[int, int]

    @property
    def flag(self) -> str:
        return self.prompts.flag

    @property
    def class_tokens(self) -> tuple[str, ...]:
        return self.prompts.class_tokens

    def prompt(self, label: int, class_index: int) -> str:
        """Return the prompt of the `class_index`-th image of a class."""
        contexts = self.contexts[label]
        context = contexts[(self.starts[label] + class_index) % len(contexts)]
        return fill_context(self.prompts.prompt(label, class_index), context)

    def longest(self) -> Iterator[tuple[str, int]]:
        """Yield prompts to check, as in `TemplatePrompts`, without contexts: these are shortened to fit."""
        templates = tuple(fill_context(template, "") for template in self.prompts.templates)
        return replace(self.prompts, templates=templates).longest()


def add_contexts(
    prompts: TemplatePrompts, sources: Sources, labels: Sequence[int], path: str, contexts_of: str
) -> tuple[ContextPrompts, dict[str, str]]:
    """Return the prompts with the contexts in a file, and their settings.

    Contexts are shortened until the text encoder reads the longest prompt in full, so that they are the same for all
    classes. Empty ones are left out.

    Raises:
        UserError: the file cannot be read, or is of other classes; a class of `labels` has no contexts of its own;
            there is no room for contexts.
    """
    flag, contexts = f"--contexts_file {path}:", read_contexts(path)
    _warn_about_other_images(flag, contexts, sources.real_images)
    by_label = _match_labels(contexts.images, sources.class_names, flag)
    # the key of an image is as good as random
    described = [one for one in contexts.images if one.context]
    pairs = sorted((digest(f"{one.key}/{one.label}"), by_label[one.label], one.context) for one in described)
    if not pairs:
        raise UserError(f"{flag} all contexts are empty.")
    texts = _shorten([context for *_, context in pairs], prompts, sources, flag)
    if contexts_of == OWN:
        own: dict[int, tuple[str, ...]] = {}
        for (_, label, _), text in zip(pairs, texts):
            own[label] = (*own.get(label, ()), text)
        if lacking := [sources.class_names[label] for label in labels if label not in own]:
            raise UserError(f"--contexts_of {OWN}: {path} has no contexts of {list_names(lacking)}; try {ALL}.")
        lists, starts = {label: own[label] for label in labels}, dict.fromkeys(labels, 0)
    else:
        lists = dict.fromkeys(labels, tuple(texts))
        starts = {label: label * len(texts) // len(sources.class_names) for label in labels}
    settings = {"contexts_sha256": contexts.sha256, "contexts_of": contexts_of}
    return ContextPrompts(prompts, lists, starts), settings


def _match_labels(images: Iterable[ImageContext], class_names: list[str], flag: str) -> dict[str, int]:
    """Return the label id of each class name in a file."""
    names = list(dict.fromkeys(image.label for image in images))
    matched = match_class_names(names, class_names, flag, is_unique=False)
    for name in names:
        if name not in matched:
            raise UserError(f"{flag} is of other images: label {name!r}: no such class{suggestion(name, class_names)}.")
    return {name: class_names.index(matched[name]) for name in names}


def _shorten(contexts: list[str], prompts: TemplatePrompts, sources: Sources, flag: str) -> list[str]:
    tokenizer, limit, expand = load_prompt_tokenizer(sources.generator, *sources.placeholder, sources.class_token_names)

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer([expand(text) for text in texts], verbose=False).input_ids]

    # of all classes, so that a context does not depend on those that are drawn; each uses all templates in turn
    pairs = product(range(len(prompts.nouns)), range(len(prompts.templates)))
    all_prompts = [prompts.prompt(label, number) for label, number in pairs]
    lengths = count([fill_context(prompt, "") for prompt in all_prompts])
    longest = all_prompts[lengths.index(max(lengths))]
    _, used, num_short = fill_contexts(
        [longest] * len(contexts), contexts, lambda texts: [number <= limit for number in count(texts)]
    )
    if not all(used):
        raise UserError(
            f"{flag} no room for contexts: the text encoder takes {limit} tokens, and without a context "
            f"'{fill_context(longest, '')}' has {max(lengths)}; shorten the template."
        )
    if num_short:
        warn_once(
            f"{flag} {num_short:,} of {len(contexts):,} contexts are shortened: the text encoder takes {limit} tokens, "
            f"with the longest class name and the style token."
        )
    return used


def _warn_about_other_images(flag: str, contexts: Contexts, real_images: dict | None) -> None:
    """Warn if a file says that it describes other real images than those of the sources."""
    described = contexts.about.get("real_images")
    if described is None or real_images is None:
        return
    names = [*CHOICES, *(seed for seed, choices in SEEDS.items() if any(map(real_images.get, choices)))]
    differing = [
        f"{name} {described.get(name)} instead of {real_images.get(name)}"
        for name in names
        if described.get(name) != real_images.get(name)
    ]
    if differing:
        warn_once(
            f"{flag} describes other images than those of the other settings ({'; '.join(differing)}); a few-shot "
            "experiment then uses more than its shots."
        )
