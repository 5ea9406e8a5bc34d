from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, pipeline

from tests.conftest import CLASS_NAMES
from tests.transfer.architectures import HEADS
from utils.cli.errors import UserError
from utils.transfer import adapters
from utils.transfer.adapters import LoraSettings, add_adapter, load_adapter, save_adapter, save_merged
from utils.transfer.classifiers import load_classifier, load_image_processor, open_classifier, save_classifier

pytest_plugins = ["tests.transfer.fixtures"]

LORA = LoraSettings(r=2, alpha=4, dropout=0.0)
PIXEL_VALUES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def adapted_classifier(path: str, lora: LoraSettings = LORA, seed: int = 0) -> PeftModel:
    return add_adapter(load_classifier(path, CLASS_NAMES, True, seed=0), lora, seed)


def train(model: PeftModel) -> PeftModel:
    """Take three steps with BatchNorm in eval mode, as a stage with an adapter does."""
    model.eval()
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixel_values=PIXEL_VALUES).logits, torch.arange(6) % 3).backward()
        optimizer.step()
    return model


def logits_of(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(pixel_values=PIXEL_VALUES).logits


def trained_names(model) -> list[str]:
    return [name for name, value in model.named_parameters() if value.requires_grad]


@pytest.mark.parametrize("name", HEADS)
def test_head_and_low_rank_updates_are_trained_and_merged_and_unmerged_predict_the_same(
    save_classifier_of, name, tmp_path
):
    path = save_classifier_of(name)
    model = adapted_classifier(path)
    updates = [key for key in trained_names(model) if HEADS[name] not in key]  # the head has its own tests
    assert updates and all("lora_A" in key or "lora_B" in key for key in updates)
    assert all(min(model.get_parameter(key).shape[:2]) <= LORA.r for key in updates)
    untrained = logits_of(load_classifier(path, CLASS_NAMES, True, seed=0))
    assert torch.allclose(logits_of(model), untrained, atol=1e-6)
    trained = logits_of(train(model))
    save_merged(model.to(memory_format=torch.channels_last), load_image_processor(path), tmp_path)
    tolerance = 1e-4 * trained.abs().max()
    assert (trained - untrained).abs().max() > 10 * tolerance

    classify = pipeline("image-classification", model=str(tmp_path))
    assert list(classify.model.config.id2label.values()) == CLASS_NAMES
    assert torch.allclose(logits_of(classify.model.cpu()), trained, atol=tolerance)

    config = AutoConfig.from_pretrained(tmp_path)
    base = AutoModelForImageClassification.from_pretrained(path, config=config, ignore_mismatched_sizes=True)
    loaded = PeftModel.from_pretrained(base, f"{tmp_path}/adapter")
    assert torch.allclose(logits_of(loaded), trained, atol=tolerance)


def test_an_adapter_and_its_head_are_loaded_from_a_folder_and_trained_further(save_classifier_of, tmp_path):
    path = save_classifier_of("resnet")
    model = train(adapted_classifier(path))
    save_adapter(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = load_adapter(load_classifier(path, CLASS_NAMES, True, seed=5), tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))
    assert trained_names(again) == trained_names(model)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(trained_names(model))


def test_adapter_names_its_base_checkpoint_at_its_commit(local_hub_server, save_classifier_of, tmp_path):
    local_hub_server.reset()
    repository = local_hub_server.create_repo("ann/vit", "model")
    repository.commit({file.name: file for file in Path(save_classifier_of("vit")).iterdir()})
    commit = open_classifier("ann/vit").revision
    model = add_adapter(load_classifier("ann/vit", CLASS_NAMES, True, 0, revision=commit), LORA, 0, revision=commit)
    repository.commit({"model.safetensors": b"newer ones, which the adapter was not trained on"})
    save_merged(train(model), load_image_processor("ann/vit", revision=commit), tmp_path)
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (config.base_model_name_or_path, config.revision) == ("ann/vit", commit)


def test_same_seed_draws_the_same_adapter(save_classifier_of):
    path = save_classifier_of("vit")
    first, again, other = (adapted_classifier(path, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    changed = {key for key, value in first.items() if not torch.equal(value, other[key])}
    assert changed == {key for key in first if "lora_A" in key}


@pytest.mark.parametrize(
    ("spoiled", "folder"),
    [
        ("resnet.embedder.embedder.normalization.running_mean", "adapter"),
        ("resnet.embedder.embedder.convolution.base_layer.weight", "adapter"),
        ("classifier.1.weight", "."),  # of the merged weights
    ],
)
def test_saved_weights_with_other_predictions_fail(save_classifier_of, tmp_path, monkeypatch, spoiled, folder):
    path = save_classifier_of("resnet")
    model = train(adapted_classifier(path))

    def spoil(model) -> None:
        with torch.no_grad():
            model.state_dict()[spoiled].add_(0.1)

    def save_spoiled(merged, *args) -> None:
        spoil(merged)
        save_classifier(merged, *args)

    if folder == "adapter":
        spoil(model.get_base_model())  # which is not in the adapter's file
    else:
        monkeypatch.setattr(adapters, "save_classifier", save_spoiled)
    with pytest.raises(AssertionError, match=f"{tmp_path / folder}: logits differ"):
        save_merged(model, load_image_processor(path), tmp_path)


def test_settings_apply_to_layers_with_matching_name_endings(save_classifier_of):
    lora = LoraSettings(r=2, alpha=5, dropout=0.3, target_modules=("q_proj",))
    model = adapted_classifier(save_classifier_of("vit"), lora)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert [name.rpartition(".")[2] for name in layers] == ["q_proj"]
    (layer,) = layers.values()
    assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout["default"].p) == (2, 2.5, 0.3)


@pytest.mark.parametrize(
    ("name", "target", "problem"),
    [
        ("vit", "q_prij", "no such layer; layers that can: "),
        ("vit", "classifier", "classifier cannot take an adapter"),
        ("timm", "conv_dw", r"timm_model.blocks.3.0.conv_dw, .* cannot take an adapter"),  # grouped: cannot be merged
    ],
)
def test_wrong_target_module_is_an_error(save_classifier_of, name, target, problem):
    with pytest.raises(UserError, match=f"--lora_target_modules {target}: {problem}"):
        adapted_classifier(save_classifier_of(name), LoraSettings(target_modules=(target,)))
