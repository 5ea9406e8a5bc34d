"""What goes with the finished shards of a set: checksums, contact sheet, record and card."""

from utils.cli.records import GENERATION_CONFIG, image_set_name, read_record, write_record
from utils.data.name_doctor import Finding, write_class_names
from utils.hub.dataset_card import write_dataset_card
from utils.hub.licenses import read_licenses
from utils.synthesis.output_folder import CLASS_NAMES, PREVIEW
from utils.synthesis.preview import draw_contact_sheet
from utils.synthesis.shards import Shards, synthetic_features
from utils.synthesis.sources import Sources


def finish_set(
    shards: Shards,
    sources: Sources,
    findings: list[Finding],
    command: str,
    hub_id: str | None,
    hub_token: str | None,
) -> dict:
    """Write what goes with the finished shards, the card last, and return the set's record."""
    output_dir = shards.output_dir
    shards.write_checksums()
    draw_contact_sheet(shards).save(output_dir / PREVIEW)
    if findings:
        write_class_names(output_dir / CLASS_NAMES, sources.class_names, sources.prompt_nouns, findings)
    record = read_record(output_dir / GENERATION_CONFIG) | shards.summarise()
    write_record(output_dir / GENERATION_CONFIG, record)
    generator, real = record["generator"], record["real_images"]
    licensed = [(generator["id"], "model", generator["revision"])]
    if real is not None:
        licensed.append((image_set_name(real), "dataset", real["dataset_revision"]))
    prompts = {shards.class_names[label]: shards.plan.prompts.prompt(label, 0) for label in shards.plan.labels}
    write_dataset_card(
        output_dir, synthetic_features(shards.class_names), record, prompts, read_licenses(licensed, hub_token),
        command, hub_id,
    )  # fmt: skip
    return record
