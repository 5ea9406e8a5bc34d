"""Predictions: each image once and in order, in any number of processes, workers and dtypes; LEEP of a checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperModel

from utils.transfer.metrics import leep
from utils.transfer.prediction import leep_of_checkpoint, leep_of_model, num_source_classes, predict

pytest_plugins = ["tests.transfer.fixtures"]

ROOT = Path(__file__).parents[2]
CHILD = """
import sys

from accelerate import debug_launcher

from tests.transfer.test_prediction import predict_in_one_of_several

debug_launcher(predict_in_one_of_several, args=tuple(sys.argv[1:]), num_processes=2)
"""


class SeenItems(list):
    """A list that remembers what was taken from it."""

    def __init__(self, items: list):
        super().__init__(items)
        self.seen = []

    def __getitem__(self, index: int) -> dict:
        self.seen.append(index)
        return super().__getitem__(index)


def make_items(num_images: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(num_images, 3, 32, 32, generator=generator)
    return [{"pixel_values": image, "labels": (5 * index) % 7} for index, image in enumerate(pixels)]


def load(folder: str, **options) -> torch.nn.Module:
    return AutoModelForImageClassification.from_pretrained(folder, **options)


def predict_in_one_of_several(classifier: str, folder: str) -> None:
    state = PartialState(cpu=True)
    found = {"processes": state.num_processes}
    for num_images in (7, 4, 1):
        images = SeenItems(make_items(num_images))
        logits, labels = predict(load(classifier), images, batch_size=2)
        found[num_images] = {"logits": logits, "labels": labels, "seen": images.seen}
    torch.save(found, Path(folder) / f"found-{state.process_index}.pt")


@torch.no_grad()
def logits_one_by_one(model, items: list[dict]) -> np.ndarray:
    model.eval()
    return np.concatenate([model(item["pixel_values"][None].to(model.dtype)).logits.float() for item in items])


@pytest.mark.parametrize("name", ["vit", "resnet", "timm"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_logits_are_those_of_each_image_in_order(name, num_workers, classifiers):
    items = make_items(7)
    model = load(classifiers[name]).train()
    logits, labels = predict(model, items, batch_size=3, num_workers=num_workers)
    assert (logits.dtype, labels.dtype) == (np.float32, np.int64)
    assert labels.tolist() == [0, 5, 3, 1, 6, 4, 2]
    assert np.allclose(logits, logits_one_by_one(model, items), atol=1e-5)
    assert np.abs(np.diff(logits, axis=0)).max() > 1e-3  # the images are told apart


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision_give_float32_logits(dtype, classifiers):
    items = make_items(3)
    model = load(classifiers["resnet"], dtype=dtype)
    logits, _ = predict(model, items)
    assert logits.dtype == np.float32
    assert np.allclose(logits, logits_one_by_one(model, items), atol=0.05)
    assert model.dtype == dtype


def test_a_model_with_an_adapter_is_predicted_with_it_and_can_be_trained_afterwards(classifiers):
    items = make_items(3)
    plain, _ = predict(load(classifiers["vit"]), items)
    layers = ["q_proj", "v_proj", "fc1", "fc2"]
    lora = LoraConfig(r=4, target_modules=layers, init_lora_weights=False, modules_to_save=["classifier"])
    model = get_peft_model(load(classifiers["vit"]), lora)
    assert isinstance(model, PeftModel)
    logits, _ = predict(model, items)
    assert np.abs(logits - plain).max() > 1e-4
    assert np.allclose(logits, logits_one_by_one(model, items), atol=1e-5)
    model(items[0]["pixel_values"][None], labels=torch.tensor([1])).loss.backward()


def test_two_processes_evaluate_each_image_once_and_both_have_all(classifiers, tmp_path):
    command = [sys.executable, "-c", CHILD, classifiers["resnet"], str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(tmp_path / f"found-{process}.pt", weights_only=False) for process in range(2)]
    assert [answers["processes"] for answers in found] == [2, 2]
    model = load(classifiers["resnet"])
    for num_images in (7, 4, 1):
        logits, labels = predict(model, make_items(num_images), batch_size=2)
        for answers in found:
            assert np.allclose(answers[num_images]["logits"], logits, atol=1e-5)
            assert answers[num_images]["labels"].tolist() == labels.tolist()
        seen = [answers[num_images]["seen"] for answers in found]
        assert sorted(sum(seen, [])) == list(range(num_images))
        assert abs(len(seen[0]) - len(seen[1])) <= 1


def test_leep_of_a_checkpoint_is_that_of_its_own_classes(classifiers):
    items = make_items(7)
    model = load(classifiers["vit"])
    probabilities = torch.from_numpy(logits_one_by_one(model, items)).softmax(1).numpy()
    expected = leep(probabilities, np.array([item["labels"] for item in items]))
    assert leep_of_checkpoint(classifiers["vit"], items) == pytest.approx(expected, abs=1e-4)
    assert leep_of_model(model, items, batch_size=2) == pytest.approx(expected, abs=1e-4)
    assert num_source_classes(classifiers["vit"]) == 7


def test_a_backbone_without_a_head_has_no_leep(tmp_path):
    config = TimmWrapperConfig(architecture="test_efficientnet", num_labels=0, pretrained_cfg={})
    TimmWrapperModel(config).save_pretrained(tmp_path)
    assert leep_of_checkpoint(tmp_path, make_items(2)) is None
    assert num_source_classes(tmp_path) == 0
