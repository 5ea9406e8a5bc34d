import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.conftest import CLASS_NAMES
from tests.transfer.architectures import HEADS, save_timm
from utils.cli.errors import UserError
from utils.transfer.adapters import LoraSettings, add_adapter
from utils.transfer.classifiers import load_classifier, load_image_processor
from utils.transfer.image_format import EvalImages
from utils.transfer.model_parts import head_parameter_names, imprint_head, reset_head

pytest_plugins = ["tests.transfer.fixtures"]

COLOURS = [(230, 40, 40), (40, 230, 40), (40, 40, 230)]


def load(path: str, seed: int = 0):
    return load_classifier(path, CLASS_NAMES, True, seed)


def with_adapter(path: str, seed: int = 0):
    return add_adapter(load(path, seed), LoraSettings(r=2), seed=0)


def coloured_items(path: str, labels: list[int]) -> list[dict]:
    """Return items of images in the colour of their class, with noise and a bright half at a random place."""
    random = np.random.default_rng(0)
    rows = []
    for label in labels:
        pixels = random.integers(0, 25, (32, 32, 3)) + np.array(COLOURS[label])
        pixels[:, random.integers(0, 30) :] //= 2
        rows.append({"image": Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), "label": label})
    return list(EvalImages(rows, load_image_processor(path)))


def pixel_values_of(items: list[dict]) -> torch.Tensor:
    return torch.stack([item["pixel_values"] for item in items])


def normalised(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def smoothed_cross_entropy(logits: np.ndarray) -> float:
    """Return it of row n for class n, with a tenth of each label spread over all classes."""
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    labels = 0.9 * np.eye(len(logits)) + 0.1 / len(logits)
    return -(labels * log_probabilities).sum(1).mean()


@pytest.mark.parametrize("name", HEADS)
def test_head_is_found_and_reset_with_an_adapter_as_without(save_classifier_of, name):
    path = save_classifier_of(name)
    plain, adapted = load(path, seed=1), with_adapter(path)
    assert sorted(head_parameter_names(plain)) == [f"{HEADS[name]}.bias", f"{HEADS[name]}.weight"]
    head = head_parameter_names(adapted)
    assert head == [key for key, value in adapted.named_parameters() if value.requires_grad and "lora" not in key]
    assert all(f"{HEADS[name]}.modules_to_save" in key for key in head)
    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    generator_state = torch.get_rng_state()
    reset_head(adapted, seed=1)
    assert torch.equal(torch.get_rng_state(), generator_state)
    changed = {key for key, value in adapted.state_dict().items() if not torch.equal(value, before[key])}
    assert {key for key in head if key.endswith("weight")} <= changed <= set(head)
    for key, adapted_key in zip(head_parameter_names(plain), head, strict=True):
        assert torch.equal(plain.get_parameter(key), adapted.get_parameter(adapted_key))


@pytest.mark.parametrize("name", HEADS)
def test_imprinted_head_is_normalised_class_means_at_the_best_scale(save_classifier_of, name):
    path = save_classifier_of(name)
    labels = np.array([0, 1, 2, 1, 0, 1, 2])
    items = coloured_items(path, labels)
    model, headless = load(path).train(), load(path).eval()
    head = model.get_submodule(HEADS[name])
    nn.init.ones_(head.bias)
    imprint_head(model, items, batch_size=4)

    headless.set_submodule(HEADS[name], nn.Identity())
    with torch.inference_mode():
        features = headless(pixel_values=pixel_values_of(items)).logits.double().numpy()
    weight = head.weight.detach().double().numpy()
    scale = np.linalg.norm(weight, axis=1)
    directions = [normalised(features)[labels == label].mean(0) for label in range(3)]
    assert np.allclose(normalised(weight), normalised(np.stack(directions)), atol=1e-5)
    assert np.allclose(scale, scale[0])
    assert not head.bias.any()

    logits = np.stack([features[labels == label].mean(0) for label in range(3)]) @ weight.T
    losses = [smoothed_cross_entropy(factor * logits) for factor in (0.97, 1.0, 1.03)]
    # some random networks give all images nearly the same features; then no scale below the bound is best
    assert losses[1] == min(losses) or np.isclose(np.diag(logits).mean(), 1000, rtol=0.01)


def test_an_imprinted_head_separates_separable_features_and_can_be_trained_with_an_adapter_too(save_classifier_of):
    path = save_classifier_of("timm_vit")
    labels = [0, 1, 2] * 4
    items = coloured_items(path, labels)
    plain, adapted = load(path), with_adapter(path, seed=1)
    for model in (plain, adapted):
        imprint_head(model, items)
        logits = model(pixel_values=pixel_values_of(items)).logits
        assert logits.argmax(1).tolist() == labels
        nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
        assert all(model.get_parameter(name).grad.abs().max() > 0 for name in head_parameter_names(model))
    for names in zip(head_parameter_names(plain), head_parameter_names(adapted), strict=True):
        assert torch.allclose(plain.get_parameter(names[0]), adapted.get_parameter(names[1]), rtol=1e-4)


def test_imprint_without_an_image_of_a_class_is_an_error(save_classifier_of):
    path = save_classifier_of("vit")
    model = load(path)
    before = model.classifier.weight.clone()
    with pytest.raises(UserError, match=r"--head_init imprint: no image of green circle, blue-stripe"):
        imprint_head(model, coloured_items(path, [0, 0]))
    assert torch.equal(model.classifier.weight, before)


def test_a_convolution_as_head_is_reset_but_not_imprinted(tmp_path):
    save_timm(tmp_path, "resnetv2_50", {"layers": [1, 1, 1, 1], "channels": [32] * 4, "stem_chs": 8})
    model = load(str(tmp_path))
    before = model.timm_model.head.fc.weight.clone()
    with pytest.raises(UserError, match=f"--head_init imprint: the head of {tmp_path} is not linear"):
        imprint_head(model, coloured_items(str(tmp_path), [0, 1, 2]))
    assert torch.equal(model.timm_model.head.fc.weight, before)
    reset_head(model, seed=1)
    assert not torch.equal(model.timm_model.head.fc.weight, before)
