"""The card of a style token."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = Path(__file__).parent / "templates" / "token_card.md.jinja"


def write_token_card(output_dir: str | Path, record: dict, run: dict) -> None:
    """Write `README.md` for a token from its `dsi_config.json` and `run_config.json` records."""
    metadata = ModelCardData(
        base_model=record["base_model"]["id"],
        datasets=[record["real_images"]["dataset_name"]],
        library_name="diffusers",
        tags=["textual_inversion", "dataset-style-inversion", "bridged-transfer"],
    )
    card = ModelCard.from_template(
        metadata, template_path=str(TEMPLATE), name=Path(output_dir).resolve().name, record=record, run=run
    )
    card.save(Path(output_dir) / "README.md")
