"""The generation plan: prompt, seed and guidance of each image, a pure function of its number. No torch."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import count, cycle, islice, product

from utils.cli.errors import UserError
from utils.synthesis.counts import BALANCE, FLAG, NUM_OF_CLASS, Counts
from utils.synthesis.prompts import Prompts, digest

# torch's CPU generator uses only the lower 32 bits of a seed: 26 for an image's number, 6 for its redraws
NUMBER_BITS = 26
MAX_IMAGES = 2**NUMBER_BITS // 2  # numbers continue after the set's end, in the padding of its last batch
MAX_REDRAWS = 2 ** (32 - NUMBER_BITS) - 1
GUIDANCE_SHARES = "guidance_shares"  # among a set's settings
INIT_IMAGE_ROWS = "init_image_rows"  # in a set's record


@dataclass(frozen=True)
class PlannedImage:
    """Image number `index`: image `class_index` of class `label`, drawn from `seed`; `redraw` counts its redraws.

    With image-to-image it is made from the real image in row `init_image` of the training split, with `strength`.
    """

    index: int
    label: int
    class_index: int
    redraw: int
    prompt: str
    seed: int
    guidance_scale: float
    strength: float | None = None
    init_image: int | None = None

    @property
    def kind(self) -> tuple[float, float | None]:
        """What all images of a batch share: guidance scale and strength, which decide the denoiser's passes."""
        return self.guidance_scale, self.strength


@dataclass(frozen=True)
class GenerationPlan:
    """All images of a synthetic set, computed on demand and never stored as a list.

    Images are drawn for `labels`, which are some or all of `num_classes` classes. The class changes fastest (`index =
    class_index * len(labels) + position of the label`), so that a larger `num_images_per_class` only adds images at
    the end. With `extra_images` of each of `labels`, these come first (`Counts`).

    Several guidance scales have equal shares of each class's images, to within one. With `scales_by_batch`, for sets of
    earlier versions, they have equal shares of the batches.

    With `strengths`, images are made from real ones, whose rows in the training split `init_rows` has by label. Each
    pair of a guidance scale and a strength has an equal share of each class's images.

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
    extra_images: tuple[int, ...] = ()
    strengths: tuple[float | None, ...] = (None,)
    init_rows: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @cached_property
    def counts(self) -> Counts:
        return Counts(len(self.labels), self.num_images_per_class, self.extra_images)

    @property
    def num_images(self) -> int:
        return self.counts.num_images

    @cached_property
    def kinds(self) -> tuple[tuple[float, float | None], ...]:
        """The pairs of a guidance scale and a strength (None without real images)."""
        return tuple(product(self.guidance_scales, self.strengths))

    @property
    def has_init_images(self) -> bool:
        return self.strengths != (None,)

    @property
    def count_settings(self) -> dict[str, list[int]]:
        """The setting for extra images, one number per drawn class; empty without them."""
        return {BALANCE: list(self.extra_images)} if self.extra_images else {}

    def to_dict(self, class_names: list[str]) -> dict:
        """Return the entries for the set's record; newer ones only if used, so earlier records stay the same."""
        record = {"num_images_per_class": self.num_images_per_class, "num_images": self.num_images}
        if self.extra_images:
            names = [class_names[label] for label in self.labels]
            record[NUM_OF_CLASS] = {name: self.counts.of_class(place) for place, name in enumerate(names)}
        if self.has_init_images:
            record[INIT_IMAGE_ROWS] = sorted(row for label in self.labels for row in self.init_rows[label])
        return record

    @property
    def num_shards(self) -> int:
        return math.ceil(self.num_images / self.images_per_shard)

    @property
    def guidance_settings(self) -> dict[str, str]:
        """The setting for the shares of guidance scales; empty for a single scale, or with `scales_by_batch`."""
        return {} if self.scales_by_batch or len(self.kinds) == 1 else {GUIDANCE_SHARES: "per class"}

    def __post_init__(self):
        # seeds are numbered as if every class had as many images as the one with most
        if self.counts.most * self.num_classes > MAX_IMAGES:
            balance = f"{BALANCE}:" if self.extra_images else ""
            why = f", as one has {max(self.extra_images):,} more than that" if self.extra_images else ""
            most = max(0, MAX_IMAGES // self.num_classes - max(self.extra_images, default=0))
            raise UserError(
                f"{FLAG} {balance}{self.num_images_per_class}: must be at most {most:,} for {self.num_classes} "
                f"classes{why}."
            )

    def image(self, index: int, redraw: int = 0) -> PlannedImage:
        """Return image number `index`, which can be after the set's end (padding of the last batch)."""
        class_index, position = self.counts.place(index)
        label = self.labels[position]
        # numbered among all classes, so a seed does not depend on the classes that are drawn
        number = redraw << NUMBER_BITS | class_index * self.num_classes + label
        prompt, seed = self.prompts.prompt(label, class_index), scramble(self.seed, number)
        scale, strength = self._kind(index)
        row = self._init_image(label, class_index) if self.has_init_images else None
        return PlannedImage(index, label, class_index, redraw, prompt, seed, scale, strength, row)

    def shard(self, number: int) -> range:
        """Return the image numbers of a shard; only the last shard may be short."""
        start = number * self.images_per_shard
        return range(start, min(start + self.images_per_shard, self.num_images))

    def batches(self, number: int) -> Iterator[list[PlannedImage]]:
        """Yield a shard's batches, each of exactly `batch_size` images in order, with one guidance scale and strength.

        The last batch of a kind may continue past the shard's end: other kernels would compute a shorter batch, and
        its images would change when the set grows. The surplus is drawn and discarded.
        """
        shard = self.shard(number)
        for kind in dict.fromkeys(self.kinds):
            alike = (index for index in count(shard.start) if self._kind(index) == kind)
            while (indices := list(islice(alike, self.batch_size)))[0] < shard.stop:
                yield [self.image(index) for index in indices]

    def redraw_batches(self, images: Iterable[PlannedImage]) -> Iterator[tuple[list[PlannedImage], int]]:
        """Yield batches that redraw images, and the number of wanted images in each; the rest repeats them."""
        again = sorted((self.image(image.index, image.redraw + 1) for image in images), key=lambda image: image.index)
        for kind in dict.fromkeys(self.kinds):
            alike = [image for image in again if image.kind == kind]
            for start in range(0, len(alike), self.batch_size):
                wanted = alike[start : start + self.batch_size]
                yield list(islice(cycle(wanted), self.batch_size)), len(wanted)

    def _kind(self, index: int) -> tuple[float, float | None]:
        """Return the guidance scale and the strength of an image.

        Of each run of images of a class, as many as there are kinds, each is of another kind, in random order. In a
        fixed order, kinds would be tied to prompts that alternate with the image's number.
        """
        if len(self.kinds) == 1:
            return self.kinds[0]
        if self.scales_by_batch:
            shard, place = divmod(index, self.images_per_shard)
            count_before = shard * math.ceil(self.images_per_shard / self.batch_size) + place // self.batch_size
            drawn_from = f"{self.seed}"
        else:
            count_before, position = self.counts.place(index)
            drawn_from = f"{self.seed}/{self.labels[position]}"
        round_number, turn = divmod(count_before, len(self.kinds))
        numbers = range(len(self.kinds))
        order = sorted(numbers, key=lambda number: digest(f"{drawn_from}/{round_number}/{number}"))
        return self.kinds[order[turn]]

    def _init_image(self, label: int, class_index: int) -> int:
        """Return the row of the real image that an image of a class is made from.

        Each run of as many images as the class has real ones uses every real one once, in random order.
        """
        rows = self.init_rows[label]
        round_number, turn = divmod(class_index, len(rows))
        return rows[_order_of_round(self.seed, label, round_number, len(rows))[turn]]


@lru_cache(maxsize=16_384)  # more than the classes that alternate
def _order_of_round(seed: int, label: int, round_number: int, number: int) -> list[int]:
    return sorted(range(number), key=lambda place: digest(f"{seed}/{label}/real {round_number}/{place}"))


def scramble(seed: int, number: int) -> int:
    """Return the 32-bit seed of a 32-bit number, different for each number: no two images start from the same noise.

    Source: a Feistel network of four rounds (Luby and Rackoff 1988), which is a permutation for any round function.
    """
    left, right = number >> 16, number & 0xFFFF
    for round_number in range(4):
        left, right = right, left ^ int.from_bytes(digest(f"{seed}/{round_number}/{right}")[:2])
    return left << 16 | right
