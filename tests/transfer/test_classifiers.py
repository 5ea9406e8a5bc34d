import pytest
import torch
from transformers import pipeline

from tests.conftest import CLASS_NAMES
from utils.transfer.classifiers import head_parameter_names, load_classifier, load_image_processor, save_classifier

pytest_plugins = ["tests.transfer.fixtures"]


@pytest.mark.parametrize("name", ["vit", "resnet", "timm"])
def test_reset_changes_the_head_only_and_keep_nothing(classifiers, name, tmp_path):
    path = classifiers[name]
    first = load_classifier(path, CLASS_NAMES, True, seed=0)
    save_classifier(first, load_image_processor(path), tmp_path)
    saved = load_classifier(str(tmp_path), CLASS_NAMES, False, seed=1).state_dict()
    fresh = load_classifier(str(tmp_path), CLASS_NAMES, True, seed=1)
    changed = {key for key, value in fresh.state_dict().items() if not torch.equal(value, saved[key])}
    assert all(torch.equal(saved[key], value) for key, value in first.state_dict().items())
    again = load_classifier(str(tmp_path), CLASS_NAMES, True, seed=0)  # the same draw once more is no error
    assert all(torch.equal(saved[key], value) for key, value in again.state_dict().items())
    head = set(head_parameter_names(fresh))
    assert changed and changed <= head
    assert {key for key in head if key.endswith("weight")} <= changed


@pytest.mark.parametrize("name", ["vit", "resnet", "timm"])
def test_saved_channels_last_model_loads_in_a_pipeline(classifiers, name, tmp_path):
    path = classifiers[name]
    model = load_classifier(path, CLASS_NAMES, True, seed=0).to(memory_format=torch.channels_last)
    save_classifier(model, load_image_processor(path), tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path))
    assert list(classify.model.config.id2label.values()) == CLASS_NAMES
    for key, value in model.state_dict().items():
        assert torch.equal(classify.model.state_dict()[key].cpu(), value)
