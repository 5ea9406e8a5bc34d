import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import TimmWrapperConfig, pipeline

from tests.conftest import CLASS_NAMES
from tests.transfer.architectures import HEADS, TIMM, save_timm
from utils.cli.errors import UserError
from utils.transfer.classifiers import (
    default_learning_rates,
    load_classifier,
    load_image_processor,
    load_pretrained,
    save_classifier,
)
from utils.transfer.model_parts import head_parameter_names

pytest_plugins = ["tests.transfer.fixtures"]


def tensors_of(model) -> dict[str, torch.Tensor]:
    """Return parameters and buffers, also those that are not in checkpoints."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.fixture
def change_weights(save_classifier_of, tmp_path):
    """Return a copy of the tiny ViT whose weights are those for which `change` returns a name and a value."""

    def change_weights(change) -> str:
        folder = shutil.copytree(save_classifier_of("vit"), tmp_path / "changed")
        path = Path(folder) / "model.safetensors"
        items = [change(*item) for item in load_file(path).items()]
        save_file(dict(filter(None, items)), path, metadata={"format": "pt"})
        return str(folder)

    return change_weights


@pytest.mark.parametrize("name", HEADS)
def test_reset_changes_the_head_only_and_keep_nothing(save_classifier_of, name, tmp_path):
    path = save_classifier_of(name)
    first = load_classifier(path, CLASS_NAMES, True, seed=0)
    head = set(head_parameter_names(first))
    pretrained = tensors_of(load_pretrained(path))  # has seven classes
    assert all(torch.equal(value, pretrained[key]) for key, value in tensors_of(first).items() if key not in head)
    save_classifier(first, load_image_processor(path), tmp_path)
    saved = tensors_of(load_classifier(str(tmp_path), CLASS_NAMES, False, seed=1))
    fresh = load_classifier(str(tmp_path), CLASS_NAMES, True, seed=1)
    changed = {key for key, value in tensors_of(fresh).items() if not torch.equal(value, saved[key])}
    again = load_classifier(str(tmp_path), CLASS_NAMES, True, seed=0)  # drawing the same again is not an error
    for model in (first, again):
        assert all(torch.equal(saved[key], value) for key, value in tensors_of(model).items())
    assert head == set(head_parameter_names(fresh))
    assert {key for key in head if key.endswith("weight")} <= changed <= head


@pytest.mark.parametrize(
    ("name", "inherited"),
    [
        ("vit", {"problem_type": "multi_label_classification"}),
        ("timm", {"problem_type": "regression"}),
        ("timm", {"problem_type": "regression", "function_to_apply": "none"}),
        ("resnet", {"return_dict": False, "output_hidden_states": True, "output_attentions": True}),
    ],
)
def test_a_saved_channels_last_model_is_a_pipeline_with_softmax_probabilities_for_any_base(
    save_classifier_of, name, inherited, tmp_path
):
    base, saved = tmp_path / "base", tmp_path / "saved"
    shutil.copytree(save_classifier_of(name), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | inherited))
    model = load_classifier(str(base), CLASS_NAMES, True, seed=0).eval().to(memory_format=torch.channels_last)
    image_processor = load_image_processor(str(base))
    save_classifier(model, image_processor, saved)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    with torch.no_grad():
        outputs = model(**image_processor(image, return_tensors="pt"))
    assert list(outputs) == ["logits"]
    expected = dict(zip(CLASS_NAMES, outputs.logits[0].softmax(0).tolist()))
    classify = pipeline("image-classification", model=str(saved))
    scores = {entry["label"]: entry["score"] for entry in classify(image)}
    assert scores == pytest.approx(expected, abs=1e-5) and sum(scores.values()) == pytest.approx(1)
    assert list(classify.model.config.id2label.values()) == CLASS_NAMES
    for key, value in model.state_dict().items():
        assert torch.equal(classify.model.state_dict()[key].cpu(), value)


def test_half_precision_checkpoint_is_trained_in_float32(save_classifier_of, tmp_path):
    load_classifier(save_classifier_of("vit"), CLASS_NAMES, True, seed=0).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), CLASS_NAMES, False, seed=0)
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_checkpoint_without_a_head_is_an_error(tmp_path):
    save_timm(tmp_path, "test_efficientnet", {"features_only": True})
    with pytest.raises(UserError, match=f"--model_name_or_path {tmp_path}: .* there is no head to train"):
        load_classifier(str(tmp_path), CLASS_NAMES, True, seed=0)


def test_a_weight_missing_from_a_checkpoint_is_reported_and_drawn_from_the_seed(change_weights, caplog):
    lacking = "vit.embeddings.patch_embeddings.projection.weight"
    folder = change_weights(lambda name, value: None if name == lacking else (name, value))
    first, again, other = (
        load_classifier(folder, CLASS_NAMES, True, seed).get_parameter(lacking) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert "changed: 1 of " in caplog.text and "they are initialised at random" in caplog.text


def test_a_checkpoint_whose_weights_have_other_names_is_an_error(change_weights):
    folder = change_weights(lambda name, value: (f"_orig_mod.{name}", value))  # as torch.compile saves them
    with pytest.raises(UserError, match=r"--model_name_or_path .*changed: \d+ of \d+ weights are not in the"):
        load_classifier(folder, CLASS_NAMES, True, seed=0)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", b"torn" * 100])
def test_damaged_weights_are_a_one_line_error(save_classifier_of, tmp_path, content):
    folder = shutil.copytree(save_classifier_of("vit"), tmp_path / "torn")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="--model_name_or_path .*torn: does not load as an image classifier"):
        load_classifier(str(folder), CLASS_NAMES, True, seed=0)


def is_random_in_training(model) -> bool:
    """Return whether two passes over the same batch differ in train mode, asserting that in eval mode they don't."""
    pixel_values = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(*(model.eval()(pixel_values=pixel_values).logits for _ in range(2)))
        return not torch.equal(*(model.train()(pixel_values=pixel_values).logits for _ in range(2)))


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
        ("resnet", "dropout", "dropout"), ("resnet", "drop_path_rate", "drop path"),
        ("vit", "drop_path_rate", "drop path"), ("convnext", "dropout", "dropout"),
        ("densenet", "drop_path_rate", "drop path"),
    ],
)  # fmt: skip
def test_dropout_of_a_model_without_it_is_an_error(save_classifier_of, tmp_path, name, flag, kind):
    if name == "densenet":  # of timm, which has the other kind of dropout
        path = str(tmp_path)
        save_timm(tmp_path, "densenet121", {"growth_rate": 4, "block_config": [1, 1, 1, 1]})
        assert is_random_in_training(load_classifier(path, CLASS_NAMES, True, seed=0, dropout=0.5))
    else:
        path = save_classifier_of(name)
    with pytest.raises(UserError, match=f"--{flag} 0.1: {path} has no {kind}; leave the flag out."):
        load_classifier(path, CLASS_NAMES, True, seed=0, **{flag: 0.1})


FAST, SLOW = (2e-4, 5e-4), (2e-5, 5e-5)
OWN_CODE = """
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

class OwnConfig(PreTrainedConfig):
    model_type = "own"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.BatchNorm2d(3)
        self.post_init()
"""


def rates_of(path, **options) -> tuple[tuple[float, float], str]:
    rates = default_learning_rates(str(path), **options)
    return (rates.real, rates.synthetic), rates.reason


@pytest.mark.parametrize("name", HEADS)
def test_networks_with_batch_norm_get_higher_learning_rates(save_classifier_of, name):
    found, reason = rates_of(save_classifier_of(name))
    architecture = TIMM[name][0] if name in TIMM else name
    if name in ("resnet", "efficientnet", "timm", "timm_resnet"):
        assert (found, reason) == (FAST, f"{architecture} normalises by BatchNorm, all its weights are trained")
    else:
        assert (found, reason) == (SLOW, f"{architecture} has no BatchNorm, all its weights are trained")


@pytest.mark.parametrize(
    ("config", "expected", "reason"),
    [
        (transformers.ViTConfig(), SLOW, "vit has no BatchNorm, all its"),
        (transformers.CvtConfig(), SLOW, "cvt has LayerNorm as well as BatchNorm, all its"),
        (TimmWrapperConfig(architecture="resnet50"), FAST, "resnet50 normalises by BatchNorm"),
        (TimmWrapperConfig(architecture="vgg11"), SLOW, "vgg11 has no BatchNorm"),
        (TimmWrapperConfig(architecture="resnetv2_50x1_bit", num_labels=0), SLOW, "_bit has no BatchNorm"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_learning_rates_need_no_weights_little_time_and_no_random_numbers(tmp_path, config, expected, reason):
    config.save_pretrained(tmp_path)
    state, started = torch.get_rng_state(), time.process_time()
    found, words = rates_of(tmp_path)
    assert found == expected and reason in words
    assert torch.equal(torch.get_rng_state(), state) and time.process_time() - started < 2


def test_learning_rates_for_adapters_custom_code_and_checkpoints_that_are_not_classifiers(tmp_path):
    assert rates_of("nowhere", use_peft=True) == (FAST, "an adapter and the head are trained")
    assert rates_of("nowhere", freeze_backbone=True) == (FAST, "the head alone is trained")
    (tmp_path / "own.py").write_text(OWN_CODE)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForImageClassification": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    assert rates_of(tmp_path, trust_remote_code=True, revision="main", token=None)[0] == FAST
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="--model_name_or_path .*bert: does not load as an image classifier"):
        rates_of(tmp_path / "bert")
