"""Shards drawn one after another: bad images are drawn again, and encoding and writing run beside the sampling."""

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from utils.cli.errors import UserError
from utils.synthesis.encoding import Encoders
from utils.synthesis.plan import PlannedImage
from utils.synthesis.sampling import Sampler
from utils.synthesis.shards import Shards

MAX_LISTED = 10


@dataclass
class Drawn:
    """The images of a shard so far: index -> the image and its bytes to come; what is bad, and why."""

    good: dict[int, tuple[PlannedImage, Future]] = field(default_factory=dict)
    bad: dict[int, tuple[PlannedImage, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Runner:
    """Makes shards. `on_drawn` is told how many images are done."""

    sampler: Sampler
    shards: Shards
    encoders: Encoders
    max_redraws: int
    on_drawn: Callable[[int], None]

    def make_shards(self, numbers: Iterable[int]) -> None:
        """Draw, encode and write shards; the one before is written while the next is drawn.

        Raises:
            UserError: images stay bad; the message lists classes and prompts.
        """
        with ThreadPoolExecutor(1) as writer:
            writing = None
            for number in numbers:
                drawn = self._draw_shard(number)
                if writing is not None:
                    writing.result()  # at most two shards are in memory
                writing = writer.submit(self._write, number, drawn)
            if writing is not None:
                writing.result()

    def _draw_shard(self, number: int) -> Drawn:
        plan, drawn = self.shards.plan, Drawn()
        kept = plan.shard(number)
        for batch in plan.batches(number):
            self._draw_batch(batch, sum(image.index in kept for image in batch), drawn)
        # Bad images are collected and drawn again together: a batch for each of them would cost far more
        for _ in range(self.max_redraws):
            again = [image for image, _ in drawn.bad.values()]
            for batch, num_wanted in plan.redraw_batches(again):
                self._draw_batch(batch, num_wanted, drawn)
        if drawn.bad:
            raise UserError(self._describe(drawn.bad))
        return drawn

    def _draw_batch(self, batch: list[PlannedImage], num_wanted: int, drawn: Drawn) -> None:
        """Draw a batch and sort its first `num_wanted` images into good and bad; the rest is padding."""
        pixels, problems = self.sampler.draw(
            [image.prompt for image in batch], [image.seed for image in batch], batch[0].guidance_scale
        )
        for image, image_pixels, problem in list(zip(batch, pixels, problems))[:num_wanted]:
            if problem is None:
                drawn.bad.pop(image.index, None)
                drawn.good[image.index] = (image, self.encoders.submit(image_pixels))
                self.on_drawn(1)
            else:
                drawn.bad[image.index] = (image, problem)

    def _write(self, number: int, drawn: Drawn) -> None:
        in_order = [drawn.good[index] for index in sorted(drawn.good)]
        names = self.shards.class_names
        redraws = Counter()
        for image, _ in in_order:
            redraws[names[image.label]] += image.redraw
        rows = (make_row(image, encoding.result()) for image, encoding in in_order)
        num_redraws = {name: count for name, count in redraws.items() if count}
        self.shards.write(number, rows, num_redraws, self.sampler.num_at_a_time)

    def _describe(self, bad: dict[int, tuple[PlannedImage, str]]) -> str:
        names = self.shards.class_names
        listed = sorted({f"{names[image.label]} ('{image.prompt}'): {problem}" for image, problem in bad.values()})
        more = f"; and {len(listed) - MAX_LISTED} more" if len(listed) > MAX_LISTED else ""
        return (
            f"--max_redraws {self.max_redraws}: after as many redraws {len(bad)} images are still bad: "
            f"{'; '.join(listed[:MAX_LISTED])}{more}. The finished shards are kept."
        )


def make_row(image: PlannedImage, image_bytes: bytes) -> dict:
    """Return a row of the set."""
    return {
        "image": {"bytes": image_bytes, "path": None},
        "label": image.label,
        "prompt": image.prompt,
        "seed": image.seed,
        "guidance_scale": image.guidance_scale,
        "class_index": image.class_index,
    }
