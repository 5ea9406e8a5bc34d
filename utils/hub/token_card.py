"""The card of a style token."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = Path(__file__).parent / "templates" / "token_card.md.jinja"


def write_token_card(output_dir: str | Path, record: dict, run: dict) -> None:
    """Write `README.md` for a token from its `dsi_config.json` and `run_config.json` records."""
    base_model, dataset = record["base_model"]["id"], record["real_images"]["dataset_name"]
    metadata = ModelCardData(
        # ids only: the metadata link to the Hub, where a local folder is nothing
        base_model=None if Path(base_model).is_dir() else base_model,
        datasets=None if Path(dataset).is_dir() else [dataset],
        library_name="diffusers",
        tags=["textual_inversion", "dataset-style-inversion", "bridged-transfer"],
    )
    card = ModelCard.from_template(
        metadata, template_path=str(TEMPLATE), name=Path(output_dir).resolve().name, record=record, run=run
    )
    card.save(Path(output_dir) / "README.md")
