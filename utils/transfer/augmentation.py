"""Augmentation of batches on the model's device: colour, detail and noise by numbers drawn per image, then Mixup.

Beside crop and flip (`image_transforms`), colour and fine detail vary: in these, synthetic images differ most from real
ones, and a classifier must not learn classes by them.
"""

import numpy as np
import torch
from torch import nn

from utils.transfer.image_transforms import ImageFormat, normalise

JITTER = 0.4
GRAY_PROBABILITY = 0.2
SHARPNESS = 4.0
NOISE_SIGMA = 0.1
NOISE_OFFSETS = 2**20
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision's
TOWARDS_BLACK, TOWARDS_MEAN, TOWARDS_GRAY = range(3)
NUM_PASSES = 4


def draw_colours(rng: np.random.Generator) -> np.ndarray:
    """Return the numbers by which `BatchAugmentation` changes one image, `(11,)` float32.

    Brightness, contrast and saturation in a random order, then grey or not: each a blend with black, the mean grey or
    the grey image (4 kinds, 4 factors); sharpness; the noise's standard deviation and its place in the noise.

    Source: torchvision, v2.ColorJitter, RandomGrayscale, RandomAdjustSharpness, GaussianNoise.
    """
    gray_factor = 0.0 if rng.random() < GRAY_PROBABILITY else 1.0
    kinds = [*rng.permutation((TOWARDS_BLACK, TOWARDS_MEAN, TOWARDS_GRAY)), TOWARDS_GRAY]
    factors = [*rng.uniform(1 - JITTER, 1 + JITTER, NUM_PASSES - 1), gray_factor]
    sharpness = SHARPNESS if rng.random() < 0.5 else 1.0
    sigma = NOISE_SIGMA if rng.random() < 0.5 else 0.0
    return np.array([*kinds, *factors, sharpness, sigma, rng.integers(NOISE_OFFSETS)], dtype=np.float32)


class ColourChange:
    """Change images by the numbers that `draw_colours` returns.

    Noise is read from one long row of normal numbers, at a place drawn per image: as everything here, it depends on the
    image's numbers only, not on the batch, and costs no more than reading memory.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._noise = torch.empty(0)

    def __call__(self, images: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
        """Return images `(batch, 3, height, width)` in [0, 1] changed by `colours` `(batch, 11)`, in place."""
        kinds, factors, (sharpness, sigmas, offsets) = _split_colours(colours)
        images = sharpen(adjust_colours(images, kinds, factors), sharpness)
        return self._add_noise(images, sigmas, offsets)

    def _add_noise(self, images: torch.Tensor, sigmas: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Add noise in place to the images whose standard deviation is above 0."""
        num_values = images[0].numel()
        if len(self._noise) < NOISE_OFFSETS + num_values or self._noise.device != images.device:
            generator = torch.Generator().manual_seed(self.seed)
            self._noise = torch.randn(NOISE_OFFSETS + num_values, generator=generator).to(images.device)
        chosen = sigmas.nonzero().squeeze(1)
        noise = self._noise.unfold(0, num_values, 1)[offsets[chosen].long()]  # a view at every place, then its rows
        noise = noise.view(-1, *images.shape[1:])
        images[chosen] = noise.mul_(sigmas[chosen, None, None, None]).add_(images[chosen]).clamp_(0, 1)
        return images


class BatchAugmentation:
    """Turn a loader's batch into what the model and the loss take, on the device where the batch is.

    `pixel_values` `(batch, 3, height, width)` uint8 become float32, augmented where there are `colours`, and
    normalised; what a checkpoint's own processor made is left as it is. `labels` `(batch,)` become `(batch, classes)`
    where there is a `mixup_weight`.
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


def _split_colours(colours: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return kinds `(passes, batch)`, factors `(passes, batch)`, and sharpness, sigmas and offsets `(3, batch)`."""
    return colours.T[:NUM_PASSES], colours.T[NUM_PASSES : 2 * NUM_PASSES], colours.T[2 * NUM_PASSES :]


def adjust_colours(images: torch.Tensor, kinds: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Blend images `(batch, 3, height, width)` in [0, 1] in place, once for each row of kinds and factors.

    A factor of 0 leaves nothing of the image, 1 all of it, one above 1 goes away from what is blended with.

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
    """Move images `(batch, 3, height, width)` in [0, 1] away from their blurred selves, in place; 1 changes nothing.

    Source: torchvision, v2.functional.adjust_sharpness.
    """
    chosen = (factors != 1).nonzero().squeeze(1)
    sharp = images[chosen].contiguous(memory_format=torch.channels_last)  # a twentieth of the time
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
    """Mix each image with the one before it in the batch; return images and labels `(batch, classes)`.

    `weights` `(batch,)` are each image's own share.

    Source: Mixup, Zhang et al. 2018, with a weight per image.
    """
    one_hot = nn.functional.one_hot(labels, num_classes).float()
    label_weights, image_weights = weights[:, None], weights[:, None, None, None]
    mixed_labels = label_weights * one_hot + (1 - label_weights) * one_hot.roll(1, 0)
    return image_weights * images + (1 - image_weights) * images.roll(1, 0), mixed_labels
