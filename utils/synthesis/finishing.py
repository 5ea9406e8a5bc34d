"""The files that accompany a set's finished shards: checksums, contact sheet, record and card."""

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
from datasets import DatasetInfo, Features, SplitInfo
from datasets.info import DatasetInfosDict
from datasets.splits import SplitDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData
from jinja2 import Template
from PIL import Image, ImageDraw, ImageFont

from utils.cli.errors import UserError
from utils.cli.records import GENERATION_CONFIG, image_set_name, read_record, write_record
from utils.data.left_out import FILTER_PICTURE, REVIEW, SCORES, read_left_out
from utils.data.name_doctor import Finding, write_class_names
from utils.hub.cards import FUNCTIONS, License, code, common_license, hub_ids, read_licenses, save_card
from utils.hub.repositories import Source
from utils.hub.targets import Target
from utils.synthesis.lora import LORA, recorded_adapters
from utils.synthesis.output_folder import CLASS_NAMES, PREVIEW, QUALITY_RECORD, report_removed
from utils.synthesis.plan import GenerationPlan
from utils.synthesis.shards import Shards, synthetic_features
from utils.synthesis.sources import Sources

# the contact sheet: cells and gaps in pixels
MAX_COLUMNS = 10
MAX_ROWS = 50
CELL = 96
NAME_WIDTH = 160
GAP = 4

CARD = Path(__file__).with_name("card.md.jinja")
QUALITY = Path(__file__).with_name("quality.md.jinja")
MAX_VALUES = 8  # of a list in the card's table of settings
MAX_CLASSES = 10  # in the card's section on quality
MARKS = {"good": "good", "look": "**look**", "bad": "**bad**", "unknown": "unknown"}


def finish_set(shards: Shards, sources: Sources, findings: list[Finding]) -> dict:
    """Write the files that accompany the finished shards, except the card, and return the set's record.

    Raises:
        UserError: the set's folder was removed.
    """
    with report_removed(shards.output_dir):
        shards.write_checksums()
        draw_contact_sheet(shards).save(shards.output_dir / PREVIEW)
        summary = shards.summarise()
    if findings:
        write_class_names(shards.output_dir / CLASS_NAMES, sources.class_names, sources.prompt_nouns, findings)
    record = read_record(shards.output_dir / GENERATION_CONFIG) | summary
    write_record(shards.output_dir / GENERATION_CONFIG, record)
    return record


def draw_contact_sheet(shards: Shards) -> Image.Image:
    """Return a sheet with the first images of the first 50 classes, read from the finished shards.

    It has one row per class, with the class name at the left.
    """
    plan = shards.plan
    rows = {label: row for row, label in enumerate(plan.labels[:MAX_ROWS])}
    num_columns = min(plan.counts.most, MAX_COLUMNS)
    sheet = Image.new("RGB", (NAME_WIDTH + num_columns * (CELL + GAP), len(rows) * (CELL + GAP)), "white")
    drawing, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for label, row in rows.items():
        name = shards.class_names[label]
        drawing.text((GAP, row * (CELL + GAP) + CELL // 2), name, fill="black", font=font, anchor="lm")
    # if classes have different numbers of images, the first ones of the class with fewest come last
    last = plan.counts.last_index(min(num_columns, plan.num_images_per_class))
    for number in range(last // plan.images_per_shard + 1):
        # one row group at a time: a whole shard of large PNG files would dominate memory
        for group in pq.ParquetFile(shards.path(number)).iter_batches(columns=["image", "label", "class_index"]):
            for example in group.to_pylist():
                row, column = rows.get(example["label"]), example["class_index"]
                if row is not None and column < num_columns:
                    # small images are enlarged by whole pixels, which keeps them sharp
                    image = Image.open(io.BytesIO(example["image"]["bytes"])).resize((CELL, CELL), Image.Resampling.BOX)
                    sheet.paste(image, (NAME_WIDTH + column * (CELL + GAP), row * (CELL + GAP)))
    return sheet


def write_card(shards: Shards, record: dict, command: str, hub_target: Target | None, hub_token: str | None) -> None:
    """Write the card of a set, with the licenses in its sources' cards, and the quality report if there is one.

    Raises:
        UserError: the existing card's metadata are malformed.
    """
    generator, real = record["generator"], record["real_images"]
    settings, sources = record["settings"], [(generator["id"], "model", generator["revision"])]
    sources += [(adapter[LORA], "model", adapter["lora_revision"]) for adapter in recorded_adapters(settings)]
    if real is not None:
        sources.append((image_set_name(real), "dataset", real["dataset_revision"]))
    path = shards.output_dir / QUALITY_RECORD
    quality = read_record(path) if path.exists() else None
    if quality and quality["num_images"]["synthetic"]["all"] != record["num_images"]:
        quality = None  # from before the set grew
    prompts = {shards.class_names[label]: shards.plan.prompts.prompt(label, 0) for label in shards.plan.labels}
    write_dataset_card(
        shards.output_dir, synthetic_features(shards.class_names, shards.plan.has_init_images), record, prompts,
        read_licenses(sources, hub_token), command, hub_target.repo_id if hub_target else None,
        quality_section(quality) + left_out_section(shards.output_dir, record),
    )  # fmt: skip


def write_dataset_card(
    output_dir: str | Path, features: Features, record: dict, prompts: dict[str, str], licenses: dict[str, License],
    command: str, hub_id: str | None = None, quality: str = "",
) -> None:  # fmt: skip
    """Write `README.md` for a synthetic set from its `generation_config.json` record.

    `prompts` has an example for each drawn class; `licenses` maps each source's name to its license: the set gets
    theirs if they agree, else 'unknown'. `quality` are the sections on the quality report and on what is left out, in
    Markdown. Local paths appear in the text only: metadata on the Hub must be ids. The code in the card uses `hub_id`
    if the set is published, else the folder. An existing card is merged.

    Raises:
        UserError: the existing card's metadata are malformed.
    """
    output_dir = Path(output_dir)
    adapters = recorded_adapters(record["settings"])
    models = hub_ids(record["generator"]["id"], *(adapter[LORA] for adapter in adapters))
    num_bytes = sum(path.stat().st_size for path in output_dir.glob("data/train-*.parquet"))
    metadata = DatasetCardData(
        **common_license(licenses.values()).to_metadata(),
        task_categories=["image-classification"],
        tags=["synthetic", "bridged-transfer", "diffusers"],
        base_model=models if len(models) > 1 else next(iter(models), None),
    )
    split = SplitInfo("train", num_bytes=num_bytes, num_examples=record["num_images"])
    sizes = {"dataset_size": num_bytes, "download_size": num_bytes}
    info = DatasetInfo(features=features, splits=SplitDict(train=split), **sizes)
    DatasetInfosDict(default=info).to_dataset_card_data(metadata)
    files = {"data_files": [{"split": "train", "path": "data/train-*"}]}
    MetadataConfigs(default=files).to_dataset_card_data(metadata)
    card = DatasetCard.from_template(
        metadata, template_path=str(CARD), name=hub_id or output_dir.resolve().name, record=record,
        real=record["real_images"] and image_set_name(record["real_images"]), settings=record["settings"],
        adapters=adapters, prompts=prompts, quality=quality, licenses=licenses, command=command, setting=format_setting,
        **FUNCTIONS,
    )  # fmt: skip
    save_card(card, output_dir / "README.md")


def format_setting(value: object) -> str:
    """Return a setting in Markdown: booleans as flags take them, lists without brackets, long ones shortened."""
    if isinstance(value, list):
        shown = ", ".join(map(format_setting, value[:MAX_VALUES]))
        return shown if len(value) <= MAX_VALUES else f"{shown}, ... ({len(value):,} in all)"
    if isinstance(value, dict):
        return ", ".join(code(f"{key}: {json.dumps(item)}") for key, item in value.items())
    return code(json.dumps(value) if isinstance(value, bool) else value)


def quality_section(record: dict | None) -> str:
    """Return the card's section for the record in `quality.json`, in Markdown; empty without one.

    It lists the ten classes that are farthest from their real ones. It shows `quality.png`, but not `duplicates.png`,
    which has real images.
    """
    if not record:
        return ""
    template = Template(QUALITY.read_text(encoding="utf-8"), keep_trailing_newline=True)
    return template.render(**record, marks=MARKS, max_classes=MAX_CLASSES, **FUNCTIONS)


def left_out_section(folder: Path, record: dict) -> str:
    """Return the card's section on images that training leaves out, in Markdown; empty without any.

    Verdicts on other images, of a set that was here before, say nothing about this one; training refuses them.
    """
    try:
        left_out = read_left_out(Source(str(folder), "--output_dir", "dataset"), record["fingerprint"])
    except UserError:
        return ""
    if not left_out:
        return ""
    picture = f"\n![the best that are left out, the worst that are kept]({FILTER_PICTURE})\n"
    return (
        f"\n## Left out\n\nTraining leaves {len(left_out):,} of {record['num_images']:,} images out: "
        f"{len(left_out.rejected):,} were rejected by people (`{REVIEW}`), {len(left_out.filtered):,} have low scores "
        f"(`{SCORES}`). `--use_rejected` takes all.\n{picture if (folder / FILTER_PICTURE).exists() else ''}"
    )


def print_summary(output_dir: str, plan: GenerationPlan, results: dict) -> None:
    """Print what was drawn, how fast, the folder, and the next command."""
    print(
        f"{plan.num_images:,} images of {len(plan.labels)} classes in {output_dir}; {results['num_drawn']:,} "
        f"drawn now at {results['images_per_second']:.1f} images/s, {sum(results['num_redraws'].values())} redrawn, "
        f"{results['seconds']:.0f} s in all. Next:"
    )
    flag = " --allow_missing_classes" if len(plan.labels) < plan.num_classes else ""
    print(f"  accelerate launch train_bridged.py --synthetic_dataset {output_dir}{flag}")
