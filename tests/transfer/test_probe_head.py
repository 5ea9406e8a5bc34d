"""A probe as a head: the saved classifier predicts what scikit-learn does; backbones without a head are enough."""

import logging

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from torch import nn
from transformers import pipeline

from tests.conftest import CLASS_NAMES
from tests.transfer.architectures import SQUARE, TRANSFORMER, save_timm
from tests.transfer.builders import run_plan
from utils.cli.errors import UserError
from utils.transfer import probe, stage
from utils.transfer.adapters import LoraSettings, add_adapter
from utils.transfer.classifiers import load_classifier, load_image_processor, load_pretrained
from utils.transfer.image_format import EvalImages
from utils.transfer.methods import METHODS, StageSettings, plan_stages
from utils.transfer.model_parts import head_module_names
from utils.transfer.probe import choose_probe_images, fit_probe, probe_head

pytest_plugins = ["tests.transfer.fixtures"]

TOWER = TRANSFORMER | {"num_hidden_layers": 1, "intermediate_size": 16}
TEXT = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 50}
TOWERS = {"vision_config": TOWER, "text_config": TEXT}
PROCESSOR = {"size": SQUARE, "crop_size": SQUARE}
# a family of transformers, the kind of model that is saved, its sizes and its image processor
BACKBONES = {
    "vit": ("ViT", "Model", TOWER, "ViT"),
    "dinov2": ("Dinov2", "Model", TRANSFORMER | {"num_hidden_layers": 2, "mlp_ratio": 1}, "Bit"),
    "clip": ("CLIP", "Model", TOWERS | {"projection_dim": 8}, "CLIP"),
    "siglip": ("Siglip", "Model", TOWERS, "Siglip"),
    "ijepa": ("IJepa", "Model", TOWER, "ViT"),
}
NO_CLASSIFIERS = {
    "clip-vision": ("CLIP", "VisionModel", "CLIPVision", TOWER),
    "dinov3": ("DINOv3ViT", "Model", "DINOv3ViT", TOWER),
}


def save_backbone(folder, name: str) -> str:
    """Write a network without a head; of image and text towers, both."""
    torch.manual_seed(0)
    if name == "timm":
        size = {"embed_dim": 16, "depth": 2, "img_size": 32}
        cfg = {
            "input_size": [3, 32, 32],
            "interpolation": "bilinear",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "crop_pct": 1,
        }
        config = transformers.TimmWrapperConfig(
            architecture="test_vit", pretrained_cfg=cfg, model_args=size, num_labels=0
        )
        transformers.TimmWrapperModel(config).save_pretrained(folder)
        return str(folder)
    family, kind, sizes, processor = BACKBONES[name]
    config = getattr(transformers, f"{family}Config")(**sizes)
    getattr(transformers, f"{family}{kind}")(config).save_pretrained(folder)
    getattr(transformers, f"{processor}ImageProcessor")(**PROCESSOR).save_pretrained(folder)
    return str(folder)


def planned(name: str = "linear_probe", num_steps: int = 5):
    """Return the only stage of a real-only method."""
    (plan,) = plan_stages(METHODS[name], StageSettings(2, 1e-3), StageSettings(num_steps, 1e-3))
    return plan


def features_of(path: str, images, class_names=tuple(CLASS_NAMES)) -> np.ndarray:
    """Return what enters the head, `(n, dimensions)`, by a network that has none."""
    model = load_classifier(path, list(class_names), True, seed=0).eval()
    model.set_submodule(head_module_names(model)[0], nn.Identity())
    pixel_values = torch.stack([item["pixel_values"] for item in EvalImages(images, load_image_processor(path))])
    with torch.inference_mode():
        return model(pixel_values=pixel_values).logits.numpy()


def expected_regression(features: np.ndarray, labels: np.ndarray) -> tuple[LogisticRegression, np.ndarray]:
    """Return scikit-learn's regression with the strength that a search by hand finds, and the features it is for."""
    scaled = features / np.linalg.norm(features, axis=1).mean()
    strength, num_folds = 10.0, min(5, np.bincount(labels).min())
    if num_folds > 1:
        folds = StratifiedKFold(num_folds, shuffle=True, random_state=0)
        strengths = (0.1, 1, 10, 100, 1000)
        strength = max(strengths, key=lambda value: cross_val_score(
            LogisticRegression(C=value, max_iter=1000), scaled, labels, cv=folds, scoring="neg_log_loss"
        ).mean())  # fmt: skip
    return LogisticRegression(C=strength, max_iter=1000).fit(scaled, labels), scaled


def pipeline_probabilities(folder, images) -> np.ndarray:
    classify = pipeline("image-classification", model=str(folder), device="cpu")
    names = images.features["label"].names
    scores = [{entry["label"]: entry["score"] for entry in classify(row["image"], top_k=None)} for row in images]
    return np.array([[score[name] for name in names] for score in scores])


@pytest.mark.parametrize("name", [*BACKBONES, "timm"])
@pytest.mark.parametrize("num_images", [12, 3])
def test_the_saved_probe_of_a_backbone_predicts_what_scikit_learn_does(images, tmp_path, name, num_images, caplog):
    path = save_backbone(tmp_path / name, name)
    labels = np.array(images["label"])
    one_of_each = [int(np.flatnonzero(labels == label)[0]) for label in range(3)]
    few = images.select(one_of_each if num_images == 3 else range(12))
    assert load_pretrained(path) is None
    with caplog.at_level(logging.INFO, "utils"):
        model, result = run_plan(planned(), path, few, tmp_path / "probe")
    regression, _ = expected_regression(features_of(path, few), np.array(few["label"]))
    scaled = features_of(path, images) / np.linalg.norm(features_of(path, few), axis=1).mean()
    found = pipeline_probabilities(tmp_path / "probe", images)
    np.testing.assert_allclose(found, regression.predict_proba(scaled), atol=2e-3)
    how = "the default, as a class has one image" if num_images == 3 else "by 4-fold cross-validation"
    assert f"features of {num_images} images, C={regression.C:g} ({how})" in caplog.text
    assert "weights are not in the checkpoint" not in caplog.text
    assert (result.num_steps, result.num_images_seen, result.num_gpus) == (0, num_images, 0) and result.seconds > 0
    # nothing but the head is another
    before = load_classifier(path, CLASS_NAMES, True, seed=0).state_dict()
    head = head_module_names(model)[0]
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value.cpu(), before[key])}
    assert changed == {f"{head}.weight", f"{head}.bias"}


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip", "siglip"])
def test_a_backbone_brings_its_own_weights(tmp_path, name):
    path = save_backbone(tmp_path / name, name)
    family, kind, *_ = BACKBONES[name]
    saved = getattr(transformers, f"{family}{kind}").from_pretrained(path).state_dict()
    loaded = load_classifier(path, CLASS_NAMES, True, seed=0).state_dict()
    towers = {key: value for key, value in loaded.items() if not key.startswith("classifier")}
    own = {key.removeprefix(f"{name}."): value for key, value in towers.items()}
    assert len(own) > 10 and all(torch.equal(value, saved[key]) for key, value in own.items())


@pytest.mark.parametrize("name", NO_CLASSIFIERS)
def test_a_backbone_without_a_classifier_in_transformers_is_a_one_line_error(tmp_path, name):
    family, kind, config, sizes = NO_CLASSIFIERS[name]
    sizes = getattr(transformers, f"{config}Config")(**sizes)
    getattr(transformers, f"{family}{kind}")(sizes).save_pretrained(tmp_path / name)
    with pytest.raises(UserError, match=f"^--model_name_or_path .*{name}: does not load as an image") as error:
        load_classifier(str(tmp_path / name), CLASS_NAMES, True, seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["resnet", "timm"])
def test_a_probe_replaces_the_head_of_a_classifier_with_an_adapter_as_without(
    save_classifier_of, images, tmp_path, name
):
    path = save_classifier_of(name)
    plain, _ = run_plan(planned(), path, images, tmp_path / "plain")
    regression, scaled = expected_regression(features_of(path, images), np.array(images["label"]))
    found = pipeline_probabilities(tmp_path / "plain", images)
    np.testing.assert_allclose(found, regression.predict_proba(scaled), atol=2e-3)
    adapted = add_adapter(load_classifier(path, CLASS_NAMES, True, 0), LoraSettings(r=2), seed=0)
    probe_head(adapted, EvalImages(images, load_image_processor(path)))
    own, other = (model.get_submodule(head_module_names(model)[0]) for model in (plain, adapted))
    torch.testing.assert_close(own.weight.cpu(), other.weight.cpu(), rtol=1e-3, atol=1e-3)


def test_two_classes_share_the_single_weight_vector_of_their_regression():
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(40, 5)).astype(np.float32), np.arange(40) % 2
    features[:, 0] += labels
    weight, bias, _ = fit_probe(features, labels)
    regression, scaled = expected_regression(features, labels)
    logits = torch.from_numpy(features @ weight.T + bias)
    np.testing.assert_allclose(logits.softmax(1).numpy(), regression.predict_proba(scaled), atol=1e-3)
    without, none, _ = fit_probe(features, labels, has_bias=False)
    assert not none.any() and not np.allclose(without, weight)


def test_fine_tuning_begins_with_the_head_of_the_probe_and_moves_it(classifiers, images, tmp_path):
    path = classifiers["vit"]
    probed, _ = run_plan(planned(), path, images, tmp_path / "probe")
    tuned, result = run_plan(planned("lp_ft"), path, images, tmp_path / "tuned")
    assert result.num_steps == 7
    own, before = (model.classifier.weight.detach().cpu() for model in (tuned, probed))
    fresh = load_classifier(path, CLASS_NAMES, True, 42).classifier.weight
    assert 0 < (own - before).norm() < 0.1 * (fresh - before).norm()
    assert not torch.equal(tuned.vit.embeddings.cls_token.cpu(), probed.vit.embeddings.cls_token.cpu())


def test_a_finished_probe_is_loaded_when_it_is_resumed(classifiers, images, tmp_path, monkeypatch):
    first, result = run_plan(planned(), classifiers["resnet"], images, tmp_path / "probe")
    monkeypatch.setattr(stage, "probe_head", lambda *_: pytest.fail("it was fitted again"))
    again, again_result = run_plan(planned(), classifiers["resnet"], images, tmp_path / "probe", resume=True)
    assert again_result == result
    assert all(torch.equal(value.cpu(), again.state_dict()[key]) for key, value in first.state_dict().items())


def test_with_many_images_a_balanced_subset_is_fitted_and_logged(classifiers, images, tmp_path, caplog):
    labels = np.repeat([0, 1, 2], [50, 3, 20])
    with caplog.at_level(logging.INFO, "utils"):
        rows = choose_probe_images(labels, 13)
        assert np.bincount(labels[rows]).tolist() == [5, 3, 5]
        assert choose_probe_images(labels, 73).tolist() == list(range(73))
    assert caplog.messages == ["The probe is fitted on 13 of 73 images, balanced over classes."]


def test_a_stage_fits_its_probe_on_the_chosen_images_alone(classifiers, images, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "choose_probe_images", lambda labels: choose_probe_images(labels, 6))
    _, result = run_plan(planned(), classifiers["vit"], images, tmp_path)
    assert result.num_images_seen == 6


def test_the_search_uses_few_images_and_the_probe_is_fitted_on_all(monkeypatch):
    seen = []
    fit = LogisticRegression.fit
    monkeypatch.setattr(LogisticRegression, "fit", lambda self, x, y: seen.append(len(x)) or fit(self, x, y))
    monkeypatch.setattr(probe, "MAX_SEARCHED_IMAGES", 20)
    fit_probe(np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32), np.arange(100) % 2)
    assert seen == [16] * 25 + [100]


def save_two_heads(folder) -> None:
    config = transformers.DeiTConfig(**TOWER)
    transformers.DeiTForImageClassificationWithTeacher(config).save_pretrained(folder)
    transformers.DeiTImageProcessor(**PROCESSOR).save_pretrained(folder)


def save_convolution(folder) -> None:
    save_timm(folder, "resnetv2_50", {"layers": [1, 1, 1, 1], "channels": [32] * 4, "stem_chs": 8})


@pytest.mark.parametrize("save", [save_two_heads, save_convolution])
def test_a_head_that_is_not_one_linear_layer_is_a_one_line_error(images, tmp_path, save):
    save(tmp_path / "odd")
    message = f"--head_init probe .*: the head of {tmp_path}/odd is not one linear layer on one feature vector."
    with pytest.raises(UserError, match=message):
        run_plan(planned(), str(tmp_path / "odd"), images, tmp_path / "probe")


def test_a_linear_layer_whose_outputs_are_not_the_logits_is_refused(classifiers, images):
    model = load_classifier(classifiers["vit"], CLASS_NAMES, True, 0)
    model.classifier.register_forward_hook(lambda module, args, output: 3 * output if model.training else output)
    items = list(EvalImages(images, load_image_processor(classifiers["vit"])))
    probe_head(model, items)  # in eval mode they are
    forward = model.forward
    model.forward = lambda **inputs: transformers.modeling_outputs.ImageClassifierOutput(
        logits=2 * forward(**inputs).logits
    )
    with pytest.raises(UserError, match="is not one linear layer"):
        probe_head(model, items)


def test_a_class_without_images_or_a_single_class_is_a_one_line_error(classifiers, images, tmp_path):
    labels = np.array(images["label"])
    with pytest.raises(UserError, match=f"--head_init probe .*: no image of {CLASS_NAMES[0]}.$"):
        run_plan(planned(), classifiers["vit"], images.select(np.flatnonzero(labels)), tmp_path / "missing")
    rows = images.select(np.flatnonzero(labels == 0))
    features = Features({"image": Image(), "label": ClassLabel(names=["only"])})
    alone = Dataset.from_dict({"image": list(rows["image"]), "label": [0] * len(rows)}, features)
    with pytest.raises(UserError, match="--head_init probe .*: needs at least two classes, got one"):
        run_plan(planned(), classifiers["vit"], alone, tmp_path / "single")
