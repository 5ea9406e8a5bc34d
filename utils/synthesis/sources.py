"""What a synthetic set is made from: generator, class names, style token. Read from records, before any model loads."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.cli.arguments import RealDataArguments
from utils.cli.errors import UserError
from utils.cli.records import DSI_CONFIG, read_record
from utils.data.class_names import prompt_nouns
from utils.data.prompts import DSI_TEMPLATE, PLAIN_TEMPLATE
from utils.hub.repositories import Source, open_source
from utils.style.base_models import BaseModel, open_base_model

LEARNED_EMBEDS = "learned_embeds.safetensors"
TOKEN = "a style token of train_dsi.py"


@dataclass(frozen=True)
class StyleToken:
    """A learned token: its file, and where that came from."""

    id: str
    revision: str | None
    sha256: str
    placeholder_token: str
    num_vectors: int
    path: Path

    def to_dict(self) -> dict:
        return {key: value for key, value in asdict(self).items() if key != "path"}


@dataclass(frozen=True)
class Sources:
    """Everything the images depend on besides the sampling settings.

    `real_images` is the record of the real set, `train_indices` the rows of it that the token has seen.
    """

    generator: Source
    class_names: list[str]
    prompt_nouns: list[str]
    real_images: dict
    resolution: int
    prompt_template: str = PLAIN_TEMPLATE
    token: StyleToken | None = None
    train_indices: list[int] | None = None


def read_token_sources(
    learned_embeds: str, revision: str | None = None, use_style_token: bool = True, hub_token: str | None = None
) -> Sources:
    """Return the sources that a style token's record names; without `use_style_token`, all of them but the token.

    Raises:
        UserError: neither folder nor repository, a file or an entry is missing, no class names.
    """
    source = open_source(learned_embeds, "--learned_embeds", revision=revision, token=hub_token)
    record = read_record(source.file(DSI_CONFIG, TOKEN))
    path = source.file(LEARNED_EMBEDS, TOKEN)
    if not record.get("class_names"):
        raise UserError(f"--learned_embeds {learned_embeds}: its {DSI_CONFIG} has no class names.")
    try:
        base_model = record["base_model"]
        token = StyleToken(
            id=learned_embeds,
            revision=source.revision,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            placeholder_token=record["placeholder_token"],
            num_vectors=record["num_vectors"],
            path=path,
        )
        return Sources(
            generator=open_generator(
                base_model["id"], "base model of --learned_embeds", base_model["revision"], hub_token
            ).source,
            class_names=record["class_names"],
            prompt_nouns=record["prompt_nouns"],
            real_images=record["real_images"],
            prompt_template=_class_template(record.get("prompt_templates", [])) if use_style_token else PLAIN_TEMPLATE,
            token=token if use_style_token else None,
            train_indices=record.get("train_indices") if use_style_token else None,
            resolution=record["resolution"],
        )
    except KeyError as error:
        raise UserError(f"--learned_embeds {learned_embeds}: its {DSI_CONFIG} has no {error}.") from None


def read_plain_sources(
    pretrained_model_name_or_path: str, revision: str | None, real_data: RealDataArguments, hub_token: str | None = None
) -> Sources:
    """Return the sources for images without a style token: a generator, and the class names of a real set.

    Raises:
        UserError: the generator is neither folder nor repository; what `load_real_images` raises.
    """
    # not at the top: datasets takes seconds to import, and with a token it is not needed before sampling
    from utils.data.real_images import RealImagesRecord, load_real_images

    generator = open_generator(pretrained_model_name_or_path, "--pretrained_model_name_or_path", revision, hub_token)
    images = load_real_images(RealImagesRecord.from_arguments(real_data), hub_token)
    if not images.class_names:
        raise UserError(f"--dataset_name {images.record.name}: its label column has no class names.")
    return Sources(
        generator.source,
        images.class_names,
        prompt_nouns(images.class_names),
        images.record.to_dict(),
        resolution=generator.native_resolution,
    )


def _class_template(templates: list[str]) -> str:
    """Return the first of a token's templates that has a place for the class name, which images are drawn for."""
    return next((template for template in templates if "{class}" in template), DSI_TEMPLATE)


def open_generator(name: str, flag: str, revision: str | None, hub_token: str | None) -> BaseModel:
    """Return a Stable Diffusion 1.x/2.x pipeline, its commit pinned.

    Raises:
        UserError: it is neither folder nor repository, or another pipeline.
    """
    base_model = open_base_model(name, flag, revision, hub_token)
    if base_model.is_xl:
        raise UserError(
            f"{flag} {name}: is a {base_model.pipeline_class}; images are drawn by Stable Diffusion 1.x/2.x."
        )
    return base_model
