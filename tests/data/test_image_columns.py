"""Columns that hold the bytes of image files without saying that they are images."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from utils.cli.errors import UserError
from utils.data.image_set import RealImagesRecord
from utils.data.images import to_rgb
from utils.data.opened_images import open_all
from utils.data.real_images import load_real_images

NUM_IMAGES = 30
LABELS = ["cat", "dog"] * (NUM_IMAGES // 2)


def encode(image: PILImage.Image) -> dict:
    content = io.BytesIO()
    image.save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


FILES = [encode(PILImage.new("RGB", (4, 4), (level, 0, 255 - level)))["bytes"] for level in range(NUM_IMAGES)]
NAMES = [f"{number}.png" for number in range(NUM_IMAGES)]


def struct(binary, string) -> pa.Array:
    rows = [{"bytes": content, "path": name} for content, name in zip(FILES, NAMES)]
    return pa.array(rows, pa.struct([("bytes", binary), ("path", string)]))


def load(tmp_path, column_name=None, **columns):
    (tmp_path / "set").mkdir()
    table = pa.table({**columns, "label": LABELS})
    pq.write_table(table, tmp_path / "set" / "train.parquet")
    record = RealImagesRecord(str(tmp_path / "set"), image_column_name=column_name, label_column_name="label")
    return load_real_images(record)


@pytest.mark.parametrize(
    "column",
    [
        struct(pa.binary(), pa.string()),
        struct(pa.large_binary(), pa.large_string()),
        pa.array([{"bytes": content} for content in FILES]),
        pa.array([{"path": name, "bytes": content, "size": 4} for content, name in zip(FILES, NAMES)]),
        pa.array(FILES, pa.binary()),
        pa.array(FILES, pa.large_binary()),
    ],
    ids=["struct", "large struct", "bytes alone", "other fields", "binary", "large binary"],
)
def test_a_column_of_the_bytes_of_files_is_read_as_images(column, tmp_path):
    real = load(tmp_path, photo=column, caption=pa.array(NAMES))
    assert real.record.image_column_name == "photo"
    found = set()
    open_all(real)
    for part in (real.train, real.validation, real.test):
        assert isinstance(part.features["image"], Image)
        for row in part:
            level = row["image"].getpixel((0, 0))[0]
            assert real.class_names[row["label"]] == LABELS[level]
            found.add(level)
    assert found == set(range(NUM_IMAGES))


def test_of_two_columns_of_bytes_one_must_be_named(tmp_path):
    columns = {"photo": pa.array(FILES, pa.binary()), "thumbnail": struct(pa.binary(), pa.string())}
    with pytest.raises(UserError, match="--image_column_name: .* more than one column .*photo, thumbnail, label"):
        load(tmp_path, **columns)
    (tmp_path / "named").mkdir()
    real = load(tmp_path / "named", "thumbnail", **columns)
    assert np.asarray(real.train[0]["image"]).shape == (4, 4, 3)


def test_a_column_of_type_image_is_taken_before_one_of_bytes(tmp_path, real_images_dir):
    features = load_real_images(RealImagesRecord(str(real_images_dir))).train
    images = features.select(range(4)).add_column("mask", FILES[:4])
    (tmp_path / "set").mkdir()
    images.to_parquet(tmp_path / "set" / "train.parquet")
    real = load_real_images(RealImagesRecord(str(tmp_path / "set")))
    assert real.record.image_column_name == "image"


def test_an_image_column_with_a_mode_is_read_without_it(tmp_path):
    """Training reads files, evaluation what datasets decode: with a mode, these would be other pixels."""
    (tmp_path / "set").mkdir()
    clear = PILImage.new("RGBA", (4, 4), (0, 0, 0, 0))
    for feature in (Image(mode="RGB"), Image(decode=False)):
        features = Features({"image": feature, "label": ClassLabel(names=["cat", "dog"])})
        rows = {"image": [encode(clear)] * NUM_IMAGES, "label": [0, 1] * (NUM_IMAGES // 2)}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")
        real = load_real_images(RealImagesRecord(str(tmp_path / "set")))
        assert to_rgb(real.test[0]["image"]).getpixel((0, 0)) == (255, 255, 255)


def test_a_column_of_paths_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match="--image_column_name url: is of type string, no image column; .*cast_column"):
        load(tmp_path, "url", url=pa.array([f"https://example.com/{name}" for name in NAMES]))
