import itertools

import datasets
import numpy as np
import pytest
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from tests.conftest import CLASS_NAMES
from utils.cli.errors import UserError
from utils.transfer.augmentation import StreamedTrainImages, TrainImages, TrainItems
from utils.transfer.classifiers import load_classifier, load_image_processor
from utils.transfer.fine_tuning import fine_tune, run_stage
from utils.transfer.methods import StagePlan, StageSettings
from utils.transfer.synthetic_images import load_synthetic, open_synthetic

pytest_plugins = ["tests.transfer.fixtures"]
NUM_ROWS = 24


@pytest.fixture(scope="module")
def processor(classifiers):
    return load_image_processor(classifiers["vit"])


@pytest.fixture(scope="module")
def images(real_images_dir):
    return load_dataset(str(real_images_dir), split="train").take(12)


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


def test_workers_that_live_on_see_the_next_epoch(processor, images):
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


def test_a_streamed_image_is_another_in_every_epoch_and_for_every_seed(processor, stream):
    pixels = [
        item["pixel_values"].numpy().tobytes()
        for seed in range(2)
        for item in itertools.islice(StreamedTrainImages(stream.take(1), TrainItems(processor), seed, 1, 0), 3)
    ]
    assert len(set(pixels)) == 6


def test_a_stage_trains_on_a_stream_and_goes_on_from_a_checkpoint_exactly(
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


@pytest.mark.parametrize(("head_init", "batch_norm"), [("imprint", "frozen"), ("reset", "recalibrate")])
def test_what_needs_all_images_at_once_is_refused_for_a_stream(
    classifiers, processor, stream, tmp_path, head_init, batch_norm
):
    plan = StagePlan("stage1", "synthetic", head_init, StageSettings(1, 1e-2, batch_norm=batch_norm))
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    with pytest.raises(UserError, match="which a stream does not give"):
        run_stage(plan, classifiers["vit"], CLASS_NAMES, stream, processor, args, tmp_path)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_in_a_stream_ends_a_stage_in_one_line(classifiers, processor, tmp_path, num_workers):
    rows = [{"bytes": b"no image", "path": "cat.png"}] * 8
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASS_NAMES)})
    stream = datasets.Dataset.from_dict({"image": rows, "label": [0] * 8}, features=features).to_iterable_dataset()
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no",
        dataloader_num_workers=num_workers,
    )  # fmt: skip
    stage = StagePlan("stage1", "synthetic", "reset", StageSettings(2, 1e-3, per_device_train_batch_size=2))
    with pytest.raises(UserError) as error:
        run_stage(stage, classifiers["vit"], CLASS_NAMES, stream, processor, args, tmp_path / "stage1")
    assert str(error.value).startswith("--streaming: a synthetic image is damaged (no known image format), number 0 of")
    assert "file cat.png" in str(error.value) and "Traceback" not in str(error.value)
