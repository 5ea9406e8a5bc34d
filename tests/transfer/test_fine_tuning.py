import copy

import pytest
import torch
from datasets import load_dataset
from transformers import TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput

from tests.conftest import CLASS_NAMES
from utils.transfer.classifiers import load_classifier, load_image_processor
from utils.transfer.fine_tuning import fine_tune, soft_cross_entropy
from utils.transfer.image_datasets import Collator, TrainImages, train_transform
from utils.transfer.methods import StageSettings

pytest_plugins = ["tests.transfer.fixtures"]


@pytest.fixture(scope="module")
def images(real_images_dir):
    return load_dataset(str(real_images_dir), split="train").take(12)


def train(path, images, tmp_path, batch_norm="frozen", mixup_alpha=0.0, **arguments):
    model = load_classifier(path, CLASS_NAMES, True, seed=0)
    before = copy.deepcopy(model.state_dict())
    options = {"per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    training_args = TrainingArguments(output_dir=str(tmp_path), **(options | arguments))
    settings = StageSettings(2, 1e-2, batch_norm=batch_norm, mixup_alpha=mixup_alpha)
    result = fine_tune(model, images, load_image_processor(path), settings, training_args, tmp_path)
    return before, model.state_dict(), result


def test_soft_cross_entropy_matches_hand_computation_and_counts_images():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    soft = torch.tensor([[0.7, 0.3], [0.0, 1.0]])
    expected = -(soft * logits.log_softmax(1)).sum()
    outputs = ImageClassifierOutput(logits=logits)
    # the Trainer counts the elements of the labels: 4 images of 2 classes are 8
    assert soft_cross_entropy(outputs, soft, torch.tensor(8)) == pytest.approx(expected.item() / 4)
    assert soft_cross_entropy(outputs, torch.tensor([0, 1])) == pytest.approx(
        -(logits.log_softmax(1)[[0, 1], [0, 1]]).mean().item()
    )


@pytest.mark.parametrize("mixup_alpha", [0.0, 0.4])
def test_accumulated_small_batches_train_like_the_big_batch(classifiers, images, tmp_path, mixup_alpha, monkeypatch):
    # Mixup pairs images within a batch: pair each with itself, so that only the soft labels are left
    monkeypatch.setattr(torch.Tensor, "roll", lambda tensor, *args: tensor)
    options = {"optim": "sgd", "max_grad_norm": 0.0, "mixup_alpha": mixup_alpha}
    _, big, _ = train(classifiers["vit"], images, tmp_path, per_device_train_batch_size=6, **options)
    _, small, _ = train(
        classifiers["vit"], images, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, **options
    )
    for name in big:
        torch.testing.assert_close(big[name], small[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet", "timm"])
def test_frozen_batch_norm_keeps_statistics_and_trained_changes_them(classifiers, images, tmp_path, name):
    for batch_norm, unchanged in (("frozen", True), ("train", False)):
        before, after, _ = train(classifiers[name], images, tmp_path, batch_norm)
        statistics = [key for key in before if key.endswith("running_mean")]
        assert statistics
        assert all(torch.equal(before[key], after[key].contiguous()) for key in statistics) is unchanged


def test_fine_tune_counts_steps_and_images(classifiers, images, tmp_path):
    _, _, result = train(classifiers["vit"], images.take(6), tmp_path)
    assert (result.num_steps, result.num_images_seen) == (2, 6)


def test_train_images_depend_on_seed_epoch_and_index_only(classifiers, images):
    transform = train_transform(load_image_processor(classifiers["vit"]))
    first, second = (TrainImages(images, transform, seed=3) for _ in range(2))
    torch.manual_seed(99)
    second[5]
    assert torch.equal(first[2]["pixel_values"], second[2]["pixel_values"])
    second.set_epoch(1)
    assert not torch.equal(first[2]["pixel_values"], second[2]["pixel_values"])


def test_collator_mixes_images_and_labels_with_the_same_weight():
    items = [
        {"pixel_values": torch.full((3, 2, 2), value), "labels": label, "mixup_weight": 0.75}
        for value, label in ((0.0, 0), (4.0, 1))
    ]
    batch = Collator(3)(items)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1.0, 3.0]
    assert batch["labels"].tolist() == [[0.75, 0.25, 0.0], [0.25, 0.75, 0.0]]
