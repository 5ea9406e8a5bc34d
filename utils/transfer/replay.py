"""Replay: synthetic images among the real ones, with a share of each batch that falls with the number of real images.

The image at each position of a batch is a function of the seed and the position only.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from utils.transfer.augmentation import StreamedTrainImages, TrainItems, undecoded

REAL, SYNTHETIC = range(2)


@dataclass(frozen=True)
class ImagePair:
    """The images of a stage on both kinds; `own`, in subclasses, are the images whose labels it mainly learns."""

    real: Dataset
    synthetic: Dataset | IterableDataset

    @property
    def is_streamed(self) -> bool:
        return isinstance(self.synthetic, IterableDataset)


@dataclass(frozen=True)
class ReplayedImages(ImagePair):
    """The real images of a stage, and synthetic ones with a `share` of each batch, in [0, 1).

    `statistics` are BatchNorm's for the synthetic images, if these are normalised separately.
    """

    share: float = 0.0
    statistics: Mapping[str, torch.Tensor] | None = None

    @property
    def own(self) -> Dataset:
        return self.real

    def __len__(self) -> int:
        return len(self.real) + (0 if self.is_streamed or self.share == 0 else len(self.synthetic))


class PairedItems(torch.utils.data.Dataset):
    """Training items of both kinds of images, `num_items` in all; a subclass decides on their order.

    Each kind has its own epochs, in which every image is seen once. Items are drawn from (seed, kind, epoch, index).
    """

    def __init__(self, images: ImagePair, items: TrainItems, seed: int, num_items: int):
        self.images = [undecoded(images.real), undecoded(images.synthetic)]
        self.items = items
        self.seed = seed
        self.num_items = num_items

    def __len__(self) -> int:
        return self.num_items

    def make(self, kind: int, rank: int) -> dict:
        """Return the `rank`-th item of its kind."""
        images = self.images[kind]
        epoch, place = divmod(rank, len(images))
        index = int(order_of_epoch(self.seed, kind, epoch, len(images))[place])
        return self.items.make(images[index], self.seed, kind, epoch, index)


class ReplayedItems(PairedItems):
    """All training items of a stage in order: `num_batches` of `batch_size`, of which a share is synthetic.

    A batch is one optimiser step over all processes. Of the items in the first n batches, `share` are synthetic,
    rounded down, so batches differ by at most one. They are at random positions in their batch.
    """

    def __init__(self, images: ReplayedImages, items: TrainItems, seed: int, batch_size: int, num_batches: int):
        super().__init__(images, items, seed, num_batches * batch_size)
        self.batch_size = batch_size
        self.share = images.share
        self.tells_kind = images.statistics is not None

    def __getitem__(self, position: int) -> dict:
        kind, rank = place_in_kind(position, self.batch_size, self.share, self.seed)
        item = self.make(kind, rank)
        return item | {"is_synthetic": kind == SYNTHETIC} if self.tells_kind else item


class StreamedPairedItems(torch.utils.data.IterableDataset):
    """Training items of both kinds of images, the synthetic ones from a stream, without end.

    Readers are the loader's workers in all processes; the items are the same for the same number of readers.
    """

    def __init__(self, images: ImagePair, items: TrainItems, seed: int, num_processes: int, process_index: int):
        self.real = PairedItems(replace(images, synthetic=images.real), items, seed, 0)
        self.stream = StreamedTrainImages(images.synthetic, items, seed, num_processes, process_index)

    @property
    def max_workers(self) -> int:
        return self.stream.max_workers

    def make_real(self, rank: int) -> dict:
        """Return the `rank`-th real item of this reader; readers divide each epoch."""
        worker = torch.utils.data.get_worker_info()
        worker_index, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader = self.stream.process_index * num_workers + worker_index
        return self.real.make(REAL, rank * self.stream.num_processes * num_workers + reader)


class StreamedReplayedItems(StreamedPairedItems):
    """`ReplayedItems` of a stream; each reader makes its own batches."""

    def __init__(
        self, images: ReplayedImages, items: TrainItems, seed: int, batch_size: int, num_processes: int,
        process_index: int,
    ):  # fmt: skip
        super().__init__(images, items, seed, num_processes, process_index)
        self.batch_size = batch_size
        self.share = images.share

    def __iter__(self) -> Iterator[dict]:
        synthetic, position = iter(self.stream), 0
        while True:
            kind, rank = place_in_kind(position, self.batch_size, self.share, self.real.seed)
            yield next(synthetic) if kind == SYNTHETIC else self.make_real(rank)
            position += 1


def place_in_kind(position: int, batch_size: int, share: float, seed: int) -> tuple[int, int]:
    """Return the kind of the item at a position over all batches, and how many of its kind come before it."""
    batch, place = divmod(position, batch_size)
    num_before, num_after = (math.floor(number * batch_size * share) for number in (batch, batch + 1))
    place = int(np.random.default_rng([seed, batch]).permutation(batch_size)[place])
    num_synthetic = num_after - num_before
    if place < num_synthetic:
        return SYNTHETIC, num_before + place
    return REAL, batch * batch_size - num_before + place - num_synthetic


@lru_cache(maxsize=8)
def order_of_epoch(seed: int, kind: int, epoch: int, num_images: int) -> np.ndarray:
    return np.random.default_rng([seed, kind, epoch]).permutation(num_images)
