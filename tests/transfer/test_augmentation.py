"""What training sees: crops and colours as torchvision makes them, drawn from (seed, epoch, index), streams divided."""

import io
import itertools

import datasets
import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import TrainingArguments

from tests.conftest import CLASS_NAMES
from tests.transfer.builders import run_plan
from utils.cli.errors import UserError
from utils.transfer import augmentation
from utils.transfer.augmentation import BatchAugmentation, CropAndFlip, StreamedTrainImages, TrainImages, TrainItems
from utils.transfer.classifiers import load_classifier, load_image_processor
from utils.transfer.fine_tuning import fine_tune
from utils.transfer.image_format import ImageFormat
from utils.transfer.methods import StagePlan, StageSettings
from utils.transfer.synthetic_images import load_synthetic, open_synthetic

pytest_plugins = ["tests.transfer.fixtures"]

NUM_ROWS = 24
FORMAT = ImageFormat((24, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear")
ADJUST = (v2.functional.adjust_brightness, v2.functional.adjust_contrast, v2.functional.adjust_saturation)


def random_photo(width: int, height: int, format: str = "jpeg", **options) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, format, **options)
    return Image.open(file)


def make_batch(number: int, seed: int = 0) -> dict:
    colours = np.stack([augmentation.draw_colours(np.random.default_rng([seed, index])) for index in range(number)])
    pixels = torch.randint(0, 256, (number, 3, 24, 32), generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels.byte(), "labels": torch.arange(number) % 3, "colours": torch.from_numpy(colours)}


def test_colours_of_a_batch_match_torchvision_for_each_image():
    batch = make_batch(40)
    batch["colours"][:, -2] = 0  # no noise
    expected = []
    for image, numbers in zip(batch["pixel_values"] / 255, batch["colours"].tolist()):
        for kind, factor in zip(numbers[:3], numbers[4:7]):
            image = ADJUST[int(kind)](image, factor)
        image = v2.functional.rgb_to_grayscale(image, 3) if numbers[7] == 0 else image
        image = v2.functional.adjust_sharpness(image, numbers[8])
        expected.append(v2.functional.normalize(image, FORMAT.mean, FORMAT.std))
    torch.testing.assert_close(BatchAugmentation(FORMAT, 3, seed=0)(batch)["pixel_values"], torch.stack(expected))


def test_drawn_colours_have_the_probabilities_and_ranges_of_the_recipe():
    drawn = np.stack([augmentation.draw_colours(np.random.default_rng([7, index])) for index in range(2000)])
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
    batch["colours"] = torch.tensor([[0, 1, 2, 2, 1, 1, 1, 1, 1, sigma, 5.0] for sigma in (0.1, 0.0)])
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


def test_mixup_mixes_images_and_labels_with_the_same_weight():
    images = torch.stack([torch.full((3, 2, 2), value) for value in (0.0, 4.0, 8.0)])
    mixed, labels = augmentation.mix_up(images, torch.tensor([0, 1, 2]), torch.tensor([0.75, 0.75, 0.5]), 3)
    assert mixed[:, 0, 0, 0].tolist() == [2.0, 3.0, 6.0]
    assert labels.tolist() == [[0.75, 0.0, 0.25], [0.25, 0.75, 0.0], [0.0, 0.5, 0.5]]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
def test_a_crop_matches_torchvisions_of_the_decoded_image(interpolation):
    crop = CropAndFlip(ImageFormat((24, 32), FORMAT.mean, FORMAT.std, interpolation), "robust")
    photo = random_photo(60, 40, "png")
    pixels = crop(photo, np.random.default_rng(3))
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 24, 32)
    rng = np.random.default_rng(3)
    torch.manual_seed(int(rng.integers(2**63)))
    expected = v2.RandomResizedCrop((24, 32), scale=(0.6, 1.0), interpolation=crop.interpolation)(
        photo.convert("RGB") if interpolation == "lanczos" else v2.functional.pil_to_tensor(photo)
    )
    expected = v2.functional.pil_to_tensor(expected) if interpolation == "lanczos" else expected
    assert torch.equal(pixels, expected.flip(-1) if rng.random() < 0.5 else expected)


def test_single_pixels_are_taken_from_the_whole_jpeg():
    crop = CropAndFlip(ImageFormat((24, 32), interpolation="nearest-exact"), "basic")
    photo = random_photo(640, 400)
    same = [crop(image, np.random.default_rng(3)) for image in (photo.convert("RGB"), random_photo(640, 400))]
    assert torch.equal(*same)


@pytest.mark.parametrize("recipe", ["robust", "basic"])
def test_random_flip_mirrors_half_of_the_crops_and_changes_nothing_else(recipe):
    image = Image.fromarray(np.repeat(np.linspace(0, 255, 60, dtype=np.uint8)[None, :, None], 40, 0).repeat(3, 2))
    with_flip, without = (CropAndFlip(FORMAT, recipe, random_flip) for random_flip in (True, False))
    num_mirrored, different = 0, set()
    for index in range(200):
        rngs = [np.random.default_rng([1, index]) for _ in range(2)]
        crop, upright = with_flip(image, rngs[0]), without(image, rngs[1])
        assert upright[0, 0, 0] < upright[0, 0, -1]
        is_mirrored = bool(crop[0, 0, 0] > crop[0, 0, -1])
        assert torch.equal(crop, upright.flip(-1) if is_mirrored else upright)
        assert rngs[0].random() == rngs[1].random()
        num_mirrored += is_mirrored
        different.add(crop.numpy().tobytes())
    assert num_mirrored == pytest.approx(100, abs=20) and len(different) > 150


@pytest.mark.parametrize("recipe", ["trivialaugment", "randaugment"])
def test_a_policy_changes_crops_the_same_way_for_the_same_seeds_and_never_mirrors(recipe):
    state = torch.get_rng_state()
    image = random_photo(60, 40, "png").convert("RGB")
    with_policy, plain = CropAndFlip(FORMAT, recipe), CropAndFlip(FORMAT, "basic")
    first, again, unchanged = (
        [crop(image, np.random.default_rng([2, index])) for index in range(12)]
        for crop in (with_policy, with_policy, plain)
    )
    assert all(map(torch.equal, first, again))
    assert sum(map(torch.equal, first, unchanged)) < 6
    assert torch.equal(torch.get_rng_state(), state)
    assert not [name for name in with_policy.policy._AUGMENTATION_SPACE if "Flip" in name]


@pytest.fixture(scope="module")
def processor(classifiers):
    return load_image_processor(classifiers["vit"])


@pytest.fixture(scope="module")
def stream(real_images_dir, tmp_path_factory):
    """A stream of four files; each row's label is its own number."""
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # 5 s at the end of every epoch, against hanging remote files
    images = load_dataset(str(real_images_dir), split="train").take(NUM_ROWS).remove_columns("label")
    images = images.add_column("label", np.arange(NUM_ROWS))
    folder = tmp_path_factory.mktemp("stream")
    for shard in range(4):
        images.shard(4, shard).to_parquet(folder / f"train-{shard:05d}.parquet")
    return load_dataset(str(folder), split="train", streaming=True)


def test_train_images_depend_on_seed_epoch_and_index_only(processor, images):
    items = TrainItems(processor, mixup_alpha=0.4)
    first, second = (TrainImages(images, items, seed=3) for _ in range(2))
    torch.manual_seed(99)
    second[5]
    for key, value in first[2].items():
        assert np.array_equal(value, second[2][key]), key
    second.set_epoch(1)
    assert not torch.equal(first[2]["pixel_values"], second[2]["pixel_values"])
    assert not np.array_equal(first[2]["colours"], second[2]["colours"])
    assert not np.array_equal(first[2]["colours"], TrainImages(images, items, seed=4)[2]["colours"])
    assert 0.5 <= first[2]["mixup_weight"] <= 1


def test_persistent_workers_see_the_next_epoch(processor, images):
    dataset = TrainImages(images, TrainItems(processor), seed=3)
    loader = DataLoader(dataset, batch_size=4, num_workers=2, persistent_workers=True)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        batches = list(loader)
        expected = torch.stack([dataset[index]["pixel_values"] for index in range(12)])
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), expected)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_processes_divide_a_stream_and_see_every_image_once_an_epoch(processor, stream, num_processes):
    epochs = [[], []]
    for rank in range(num_processes):
        dataset = StreamedTrainImages(stream, TrainItems(processor), 0, num_processes, rank)
        labels = [item["labels"] for item in itertools.islice(dataset, 2 * NUM_ROWS // num_processes)]
        for epoch, part in zip(epochs, np.array_split(labels, 2)):
            epoch.extend(part.tolist())
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(NUM_ROWS))
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


def test_workers_divide_a_stream_and_make_the_same_batches_again(processor, stream):
    dataset = StreamedTrainImages(stream, TrainItems(processor), 0, 1, 0)
    assert dataset.max_workers == 4
    runs = []
    for _ in range(2):
        loader = iter(DataLoader(dataset, batch_size=4, num_workers=2))
        runs.append([next(loader) for _ in range(2 * NUM_ROWS // 4)])
        del loader
    first_epoch = torch.cat([batch["labels"] for batch in runs[0][: NUM_ROWS // 4]])
    assert sorted(first_epoch.tolist()) == list(range(NUM_ROWS))
    for first, second in zip(*runs):
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_streamed_image_is_augmented_differently_in_every_epoch_and_for_every_seed(processor, stream):
    pixels = [
        item["pixel_values"].numpy().tobytes()
        for seed in range(2)
        for item in itertools.islice(StreamedTrainImages(stream.take(1), TrainItems(processor), seed, 1, 0), 3)
    ]
    assert len(set(pixels)) == 6


def test_a_stage_trains_on_a_stream_and_resumes_exactly_from_a_checkpoint(
    classifiers, processor, synthetic_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    stream = load_synthetic(open_synthetic(str(synthetic_dir)), CLASS_NAMES, streaming=True)
    options = {"report_to": "none", "disable_tqdm": True, "save_strategy": "steps", "save_steps": 4, "seed": 5}
    settings = StageSettings(9, 1e-2, mixup_alpha=0.3, per_device_train_batch_size=4)
    runs = []
    for checkpoint in (None, str(tmp_path / "checkpoint-4")):
        model = load_classifier(classifiers["vit"], CLASS_NAMES, True, seed=0)
        start = {key: value.clone() for key, value in model.state_dict().items()}
        args = TrainingArguments(output_dir=str(tmp_path), **options)
        result = fine_tune(model, stream, processor, settings, args, tmp_path, checkpoint=checkpoint)
        assert (result.num_steps, result.num_images_seen) == (9, 36)
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in start)
    assert not torch.equal(runs[0]["classifier.weight"], start["classifier.weight"])


@pytest.mark.parametrize(
    ("head_init", "batch_norm"), [("imprint", "frozen"), ("probe", "frozen"), ("reset", "recalibrate")]
)
def test_settings_that_need_all_images_at_once_are_refused_for_a_stream(
    classifiers, images, tmp_path, head_init, batch_norm
):
    plan = StagePlan("stage1", "synthetic", head_init, StageSettings(1, 1e-2, batch_norm=batch_norm))
    with pytest.raises(UserError, match="which a stream does not have"):
        run_plan(plan, classifiers["vit"], images.to_iterable_dataset(), tmp_path)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_in_a_stream_ends_a_stage_with_a_one_line_error(classifiers, tmp_path, num_workers):
    rows = [{"bytes": b"no image", "path": "cat.png"}] * 8
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASS_NAMES)})
    stream = datasets.Dataset.from_dict({"image": rows, "label": [0] * 8}, features=features).to_iterable_dataset()
    stage = StagePlan("stage1", "synthetic", "reset", StageSettings(2, 1e-3, per_device_train_batch_size=2))
    with pytest.raises(UserError) as error:
        run_plan(stage, classifiers["vit"], stream, tmp_path, use_cpu=True, dataloader_num_workers=num_workers)
    assert str(error.value).startswith("--streaming: a synthetic image is damaged (no known image format): number 0 of")
    assert "file cat.png" in str(error.value) and "Traceback" not in str(error.value)
