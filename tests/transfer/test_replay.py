"""Replayed images: how many of each kind a batch has, which ones, and that a resumed stage sees the same."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset

from utils.transfer.augmentation import TrainItems
from utils.transfer.classifiers import load_image_processor
from utils.transfer.replay import (
    REAL,
    SYNTHETIC,
    ReplayedImages,
    ReplayedItems,
    StreamedReplayedItems,
    place_in_kind,
)

pytest_plugins = ["tests.transfer.fixtures"]


@pytest.mark.parametrize(("batch_size", "share"), [(32, 6 / 7), (32, 6 / 22), (8, 0.03), (5, 0.5), (4, 0.0)])
def test_each_batch_has_its_share_and_each_kind_is_in_order(batch_size, share):
    places = [place_in_kind(position, batch_size, share, seed=0) for position in range(50 * batch_size)]
    counts = [
        Counter(kind for kind, _ in places[start : start + batch_size])[SYNTHETIC]
        for start in range(0, len(places), batch_size)
    ]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == int(50 * batch_size * share)
    for kind in (REAL, SYNTHETIC):
        ranks = [rank for of, rank in places if of == kind]
        assert sorted(ranks) == list(range(len(ranks)))
    firsts = Counter(places[start][0] for start in range(0, len(places), batch_size))
    assert len(firsts) == (2 if 0.1 < share < 0.9 else len(firsts))  # not always the same kind in front


@pytest.fixture
def replayed(images):
    """12 real and 12 other images, labelled 0 to 2 and 3 to 5."""
    rows = [{"image": image, "label": label} for image, label in zip(images["image"], images["label"])]
    others = Dataset.from_list([row | {"label": row["label"] + 3} for row in rows]).cast_column(
        "image", images.features["image"]
    )
    real = Dataset.from_list(rows).cast_column("image", images.features["image"])
    return ReplayedImages(real, others, share=0.25)


@pytest.fixture
def items(classifiers):
    return TrainItems(load_image_processor(classifiers["vit"]), mixup_alpha=0.2)


def test_every_image_of_a_kind_is_seen_once_per_epoch_with_new_augmentation(replayed, items):
    all_items = ReplayedItems(replayed, items, seed=0, batch_size=8, num_batches=16)
    assert len(all_items) == 128
    seen = [all_items[position] for position in range(128)]
    labels = np.array([item["labels"] for item in seen])
    assert ((labels >= 3).reshape(16, 8).sum(1) == 2).all()
    real = [item["pixel_values"] for item in seen if item["labels"] < 3]
    assert Counter(labels[labels < 3].tolist()) == dict.fromkeys(range(3), 32)
    assert not any(torch.equal(a, b) for a, b in zip(real[:12], real[12:24]))
    again = ReplayedItems(replayed, items, seed=0, batch_size=8, num_batches=20)
    assert torch.equal(again[100]["pixel_values"], all_items[100]["pixel_values"])
    other = ReplayedItems(replayed, items, seed=1, batch_size=8, num_batches=16)
    assert not torch.equal(other[100]["pixel_values"], all_items[100]["pixel_values"])


def test_a_stream_has_the_same_shares(replayed, items):
    stream = ReplayedImages(replayed.real, replayed.synthetic.to_iterable_dataset(num_shards=2), 0.25)
    readers = [StreamedReplayedItems(stream, items, 0, 8, 2, process) for process in range(2)]
    seen = [[item["labels"] for item in islice(reader, 48)] for reader in readers]
    for labels in seen:
        assert ((np.array(labels) >= 3).reshape(6, 8).sum(1) == 2).all()
    # the readers divide each epoch of the real images among them
    first = sorted(label for labels in seen for label in labels[:8] if label < 3)
    assert Counter(first) == dict.fromkeys(range(3), 4)
