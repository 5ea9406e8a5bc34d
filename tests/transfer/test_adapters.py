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
from utils.transfer.classifiers import check_classifier, load_classifier, load_image_processor, save_classifier

pytest_plugins = ["tests.transfer.fixtures"]

LORA = LoraSettings(r=2, alpha=4, dropout=0.0)


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def adapted_classifier(path: str, lora: LoraSettings = LORA, seed: int = 0) -> PeftModel:
    return add_adapter(load_classifier(path, CLASS_NAMES, True, seed=0), lora, seed)


def train(model: PeftModel, pixel_values: torch.Tensor) -> None:
    """Take three steps with BatchNorm in eval mode, as a stage with an adapter does."""
    model.eval()
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixel_values=pixel_values).logits, torch.arange(6) % 3).backward()
        optimizer.step()


def logits_of(model, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(pixel_values=pixel_values).logits


@pytest.mark.parametrize("name", HEADS)
def test_merged_weights_and_adapter_both_load_and_predict_the_same(save_classifier_of, name, tmp_path, pixel_values):
    path = save_classifier_of(name)
    model = adapted_classifier(path)
    untrained = logits_of(load_classifier(path, CLASS_NAMES, True, seed=0), pixel_values)
    assert torch.allclose(logits_of(model, pixel_values), untrained, atol=1e-6)
    train(model, pixel_values)
    trained = logits_of(model, pixel_values)
    save_merged(model.to(memory_format=torch.channels_last), load_image_processor(path), tmp_path)
    tolerance = 1e-4 * trained.abs().max()
    assert (trained - untrained).abs().max() > 10 * tolerance

    classify = pipeline("image-classification", model=str(tmp_path))
    assert list(classify.model.config.id2label.values()) == CLASS_NAMES
    assert torch.allclose(logits_of(classify.model.cpu(), pixel_values), trained, atol=tolerance)

    config = AutoConfig.from_pretrained(tmp_path)
    base = AutoModelForImageClassification.from_pretrained(path, config=config, ignore_mismatched_sizes=True)
    assert torch.allclose(
        logits_of(PeftModel.from_pretrained(base, f"{tmp_path}/adapter"), pixel_values), trained, atol=tolerance
    )


@pytest.mark.parametrize("name", HEADS)
def test_only_low_rank_updates_outside_the_head_and_the_whole_head_are_trained(save_classifier_of, name):
    model = adapted_classifier(save_classifier_of(name))
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    head = {key for key in trained if HEADS[name] in key}
    assert {key.rpartition(".")[2] for key in head} == {"weight", "bias"}
    assert not any("lora" in key for key in head)
    updates = trained.keys() - head
    assert updates and all("lora_A" in key or "lora_B" in key for key in updates)
    assert all(min(trained[key].shape[:2]) <= LORA.r for key in updates)


def test_adapter_goes_on_from_a_folder_with_its_head_and_is_trained_on(save_classifier_of, tmp_path, pixel_values):
    path = save_classifier_of("resnet")
    model = adapted_classifier(path)
    train(model, pixel_values)
    save_adapter(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = load_adapter(load_classifier(path, CLASS_NAMES, True, seed=5), tmp_path)
    assert torch.equal(logits_of(again, pixel_values), logits_of(model, pixel_values))
    trained = [key for key, value in model.named_parameters() if value.requires_grad]
    assert [key for key, value in again.named_parameters() if value.requires_grad] == trained
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(trained)


def test_adapter_names_its_base_checkpoint_at_its_commit(local_hub_server, save_classifier_of, tmp_path, pixel_values):
    local_hub_server.reset()
    repository = local_hub_server.create_repo("ann/vit", "model")
    repository.commit({file.name: file for file in Path(save_classifier_of("vit")).iterdir()})
    commit = check_classifier("ann/vit")
    model = add_adapter(load_classifier("ann/vit", CLASS_NAMES, True, 0, revision=commit), LORA, 0, revision=commit)
    train(model, pixel_values)
    repository.commit({"model.safetensors": b"newer ones, which the adapter was not trained on"})
    save_merged(model, load_image_processor("ann/vit", revision=commit), tmp_path)
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (config.base_model_name_or_path, config.revision) == ("ann/vit", commit)


def test_same_seed_draws_the_same_adapter(save_classifier_of):
    path = save_classifier_of("vit")
    first, again, other = (adapted_classifier(path, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    changed = {key for key, value in first.items() if not torch.equal(value, other[key])}
    assert changed == {key for key in first if "lora_A" in key}


@pytest.mark.parametrize("what", ["running_mean", "convolution"])
def test_saving_a_model_whose_base_was_trained_too_fails(save_classifier_of, tmp_path, pixel_values, what):
    path = save_classifier_of("resnet")
    model = adapted_classifier(path)
    train(model, pixel_values)
    stem = model.get_base_model().resnet.embedder.embedder
    with torch.no_grad():
        if what == "running_mean":
            stem.normalization.running_mean += 0.1
        else:
            stem.convolution.base_layer.weight *= 1.1
    with pytest.raises(AssertionError, match=f"{tmp_path}/adapter: loaded again, logits differ"):
        save_merged(model, load_image_processor(path), tmp_path)


def test_merged_weights_that_predict_otherwise_fail(save_classifier_of, tmp_path, monkeypatch):
    def save_other_head(model, *args) -> None:
        with torch.no_grad():
            model.classifier.weight *= 1.1
        save_classifier(model, *args)

    path = save_classifier_of("vit")
    monkeypatch.setattr(adapters, "save_classifier", save_other_head)
    with pytest.raises(AssertionError, match=f"{tmp_path}: loaded again, logits differ"):
        save_merged(adapted_classifier(path), load_image_processor(path), tmp_path)


def test_settings_reach_the_layers_whose_names_end_so(save_classifier_of):
    lora = LoraSettings(r=2, alpha=5, dropout=0.3, target_modules=("q_proj",))
    model = adapted_classifier(save_classifier_of("vit"), lora)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert [name.rpartition(".")[2] for name in layers] == ["q_proj"]
    (layer,) = layers.values()
    assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout["default"].p) == (2, 2.5, 0.3)


@pytest.mark.parametrize(
    ("name", "target", "problem"),
    [
        ("vit", "q_prij", "there is no such layer; of those that can, the first are "),
        ("vit", "classifier", "classifier cannot take an adapter"),
        ("timm", "conv_dw", r"timm_model.blocks.3.0.conv_dw, .* cannot take an adapter"),  # grouped: cannot be merged
    ],
)
def test_wrong_target_module_is_an_error(save_classifier_of, name, target, problem):
    with pytest.raises(UserError, match=f"--lora_target_modules {target}: {problem}"):
        adapted_classifier(save_classifier_of(name), LoraSettings(target_modules=(target,)))
