import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import pipeline

from tests.conftest import CLASS_NAMES
from tests.transfer.architectures import HEADS, save_timm
from utils.cli.errors import UserError
from utils.transfer.classifiers import load_classifier, load_image_processor, load_pretrained, save_classifier
from utils.transfer.evaluation import predict
from utils.transfer.model_parts import head_parameter_names

pytest_plugins = ["tests.transfer.fixtures"]


def tensors_of(model) -> dict[str, torch.Tensor]:
    """Return parameters and buffers, also those that no checkpoint holds."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("name", HEADS)
def test_reset_changes_the_head_only_and_keep_nothing(save_classifier_of, name, tmp_path):
    path = save_classifier_of(name)
    first = load_classifier(path, CLASS_NAMES, True, seed=0)
    head = set(head_parameter_names(first))
    pretrained = tensors_of(load_pretrained(path))  # of seven classes
    assert all(torch.equal(value, pretrained[key]) for key, value in tensors_of(first).items() if key not in head)
    save_classifier(first, load_image_processor(path), tmp_path)
    saved = tensors_of(load_classifier(str(tmp_path), CLASS_NAMES, False, seed=1))
    fresh = load_classifier(str(tmp_path), CLASS_NAMES, True, seed=1)
    changed = {key for key, value in tensors_of(fresh).items() if not torch.equal(value, saved[key])}
    assert all(torch.equal(saved[key], value) for key, value in tensors_of(first).items())
    again = load_classifier(str(tmp_path), CLASS_NAMES, True, seed=0)  # the same draw once more is no error
    assert all(torch.equal(saved[key], value) for key, value in tensors_of(again).items())
    assert head == set(head_parameter_names(fresh))
    assert changed and changed <= head
    assert {key for key in head if key.endswith("weight")} <= changed


@pytest.mark.parametrize("name", ["vit", "resnet", "timm"])
def test_saved_channels_last_model_loads_in_a_pipeline(save_classifier_of, name, tmp_path):
    path = save_classifier_of(name)
    model = load_classifier(path, CLASS_NAMES, True, seed=0).to(memory_format=torch.channels_last)
    save_classifier(model, load_image_processor(path), tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path))
    assert list(classify.model.config.id2label.values()) == CLASS_NAMES
    for key, value in model.state_dict().items():
        assert torch.equal(classify.model.state_dict()[key].cpu(), value)


@pytest.mark.parametrize("name", ["vit", "timm"])
@pytest.mark.parametrize(
    "inherited",
    [
        {"problem_type": "multi_label_classification"},
        {"problem_type": "regression"},
        {"problem_type": "regression", "function_to_apply": "none"},
        {"return_dict": False, "output_hidden_states": True, "output_attentions": True},
    ],
)
def test_a_saved_pipeline_gives_softmax_probabilities_whatever_the_base_was_for(
    save_classifier_of, name, inherited, tmp_path
):
    base, saved = tmp_path / "base", tmp_path / "saved"
    shutil.copytree(save_classifier_of(name), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | inherited))
    model = load_classifier(str(base), CLASS_NAMES, True, seed=0).eval()
    image_processor = load_image_processor(str(base))
    save_classifier(model, image_processor, saved)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    with torch.no_grad():
        outputs = model(**image_processor(image, return_tensors="pt"))
    assert list(outputs) == ["logits"]
    expected = dict(zip(CLASS_NAMES, outputs.logits[0].softmax(0).tolist()))
    scores = {entry["label"]: entry["score"] for entry in pipeline("image-classification", model=str(saved))(image)}
    assert scores == pytest.approx(expected, abs=1e-5) and sum(scores.values()) == pytest.approx(1)


def test_half_precision_checkpoint_is_trained_in_float32(save_classifier_of, tmp_path):
    load_classifier(save_classifier_of("vit"), CLASS_NAMES, True, seed=0).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), CLASS_NAMES, False, seed=0)
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_checkpoint_without_a_head_is_an_error(tmp_path):
    save_timm(tmp_path, "test_efficientnet", {"features_only": True})
    with pytest.raises(UserError, match=f"--model_name_or_path {tmp_path}: .* there is no head to train"):
        load_classifier(str(tmp_path), CLASS_NAMES, True, seed=0)


def test_what_a_checkpoint_lacks_is_drawn_from_the_seed(save_classifier_of, tmp_path):
    model = load_classifier(save_classifier_of("vit"), CLASS_NAMES, True, seed=0)
    lacking = "vit.embeddings.patch_embeddings.projection.weight"
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[lacking]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    first, again, other = (
        load_classifier(str(tmp_path), CLASS_NAMES, False, seed).get_parameter(lacking) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def is_random_in_training(model) -> bool:
    """Return whether two passes over the same batch differ in train mode, asserting that in eval mode they don't."""
    pixel_values = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(pixel_values=pixel_values).logits, model(pixel_values=pixel_values).logits)
        model.train()
        return not torch.equal(model(pixel_values=pixel_values).logits, model(pixel_values=pixel_values).logits)


DROPOUT, DROP_PATH = {"dropout": 0.5}, {"drop_path_rate": 0.5}


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("vit", DROPOUT), ("dinov2", DROPOUT), ("dinov2", DROP_PATH), ("convnext", DROP_PATH),
        ("swin", DROPOUT | {"drop_path_rate": 0.0}), ("swin", DROP_PATH | {"dropout": 0.0}),
        ("efficientnet", DROPOUT | {"drop_path_rate": 0.0}), ("efficientnet", DROP_PATH | {"dropout": 0.0}),
        ("timm", DROPOUT), ("timm_resnet", DROPOUT), ("timm_resnet", DROP_PATH),
        ("timm_vit", DROPOUT), ("timm_vit", DROP_PATH), ("timm_dinov3", DROP_PATH),
    ],
)  # fmt: skip
def test_dropout_acts_in_training_only_and_is_saved(save_classifier_of, name, rates, tmp_path):
    path = save_classifier_of(name)
    torch.manual_seed(0)
    model = load_classifier(path, CLASS_NAMES, True, seed=0, **rates)
    assert is_random_in_training(model)
    save_classifier(model, load_image_processor(path), tmp_path)
    assert is_random_in_training(load_classifier(str(tmp_path), CLASS_NAMES, False, seed=0))
    without = load_classifier(str(tmp_path), CLASS_NAMES, False, seed=0, **dict.fromkeys(rates, 0.0))
    assert not is_random_in_training(without)


def test_dropout_leaves_attention_alone(save_classifier_of):
    config = load_classifier(save_classifier_of("vit"), CLASS_NAMES, True, seed=0, dropout=0.5).config
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("name", "flag", "kind"),
    [
        ("resnet", "dropout", "dropout"),
        ("resnet", "drop_path_rate", "drop path"),
        ("vit", "drop_path_rate", "drop path"),
        ("convnext", "dropout", "dropout"),
    ],
)
def test_dropout_of_a_model_without_it_is_an_error(save_classifier_of, name, flag, kind):
    path = save_classifier_of(name)
    with pytest.raises(UserError, match=f"--{flag} 0.1: {path} has no {kind}; leave the flag out."):
        load_classifier(path, CLASS_NAMES, True, seed=0, **{flag: 0.1})


def test_drop_path_of_a_timm_model_without_it_is_an_error(tmp_path):
    save_timm(tmp_path, "densenet121", {"growth_rate": 4, "block_config": [1, 1, 1, 1]})
    assert is_random_in_training(load_classifier(str(tmp_path), CLASS_NAMES, True, seed=0, dropout=0.5))
    with pytest.raises(UserError, match=f"--drop_path_rate 0.1: {tmp_path} has no drop path"):
        load_classifier(str(tmp_path), CLASS_NAMES, True, seed=0, drop_path_rate=0.1)


def change_weights(folder, change) -> str:
    path = Path(folder) / "model.safetensors"
    save_file(dict(change(*item) for item in load_file(path).items() if change(*item)), path, metadata={"format": "pt"})
    return str(folder)


def test_a_checkpoint_whose_weights_have_other_names_is_an_error(save_classifier_of, tmp_path):
    folder = shutil.copytree(save_classifier_of("vit"), tmp_path / "compiled")
    change_weights(folder, lambda name, value: (f"_orig_mod.{name}", value))  # as torch.compile saves them
    with pytest.raises(UserError, match=r"--model_name_or_path .*compiled: \d+ of \d+ weights are not in the"):
        load_classifier(str(folder), CLASS_NAMES, True, seed=0)


def test_a_checkpoint_that_lacks_a_few_weights_is_told(save_classifier_of, tmp_path, caplog):
    folder = shutil.copytree(save_classifier_of("vit"), tmp_path / "lacking")
    change_weights(folder, lambda name, value: None if name.endswith("layernorm.bias") else (name, value))
    load_classifier(str(folder), CLASS_NAMES, True, seed=0)
    assert "lacking: 1 of " in caplog.text and "they begin as random numbers" in caplog.text


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", b"torn" * 100])
def test_torn_weights_are_one_line(save_classifier_of, tmp_path, content):
    folder = shutil.copytree(save_classifier_of("vit"), tmp_path / "torn")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="--model_name_or_path .*torn: does not load as an image classifier"):
        load_classifier(str(folder), CLASS_NAMES, True, seed=0)


def test_outputs_that_are_not_finite_are_no_prediction(save_classifier_of):
    model = load_classifier(save_classifier_of("vit"), CLASS_NAMES, True, seed=0)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    items = [{"pixel_values": torch.zeros(3, 32, 32), "labels": 0}]
    with pytest.raises(UserError, match="the classifier's outputs are not finite; its weights are damaged"):
        predict(model, items)
