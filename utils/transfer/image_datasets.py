"""Images into batches: augmentation and Mixup drawn from (seed, epoch, index), evaluation as the pipeline does it."""

import numpy as np
import torch
from datasets import Dataset
from torchvision.transforms import v2

from utils.data.images import to_rgb


def train_transform(image_processor) -> v2.Compose:
    """Return augmentation and normalisation, with size, mean and std of a checkpoint's image processor.

    Beside crop and flip, colour and fine detail vary: in these, synthetic images differ most from real ones, and a
    classifier must not learn classes by them.
    """
    if hasattr(image_processor, "data_config"):  # timm's keeps its settings there
        config = image_processor.data_config
        size, mean, std = config["input_size"][-2:], config["mean"], config["std"]
        interpolation = config["interpolation"]
    else:
        config = image_processor.to_dict()
        edges = config.get("crop_size") if config.get("do_center_crop") else config["size"]
        edge = edges.get("shortest_edge")
        size = (edge, edge) if edge else (edges["height"], edges["width"])
        normalise = config.get("do_normalize", True)
        mean = config["image_mean"] if normalise else (0.0, 0.0, 0.0)
        std = config["image_std"] if normalise else (1.0, 1.0, 1.0)
        interpolation = {2: "bilinear", 3: "bicubic", 0: "nearest", 1: "lanczos"}[int(config["resample"])]
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.6, 1.0), interpolation=v2.InterpolationMode(interpolation)),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
            v2.RandomGrayscale(0.2),
            v2.RandomAdjustSharpness(4.0, p=0.5),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomApply([v2.GaussianNoise(sigma=0.1)], p=0.5),
            v2.Normalize(mean, std),
        ]
    )


def take_spread(images: Dataset, limit: int | None) -> Dataset:
    """Return at most `limit` images, evenly spread over the set, which may be sorted by class."""
    if limit is None or limit >= len(images):
        return images
    return images.select(np.linspace(0, len(images) - 1, limit).astype(int))


class TrainImages(torch.utils.data.Dataset):
    """Augmented images, each drawn from (seed, epoch, index): the same at any batch size, worker and process count.

    Items hold `pixel_values` `(3, height, width)`, the int `labels` and, for Mixup, its weight in [0.5, 1].
    """

    def __init__(self, images: Dataset, transform, seed: int, mixup_alpha: float = 0.0):
        self.images = images
        self.transform = transform
        self.seed = seed
        self.mixup_alpha = mixup_alpha
        # shared memory: workers that live on see the new epoch too
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(int(epoch))

    def __getitem__(self, index: int) -> dict:
        row = self.images[index]
        rng = np.random.default_rng([self.seed, int(self._epoch), index])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**63)))
            pixel_values = self.transform(to_rgb(row["image"]))
        item = {"pixel_values": pixel_values, "labels": row["label"]}
        if self.mixup_alpha > 0:
            weight = rng.beta(self.mixup_alpha, self.mixup_alpha)
            # the larger part is the image's own: with independent weights, some images would vanish from the batch
            item["mixup_weight"] = max(weight, 1 - weight)
        return item


class EvalImages(torch.utils.data.Dataset):
    """Images as the checkpoint's own image processor makes them, so that a pipeline repeats the measured accuracy."""

    def __init__(self, images: Dataset, image_processor):
        self.images = images
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        row = self.images[index]  # raises IndexError at the end, so that iteration stops
        pixel_values = self.image_processor(to_rgb(row["image"]), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixel_values, "labels": row["label"]}


def cache_items(images: EvalImages, max_bytes: int = 2**30) -> EvalImages | list[dict]:
    """Return the items in memory where they take at most `max_bytes`, for sets that are evaluated again and again."""
    item_bytes = images[0]["pixel_values"].nbytes
    return list(images) if len(images) * item_bytes <= max_bytes else images


class Collator:
    """Stack items; where they carry Mixup weights, mix each with the one before it and give soft labels.

    Source: Mixup, Zhang et al. 2018, with a weight per image.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        pixel_values = torch.stack([item["pixel_values"] for item in items])
        labels = torch.tensor([item["labels"] for item in items])
        if "mixup_weight" in items[0]:
            weights = torch.tensor([item["mixup_weight"] for item in items], dtype=torch.float32)[:, None]
            one_hot = torch.nn.functional.one_hot(labels, self.num_classes).float()
            labels = weights * one_hot + (1 - weights) * one_hot.roll(1, 0)
            weights = weights[:, :, None, None]
            pixel_values = weights * pixel_values + (1 - weights) * pixel_values.roll(1, 0)
        return {"pixel_values": pixel_values.contiguous(memory_format=torch.channels_last), "labels": labels}
