"""The records and the card of a finished token, and the summary that the run prints. No torch."""

import time
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from utils.cli.options import absolute_if_local
from utils.cli.records import DSI_CONFIG, RUN_CONFIG, image_set_name
from utils.cli.run_folder import RunFolder
from utils.data.prompts import AS_WRITTEN, fill_context, render_prompt
from utils.hub.cards import FUNCTIONS, License, common_license, hub_ids, read_licenses, save_card
from utils.hub.targets import Target
from utils.style.base_models import BaseModel
from utils.style.families import CLASS_EMBEDS, FAMILIES, LEARNED_EMBEDS, LORA_WEIGHTS, OTHER

STYLE_PICTURE = "style.png"
TRAINING_PICTURE = "training.png"
PUBLISHED_FILES = (
    LEARNED_EMBEDS, CLASS_EMBEDS, LORA_WEIGHTS, TRAINING_PICTURE, STYLE_PICTURE, DSI_CONFIG, RUN_CONFIG, "README.md",
)  # fmt: skip
OUTPUTS = PUBLISHED_FILES[:-1]  # without the card, which may hold a person's text
# each has a loss in `health`; the third only with a LoRA adapter, which is part of the last one
ARMS = ("no_token", "untrained_token", "token_without_lora", "trained_token")
ARM_LABELS = {"token_without_lora": "token without LoRA", "trained_token": "token with LoRA"}  # with an adapter
TEMPLATE = Path(__file__).with_name("card.md.jinja")


def describe_token(
    base_model: BaseModel, real_images, nouns: list[str], templates: list[str], article: str | None, **settings
) -> dict:
    """Return the contents of `dsi_config.json`; without `article`, for a run of an earlier version."""
    return {
        "base_model": {"id": absolute_if_local(base_model.source.name), "revision": base_model.source.revision},
        "pipeline_class": base_model.pipeline_class, "real_images": real_images.record.to_dict(),
        "train_indices": real_images.train_indices.tolist(), "class_names": real_images.class_names,
        "prompt_nouns": nouns, "prompt_templates": templates, **({"article": article} if article else {}), **settings,
    }  # fmt: skip


def label_arms(health: dict) -> dict[str, str]:
    """Return the arms in `health` with their labels."""
    labels = ARM_LABELS if "loss_token_without_lora" in health else {}
    return {arm: labels.get(arm, arm.replace("_", " ")) for arm in ARMS if f"loss_{arm}" in health}


def write_records(
    folder: RunFolder, record: dict, started: float, command: str, target: Target | None, token: str | None
) -> None:
    """Write `run_config.json`, the card and, last, `dsi_config.json`; print what the token learned.

    `started` is the `time.time()` at the start of the run, `target` the repository that the token is published to.
    """
    base_model, real = record["base_model"], record["real_images"]
    sources = [
        (base_model["id"], "model", base_model["revision"]),
        (image_set_name(real), "dataset", real["dataset_revision"]),
    ]
    run = folder.write_run_config(started)
    write_token_card(folder.path, record, run, read_licenses(sources, token), command, target and target.repo_id)
    folder.finish(record)
    print_summary(folder.path, record["health"], time.time() - started)


def write_token_card(
    output_dir: str | Path, record: dict, run: dict, licenses: dict[str, License], command: str,
    hub_id: str | None = None,
) -> None:  # fmt: skip
    """Write `README.md` for a token from its `dsi_config.json` and `run_config.json` records.

    `licenses` maps each source's name to its license; the token gets that of the base model. The code in the card uses
    `hub_id` if the token is published, else the folder. An existing card is merged.

    Raises:
        UserError: the existing card's metadata are malformed.
    """
    real = image_set_name(record["real_images"])
    base_models = hub_ids(record["base_model"]["id"])
    metadata = ModelCardData(
        **common_license([licenses[record["base_model"]["id"]]]).to_metadata(),
        base_model=base_models[0] if base_models else None,
        base_model_relation="adapter" if base_models else None,
        datasets=hub_ids(real) or None, library_name="diffusers", pipeline_tag="text-to-image",
        tags=["textual_inversion", "dataset-style-inversion", "bridged-transfer"] + ["lora"] * ("lora" in record),
    )  # fmt: skip
    prompt = render_prompt(
        fill_context(record["prompt_templates"][0], ""), record["prompt_nouns"][0], record["placeholder_token"],
        record.get("article", AS_WRITTEN), class_token=next(iter(record.get("class_tokens", {}).get("names", [])), ""),
    )  # fmt: skip
    card = ModelCard.from_template(
        metadata, template_path=str(TEMPLATE), name=hub_id or Path(output_dir).resolve().name, real=real,
        is_published=hub_id is not None, record=record, run=run, prompt=prompt,
        text_encoders=FAMILIES.get(record.get("pipeline_class"), OTHER).text_encoders,
        licenses=licenses, command=command, **FUNCTIONS,
        has_style_picture=(Path(output_dir) / STYLE_PICTURE).is_file(),
    )  # fmt: skip
    save_card(card, Path(output_dir) / "README.md")


def print_summary(output_dir: Path, health: dict, seconds: float) -> None:
    """Print what the token learned, its folder, and the next command."""
    print(f"Denoising loss on {health['num_images']} {health['images']}, with fixed noise:")
    arms = label_arms(health)
    width = max(16, *map(len, arms.values()))
    for arm, label in arms.items():
        print(f"  {label:{width}s} {health[f'loss_{arm}']:.4f}")
    for embedding in health["embeddings"]:
        low, middle, high = embedding["vocabulary_5_50_95"]
        print(
            f"Embedding norm {embedding['norm']:.3f}; in the vocabulary, 5% are below {low:.3f}, half below "
            f"{middle:.3f} and 95% below {high:.3f}."
        )
    if health["num_skipped_images"]:
        print(f"{health['num_skipped_images']} damaged images were left out.")
    if not health["token_learned"]:
        print(
            "WARNING: the token learned nothing: its loss is not clearly below that of the untrained token. Try more "
            "steps, a higher --learning_rate, or another --initializer_token."
        )
    print(f"Style token in {output_dir}, {seconds:.0f} s. Next:")
    print(f"  accelerate launch generate_synthetic.py --learned_embeds {output_dir}")
