"""Tiny classifiers of transformers and timm with random weights, and a synthetic set with its record."""

import functools
import gc

import pytest
import torch
from datasets import load_dataset

from tests.conftest import CLASS_NAMES, save_image_set
from tests.transfer.architectures import save_architecture
from utils.cli.records import GENERATION_CONFIG, write_record
from utils.data.image_set import RealImagesRecord


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Exclude torch from garbage collections, of which each training makes two."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def save_classifier_of(tmp_path_factory):
    """Return the folder of a tiny classifier of an architecture, as in `architectures.py`, saved when first used."""

    @functools.cache
    def save(name: str) -> str:
        folder = str(tmp_path_factory.mktemp("classifiers") / name)
        torch.manual_seed(0)
        save_architecture(folder, name)
        return folder

    return save


@pytest.fixture(scope="session")
def classifiers(save_classifier_of) -> dict[str, str]:
    return {name: save_classifier_of(name) for name in ("vit", "resnet", "timm")}


@pytest.fixture(scope="session")
def images(real_images_dir):
    """Twelve real images, four of each class."""
    return load_dataset(str(real_images_dir), split="train").take(12)


@pytest.fixture(scope="session")
def make_synthetic_dir(tmp_path_factory, real_images_dir):
    def make(name: str = "synthetic", class_names=tuple(CLASS_NAMES), train_indices=None, random_flip=True):
        folder = tmp_path_factory.mktemp(name) / name
        save_image_set(folder, {"train": 6}, class_names)
        real = RealImagesRecord(str(real_images_dir), num_shots=2, random_flip=random_flip).to_dict()
        record = {"real_images": real, "class_names": CLASS_NAMES, "token": None, "train_indices": train_indices}
        write_record(folder / GENERATION_CONFIG, record)
        return folder

    return make


@pytest.fixture(scope="session")
def synthetic_dir(make_synthetic_dir):
    return make_synthetic_dir()


@pytest.fixture(scope="session")
def unmirrored_dir(make_synthetic_dir):
    """A set whose token was learned with `--random_flip false`."""
    return make_synthetic_dir("unmirrored", random_flip=False)
