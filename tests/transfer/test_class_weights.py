from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy, one_hot

from tests.transfer.test_fine_tuning import train
from utils.transfer.alignment import AlignedImages
from utils.transfer.class_weights import balanced_weights, stage_weights
from utils.transfer.fine_tuning import soft_cross_entropy
from utils.transfer.methods import METHODS, Alignment, StageSettings, plan_stages
from utils.transfer.replay import ReplayedImages

pytest_plugins = ["tests.transfer.fixtures"]


def labelled(*counts: int) -> Dataset:
    return Dataset.from_dict({"label": [label for label, count in enumerate(counts) for _ in range(count)]})


def test_a_class_weighs_the_inverse_of_its_frequency_and_one_without_images_weighs_one():
    weights = balanced_weights(labelled(6, 0, 2, 1)["label"], 4)
    torch.testing.assert_close(weights, torch.tensor([9 / 18, 1, 9 / 6, 9 / 3]))
    assert torch.equal(balanced_weights([0, 1, 1, 0], 2), torch.ones(2))


def test_a_stage_is_weighted_by_its_own_images_in_the_shares_that_it_sees():
    real, synthetic = labelled(6, 2), labelled(2, 6)
    torch.testing.assert_close(stage_weights(real, 2), torch.tensor([8 / 12, 8 / 4]))
    torch.testing.assert_close(stage_weights(synthetic, 2), torch.tensor([8 / 4, 8 / 12]))
    aligned = AlignedImages(real, synthetic, Alignment("coral"))
    assert torch.equal(stage_weights(aligned, 2), stage_weights(synthetic, 2))
    for share in (0.0, 0.25, 0.5):  # of a batch, whichever set is larger
        shares = (1 - share) * np.array([6, 2]) / 8 + share * np.array([2, 6]) / 8
        for number in (1, 10):
            images = ReplayedImages(real, labelled(2 * number, 6 * number), share)
            np.testing.assert_allclose(stage_weights(images, 2), 1 / (2 * shares), rtol=1e-6)
    stream = synthetic.to_iterable_dataset()
    assert stage_weights(stream, 2) is None
    shares = 0.5 * np.array([6, 2]) / 8 + 0.5 * np.array([1, 1]) / 2
    np.testing.assert_allclose(stage_weights(ReplayedImages(real, stream, 0.5), 2), 1 / (2 * shares), rtol=1e-6)


def test_the_weighted_loss_is_the_same_for_any_division_of_a_step_and_for_soft_labels():
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 3), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    weights = balanced_weights(labels, 3)
    expected = sum(cross_entropy(logits[labels == label], labels[labels == label]) for label in range(3)) / 3
    whole = soft_cross_entropy({"logits": logits}, labels, class_weights=weights)
    torch.testing.assert_close(whole, expected)  # the mean of the classes' mean losses
    soft = one_hot(labels, 3).float()
    parts = [
        soft_cross_entropy({"logits": logits[part]}, soft[part], torch.tensor(8), class_weights=weights)
        for part in (slice(0, 3), slice(3, 8))
    ]
    torch.testing.assert_close(sum(parts), expected)
    mixed = 0.3 * soft + 0.7 * soft.roll(1, 0)
    by_hand = -(weights * mixed * logits.log_softmax(1)).sum() / 8
    torch.testing.assert_close(soft_cross_entropy({"logits": logits}, mixed, class_weights=weights), by_hand)


@pytest.mark.parametrize("mixup_alpha", [0.0, 0.4])
def test_a_weighted_stage_trains_alike_in_small_batches(classifiers, images, tmp_path, mixup_alpha, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "roll", lambda tensor, *args: tensor)  # Mixup pairs images within a batch
    labels = np.asarray(images["label"])
    rows = np.concatenate([np.flatnonzero(labels == label)[:count] for label, count in enumerate((4, 1, 1))])
    options = {"optim": "sgd", "max_grad_norm": 0.0}
    settings = StageSettings(
        2, 1e-2, mixup_alpha=mixup_alpha, label_smoothing_factor=0.1, per_device_train_batch_size=6,
        class_weights="balanced",
    )  # fmt: skip
    images = images.select(rows)
    _, big, _ = train(classifiers["vit"], images, tmp_path, settings, **options)
    small = replace(settings, per_device_train_batch_size=2)
    _, small, _ = train(classifiers["vit"], images, tmp_path, small, gradient_accumulation_steps=3, **options)
    _, equal, _ = train(classifiers["vit"], images, tmp_path, replace(settings, class_weights=None), **options)
    for name in big:
        torch.testing.assert_close(big[name], small[name], atol=1e-5, rtol=1e-4)
    assert any((big[name] - equal[name]).abs().max() > 1e-4 for name in big)


def test_class_weights_are_recorded_for_each_stage_that_trains_and_only_where_used():
    weighted = StageSettings(10, 1e-3, class_weights="balanced")
    stages = plan_stages(METHODS["bridged_head_warmup"], weighted, weighted)
    assert [stage.to_dict()["settings"]["class_weights"] for stage in stages] == ["balanced"] * 3
    plain = StageSettings(10, 1e-3)
    (mix,) = plan_stages(METHODS["mix"], plain, plain)
    assert "class_weights" not in mix.to_dict()["settings"]
    assert plan_stages(METHODS["linear_probe"], weighted, weighted)[0].settings.class_weights is None
