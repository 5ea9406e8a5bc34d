"""Augmentation in training: crop, colours and Mixup, with random numbers drawn from (seed, epoch, index).

The loader's workers decode and crop. Colours, sharpness, noise and Mixup are applied to whole batches on the model's
device, with numbers that the worker drew. Synthetic images differ from real ones most in colour and fine detail, which
a classifier must not use to recognise classes.
"""

import itertools
from collections.abc import Iterator

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from utils.cli.errors import UserError
from utils.data.images import describe_error
from utils.transfer.decoding import decode, open_image
from utils.transfer.image_cache import DECODED
from utils.transfer.image_format import ImageFormat, cut, normalise, process, read_image_format

ROBUST_SCALE = (0.6, 1.0)  # smaller crops of few images miss the object
DEFAULT_SCALE = (0.08, 1.0)  # torchvision's, used by the other recipes
JITTER = 0.4
GRAY_PROBABILITY = 0.2
SHARPNESS = 4.0
NOISE_SIGMA = 0.1
NOISE_OFFSETS = 2**20
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision's
TOWARDS_BLACK, TOWARDS_MEAN, TOWARDS_GRAY = range(3)
NUM_PASSES = 4
SHUFFLE_BUFFER = 1_000  # undecoded rows of a stream: about 50 MB


class TrainItems:
    """Turn rows with an undecoded image into items: `pixel_values` `(3, height, width)` uint8, `labels` int.

    With `robust` augmentation, items have `colours` for `BatchAugmentation`; with Mixup, each image's own weight in
    [0.5, 1]. If training cannot repeat the image processor, `pixel_values` are its float32 output, after changes of
    colour.
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
            # each image keeps the larger part: with independent weights, some images would vanish from the batch
            item["mixup_weight"] = np.float32(max(weight, 1 - weight))
        return item if self.image_format.processor is None else self._process(item)

    def _process(self, item: dict) -> dict:
        """Return the item with the image processor's output for its crop, after changes of colour."""
        pixels = item["pixel_values"]
        if "colours" in item:
            colours = torch.from_numpy(item.pop("colours"))
            changed = self.change_colours(pixels[None] / 255, colours[None])[0]
            pixels = changed.mul_(255).round_().to(torch.uint8)
        return item | {"pixel_values": process(self.image_format.processor, to_pil_image(pixels))}


class TrainImages(torch.utils.data.Dataset):
    """Training items drawn from (seed, epoch, index): the same for any batch size and number of workers, processes."""

    def __init__(self, images: datasets.Dataset, items: TrainItems, seed: int):
        self.images = undecoded(images)
        self.items = items
        self.seed = seed
        # shared memory: persistent workers see the new epoch too
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(int(epoch))

    def __getitem__(self, index: int) -> dict:
        return self.items.make(self.images[index], self.seed, int(self._epoch), index)


class StreamedTrainImages(torch.utils.data.IterableDataset):
    """Training items of a stream, without end: epoch after epoch, each with its own shuffle buffer.

    Processes and their workers divide the stream. Items are drawn from (seed, epoch, process, worker, position): the
    same for the same numbers of processes and workers.
    """

    def __init__(
        self, images: datasets.IterableDataset, items: TrainItems, seed: int, num_processes: int, process_index: int
    ):
        self.images = undecoded(images)
        self.items = items
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index

    @property
    def max_workers(self) -> int:
        """The largest number of workers per process that can share the stream."""
        return self._epoch_images(0).num_shards

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        reader = (self.process_index, worker.id if worker else 0)
        for epoch in itertools.count():
            position = -1
            # datasets gives each worker its part
            for position, row in enumerate(self._epoch_images(epoch)):
                try:
                    item = self.items.make(row, self.seed, epoch, *reader, position)
                except Exception as error:  # Pillow raises many kinds of errors for damaged files
                    raise UserError(
                        f"--streaming: a synthetic image is damaged ({describe_error(error)}): number {position} of "
                        f"epoch {epoch}, file {(row['image'] or {}).get('path')}; without --streaming, its row is "
                        "named, or --skip_bad_images leaves it out."
                    ) from error
                yield item
            if position < 0:
                return

    def _epoch_images(self, epoch: int) -> datasets.IterableDataset:
        generator = np.random.default_rng([self.seed, epoch])
        shuffled = self.images.shuffle(generator=generator, buffer_size=SHUFFLE_BUFFER)
        return split_dataset_by_node(shuffled, rank=self.process_index, world_size=self.num_processes)


def undecoded(images: datasets.Dataset | datasets.IterableDataset) -> datasets.Dataset | datasets.IterableDataset:
    """Return the columns `image`, undecoded, and `label`; decoded already where `cache_images` has done so."""
    if DECODED in (images.column_names or ()):
        return images.select_columns([DECODED, "label"]).rename_column(DECODED, "image")
    return images.select_columns(["image", "label"]).cast_column("image", datasets.Image(decode=False))


class CropAndFlip:
    """Turn an opened image into a random crop `(3, height, width)` uint8, perhaps mirrored, then apply a policy.

    `augmentation` is one of `AUGMENTATIONS`; `trivialaugment` and `randaugment` are torchvision's policies, which never
    mirror. `random_flip` affects mirroring only. A crop for the checkpoint's own processor keeps its shape.

    Source: torchvision, v2.RandomResizedCrop, TrivialAugmentWide, RandAugment.
    """

    def __init__(self, image_format: ImageFormat, augmentation: str = "robust", random_flip: bool = True):
        scale = ROBUST_SCALE if augmentation == "robust" else DEFAULT_SCALE
        self.crop = v2.RandomResizedCrop(image_format.size, scale=scale)
        self.size, self.decoded_for = image_format.size, image_format.crop_size
        self.keeps_shape = image_format.processor is not None
        self.interpolation = image_format.interpolation
        self.random_flip = random_flip
        policies = {"trivialaugment": v2.TrivialAugmentWide, "randaugment": v2.RandAugment}
        self.policy = policies[augmentation]() if augmentation in policies else None

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        state = torch.get_rng_state()  # takes a hundredth of the time of torch.random.fork_rng and manual_seed
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        try:
            image = decode(image, self.decoded_for)
            box = self.crop.make_params([image])
            box = tuple(box[name] for name in ("top", "left", "height", "width"))
            size = tuple(max(3, edge) for edge in box[2:]) if self.keeps_shape else self.size  # sharpening needs 3
            pixels = cut(image, box, size, self.interpolation)
            is_mirrored = rng.random() < 0.5  # always drawn, so later draws stay the same
            if is_mirrored and self.random_flip:
                pixels = pixels.flip(-1)
            return self.policy(pixels) if self.policy else pixels
        finally:
            torch.set_rng_state(state)


def draw_colours(rng: np.random.Generator) -> np.ndarray:
    """Return the random numbers of `BatchAugmentation` for one image, `(11,)` float32.

    Brightness, contrast and saturation in a random order, then perhaps grey: each a blend with black, the mean grey or
    the grey image (4 kinds, 4 factors); sharpness; the standard deviation of the noise and its offset.

    Source: torchvision, v2.ColorJitter, RandomGrayscale, RandomAdjustSharpness, GaussianNoise.
    """
    gray_factor = 0.0 if rng.random() < GRAY_PROBABILITY else 1.0
    kinds = [*rng.permutation((TOWARDS_BLACK, TOWARDS_MEAN, TOWARDS_GRAY)), TOWARDS_GRAY]
    factors = [*rng.uniform(1 - JITTER, 1 + JITTER, NUM_PASSES - 1), gray_factor]
    sharpness = SHARPNESS if rng.random() < 0.5 else 1.0
    sigma = NOISE_SIGMA if rng.random() < 0.5 else 0.0
    return np.array([*kinds, *factors, sharpness, sigma, rng.integers(NOISE_OFFSETS)], dtype=np.float32)


class ColourChange:
    """Change images according to the numbers of `draw_colours`.

    Noise is read from one long sequence of normal numbers, at an offset drawn per image. Like everything here, it
    depends only on the image's numbers, not on the batch, and it costs no more than reading memory.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._noise = torch.empty(0)

    def __call__(self, images: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
        """Return images `(batch, 3, height, width)` in [0, 1] changed by `colours` `(batch, 11)`, in place."""
        kinds, factors, (sharpness, sigmas, offsets) = colours.T.split((NUM_PASSES, NUM_PASSES, 3))
        images = sharpen(adjust_colours(images, kinds, factors), sharpness)
        return self._add_noise(images, sigmas, offsets)

    def _add_noise(self, images: torch.Tensor, sigmas: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Add noise in place to the images whose standard deviation is above 0."""
        num_values = images[0].numel()
        if len(self._noise) < NOISE_OFFSETS + num_values or self._noise.device != images.device:
            generator = torch.Generator().manual_seed(self.seed)
            self._noise = torch.randn(NOISE_OFFSETS + num_values, generator=generator).to(images.device)
        chosen = sigmas.nonzero().squeeze(1)
        noise = self._noise.unfold(0, num_values, 1)[offsets[chosen].long()]  # a view at every offset, then its rows
        noise = noise.view(-1, *images.shape[1:])
        images[chosen] = noise.mul_(sigmas[chosen, None, None, None]).add_(images[chosen]).clamp_(0, 1)
        return images


class BatchAugmentation:
    """Turn a loader's batch into the inputs of the model and the loss, on the batch's device.

    `pixel_values` `(batch, 3, height, width)` uint8 become float32, augmented if there are `colours`, and normalised;
    the output of a checkpoint's own processor is not changed. `labels` `(batch,)` become `(batch, classes)` if there is
    a `mixup_weight`.
    """

    def __init__(self, image_format: ImageFormat, num_classes: int, seed: int):
        self.image_format = image_format
        self.num_classes = num_classes
        self.change_colours = ColourChange(seed)

    @torch.no_grad()
    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        images, labels = batch["pixel_values"], batch["labels"]
        if self.image_format.processor is None:
            images = images.to(torch.float32).div_(255)
            if "colours" in batch:
                images = self.change_colours(images, batch["colours"])
            images = normalise(images, self.image_format)
        if "mixup_weight" in batch:
            images, labels = mix_up(images, labels, batch["mixup_weight"], self.num_classes)
        return {"pixel_values": images.contiguous(memory_format=torch.channels_last), "labels": labels}


def adjust_colours(images: torch.Tensor, kinds: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Blend images `(batch, 3, height, width)` in [0, 1] in place, once for each row of kinds and factors.

    A factor of 0 replaces the image, 1 keeps it, above 1 extrapolates away from what it is blended with.

    Source: torchvision, v2.functional.adjust_brightness, adjust_contrast, adjust_saturation.
    """
    red, green, blue = GRAY_WEIGHTS
    for kind, factor in zip(kinds[:, :, None, None, None], factors[:, :, None, None, None]):
        gray = (images[:, :1] * red).add_(images[:, 1:2], alpha=green).add_(images[:, 2:], alpha=blue)
        other = torch.where(kind == TOWARDS_MEAN, gray.mean((1, 2, 3), keepdim=True), gray)
        other = torch.where(kind == TOWARDS_BLACK, 0.0, other)
        images.mul_(factor).add_(other.mul_(1 - factor)).clamp_(0, 1)
    return images


def sharpen(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Sharpen images `(batch, 3, height, width)` in [0, 1] in place, away from a blurred copy; 1 changes nothing.

    Source: torchvision, v2.functional.adjust_sharpness.
    """
    chosen = (factors != 1).nonzero().squeeze(1)
    sharp = images[chosen].contiguous(memory_format=torch.channels_last)  # takes a twentieth of the time
    kernel = images.new_full((3, 1, 3, 3), 1 / 13)
    kernel[:, :, 1, 1] = 5 / 13
    inner = sharp[:, :, 1:-1, 1:-1]
    blurred = nn.functional.conv2d(sharp, kernel, groups=3)
    inner.add_(blurred.sub_(inner).mul_(1 - factors[chosen, None, None, None]))
    images[chosen] = sharp.clamp_(0, 1)
    return images


def mix_up(
    images: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each image with the previous one in the batch; return images and labels `(batch, classes)`.

    `weights` `(batch,)` are the shares of the images themselves.

    Source: Mixup, Zhang et al. 2018, with a weight per image.
    """
    one_hot = nn.functional.one_hot(labels, num_classes).float()
    label_weights, image_weights = weights[:, None], weights[:, None, None, None]
    mixed_labels = label_weights * one_hot + (1 - label_weights) * one_hot.roll(1, 0)
    return image_weights * images + (1 - image_weights) * images.roll(1, 0), mixed_labels
