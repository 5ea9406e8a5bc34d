"""Tiny classifiers of transformers and timm with random weights, and a synthetic set with its record."""

import pytest
import torch

from tests.conftest import CLASS_NAMES, save_image_set
from utils.cli.records import GENERATION_CONFIG, write_record
from utils.data.real_images import RealImagesRecord


def _save_vit(folder) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        num_labels=7,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def _save_resnet(folder) -> None:
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=7)
    ResNetForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)


def _save_timm(folder, architecture: str = "test_efficientnet") -> None:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    pretrained_cfg = {
        "input_size": [3, 32, 32], "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0,
    }  # fmt: skip
    config = TimmWrapperConfig(architecture=architecture, pretrained_cfg=pretrained_cfg, num_labels=7)
    TimmWrapperForImageClassification(config).save_pretrained(folder)


SAVERS = {"vit": _save_vit, "resnet": _save_resnet, "timm": _save_timm}


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory) -> dict[str, str]:
    folders = {}
    for name, save in SAVERS.items():
        torch.manual_seed(0)
        folders[name] = str(tmp_path_factory.mktemp("classifiers") / name)
        save(folders[name])
    return folders


@pytest.fixture(scope="session")
def make_synthetic_dir(tmp_path_factory, real_images_dir):
    def make(name: str = "synthetic", class_names=tuple(CLASS_NAMES), train_indices=None):
        folder = tmp_path_factory.mktemp(name) / name
        save_image_set(folder, {"train": 6}, class_names)
        real = RealImagesRecord(str(real_images_dir), num_shots=2).to_dict()
        record = {"real_images": real, "class_names": CLASS_NAMES, "token": None, "train_indices": train_indices}
        write_record(folder / GENERATION_CONFIG, record)
        return folder

    return make


@pytest.fixture(scope="session")
def synthetic_dir(make_synthetic_dir):
    return make_synthetic_dir()
