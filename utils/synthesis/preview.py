"""The contact sheet: a row a class, its name at the left."""

import io

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from utils.synthesis.shards import Shards

MAX_COLUMNS = 10
MAX_ROWS = 50
CELL = 96
NAME_WIDTH = 160
GAP = 4


def draw_contact_sheet(shards: Shards) -> Image.Image:
    """Return a sheet with the first images of each class, read from the finished shards (of the first 50 classes)."""
    plan = shards.plan
    rows = {label: row for row, label in enumerate(plan.labels[:MAX_ROWS])}
    num_columns = min(plan.num_images_per_class, MAX_COLUMNS)
    sheet = Image.new("RGB", (NAME_WIDTH + num_columns * (CELL + GAP), len(rows) * (CELL + GAP)), "white")
    drawing, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for label, row in rows.items():
        name = shards.class_names[label]
        drawing.text((GAP, row * (CELL + GAP) + CELL // 2), name, fill="black", font=font, anchor="lm")
    last = num_columns * len(plan.labels) - 1
    for number in range(last // plan.images_per_shard + 1):
        # a row group at a time: a whole shard of large PNG files would be the largest thing in memory
        for group in pq.ParquetFile(shards.path(number)).iter_batches(columns=["image", "label", "class_index"]):
            for example in group.to_pylist():
                row, column = rows.get(example["label"]), example["class_index"]
                if row is not None and column < num_columns:
                    # small images are enlarged by whole pixels, so that they stay as they are
                    image = Image.open(io.BytesIO(example["image"]["bytes"])).resize((CELL, CELL), Image.Resampling.BOX)
                    sheet.paste(image, (NAME_WIDTH + column * (CELL + GAP), row * (CELL + GAP)))
    return sheet
