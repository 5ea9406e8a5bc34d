"""The card of a synthetic image set."""

from collections.abc import Sequence
from pathlib import Path

from datasets import DatasetInfo, Features, SplitInfo
from datasets.info import DatasetInfosDict
from datasets.splits import SplitDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData, RepoCard

from utils.cli.errors import UserError
from utils.hub.repositories import open_source

TEMPLATE = Path(__file__).parent / "templates" / "dataset_card.md.jinja"
UNKNOWN_LICENSE = "unknown"


def read_license(name: str, repo_type: str, revision: str | None = None, token: str | None = None) -> str:
    """Return the licence that the card of a folder or repository names, 'unknown' where it names none."""
    try:
        path = open_source(name, "licence of", repo_type, revision, token).file("README.md")
    except UserError:
        return UNKNOWN_LICENSE
    return RepoCard.load(path, ignore_metadata_errors=True).data.get("license") or UNKNOWN_LICENSE


def write_dataset_card(
    output_dir: str | Path,
    features: Features,
    record: dict,
    prompts: Sequence[str],
    num_redraws: dict[str, int],
    licenses: dict[str, str],
    command: str,
) -> None:
    """Write `README.md` for a synthetic set from its `generation_config.json` record.

    `num_redraws` has a count a class; `licenses` maps each source's name to its licence: the set gets theirs where
    they agree, 'unknown' where not. Local paths are named in the text only: the Hub takes ids in the metadata.
    """
    output_dir = Path(output_dir)
    num_bytes = sum(path.stat().st_size for path in output_dir.glob("data/train-*.parquet"))
    generator_id = record["generator"]["id"]
    metadata = DatasetCardData(
        license=next(iter(licenses.values())) if len(set(licenses.values())) == 1 else UNKNOWN_LICENSE,
        task_categories=["image-classification"],
        tags=["synthetic", "bridged-transfer", "diffusers"],
        base_model=None if Path(generator_id).exists() else generator_id,
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
        name=output_dir.resolve().name,
        record=record,
        prompts=prompts,
        num_redraws=num_redraws,
        licenses=licenses,
        command=command,
    )
    card.save(output_dir / "README.md")
