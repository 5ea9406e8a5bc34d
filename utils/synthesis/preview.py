"""The contact sheet: a row a class, its name at the left."""

import io
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from utils.synthesis.plan import GenerationPlan
from utils.synthesis.shards import shard_path

MAX_COLUMNS = 10
MAX_ROWS = 50
CELL = 96
NAME_WIDTH = 160
GAP = 4


def draw_contact_sheet(output_dir: str | Path, plan: GenerationPlan) -> Image.Image:
    """Return a sheet with the first images of each class, read from the finished shards (of the first 50 classes)."""
    num_rows = min(len(plan.class_names), MAX_ROWS)
    num_columns = min(plan.num_images_per_class, MAX_COLUMNS)
    sheet = Image.new("RGB", (NAME_WIDTH + num_columns * (CELL + GAP), num_rows * (CELL + GAP)), "white")
    drawing, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, name in enumerate(plan.class_names[:num_rows]):
        drawing.text((GAP, row * (CELL + GAP) + CELL // 2), name, fill="black", font=font, anchor="lm")
    last = num_columns * len(plan.class_names) - 1
    for number in range(last // plan.images_per_shard + 1):
        table = pq.read_table(shard_path(output_dir, number), columns=["image", "label", "class_index"])
        for example in table.to_pylist():
            row, column = example["label"], example["class_index"]
            if row < num_rows and column < num_columns:
                # enlarged by whole pixels, so that small images stay as they are
                image = Image.open(io.BytesIO(example["image"]["bytes"])).resize((CELL, CELL), Image.Resampling.BOX)
                sheet.paste(image, (NAME_WIDTH + column * (CELL + GAP), row * (CELL + GAP)))
    return sheet
