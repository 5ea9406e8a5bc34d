"""The sources of a synthetic set: generator, class names, style token. Read from records, before any model loads."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from utils.cli.errors import UserError
from utils.cli.options import absolute_if_local
from utils.cli.parsing import suggestion
from utils.cli.records import DSI_CONFIG, read_record
from utils.data.arguments import RealDataArguments
from utils.data.class_names import match_class_names, prompt_nouns, read_class_names, read_class_names_file
from utils.data.prompts import AS_WRITTEN, AUTO, CLASS_TOKEN, DSI_TEMPLATE, PLAIN_TEMPLATE, with_others
from utils.hub.repositories import open_source
from utils.style.families import LEARNED_EMBEDS, OWN_SCHEDULER
from utils.synthesis.few_steps import FewSteps
from utils.synthesis.generators import TRUE_CFG_SCALE, Generator, open_generator
from utils.synthesis.init_images import InitImages
from utils.synthesis.learned import (
    CLASS_EMBEDS,
    LEARNED_LORA,
    TOKEN,
    ClassTokens,
    open_class_tokens,
    open_learned_lora,
)
from utils.synthesis.lora import LoraAdapter, record_adapters

GENERATOR_CONTENTS, SCHEDULER_CONFIG = "generator_contents", "scheduler_config"  # among a set's settings


@dataclass(frozen=True)
class StyleToken:
    """A learned token: its file and its origin."""

    id: str
    revision: str | None
    sha256: str
    placeholder_token: str
    num_vectors: int
    path: Path

    def to_dict(self) -> dict:
        record = {key: value for key, value in asdict(self).items() if key != "path"}
        return record | {"id": absolute_if_local(self.id)}


@dataclass(frozen=True)
class Sources:
    """Everything that the images depend on, besides the sampling settings.

    `chosen_nouns` are the classes whose nouns come from --class_names_file. `real_images` is the record of the real
    set, None if only class names are known; `train_indices` are its rows that the token was trained on. `article` is
    that of the prompts that the token was trained with. `learned_lora` and `class_tokens` were learned with it. `loras`
    are further adapters of the generator. `init_images` are the real images that synthetic ones are made from.
    """

    generator: Generator
    class_names: list[str]
    prompt_nouns: list[str]
    chosen_nouns: set[str]
    real_images: dict | None
    resolution: int
    prompt_templates: list[str]
    article: str = AUTO
    token: StyleToken | None = None
    train_indices: list[int] | None = None
    learned_lora: LoraAdapter | None = None
    class_tokens: ClassTokens | None = None
    loras: tuple[LoraAdapter, ...] = ()
    init_images: InitImages | None = None

    def with_loras(self, loras: tuple[LoraAdapter, ...]) -> "Sources":
        """Return the sources with further adapters.

        Raises:
            UserError: one of them is the LoRA that was learned with the style token, and would be fused twice.
        """
        for lora in loras:
            if self.learned_lora is not None and lora.sha256 == self.learned_lora.sha256:
                raise UserError(
                    f"--lora {lora.source.name}: is the LoRA of --learned_embeds {self.token.id}, which is fused "
                    "already; leave it out, or add --use_learned_lora false to give it a scale."
                )
        return replace(self, loras=loras)

    @property
    def adapters(self) -> list[LoraAdapter]:
        """All adapters, in the order in which they are fused."""
        return [*filter(None, [self.learned_lora]), *self.loras]

    @cached_property
    def few_steps(self) -> FewSteps | None:
        """How to sample the generator with its adapters; None if they are not distilled for few steps."""
        few_steps = next((lora.few_steps for lora in self.loras if lora.few_steps), None)
        if few_steps and not self.generator.family.scales_model_input:  # flow matching needs its own schedulers
            scale = few_steps.guidance_scale if self.generator.guidance_parameter == TRUE_CFG_SCALE else None
            few_steps = replace(few_steps, scheduler=OWN_SCHEDULER, scheduler_config={}, guidance_scale=scale)
        return few_steps or self.generator.few_steps

    @property
    def default_scheduler(self) -> str:
        own = self.few_steps is None or self.few_steps.scheduler == OWN_SCHEDULER
        return self.generator.default_scheduler if own else self.few_steps.scheduler

    @property
    def placeholder(self) -> tuple[str | None, int]:
        """The style token's placeholder in prompts, and its number of vectors; None and 1 without a token."""
        return (self.token.placeholder_token, self.token.num_vectors) if self.token else (None, 1)

    @property
    def class_token_names(self) -> tuple[str, ...]:
        return self.class_tokens.names if self.class_tokens else ()

    @property
    def learned_settings(self) -> dict[str, str | None]:
        """The settings for what was learned with the token."""
        return {
            LEARNED_LORA: self.learned_lora and self.learned_lora.sha256,
            CLASS_EMBEDS: self.class_tokens and self.class_tokens.sha256,
        }

    def check_unchanged(self, settings: dict) -> None:
        """Check that generator, token and adapters still match a set's settings.

        Raises:
            UserError: one of them was replaced.
        """
        now = {GENERATOR_CONTENTS: self.generator.identity}
        if self.token is not None:
            now["learned_embeds_sha256"] = _sha256(self.token.path)
        if self.learned_lora is not None:
            now[LEARNED_LORA] = _sha256(self.learned_lora.path)
        if self.class_tokens is not None:
            now[CLASS_EMBEDS] = _sha256(self.class_tokens.path)
        if self.loras:
            hashes = [replace(lora, sha256=_sha256(lora.path)) for lora in self.loras]
            now["lora_sha256"] = record_adapters(hashes)["lora_sha256"]
        for name, value in now.items():
            if settings.get(name, value) != value:
                raise UserError(
                    f"{self.generator.prefix} {name} was {settings[name]}, now {value}: replaced while images were "
                    "drawn; the finished shards are from before. Restore it to continue, or choose another "
                    "--output_dir."
                )

    def names_of(self, labels: Iterable[int]) -> tuple[list[str], list[str]]:
        """Return the names and nouns of some classes."""
        return [self.class_names[label] for label in labels], [self.prompt_nouns[label] for label in labels]


def read_token_sources(
    learned_embeds: str, revision: str | None = None, use_style_token: bool = True, class_names_file: str | None = None,
    hub_token: str | None = None, use_learned_lora: bool = True,
) -> Sources:  # fmt: skip
    """Return the sources in a style token's record; without `use_style_token`, all but what was learned.

    Without `use_learned_lora`, the LoRA that was learned with the token is left out.

    Nouns in `class_names_file` replace those that the token was trained with.

    Raises:
        UserError: the token is neither a folder nor a repository, or lacks a file, an entry or class names.
    """
    source = open_source(learned_embeds, "--learned_embeds", revision=revision, token=hub_token)
    record = read_record(source.file(DSI_CONFIG, TOKEN))
    path = source.file(LEARNED_EMBEDS, TOKEN)
    class_names = record.get("class_names")
    if not class_names:
        raise UserError(f"--learned_embeds {learned_embeds}: its {DSI_CONFIG} has no class names.")
    try:
        base_model, trained_with = record["base_model"], dict(zip(class_names, record["prompt_nouns"]))
        chosen = read_class_names_file(class_names_file, class_names) if class_names_file else {}
        token = StyleToken(
            learned_embeds, source.revision, _sha256(path), record["placeholder_token"], record["num_vectors"], path
        )
        flag = "base model of --learned_embeds"
        generator = open_generator(base_model["id"], flag, base_model["revision"], hub_token)
        nouns = prompt_nouns(class_names, trained_with | chosen)
        without_token = Sources(
            generator, class_names, nouns, set(chosen), record["real_images"], record["resolution"], [PLAIN_TEMPLATE],
            record.get("article", AS_WRITTEN),  # earlier versions had no other
        )  # fmt: skip
        if not use_style_token:
            return without_token
        class_tokens, learned_lora = record.get("class_tokens"), record.get("lora")
        # images are drawn only from templates that name the class
        templates = [template for template in record.get("prompt_templates", []) if "{class}" in template]
        usual = with_others(DSI_TEMPLATE, [CLASS_TOKEN] if class_tokens else [])
        sources = replace(
            without_token, prompt_templates=templates or [usual], token=token,
            train_indices=record.get("train_indices"),
            class_tokens=open_class_tokens(source, class_tokens) if class_tokens else None,
            learned_lora=open_learned_lora(source, learned_lora) if learned_lora and use_learned_lora else None,
        )  # fmt: skip
    except KeyError as error:
        raise UserError(f"--learned_embeds {learned_embeds}: its {DSI_CONFIG} has no {error}.") from None
    if not (use_learned_lora or learned_lora):
        raise UserError(f"--use_learned_lora false: {learned_embeds} has no LoRA; leave --use_learned_lora out.")
    if sources.learned_lora is not None:
        sources.learned_lora.check(generator)
    if sources.class_tokens is not None:
        sources.class_tokens.check(generator, len(class_names))
    return sources


def read_plain_sources(
    pretrained_model_name_or_path: str, revision: str | None, real_data: RealDataArguments | None,
    class_names_file: str | None = None, hub_token: str | None = None, resolution: int | None = None,
) -> Sources:  # fmt: skip
    """Return the sources for images without a style token: a generator and class names.

    Class names are those of a real set or, without one, of `class_names_file`, in the order of their label ids.
    `resolution` is the generator's own by default.

    Raises:
        UserError: the generator is neither a folder nor a repository; or from `load_labelled_splits`.
    """
    generator = open_generator(pretrained_model_name_or_path, "--pretrained_model_name_or_path", revision, hub_token)
    if real_data is None:
        chosen = read_class_names(class_names_file)
        class_names, record = list(chosen), None
    else:
        # imported late: datasets takes seconds, and with a token it is not needed before sampling
        from utils.data.image_set import RealImagesRecord
        from utils.data.real_images import load_labelled_splits

        images = load_labelled_splits(RealImagesRecord.from_arguments(real_data), hub_token)
        class_names, record = images.class_names, images.record.to_dict()
        if not class_names:
            raise UserError(f"--dataset_name {images.record.name}: its label column has no class names.")
        chosen = read_class_names_file(class_names_file, class_names) if class_names_file else {}
    nouns = prompt_nouns(class_names, chosen)
    return Sources(
        generator, class_names, nouns, set(chosen), record, resolution or generator.native_resolution, [PLAIN_TEMPLATE]
    )  # fmt: skip


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find_labels(classes: list[str] | None, excluded: list[str] | None, class_names: list[str]) -> tuple[int, ...]:
    """Return the labels of --classes (default: all) without --exclude_classes, in label order.

    Raises:
        UserError: a class is unknown or ambiguous, or is in both; no class is left.
    """
    left_out = _find_classes(excluded or [], class_names, "--exclude_classes")
    chosen = set(class_names) - left_out
    if classes is not None:
        chosen = _find_classes(classes, class_names, "--classes")
        if chosen & left_out:
            raise UserError(
                f"--classes {' '.join(sorted(chosen & left_out))}: also in --exclude_classes (as a flag or in the "
                "recipe); name each class in only one of them."
            )
    if not chosen:
        raise UserError(f"--exclude_classes {' '.join(excluded)}: no class is left to draw.")
    return tuple(label for label, name in enumerate(class_names) if name in chosen)


def _find_classes(names: list[str], class_names: list[str], flag: str) -> set[str]:
    matched = match_class_names(names, class_names, flag, is_unique=False)
    for name in names:
        if name not in matched:
            raise UserError(f"{flag} {name}: no such class{suggestion(name, class_names)}.")
    return set(matched.values())
