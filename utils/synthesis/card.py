"""The card of a synthetic image set."""

from pathlib import Path

from datasets import DatasetInfo, Features, SplitInfo
from datasets.info import DatasetInfosDict
from datasets.splits import SplitDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData

from utils.cli.records import image_set_name
from utils.hub.cards import FUNCTIONS, License, common_license, hub_ids, save_card

TEMPLATE = Path(__file__).with_name("card.md.jinja")


def write_dataset_card(
    output_dir: str | Path,
    features: Features,
    record: dict,
    prompts: dict[str, str],
    licenses: dict[str, License],
    command: str,
    hub_id: str | None = None,
    quality: str = "",
) -> None:
    """Write `README.md` for a synthetic set from its `generation_config.json` record.

    `prompts` has an example for each class that was drawn; `licenses` maps each source's name to its licence: the set
    gets theirs where they agree, 'unknown' where not. `quality` is the section on the quality report, in Markdown.
    Local paths are named in the text only: the Hub takes ids in the metadata. The code in the card names `hub_id`
    where the set is published, else the folder. A card that is there already is merged.

    Raises:
        UserError: that card's metadata are malformed.
    """
    output_dir = Path(output_dir)
    num_bytes = sum(path.stat().st_size for path in output_dir.glob("data/train-*.parquet"))
    metadata = DatasetCardData(
        **common_license(licenses.values()).to_metadata(),
        task_categories=["image-classification"],
        tags=["synthetic", "bridged-transfer", "diffusers"],
        base_model=next(iter(hub_ids(record["generator"]["id"])), None),
    )
    split = SplitInfo("train", num_bytes=num_bytes, num_examples=record["num_images"])
    info = DatasetInfo(
        features=features, splits=SplitDict(train=split), dataset_size=num_bytes, download_size=num_bytes
    )
    DatasetInfosDict(default=info).to_dataset_card_data(metadata)
    files = {"data_files": [{"split": "train", "path": "data/train-*"}]}
    MetadataConfigs(default=files).to_dataset_card_data(metadata)
    card = DatasetCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        name=hub_id or output_dir.resolve().name,
        real=record["real_images"] and image_set_name(record["real_images"]),
        record=record,
        settings=record["settings"],
        prompts=prompts,
        quality=quality,
        licenses=licenses,
        command=command,
        **FUNCTIONS,
    )
    save_card(card, output_dir / "README.md")
