"""Images as vectors of length 1, whose products are similarities: in a model's features, and in their pixels."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch

from utils.data.images import to_rgb

BRIGHTNESS_SIZE, COLOUR_SIZE = 16, 8  # side in pixels; JPEG halves color too
THUMBNAIL_SHAPES = ((BRIGHTNESS_SIZE,) * 2, (COLOUR_SIZE,) * 2, (COLOUR_SIZE,) * 2)
THUMBNAIL_LENGTH = sum(height * width for height, width in THUMBNAIL_SHAPES)


@dataclass(frozen=True)
class UnitFeatures:
    """Features minus `centre`, scaled to length 1, read from disk in chunks: their products are cosines.

    A model's features all point in similar directions; without the mean of real images, cosines distinguish them.
    `raw` is `(n, num_features)` float16, `centre` `(num_features,)` float32 or 0.
    """

    raw: np.ndarray
    centre: np.ndarray | float = 0.0

    def __len__(self) -> int:
        return len(self.raw)

    def take(self, rows: np.ndarray | slice, device: str | torch.device = "cpu") -> torch.Tensor:
        """Return `(rows, num_features)` float32."""
        features = torch.from_numpy(np.asarray(self.raw[rows], np.float32) - np.float32(self.centre))
        return torch.nn.functional.normalize(features.to(device))

    def chunks(self, size: int, device: str | torch.device = "cpu") -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the first row of each chunk, and the chunk."""
        for start in range(0, len(self), size):
            yield start, self.take(slice(start, start + size), device)


def make_thumbnail(image: PIL.Image.Image) -> np.ndarray:
    """Return `(THUMBNAIL_LENGTH,)` uint8: an image's brightness and its two color channels, row by row."""
    small = to_rgb(image).resize(THUMBNAIL_SHAPES[0], PIL.Image.Resampling.LANCZOS).convert("YCbCr")
    channels = [channel.resize(shape) for channel, shape in zip(small.split(), THUMBNAIL_SHAPES)]
    return np.concatenate([np.asarray(channel).ravel() for channel in channels])


@dataclass(frozen=True)
class Thumbnails(UnitFeatures):
    """Thumbnails, whose products are pixel correlations, regardless of brightness; 0 for a plain image.

    `raw` is `(n, THUMBNAIL_LENGTH)` uint8, from `make_thumbnail`.
    """

    is_mirrored: bool = False

    def levels(self, rows: np.ndarray | slice) -> np.ndarray:
        """Return `(rows, THUMBNAIL_LENGTH)` float32 in [0, 255]."""
        channels = [channel[..., ::-1] if self.is_mirrored else channel for channel in _split(self.raw[rows])]
        return _join(channels).astype(np.float32)

    def take(self, rows: np.ndarray | slice, device: str | torch.device = "cpu") -> torch.Tensor:
        """Return `(rows, THUMBNAIL_LENGTH)` float32: each channel minus its mean."""
        channels = [channel - channel.mean((1, 2), keepdims=True) for channel in _split(self.levels(rows))]
        return torch.nn.functional.normalize(torch.from_numpy(_join(channels)).to(device))


def _split(thumbnails: np.ndarray) -> list[np.ndarray]:
    """Return the three channels `(n, height, width)`."""
    parts = np.split(thumbnails, np.cumsum([height * width for height, width in THUMBNAIL_SHAPES])[:-1], axis=1)
    return [part.reshape(-1, *shape) for part, shape in zip(parts, THUMBNAIL_SHAPES)]


def _join(channels: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([channel.reshape(len(channel), -1) for channel in channels], axis=1)
