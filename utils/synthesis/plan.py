"""The generation plan: prompt, seed and guidance of each image, a pure function of its number. No torch."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, cycle, islice

from utils.cli.errors import UserError
from utils.synthesis.prompts import Prompts, digest

# torch's CPU generator uses only the lower 32 bits of a seed: 26 for an image's number, 6 for its redraws
NUMBER_BITS = 26
MAX_IMAGES = 2**NUMBER_BITS // 2  # numbers continue after the set's end, in the padding of its last batch
MAX_REDRAWS = 2 ** (32 - NUMBER_BITS) - 1
GUIDANCE_SHARES = "guidance_shares"  # among a set's settings


@dataclass(frozen=True)
class PlannedImage:
    """Image number `index`: image `class_index` of class `label`, drawn from `seed`; `redraw` counts its redraws."""

    index: int
    label: int
    class_index: int
    redraw: int
    prompt: str
    seed: int
    guidance_scale: float


@dataclass(frozen=True)
class GenerationPlan:
    """All images of a synthetic set, computed on demand and never stored as a list.

    Images are drawn for `labels`, which are some or all of `num_classes` classes. The class changes fastest (`index =
    class_index * len(labels) + position of the label`), so that a larger `num_images_per_class` only adds images at
    the end.

    Several guidance scales have equal shares of each class's images, to within one. With `scales_by_batch`, for sets of
    earlier versions, they have equal shares of the batches.

    Raises:
        UserError: there are too many images to number.
    """

    num_classes: int
    labels: tuple[int, ...]
    prompts: Prompts
    guidance_scales: tuple[float, ...]
    num_images_per_class: int
    seed: int
    batch_size: int
    images_per_shard: int
    scales_by_batch: bool = False

    @property
    def num_images(self) -> int:
        return self.num_images_per_class * len(self.labels)

    @property
    def num_shards(self) -> int:
        return math.ceil(self.num_images / self.images_per_shard)

    @property
    def guidance_settings(self) -> dict[str, str]:
        """The setting for the shares of guidance scales; empty for a single scale, or with `scales_by_batch`."""
        return {} if self.scales_by_batch or len(self.guidance_scales) == 1 else {GUIDANCE_SHARES: "per class"}

    def __post_init__(self):
        if self.num_images_per_class * self.num_classes > MAX_IMAGES:
            raise UserError(
                f"--num_images_per_class {self.num_images_per_class}: must be at most "
                f"{MAX_IMAGES // self.num_classes:,} for {self.num_classes} classes."
            )

    def image(self, index: int, redraw: int = 0) -> PlannedImage:
        """Return image number `index`, which can be after the set's end (padding of the last batch)."""
        class_index, position = divmod(index, len(self.labels))
        label = self.labels[position]
        # numbered among all classes, so a seed does not depend on the classes that are drawn
        number = redraw << NUMBER_BITS | class_index * self.num_classes + label
        prompt, seed = self.prompts.prompt(label, class_index), scramble(self.seed, number)
        return PlannedImage(index, label, class_index, redraw, prompt, seed, self._guidance_scale(index))

    def shard(self, number: int) -> range:
        """Return the image numbers of a shard; only the last shard may be short."""
        start = number * self.images_per_shard
        return range(start, min(start + self.images_per_shard, self.num_images))

    def batches(self, number: int) -> Iterator[list[PlannedImage]]:
        """Yield a shard's batches, each of exactly `batch_size` images in order, with one guidance scale.

        The last batch of a scale may continue past the shard's end: other kernels would compute a shorter batch, and
        its images would change when the set grows. The surplus is drawn and discarded.
        """
        shard = self.shard(number)
        for guidance_scale in dict.fromkeys(self.guidance_scales):
            alike = (index for index in count(shard.start) if self._guidance_scale(index) == guidance_scale)
            while (indices := list(islice(alike, self.batch_size)))[0] < shard.stop:
                yield [self.image(index) for index in indices]

    def redraw_batches(self, images: Iterable[PlannedImage]) -> Iterator[tuple[list[PlannedImage], int]]:
        """Yield batches that redraw images, and the number of wanted images in each; the rest repeats them."""
        again = sorted((self.image(image.index, image.redraw + 1) for image in images), key=lambda image: image.index)
        for guidance_scale in dict.fromkeys(self.guidance_scales):
            alike = [image for image in again if image.guidance_scale == guidance_scale]
            for start in range(0, len(alike), self.batch_size):
                wanted = alike[start : start + self.batch_size]
                yield list(islice(cycle(wanted), self.batch_size)), len(wanted)

    def _guidance_scale(self, index: int) -> float:
        """Return the guidance scale of an image.

        Of each run of images of a class, as many as there are scales, each has another scale, in random order. In a
        fixed order, scales would be tied to prompts that alternate with the image's number.
        """
        if len(self.guidance_scales) == 1:
            return self.guidance_scales[0]
        if self.scales_by_batch:
            shard, place = divmod(index, self.images_per_shard)
            count_before = shard * math.ceil(self.images_per_shard / self.batch_size) + place // self.batch_size
            drawn_from = f"{self.seed}"
        else:
            count_before, position = divmod(index, len(self.labels))
            drawn_from = f"{self.seed}/{self.labels[position]}"
        round_number, turn = divmod(count_before, len(self.guidance_scales))
        numbers = range(len(self.guidance_scales))
        order = sorted(numbers, key=lambda number: digest(f"{drawn_from}/{round_number}/{number}"))
        return self.guidance_scales[order[turn]]


def scramble(seed: int, number: int) -> int:
    """Return the 32-bit seed of a 32-bit number, different for each number: no two images start from the same noise.

    Source: a Feistel network of four rounds (Luby and Rackoff 1988), which is a permutation for any round function.
    """
    left, right = number >> 16, number & 0xFFFF
    for round_number in range(4):
        left, right = right, left ^ int.from_bytes(digest(f"{seed}/{round_number}/{right}")[:2])
    return left << 16 | right
