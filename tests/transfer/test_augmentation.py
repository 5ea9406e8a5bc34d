import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from utils.transfer.augmentation import (
    NOISE_SIGMA,
    BatchAugmentation,
    CropAndFlip,
    adjust_colours,
    decode_for_crop,
    draw_colours,
    mix_up,
    sharpen,
)
from utils.transfer.image_format import ImageFormat

FORMAT = ImageFormat((24, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear")
ADJUST = (v2.functional.adjust_brightness, v2.functional.adjust_contrast, v2.functional.adjust_saturation)


def random_images(number: int) -> torch.Tensor:
    return torch.rand(number, 3, 24, 32, generator=torch.Generator().manual_seed(0))


def random_photo(width: int, height: int, format: str = "jpeg", **options) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, format, **options)
    return Image.open(file)


def make_batch(number: int, seed: int = 0) -> dict:
    colours = np.stack([draw_colours(np.random.default_rng([seed, index])) for index in range(number)])
    pixels = torch.randint(0, 256, (number, 3, 24, 32), generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels.byte(), "labels": torch.arange(number) % 3, "colours": torch.from_numpy(colours)}


def test_colours_of_a_batch_are_torchvisions_of_each_image():
    images = random_images(6)
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    factors = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.6
    factors[3] = torch.tensor([1.0, 0, 1, 0, 1, 0])
    kinds = torch.tensor([[*order, 2] for order in orders]).T
    expected = []
    for index, image in enumerate(images):
        for order, factor in zip(orders[index], factors[:3, index].tolist()):
            image = ADJUST[order](image, factor)
        expected.append(v2.functional.rgb_to_grayscale(image, 3) if index % 2 else image)
    torch.testing.assert_close(adjust_colours(images.clone(), kinds, factors), torch.stack(expected))


def test_sharpening_a_batch_is_torchvisions_of_each_image():
    images = random_images(3)
    expected = torch.stack([v2.functional.adjust_sharpness(images[0], 4.0), images[1], images[2] * 0 + 0.5])
    images[2] = 0.5
    torch.testing.assert_close(sharpen(images.clone(), torch.tensor([4.0, 1.0, 4.0])), expected)


def test_drawn_colours_have_the_probabilities_and_ranges_of_the_recipe():
    drawn = np.stack([draw_colours(np.random.default_rng([7, index])) for index in range(2000)])
    orders, gray_kind, factors, gray, sharpness, sigma, offset = np.split(drawn, [3, 4, 7, 8, 9, 10], axis=1)
    assert {tuple(order) for order in orders.astype(int)} == {
        (0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0),
    }  # fmt: skip
    assert set(gray_kind.ravel()) == {2}
    assert factors.min() == pytest.approx(0.6, abs=0.01) and factors.max() == pytest.approx(1.4, abs=0.01)
    assert (gray == 0).mean() == pytest.approx(0.2, abs=0.03) and set(gray.ravel()) == {0, 1}
    assert (sharpness == 4).mean() == pytest.approx(0.5, abs=0.04) and set(sharpness.ravel()) == {1, 4}
    assert (sigma > 0).mean() == pytest.approx(0.5, abs=0.04) and sigma.max() == np.float32(0.1)
    assert len(np.unique(offset)) > 1900 and offset.min() >= 0 and offset.max() < 2**20


def test_noise_has_its_standard_deviation_and_leaves_the_other_images():
    batch = make_batch(2)
    batch["pixel_values"] = torch.full((2, 3, 24, 32), 128, dtype=torch.uint8)
    batch["colours"] = torch.tensor([[0, 1, 2, 2, 1, 1, 1, 1, 1, sigma, 5.0] for sigma in (NOISE_SIGMA, 0.0)])
    mean, std = torch.tensor(FORMAT.mean).view(3, 1, 1), torch.tensor(FORMAT.std).view(3, 1, 1)
    noisy, plain = BatchAugmentation(FORMAT, 3, seed=0)(batch)["pixel_values"] * std + mean
    torch.testing.assert_close(plain, torch.full_like(plain, 128 / 255))
    noise = noisy - plain
    assert noise.mean().abs() < 0.01 and noise.std() == pytest.approx(0.1, rel=0.05)
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.1


def test_an_augmented_image_is_the_same_in_any_batch():
    batch = make_batch(8)
    whole = BatchAugmentation(FORMAT, 3, seed=0)(batch)["pixel_values"]
    turned = {key: value.flip(0)[:5] for key, value in batch.items()}
    part = BatchAugmentation(FORMAT, 3, seed=0)(turned)["pixel_values"]
    torch.testing.assert_close(part, whole.flip(0)[:5], rtol=0, atol=1e-6)
    assert not torch.allclose(BatchAugmentation(FORMAT, 3, seed=1)(batch)["pixel_values"], whole)


def test_without_colours_images_are_only_normalised():
    batch = make_batch(4)
    del batch["colours"]
    expected = v2.functional.normalize(batch["pixel_values"].float() / 255, FORMAT.mean, FORMAT.std)
    augmented = BatchAugmentation(FORMAT, 3, seed=0)(batch)
    torch.testing.assert_close(augmented["pixel_values"], expected)
    assert augmented["labels"].tolist() == [0, 1, 2, 0]


def test_mixup_mixes_images_and_labels_with_the_same_weight():
    images = torch.stack([torch.full((3, 2, 2), value) for value in (0.0, 4.0, 8.0)])
    mixed, labels = mix_up(images, torch.tensor([0, 1, 2]), torch.tensor([0.75, 0.75, 0.5]), 3)
    assert mixed[:, 0, 0, 0].tolist() == [2.0, 3.0, 6.0]
    assert labels.tolist() == [[0.75, 0.0, 0.25], [0.25, 0.75, 0.0], [0.0, 0.5, 0.5]]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
def test_a_crop_is_torchvisions_of_the_decoded_image(interpolation):
    image_format = ImageFormat((24, 32), FORMAT.mean, FORMAT.std, interpolation)
    crop = CropAndFlip(image_format, "robust")
    pixels = crop(random_photo(60, 40, "png"), np.random.default_rng(3))
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 24, 32)
    rng = np.random.default_rng(3)
    torch.manual_seed(int(rng.integers(2**63)))
    expected = v2.RandomResizedCrop((24, 32), scale=(0.6, 1.0), interpolation=crop.interpolation)(
        v2.functional.pil_to_tensor(random_photo(60, 40, "png"))
        if interpolation != "lanczos"
        else random_photo(60, 40, "png").convert("RGB")
    )
    expected = expected if isinstance(expected, torch.Tensor) else v2.functional.pil_to_tensor(expected)
    assert torch.equal(pixels, expected.flip(-1) if rng.random() < 0.5 else expected)


def test_single_pixels_are_taken_from_the_whole_jpeg():
    crop = CropAndFlip(ImageFormat((24, 32), interpolation="nearest-exact"), "basic")
    photo = random_photo(640, 400)
    same = [crop(image, np.random.default_rng(3)) for image in (photo.convert("RGB"), random_photo(640, 400))]
    assert torch.equal(*same)


def test_half_of_the_crops_are_mirrored_and_all_differ():
    image = Image.fromarray(np.repeat(np.linspace(0, 255, 60, dtype=np.uint8)[None, :, None], 40, 0).repeat(3, 2))
    crop = CropAndFlip(FORMAT, "basic")
    crops = [crop(image, np.random.default_rng([1, index])) for index in range(200)]
    mirrored = np.mean([int(pixels[0, 0, 0]) > int(pixels[0, 0, -1]) for pixels in crops])
    assert mirrored == pytest.approx(0.5, abs=0.1)
    assert len({pixels.numpy().tobytes() for pixels in crops}) > 150


@pytest.mark.parametrize("augmentation", ["robust", "basic"])
def test_without_random_flip_no_crop_is_mirrored_and_nothing_else_changes(augmentation):
    image = Image.fromarray(np.repeat(np.linspace(0, 255, 60, dtype=np.uint8)[None, :, None], 40, 0).repeat(3, 2))
    with_flip, without = (CropAndFlip(FORMAT, augmentation, random_flip) for random_flip in (True, False))
    for index in range(60):
        rngs = [np.random.default_rng([1, index]) for _ in range(2)]
        mirrored, upright = with_flip(image, rngs[0]), without(image, rngs[1])
        assert upright[0, 0, 0] < upright[0, 0, -1]
        assert torch.equal(upright, mirrored) or torch.equal(upright, mirrored.flip(-1))
        assert rngs[0].random() == rngs[1].random()


@pytest.mark.parametrize("policy", [v2.TrivialAugmentWide, v2.RandAugment])
def test_no_policy_mirrors(policy):
    assert not [name for name in policy()._AUGMENTATION_SPACE if "Flip" in name]


@pytest.mark.parametrize("augmentation", ["trivialaugment", "randaugment"])
def test_a_policy_changes_crops_the_same_way_for_the_same_seeds(augmentation):
    state = torch.get_rng_state()
    image = random_photo(60, 40, "png").convert("RGB")
    with_policy, plain = CropAndFlip(FORMAT, augmentation), CropAndFlip(FORMAT, "basic")
    crops = [[crop(image, np.random.default_rng([2, index])) for index in range(12)] for crop in (with_policy, plain)]
    again = [with_policy(image, np.random.default_rng([2, index])) for index in range(12)]
    assert all(torch.equal(first, second) for first, second in zip(crops[0], again))
    assert sum(torch.equal(first, second) for first, second in zip(*crops)) < 6
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("orientation", "size"), [(1, (640, 400)), (6, (400, 640))])
def test_a_large_jpeg_is_decoded_small_and_its_crop_shows_the_same(orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    whole, box = decode_for_crop(random_photo(640, 400, exif=exif), 100, 200, 240, 320, size=(240, 320))
    small, small_box = decode_for_crop(random_photo(640, 400, exif=exif), 100, 200, 240, 320, size=(50, 70))
    assert whole.size == size and small.size == (size[0] // 4, size[1] // 4)
    assert box == ((100, 200, 240, 320) if orientation == 1 else (200, 100, 320, 240))
    crops = [
        v2.functional.resized_crop(v2.functional.pil_to_tensor(image), *place, [50, 50]).float()
        for image, place in ((whole, box), (small, small_box))
    ]
    assert (crops[0] - crops[1]).abs().mean() < 2


def test_a_jpeg_is_decoded_whole_where_a_smaller_one_would_be_blown_up():
    image, box = decode_for_crop(random_photo(640, 400), 0, 0, 90, 120, size=(50, 70))
    assert image.size == (640, 400) and box == (0, 0, 90, 120)
