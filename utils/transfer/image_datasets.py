"""Images into batches: training images drawn from (seed, epoch, index), evaluation as the pipeline does it."""

import itertools
from collections.abc import Iterator

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torchvision.transforms.v2.functional import to_pil_image

from utils.cli.errors import UserError
from utils.data.images import describe_error, to_rgb
from utils.transfer.augmentation import ColourChange, draw_colours
from utils.transfer.image_format import read_image_format
from utils.transfer.image_transforms import CropAndFlip, open_image, process

SHUFFLE_BUFFER = 1_000  # rows of a stream, undecoded: some 50 MB


class TrainItems:
    """Rows with an undecoded image into items: `pixel_values` `(3, height, width)` uint8, `labels` int.

    For `robust` augmentation with the `colours` that `BatchAugmentation` takes, for Mixup with each image's own weight
    in [0.5, 1]. Where only the image processor can make its pixels, `pixel_values` are those, float32, colours changed.
    """

    def __init__(
        self, image_processor, augmentation: str = "robust", mixup_alpha: float = 0.0, random_flip: bool = True
    ):
        self.image_format = read_image_format(image_processor)
        self.crop_and_flip = CropAndFlip(self.image_format, augmentation, random_flip)
        self.draws_colours = augmentation == "robust"
        self.change_colours = ColourChange(seed=0)
        self.mixup_alpha = mixup_alpha

    def make(self, row: dict, *seeds: int) -> dict:
        rng = np.random.default_rng(seeds)
        item = {"pixel_values": self.crop_and_flip(open_image(row["image"]), rng), "labels": row["label"]}
        if self.draws_colours:
            item["colours"] = draw_colours(rng)
        if self.mixup_alpha > 0:
            weight = rng.beta(self.mixup_alpha, self.mixup_alpha)
            # the larger part is the image's own: with independent weights, some images would vanish from the batch
            item["mixup_weight"] = np.float32(max(weight, 1 - weight))
        return item if self.image_format.processor is None else self._process(item)

    def _process(self, item: dict) -> dict:
        """Return the item with what the image processor makes of its crop, which takes colours before it."""
        pixels = item["pixel_values"]
        if "colours" in item:
            colours = torch.from_numpy(item.pop("colours"))
            changed = self.change_colours(pixels[None] / 255, colours[None])[0]
            pixels = changed.mul_(255).round_().to(torch.uint8)
        return item | {"pixel_values": process(self.image_format.processor, to_pil_image(pixels))}


class TrainImages(torch.utils.data.Dataset):
    """Training items, each drawn from (seed, epoch, index): the same at any batch size, worker and process count."""

    def __init__(self, images: datasets.Dataset, items: TrainItems, seed: int):
        self.images = _undecoded(images)
        self.items = items
        self.seed = seed
        # shared memory: workers that live on see the new epoch too
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(int(epoch))

    def __getitem__(self, index: int) -> dict:
        return self.items.make(self.images[index], self.seed, int(self._epoch), index)


class StreamedTrainImages(torch.utils.data.IterableDataset):
    """Training items of a stream, without end: epoch after epoch, in each through a shuffle buffer of its own.

    Processes and their workers divide the stream. Items are drawn from (seed, epoch, process, worker, position): the
    same again at the same number of processes and workers.
    """

    def __init__(
        self, images: datasets.IterableDataset, items: TrainItems, seed: int, num_processes: int, process_index: int
    ):
        self.images = _undecoded(images)
        self.items = items
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index

    @property
    def max_workers(self) -> int:
        """Return how many workers of a process can have a part of the stream."""
        return self._epoch_images(0).num_shards

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        reader = (self.process_index, worker.id if worker else 0)
        for epoch in itertools.count():
            position = -1
            # datasets itself gives each worker its part
            for position, row in enumerate(self._epoch_images(epoch)):
                try:
                    item = self.items.make(row, self.seed, epoch, *reader, position)
                except Exception as error:  # on damaged files Pillow raises nearly anything
                    raise UserError(
                        f"--streaming: a synthetic image is damaged ({describe_error(error)}), number {position} of "
                        f"epoch {epoch}, file {(row['image'] or {}).get('path')}; without --streaming it is named "
                        "by its row, or left out by --skip_bad_images."
                    ) from error
                yield item
            if position < 0:
                return

    def _epoch_images(self, epoch: int) -> datasets.IterableDataset:
        generator = np.random.default_rng([self.seed, epoch])
        shuffled = self.images.shuffle(generator=generator, buffer_size=SHUFFLE_BUFFER)
        return split_dataset_by_node(shuffled, rank=self.process_index, world_size=self.num_processes)


def _undecoded(images: datasets.Dataset | datasets.IterableDataset) -> datasets.Dataset | datasets.IterableDataset:
    return images.select_columns(["image", "label"]).cast_column("image", datasets.Image(decode=False))


class EvalImages(torch.utils.data.Dataset):
    """Images as the checkpoint's own image processor makes them, so that a pipeline repeats the measured accuracy."""

    def __init__(self, images: datasets.Dataset, image_processor):
        self.images = images
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        row = self.images[index]  # raises IndexError at the end, so that iteration stops
        return {"pixel_values": process(self.image_processor, to_rgb(row["image"])), "labels": row["label"]}


def cache_items(images: EvalImages, max_bytes: int = 2**30) -> EvalImages | list[dict]:
    """Return the items in memory where they take at most `max_bytes`, for sets that are evaluated again and again."""
    item_bytes = images[0]["pixel_values"].nbytes
    return list(images) if len(images) * item_bytes <= max_bytes else images
