"""Predictions: each image once and in order, in any number of processes, workers and dtypes; metrics of them; LEEP."""

import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import binom
from sklearn.metrics import top_k_accuracy_score
from torchmetrics.functional.classification import multiclass_calibration_error
from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperModel

from utils.cli.errors import UserError
from utils.transfer import evaluation
from utils.transfer.arguments import METRICS
from utils.transfer.evaluation import accuracy_interval, classification_metrics, leep, leep_results, predict

pytest_plugins = ["tests.transfer.fixtures"]

ROOT = Path(__file__).parents[2]
CHILD = """
import sys

from accelerate import debug_launcher

from tests.transfer.test_evaluation import predict_in_one_of_several

debug_launcher(predict_in_one_of_several, args=tuple(sys.argv[1:]), num_processes=2)
"""
COUNTS = (7, 4, 1)  # of images, for two processes


class SeenItems(list):
    """A list that records which items were read."""

    def __init__(self, items: list):
        super().__init__(items)
        self.seen = []

    def __getitem__(self, index: int) -> dict:
        self.seen.append(index)
        return super().__getitem__(index)


def make_items(num_images: int) -> list[dict]:
    pixels = torch.randn(num_images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "labels": (5 * index) % 7} for index, image in enumerate(pixels)]


def load(folder: str, **options) -> torch.nn.Module:
    return AutoModelForImageClassification.from_pretrained(folder, **options)


def predict_in_one_of_several(classifier: str, folder: str) -> None:
    state = PartialState(cpu=True)
    evaluation.ROWS_AT_A_TIME = 3  # so that the rows of seven images are gathered in two parts
    found = {}
    for num_images in COUNTS:
        images = SeenItems(make_items(num_images))
        found[num_images] = (*predict(load(classifier), images, batch_size=2), images.seen)
    torch.save(found, Path(folder) / f"found-{state.process_index}-of-{state.num_processes}.pt")


@torch.no_grad()
def logits_one_by_one(model, items: list[dict]) -> np.ndarray:
    model.eval()
    return np.concatenate([model(item["pixel_values"][None].to(model.dtype)).logits.float() for item in items])


def leep_by_definition(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return equations 1 and 2 of the paper, written as loops."""
    num_images, num_classes = probabilities.shape
    joint = np.zeros((7, num_classes))
    for theta, label in zip(probabilities, labels):
        joint[label] += theta / num_images
    total = 0.0
    for theta, label in zip(probabilities, labels):
        total += np.log(sum(joint[label, z] / joint[:, z].sum() * theta[z] for z in range(num_classes)))
    return total / num_images


def random_predictions(num_images: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return logits of a classifier that is right about half of the time, and labels; no image has the last class."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes - 1, num_images)
    logits = rng.normal(size=(num_images, num_classes)).astype(np.float32)
    logits[np.arange(num_images), labels] += 2
    logits *= rng.uniform(0.2, 6, (num_images, 1))  # some too confident, others not confident enough
    return logits, labels


def predictions_with(num_right: int, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(num_images) % 3
    return np.eye(3)[np.where(np.arange(num_images) < num_right, labels, (labels + 1) % 3)], labels


@pytest.mark.parametrize(("name", "num_workers"), [("vit", 0), ("resnet", 2), ("timm", 0)])
def test_logits_are_in_the_order_of_the_images(name, num_workers, classifiers):
    items = make_items(7)
    model = load(classifiers[name]).train()
    logits, labels = predict(model, items, batch_size=3, num_workers=num_workers)
    assert (logits.dtype, labels.dtype) == (np.float32, np.int64)
    assert labels.tolist() == [0, 5, 3, 1, 6, 4, 2]
    assert np.allclose(logits, logits_one_by_one(model, items), atol=1e-5)
    assert np.abs(np.diff(logits, axis=0)).max() > 1e-3  # the images have different logits


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


def test_outputs_that_are_not_finite_are_an_error(classifiers):
    model = load(classifiers["vit"])
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="vit: the classifier's outputs are not finite; its weights, or mean"):
        predict(model, make_items(1))


def test_two_processes_evaluate_each_image_once_and_both_get_all_results(classifiers, tmp_path):
    command = [sys.executable, "-c", CHILD, classifiers["resnet"], str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(tmp_path / f"found-{process}-of-2.pt", weights_only=False) for process in range(2)]
    model = load(classifiers["resnet"])
    for num_images in COUNTS:
        expected_logits, expected_labels = predict(model, make_items(num_images), batch_size=2)
        for logits, labels, _ in (answers[num_images] for answers in found):
            assert np.allclose(logits, expected_logits, atol=1e-5)
            assert labels.tolist() == expected_labels.tolist()
        seen = [answers[num_images][2] for answers in found]
        assert sorted(sum(seen, [])) == list(range(num_images))
        assert abs(len(seen[0]) - len(seen[1])) <= 1


def test_leep_uses_each_models_own_classes_and_reads_images_once(classifiers, monkeypatch):
    monkeypatch.setattr(evaluation, "ROWS_AT_A_TIME", 3)
    items = SeenItems(make_items(7))
    bridged = load(classifiers["resnet"])
    found = leep_results(classifiers["vit"], bridged, items, batch_size=2)
    assert items.seen == list(range(7))
    labels = np.array([item["labels"] for item in items])
    for name, model in (("pretrained", load(classifiers["vit"])), ("bridged", bridged)):
        probabilities = torch.from_numpy(logits_one_by_one(model, items)).softmax(1).numpy()
        assert found.pop(f"leep_{name}") == pytest.approx(leep_by_definition(probabilities, labels), abs=1e-4)
    assert found == {"leep_num_images": 7, "leep_num_source_classes": 7}


def test_leep_of_a_backbone_without_a_head_or_without_a_bridged_model_is_not_known(classifiers, tmp_path):
    config = TimmWrapperConfig(architecture="test_efficientnet", num_labels=0, pretrained_cfg={})
    TimmWrapperModel(config).save_pretrained(tmp_path)
    unknown = {"leep_pretrained": None, "leep_bridged": None, "leep_num_images": 2, "leep_num_source_classes": 0}
    assert leep_results(str(tmp_path), None, make_items(2)) == unknown
    assert leep_results(str(tmp_path), load(classifiers["vit"]), make_items(2), num_workers=1)["leep_bridged"] < 0
    alone = leep_results(classifiers["vit"], None, make_items(2))
    assert alone["leep_bridged"] is None and alone["leep_pretrained"] < 0


def test_leep_is_zero_for_a_perfect_model():
    labels = np.random.default_rng(0).integers(0, 3, 12)
    assert leep(np.eye(3)[labels], labels) == pytest.approx(0)


def test_leep_of_many_images_needs_little_memory_in_addition_to_their_probabilities():
    labels = np.arange(100_000) % 100
    probabilities = np.full((100_000, 100), 0.01, np.float32)
    tracemalloc.start()
    assert leep(probabilities, labels) == pytest.approx(np.log(0.01))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < probabilities.nbytes


def test_metrics_equal_those_computed_another_way():
    logits, labels = random_predictions(500, 12)
    found = classification_metrics(logits, labels)
    pairs = np.eye(12)[labels].T @ np.eye(12)[logits.argmax(1)]
    right, of_class, predicted = pairs.diagonal()[:11], pairs.sum(1)[:11], pairs.sum(0)[:11]
    probabilities = torch.from_numpy(logits).softmax(1)
    calibration_error = multiclass_calibration_error(probabilities, torch.from_numpy(labels), 12, n_bins=15)
    assert found == pytest.approx(
        {
            "accuracy": right.sum() / 500,
            "mean_per_class_accuracy": (right / of_class).mean(),
            "macro_f1": (2 * right / (of_class + predicted)).mean(),
            "top5_accuracy": top_k_accuracy_score(labels, logits, k=5, labels=np.arange(12)),
            "expected_calibration_error": calibration_error.item(),
        }
    )
    assert 0.3 < found["accuracy"] < found["top5_accuracy"] < 1


def test_a_model_that_tells_no_class_from_another_is_right_by_chance():
    found = classification_metrics(np.zeros((20, 10), np.float32), np.arange(20) % 10)
    assert (found["accuracy"], found["top5_accuracy"]) == (0.1, 0.5)
    assert found["expected_calibration_error"] == pytest.approx(0, abs=1e-6)


def test_nan_logits_count_as_wrong_answers():
    logits, labels = np.eye(6)[[1, 2, 3, 4]], np.array([1, 2, 3, 4])
    logits[:2] = np.nan
    found = classification_metrics(logits, labels)
    assert (found["accuracy"], found["top5_accuracy"]) == (0.5, 0.5)
    assert np.isnan(found["expected_calibration_error"])


@pytest.mark.parametrize("num_classes", [3, 6])
def test_a_flag_may_name_exactly_the_measured_metrics(num_classes):
    measured = classification_metrics(np.eye(num_classes), np.arange(num_classes))
    known = set(METRICS) - {"loss"}  # which the Trainer adds
    assert set(measured) == (known if num_classes > 5 else known - {"top5_accuracy"})


def test_metrics_print_nothing_and_leave_random_states_alone(capfd, recwarn):
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate()
    evaluation.test_metrics(*random_predictions(40, 12))
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate()) == before
    assert capfd.readouterr() == ("", "")
    assert not [str(warning.message) for warning in recwarn if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize(("num_right", "num_images"), [(80, 100), (900, 1500), (3, 40)])
def test_the_accuracy_interval_is_that_of_the_binomial_distribution(num_right, num_images):
    """A resample of n images has a binomially distributed number of correct ones."""
    predictions = predictions_with(num_right, num_images)
    found = accuracy_interval(*predictions)
    expected = binom.ppf([0.025, 0.975], num_images, num_right / num_images) / num_images
    assert found == pytest.approx(expected, abs=1.01 / num_images)
    assert found[0] < num_right / num_images < found[1]
    results = evaluation.test_metrics(*predictions)
    assert (results["test_accuracy_low"], results["test_accuracy_high"]) == found
    assert (results["test_accuracy"], results["num_test_images"]) == (num_right / num_images, num_images)
    assert {f"test_{name}" for name in classification_metrics(*predictions)} < set(results)


def test_the_accuracy_interval_takes_little_memory_and_depends_on_its_seed_alone():
    predictions = predictions_with(4000, 5000)
    tracemalloc.start()
    first = accuracy_interval(*predictions)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6  # all resamples at once are 9,999 x 5,000 numbers
    np.random.seed(1)
    assert accuracy_interval(*predictions, seed=0) == first != accuracy_interval(*predictions, seed=1)


def test_the_accuracy_interval_for_equal_results():
    assert accuracy_interval(*predictions_with(1, 1)) == (0, 1)
    assert accuracy_interval(*predictions_with(30, 30)) == (1, 1)
