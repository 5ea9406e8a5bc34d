import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image as PILImage
from torch.utils.data import default_collate
from transformers import TimmWrapperImageProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from utils.cli.errors import UserError
from utils.transfer import image_format
from utils.transfer.augmentation import BatchAugmentation, TrainItems
from utils.transfer.image_format import EvalImages, check_image_processor, read_image_format

pytest_plugins = ["tests.transfer.fixtures"]


def square(edge: int) -> dict:
    return {"height": edge, "width": edge}


CROP = {"size": square(36), "crop_size": square(32)}
SHORTEST = CROP | {"size": {"shortest_edge": 36}}
# small sizes, as the classes name them; all processors that crop show 8/9 of a side
SIZES = {
    "Beit": {"size": square(32)}, "Bit": SHORTEST, "CLIP": SHORTEST, "DeiT": CROP, "EfficientNet": {"size": square(32)},
    "ConvNext": {"size": {"shortest_edge": 32}, "crop_pct": 8 / 9}, "Gemma3": {"size": square(32)},
    "Levit": SHORTEST | {"size": {"shortest_edge": 31.5}}, "MobileNetV1": SHORTEST, "MobileNetV2": SHORTEST,
    "MobileViT": SHORTEST, "PPLCNet": SHORTEST | {"resize_short": 36},
    "Perceiver": {"size": square(32), "crop_size": square(36)},
    "PoolFormer": {"size": {"shortest_edge": 32}, "crop_size": square(32), "crop_pct": 8 / 9},
    "Pvt": {"size": square(32)}, "Segformer": {"size": square(32)}, "Siglip": {"size": square(32)},
    "ViT": {"size": square(32)}, "Donut": {"size": square(32)}, "TextNet": {"size": {"shortest_edge": 32}},
    "ImageGPT": {"size": square(8), "clusters": np.zeros((2, 3))}, "Siglip2": {},
}  # fmt: skip
CROPPING = {"Bit", "CLIP", "ConvNext", "DeiT", "Levit", "MobileNetV1", "MobileNetV2", "MobileViT", "PPLCNet",
            "Perceiver", "PoolFormer"}  # fmt: skip
REFUSED = {"ImageGPT": "input_ids 1 x 64", "Siglip2": "pixel_values 1 x 256 x 768", "TextNet": "1 x 3 x 32 x 96 or"}
PADDING = {"Donut"}


def processor_classes() -> dict[str, str]:
    """Return every image processor of transformers' image classifiers, and its family."""
    mappings = [IMAGE_PROCESSOR_MAPPING_NAMES.get(name, {}) for name in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES]
    names = {name for mapping in mappings for name in mapping.values()} - {"TimmWrapperImageProcessor"}
    return {name: name.removesuffix("Pil").removesuffix("ImageProcessor") for name in sorted(names)}


def make(family: str, **settings):
    family, pil, _ = family.partition("Pil")
    return getattr(transformers, f"{family}ImageProcessor{pil}")(**(SIZES[family] | settings))


def noise(height: int, width: int) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8))


def trained_on(image_processor, image: PILImage.Image, box: tuple, monkeypatch) -> torch.Tensor:
    """Return the model's input for a box of an image in training, `(3, height, width)`."""
    items = TrainItems(image_processor, "basic", random_flip=False)
    drawn = dict(zip(("top", "left", "height", "width"), box))
    monkeypatch.setattr(items.crop_and_flip.crop, "make_params", lambda _: drawn)
    monkeypatch.setattr("utils.transfer.augmentation.open_image", lambda image: image)
    batch = default_collate([items.make({"image": image, "label": 0}, 1)])
    return BatchAugmentation(items.image_format, 2, seed=0)(batch)["pixel_values"][0]


def assert_same_pixels(image_processor, box: tuple, size: tuple[int, int], monkeypatch) -> None:
    """Assert that training and evaluation get the same pixels for the box that evaluation shows of an image."""
    image = noise(*size)
    trained = trained_on(image_processor, image, box, monkeypatch)
    evaluated = EvalImages([{"image": image, "label": 0}], image_processor)[0]["pixel_values"]
    assert read_image_format(image_processor).processor is None
    assert trained.shape == evaluated.shape
    black, white = (image_processor(PILImage.new("RGB", (48, 48), colour)) for colour in ("black", "white"))
    level = (np.asarray(white["pixel_values"][0]) - np.asarray(black["pixel_values"][0])).max() / 255
    # the processor sees the image beyond the edges of a crop, and may round differently
    assert (trained - evaluated)[:, 3:-3, 3:-3].abs().max() <= 1.01 * level


@pytest.mark.parametrize(("name", "family"), processor_classes().items())
def test_training_gets_the_pixels_that_the_image_processor_makes(name, family, monkeypatch):
    image_processor = getattr(transformers, name)(**SIZES[family])
    if family in REFUSED:
        with pytest.raises(UserError, match=f"^--model_name_or_path some/model: .* {REFUSED[family]}"):
            check_image_processor(image_processor, "some/model")
        return
    check_image_processor(image_processor, "some/model")
    if family in PADDING:
        assert read_image_format(image_processor).processor is image_processor
        return
    box = (6, 6, 96, 96) if family in CROPPING else (0, 0, 108, 108)
    assert_same_pixels(image_processor, box, (108, 108), monkeypatch)


@pytest.mark.parametrize(
    ("family", "settings", "box"),
    [
        ("MobileViT", {"do_flip_channel_order": False}, (6, 6, 96, 96)),
        ("EfficientNet", {"include_top": False}, (0, 0, 108, 108)),
        ("EfficientNet", {"rescale_offset": True, "rescale_factor": 1 / 127.5}, (0, 0, 108, 108)),
        ("EfficientNet", {"do_normalize": False}, (0, 0, 108, 108)),
        ("EfficientNetPil", {"image_std": [0.2, 0.3, 0.4], "resample": 0}, (0, 0, 108, 108)),
        ("ViT", {"do_rescale": False}, (0, 0, 108, 108)),
        ("ViT", {"do_rescale": False, "do_normalize": False}, (0, 0, 108, 108)),
        ("ViT", {"rescale_factor": 1 / 127.5}, (0, 0, 108, 108)),
        ("ViT", {"size": {"height": 27, "width": 54}, "resample": 1}, (0, 0, 108, 108)),
        ("ViTPil", {"size": {"height": 54, "width": 27}, "resample": 3}, (0, 0, 108, 108)),
        ("ViT", {"resample": 0}, (0, 0, 108, 108)),
        ("ViTPil", {"resample": 4}, (0, 0, 108, 108)),
        ("ViTPil", {"resample": 5}, (0, 0, 108, 108)),
        ("ConvNext", {"crop_pct": 0.5, "size": {"shortest_edge": 18}}, (27, 27, 54, 54)),
        ("CLIP", {"crop_size": {"height": 20, "width": 30}}, (24, 9, 60, 90)),
        ("CLIP", {"crop_size": square(31)}, (6, 6, 93, 93)),  # half a pixel off the middle
        ("Perceiver", {"size": square(30), "crop_size": square(40)}, (13, 13, 81, 81)),
    ],
)
def test_training_follows_every_setting_of_the_image_processor(family, settings, box, monkeypatch):
    assert_same_pixels(make(family, **settings), box, (108, 108), monkeypatch)


@pytest.mark.parametrize(
    ("settings", "box"),
    [
        ({"crop_pct": 8 / 9}, (6, 6, 96, 96)),
        ({"crop_pct": 8 / 9, "crop_mode": "squash", "interpolation": "bicubic"}, (6, 6, 96, 96)),
        ({"crop_pct": 1.0, "interpolation": "lanczos"}, (0, 0, 108, 108)),
        ({"crop_pct": 1.0, "interpolation": "nearest", "mean": [0] * 3, "std": [1] * 3}, (0, 0, 108, 108)),
        ({"input_size": (3, 18, 27), "crop_pct": 0.5, "interpolation": "hamming"}, (27, 27, 54, 54)),
    ],
)
def test_training_gets_the_pixels_that_timms_transform_makes(settings, box, monkeypatch):
    config = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bilinear"}
    size = (108, 162) if "input_size" in settings else (108, 108)
    box = (27, 42, 54, 81) if "input_size" in settings else box
    assert_same_pixels(TimmWrapperImageProcessor(pretrained_cfg=config | settings), box, size, monkeypatch)


class Standardising(transformers.ViTImageProcessor):
    """Subtracts each image's own mean, like processors of some medical models."""

    def __call__(self, images, **options):
        features = super().__call__(images, **options)
        return {"pixel_values": features["pixel_values"] - features["pixel_values"].mean()}


class Sharpening(transformers.ViTImageProcessor):
    """Does not change images of one colour."""

    def __call__(self, images, **options):
        pixels = super().__call__(images, **options)["pixel_values"]
        return {"pixel_values": 2 * pixels - torch.nn.functional.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)}


class Brightening(transformers.ViTImageProcessor):
    """Does not change black and white."""

    def __call__(self, images, **options):
        pixels = super().__call__(images, **options)["pixel_values"]
        return {"pixel_values": (0.5 * pixels + 0.5).sqrt()}


@pytest.mark.parametrize(
    "image_processor",
    [
        make("Donut"),  # pads
        make("CLIP", size={"shortest_edge": 24}),  # pads, crop_size is larger
        make("MobileViT", size={"shortest_edge": 24}),  # pads too, and swaps red and blue
        TimmWrapperImageProcessor(pretrained_cfg={"input_size": (3, 32, 32), "crop_mode": "border"}),
        Standardising(size=square(32)),
        Sharpening(size=square(32)),
        Brightening(size=square(32)),
    ],
    ids=lambda image_processor: type(image_processor).__name__,
)
def test_the_image_processor_itself_is_used_with_a_warning_if_training_cannot_repeat_it(
    image_processor, monkeypatch, caplog
):
    for size, box in ((40, 60), (0, 0, 40, 60)), ((60, 40), (10, 0, 30, 40)):
        image = noise(*size)
        shown = image.crop((box[1], box[0], box[1] + box[3], box[0] + box[2]))
        expected = image_processor(shown, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(trained_on(image_processor, image, box, monkeypatch), expected)
    messages = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 1 and "training calls it for every image, which is slower" in messages[0]


def test_colours_change_before_the_image_processor_and_crops_keep_their_pixels(monkeypatch):
    items = TrainItems(make("Donut"), "robust", mixup_alpha=0.2)
    monkeypatch.setattr("utils.transfer.augmentation.open_image", lambda image: image)
    row = {"image": PILImage.new("RGB", (900, 600), (200, 100, 0)), "label": 1}
    made = [items.make(row, 0, 0, index) for index in range(30)]
    tiny = {"image": PILImage.new("RGB", (1, 2)), "label": 1}
    assert all(items.make(tiny, 0, 0, index)["pixel_values"].shape == (3, 32, 32) for index in range(5))
    assert {tuple(item["pixel_values"].shape) for item in made} == {(3, 32, 32)}
    assert all("colours" not in item and item["mixup_weight"] >= 0.5 for item in made)
    means = torch.stack([item["pixel_values"].mean((1, 2)) for item in made])
    assert means.std(0).min() > 0.05 and torch.equal(made[3]["pixel_values"], items.make(row, 0, 0, 3)["pixel_values"])
    largest = []
    monkeypatch.setattr(items, "_process", lambda item: largest.append(item["pixel_values"].shape[1:]) or item)
    items.make(row, 0, 0, 1)
    assert min(largest[0]) > 300  # the image's own pixels, as a processor may crop them


def test_a_wrong_mean_scale_order_or_interpolation_is_detected(monkeypatch):
    right = read_image_format(make("EfficientNetPil", image_std=[0.5, 0.6, 0.7]))
    assert right.channels == (0, 1, 2) and right.interpolation == "bicubic"
    assert right.mean == pytest.approx((0.5,) * 3, abs=1e-6)  # of two normalisations: 0.5 + 0.5 std
    assert right.std == pytest.approx((0.25, 0.36, 0.49), abs=1e-6)
    for wrong in (
        {"mean": (0.51,) * 3}, {"std": (0.255,) * 3}, {"channels": (0, 1, 2)}, {"interpolation": "bilinear"},
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            plain = replace(right, **wrong)
            patch.setattr(image_format, "_measure_values", lambda *_, plain=plain: plain)
            patch.setattr(image_format, "INTERPOLATIONS", (plain.interpolation,))
            image_processor = make("MobileViT", do_normalize=True, image_mean=[0.5] * 3, image_std=[0.25] * 3)
            assert read_image_format(image_processor).processor is image_processor, wrong
