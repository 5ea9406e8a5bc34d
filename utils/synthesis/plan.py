"""The generation plan: which image is made from what. A pure function of the image's number; no torch."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class PlannedImage:
    """Image number `index`: the `class_index`-th of the class `label`, drawn from `seed` for the `redraw`-th time."""

    index: int
    label: int
    class_index: int
    redraw: int
    prompt: str
    seed: int


@dataclass(frozen=True)
class GenerationPlan:
    """All images of a synthetic set, computed when asked for and never held as a list.

    The class is the inner order (`index = class_index * num_classes + label`), so that a larger
    `num_images_per_class` only adds images at the end. `prompts` has one prompt a class.
    """

    class_names: tuple[str, ...]
    prompts: tuple[str, ...]
    num_images_per_class: int
    seed: int
    batch_size: int
    images_per_shard: int

    @property
    def num_images(self) -> int:
        return self.num_images_per_class * len(self.class_names)

    @property
    def num_shards(self) -> int:
        return math.ceil(self.num_images / self.images_per_shard)

    def image(self, index: int, redraw: int = 0) -> PlannedImage:
        """Return image number `index`, which may lie beyond the set's end (padding of the last batch)."""
        class_index, label = divmod(index, len(self.class_names))
        key = f"{self.seed}/{self.class_names[label]}/{class_index}/{redraw}"
        # 63 bits: torch takes 64, the parquet column is a signed int64
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1
        return PlannedImage(index, label, class_index, redraw, self.prompts[label], seed)

    def find_redraw(self, index: int, seed: int, max_redraws: int) -> int | None:
        """Return at which redraw image `index` has `seed`, None when at none: then it is not of this plan."""
        draws = range(max_redraws + 1)
        return next((redraw for redraw in draws if self.image(index, redraw).seed == seed), None)

    def shard(self, number: int) -> range:
        """Return the image numbers of a shard; only the last one may be short."""
        start = number * self.images_per_shard
        return range(start, min(start + self.images_per_shard, self.num_images))

    def batches(self, number: int) -> Iterator[range]:
        """Yield a shard's batches of image numbers, each exactly `batch_size` long.

        The last one may run past the shard's end: a shorter batch would be computed by other kernels, and its
        images would change once the set grows. The surplus is drawn and thrown away.
        """
        shard = self.shard(number)
        for start in range(shard.start, shard.stop, self.batch_size):
            yield range(start, start + self.batch_size)
