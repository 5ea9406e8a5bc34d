"""The card of a style token."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from utils.cli.records import image_set_name
from utils.hub.licenses import License, common_license, hub_ids
from utils.hub.markdown import FUNCTIONS
from utils.hub.merged_card import save_card
from utils.style.families import FAMILIES, OTHER

STYLE_PICTURE = "style.png"
TEMPLATE = Path(__file__).with_name("card.md.jinja")


def write_token_card(
    output_dir: str | Path,
    record: dict,
    run: dict,
    licenses: dict[str, License],
    command: str,
    hub_id: str | None = None,
) -> None:
    """Write `README.md` for a token from its `dsi_config.json` and `run_config.json` records.

    `licenses` maps each source's name to its licence; the token gets that of the base model. The code in the card
    names `hub_id` where the token is published, else the folder. A card that is there already is merged.

    Raises:
        UserError: that card's metadata are malformed.
    """
    real = image_set_name(record["real_images"])
    base_models = hub_ids(record["base_model"]["id"])
    metadata = ModelCardData(
        **common_license([licenses[record["base_model"]["id"]]]).to_metadata(),
        base_model=base_models[0] if base_models else None,
        base_model_relation="adapter" if base_models else None,
        datasets=hub_ids(real) or None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["textual_inversion", "dataset-style-inversion", "bridged-transfer"],
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        name=hub_id or Path(output_dir).resolve().name,
        real=real,
        record=record,
        text_encoders=FAMILIES.get(record.get("pipeline_class"), OTHER).text_encoders,
        run=run,
        licenses=licenses,
        command=command,
        **FUNCTIONS,
        has_style_picture=(Path(output_dir) / STYLE_PICTURE).is_file(),
    )
    save_card(card, Path(output_dir) / "README.md")
