"""Features of tiny models of the real classes."""

import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image as PILImage
from transformers import AutoModelForImageClassification

from tests.data.builders import encode, image_column, labelled_images
from utils.cli.errors import UserError
from utils.quality.features import FeatureModel, extract_features, open_feature_model
from utils.quality.vectors import UnitFeatures, make_thumbnail

pytest_plugins = ["tests.transfer.fixtures"]


def load(folder) -> FeatureModel:
    return FeatureModel(open_feature_model(str(folder), "--model_name_or_path"), "cpu")


def image_set(num_images: int) -> Dataset:
    return labelled_images([number % 3 for number in range(num_images)])


def save_backbone(name: str, folder) -> None:
    import transformers as tr

    small = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = {
        "dinov2": lambda: tr.Dinov2ForImageClassification(tr.Dinov2Config(**small)),
        "convnext": lambda: tr.ConvNextForImageClassification(
            tr.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
        ),
        "swin": lambda: tr.SwinForImageClassification(
            tr.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
        ),
        "deit": lambda: tr.DeiTForImageClassification(tr.DeiTConfig(**small)),
    }[name]()
    model.save_pretrained(folder)
    tr.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def before_the_head(folder, head_name: str, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the input of a checkpoint's classification head."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    given = []
    model.get_submodule(head_name).register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    with torch.no_grad():
        model(pixel_values)
    return given[0].flatten(1)


@pytest.mark.parametrize(
    ("name", "head", "size"),
    [
        ("vit", "classifier", 16), ("resnet", "classifier", 16), ("timm", "timm_model.classifier", None),
        ("convnext", "classifier", 16), ("swin", "classifier", 16), ("deit", "classifier", 16),
    ],
)  # fmt: skip
def test_features_are_the_classifiers_pooled_output(classifiers, tmp_path, name, head, size):
    if name not in classifiers:
        save_backbone(name, tmp_path / name)
    folder = classifiers.get(name, tmp_path / name)
    model = load(folder)
    pixel_values = torch.stack([model.preprocess(image) for image in image_set(4)["image"]])
    expected = before_the_head(folder, head, pixel_values)
    if name in ("vit", "deit"):  # their heads get all tokens, or the first of them
        expected = expected[:, :16]
    assert size in (None, model.num_features)
    torch.testing.assert_close(model(pixel_values), expected, rtol=1e-4, atol=1e-5)


def test_features_of_dinov2_are_the_class_token(tmp_path):
    save_backbone("dinov2", tmp_path)
    model = load(tmp_path)
    pixel_values = model.preprocess(image_set(1)[0]["image"])[None]
    torch.testing.assert_close(model(pixel_values), model.model(pixel_values).last_hidden_state[:, 0])


def test_the_same_features_at_each_load_and_batch_size_and_of_a_selection(classifiers, tmp_path):
    images = image_set(7)
    first, thumbnails = extract_features(load(classifiers["vit"]), images, "images", tmp_path / "first", 3)
    second, _ = extract_features(load(classifiers["vit"]), images, "images", tmp_path / "second", 64)
    assert first.shape == (7, 16) and first.dtype == np.float16
    np.testing.assert_allclose(first, second, atol=2e-3)
    assert np.abs(first[0] - first[1]).max() > 0.01
    assert isinstance(first, np.memmap) and isinstance(thumbnails, np.memmap)  # on disk, for any number of images
    assert (thumbnails == [make_thumbnail(image) for image in images["image"]]).all()
    part, _ = extract_features(load(classifiers["vit"]), images.select([5, 2]), "images", tmp_path / "part", 4)
    np.testing.assert_allclose(part, first[[5, 2]], atol=2e-3)


def test_damaged_images_and_features_too_large_for_half_precision_are_refused(classifiers, tmp_path):
    model = load(classifiers["resnet"])
    with pytest.raises(UserError, match="real images: the image in row 0 is damaged"):
        extract_features(model, image_column([b"no image"]), "real images", tmp_path / "damaged", 4)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(1e4)
    with pytest.raises(UserError, match="half precision"):
        extract_features(model, image_set(2), "images", tmp_path / "features", 2)


def test_grey_and_transparent_images_have_features(classifiers, tmp_path):
    images = image_column([encode(PILImage.new(mode, (40, 20))) for mode in ("L", "RGBA", "I;16")])
    assert extract_features(load(classifiers["timm"]), images, "images", tmp_path / "features", 2)[0].shape[0] == 3


def test_a_model_without_image_processor_is_an_error(classifiers, tmp_path):
    AutoModelForImageClassification.from_pretrained(classifiers["vit"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--model_name_or_path .*: has no usable image processor"):
        load(tmp_path)


def test_weights_without_safetensors_are_refused(classifiers, tmp_path):
    shutil.copy(f"{classifiers['vit']}/config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="safetensors"):
        open_feature_model(str(tmp_path), "--model_name_or_path")


def test_a_backbone_with_missing_weights_is_refused(classifiers, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(classifiers["vit"], tmp_path / "lacking")
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if "layernorm" in name)]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match="lacks 1 weights of the backbone"):
        load(folder)


def test_a_model_of_text_is_refused(tmp_path):
    from transformers import CLIPConfig, CLIPModel, ViTImageProcessor

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text, vision = {**small, "vocab_size": 30}, {**small, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not an image model, as its input is input_ids"):
        load(tmp_path)


def test_unit_features_give_cosines_around_the_centre():
    raw = np.array([[3, 4], [5, 4], [1, 2]], np.float16)
    features = UnitFeatures(raw, np.array([1, 4], np.float32))
    unit = torch.cat([chunk for _, chunk in features.chunks(2)])
    expected = np.array([[1, 0], [1, 0], [0, -1]], np.float32)
    np.testing.assert_allclose(unit.numpy(), expected, atol=1e-6)
    assert [start for start, _ in features.chunks(2)] == [0, 2]
