"""What goes with the finished shards of a set: checksums, contact sheet, record and card."""

from utils.cli.records import GENERATION_CONFIG, image_set_name, read_record, write_record
from utils.data.name_doctor import Finding, write_class_names
from utils.hub.cards import read_licenses
from utils.synthesis.card import write_dataset_card
from utils.synthesis.output_folder import CLASS_NAMES, PREVIEW, QUALITY_RECORD
from utils.synthesis.preview import draw_contact_sheet
from utils.synthesis.quality_section import quality_section
from utils.synthesis.shards import Shards, synthetic_features
from utils.synthesis.sources import Sources


def finish_set(shards: Shards, sources: Sources, findings: list[Finding]) -> dict:
    """Write what goes with the finished shards, but for the card, and return the set's record."""
    shards.write_checksums()
    draw_contact_sheet(shards).save(shards.output_dir / PREVIEW)
    if findings:
        write_class_names(shards.output_dir / CLASS_NAMES, sources.class_names, sources.prompt_nouns, findings)
    record = read_record(shards.output_dir / GENERATION_CONFIG) | shards.summarise()
    write_record(shards.output_dir / GENERATION_CONFIG, record)
    return record


def write_card(shards: Shards, record: dict, command: str, hub_id: str | None, hub_token: str | None) -> None:
    """Write the card of a set, with the licences that its sources' cards name, and the quality report if it has one."""
    generator, real = record["generator"], record["real_images"]
    sources = [(generator["id"], "model", generator["revision"])]
    if real is not None:
        sources.append((image_set_name(real), "dataset", real["dataset_revision"]))
    path, quality = shards.output_dir / QUALITY_RECORD, None
    if path.exists():
        quality = read_record(path)
        if quality["num_images"]["synthetic"]["all"] != record["num_images"]:
            quality = None  # of before the set grew
    write_dataset_card(
        shards.output_dir,
        synthetic_features(shards.class_names),
        record,
        {shards.class_names[label]: shards.plan.prompts.prompt(label, 0) for label in shards.plan.labels},
        read_licenses(sources, hub_token),
        command,
        hub_id,
        quality_section(quality),
    )
