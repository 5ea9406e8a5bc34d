"""Forecast disk space compared with the space that loading uses: Arrow copies, downloads, latents."""

from pathlib import Path

import datasets
import pytest
import torch

from tests.conftest import CLASS_NAMES, save_class_folders, save_image_set
from utils.data.image_set import RealImagesRecord
from utils.forecast.costs import DiskUse, folder_bytes, latent_bytes
from utils.forecast.inputs import dataset_disk, missing_bytes, real_set_disk
from utils.hub.image_datasets import load_image_dataset
from utils.hub.repositories import Source, open_source
from utils.style.latents import DTYPE as LATENT_DTYPE
from utils.style.latents import LatentCache

pytest_plugins = ["tests.local_hub.fixtures"]


def written(folder: Path) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*.arrow"))


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def save_parquet(folder: Path) -> None:
    save_image_set(folder, {"train": 80, "test": 40})


def save_to_disk(folder: Path) -> None:
    save_parquet(folder.parent / "source")
    datasets.load_dataset(str(folder.parent / "source"), cache_dir=str(folder.parent / "elsewhere")).save_to_disk(
        folder
    )


def save_images_with_metadata(folder: Path) -> None:
    save_class_folders(folder / "train", dict.fromkeys(CLASS_NAMES, 60))
    rows = [f"{name}/{number}.png,{name}" for name in CLASS_NAMES for number in range(60)]
    (folder / "train" / "metadata.csv").write_text("\n".join(["file_name,label", *rows]) + "\n")


def save_classes(folder: Path) -> None:
    save_class_folders(folder, dict.fromkeys(CLASS_NAMES, 60))


@pytest.mark.parametrize(
    ("save", "is_copied"),
    [(save_parquet, True), (save_to_disk, False), (save_images_with_metadata, False), (save_classes, False)],
)
def test_the_forecast_arrow_copy_is_the_one_that_loading_writes(save, is_copied, tmp_path, empty_cache):
    save(tmp_path / "set")
    record = RealImagesRecord(str(tmp_path / "set"))
    uses = real_set_disk(record)
    assert written(empty_cache) == 0
    load_real(record)
    images = sum(path.stat().st_size for path in (tmp_path / "set").rglob("*") if path.is_file())
    forecast = sum(use.num_bytes for use in uses)
    assert forecast == pytest.approx(written(empty_cache), rel=0.06, abs=2_000)
    assert (written(empty_cache) > 0.8 * images) == is_copied
    assert sum(use.num_bytes for use in real_set_disk(record)) == 0  # it exists


def load_real(record: RealImagesRecord) -> None:
    from utils.data.real_images import load_real_images

    load_real_images(record)


def test_a_set_on_the_hub_is_downloaded_and_copied_once(local_hub, tmp_path, empty_cache):
    save_parquet(tmp_path / "set")
    files = {str(path.relative_to(tmp_path / "set")): path for path in (tmp_path / "set").rglob("*.parquet")}
    local_hub.create_repo("user/set", "dataset").commit(files)
    source = open_source("user/set", "--dataset_name", "dataset")
    download, copy = dataset_disk(source)
    size = sum(path.stat().st_size for path in files.values())
    assert (download.num_bytes, copy.num_bytes) == (size, size)
    load_image_dataset(source)
    assert copy.num_bytes == pytest.approx(written(empty_cache), rel=0.06)
    assert dataset_disk(source) == []
    assert missing_bytes(source, list(files)) == 0


def test_sizes_are_unknown_where_the_hub_cannot_be_reached(monkeypatch):
    source = Source("user/none", "--dataset_name", "dataset", revision="0" * 40)
    monkeypatch.setattr(Source, "is_reachable", lambda self: False)
    assert missing_bytes(source, ["weights.safetensors"]) is None
    assert missing_bytes(source, []) == 0


def test_the_latent_cache_is_as_large_as_forecast(tmp_path):
    moments = {name: torch.zeros(2, 3, 4, 8, 8, dtype=LATENT_DTYPE) for name in ("mean", "std")}
    cache = LatentCache(tmp_path, ["a", "b", "c"], 64, "vae", num_copies=2)
    cache.folder.mkdir()
    cache._write(0, moments)
    [shard] = cache.folder.glob("*.safetensors")
    assert latent_bytes(3, 64, 2) == pytest.approx(shard.stat().st_size, abs=500)


def test_a_dataset_that_is_read_takes_twice_its_size(tmp_path):
    assert folder_bytes(10, 100.5) == 1005
    assert folder_bytes(10, 100.5, is_read=True) == 2010
    assert DiskUse("images", 1, tmp_path / "not" / "there").free > 0
