"""Shards drawn one after another: bad images are drawn again, and encoding and writing run beside the sampling."""

import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from PIL import Image as PILImage
from tqdm.auto import tqdm

from utils.cli.errors import UserError
from utils.cli.precision import allow_tf32, choose_precision
from utils.cli.processes import check_processes_joined, warn_once
from utils.cli.threads import report_threads
from utils.synthesis.output_folder import STATE_DIR, report_removed
from utils.synthesis.plan import PlannedImage
from utils.synthesis.sampling import Sampler, load_sampler
from utils.synthesis.shards import Shards
from utils.synthesis.sources import Sources

NUM_THREADS = 2
MAX_WAITING = 256  # images before encoding; at 512 pixels a side 200 MB
MAX_LISTED = 10
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_AT_THE_END = 0.1


def start_accelerator(mixed_precision: str | None, recorded: str | None = None, folder: str = "") -> Accelerator:
    """Return the `Accelerator`: which process this is, on which device, in which precision; say what was chosen.

    `recorded` is the precision of the set that is in `folder` already.

    Raises:
        UserError: the device does not have it; what `check_processes_joined` raises.
    """
    precision, line = choose_precision(mixed_precision, recorded, folder)
    if line:
        warn_once(line)
    try:
        # one process may still draw its last shard, or send it, when the others are done
        accelerator = Accelerator(
            mixed_precision=precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))]
        )
    except ValueError as error:  # fp16 without a GPU, bf16 on one that has none
        raise UserError(f"--mixed_precision {precision}: {error}") from None
    check_processes_joined(accelerator.num_processes)
    report_threads(accelerator.device.type)
    allow_tf32(accelerator.device)
    return accelerator


def draw_missing(
    shards: Shards, sources: Sources, settings: dict, max_redraws: int, accelerator: Accelerator
) -> tuple[int, float]:
    """Draw this process's part of the missing shards; return how many images all of them draw, and the seconds here.

    Shards are dealt to the processes by number. A set that lacks none loads no generator.

    Raises:
        UserError: what `Runner.make_shards` and `load_pipeline` raise; the set's folder was removed.
    """
    [missing] = broadcast_object_list([shards.find_missing() if accelerator.is_main_process else None])
    if not missing:
        return 0, 0.0
    process, num_processes = accelerator.process_index, accelerator.num_processes
    mine, num_images = missing[process::num_processes], sum(len(shards.plan.shard(number)) for number in missing)
    sampler = load_sampler(sources, settings, accelerator) if mine else None
    progress = SharedProgress(shards.output_dir / STATE_DIR, process, num_processes, num_images)
    accelerator.wait_for_everyone()  # counts of an earlier run are gone
    started = time.perf_counter()
    with report_removed(shards.output_dir), progress.bar:
        with Encoders(settings["image_format"], settings["image_quality"]) as encoders:
            check = partial(sources.check_unchanged, settings)
            Runner(sampler, shards, encoders, max_redraws, progress.update, check).make_shards(mine)
        progress.finish()
    seconds = time.perf_counter() - started
    accelerator.wait_for_everyone()
    return num_images, seconds


class Encoders:
    """Threads that encode images. Who gives them too many waits until some are done."""

    def __init__(self, image_format: str, quality: int):
        self.image_format = image_format
        self.quality = quality
        self._threads = ThreadPoolExecutor(NUM_THREADS)
        self._places = threading.BoundedSemaphore(MAX_WAITING)

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, *_) -> None:
        self._threads.shutdown(cancel_futures=True)

    def submit(self, pixels: np.ndarray) -> Future:
        """Return the future of the encoded `(height, width, 3)` uint8 pixels."""
        self._places.acquire()
        future = self._threads.submit(encode_image, pixels, self.image_format, self.quality)
        future.add_done_callback(lambda _: self._places.release())
        return future


def encode_image(pixels: np.ndarray, image_format: str, quality: int) -> bytes:
    """Return `(height, width, 3)` uint8 pixels as the bytes of an image file.

    `quality`, 1 to 100, is that of a JPEG or WebP file; PNG is lossless.
    """
    buffer = io.BytesIO()
    options = {} if image_format == "png" else {"quality": quality}
    PILImage.fromarray(pixels).save(buffer, format=image_format, **options)
    return buffer.getvalue()


class SharedProgress:
    """A bar on the main process over what all processes have drawn, of which each keeps its count in a folder."""

    def __init__(self, folder: Path, process_index: int, num_processes: int, total: int):
        self.process_index = process_index
        self.num_done, self._looked_at = 0, 0.0
        self._counts = [folder / f"drawn-{index}" for index in range(num_processes)]
        self._counts[process_index].unlink(missing_ok=True)  # of an earlier run
        self.bar = tqdm(total=total, desc="synthetic images", unit="image", disable=process_index != 0)

    def update(self, count: int) -> None:
        """Add images that this process has drawn."""
        self.num_done += count
        if time.monotonic() - self._looked_at >= SECONDS_BETWEEN_LOOKS:
            self._looked_at = time.monotonic()
            self._show()

    def finish(self) -> None:
        """Say that this process has done its share; the main one shows the others' until they have done theirs."""
        self._show()
        while self.process_index == 0 and self.bar.n < self.bar.total:
            time.sleep(SECONDS_AT_THE_END)
            self._show()

    def _show(self) -> None:
        # the main process's, too: if the folder was removed, it must not wait for the others' counts
        self._counts[self.process_index].write_text(str(self.num_done))
        if self.process_index != 0:
            return
        # a count is empty while it is written
        others = [int(path.read_text() or 0) for path in self._counts[1:] if path.exists()]
        self.bar.update(max(self.num_done + sum(others) - self.bar.n, 0))


# of a shard so far, by index: the image and its bytes to come; what is bad, and why
Good = dict[int, tuple[PlannedImage, Future]]
Bad = dict[int, tuple[PlannedImage, str]]


@dataclass(frozen=True)
class Runner:
    """Makes shards. `on_drawn` is told how many images are done; `check` raises where they may not be kept."""

    sampler: Sampler
    shards: Shards
    encoders: Encoders
    max_redraws: int
    on_drawn: Callable[[int], None]
    check: Callable[[], None] = lambda: None

    def make_shards(self, numbers: Iterable[int]) -> None:
        """Draw, encode and write shards; the one before is written while the next is drawn.

        Raises:
            UserError: images stay bad; the message lists classes and prompts.
        """
        with ThreadPoolExecutor(1) as writer:
            writing = None
            for number in numbers:
                images = self._draw_shard(number)
                if writing is not None:
                    writing.result()  # at most two shards are in memory
                writing = writer.submit(self._write, number, images)
            if writing is not None:
                writing.result()

    def _draw_shard(self, number: int) -> Good:
        plan, kept = self.shards.plan, self.shards.plan.shard(number)
        good, bad = {}, {}
        for batch in plan.batches(number):
            self._draw_batch(batch, sum(image.index in kept for image in batch), good, bad)
        # Bad images are collected and drawn again together: a batch for each of them would cost far more
        for _ in range(self.max_redraws):
            for batch, num_wanted in plan.redraw_batches([image for image, _ in bad.values()]):
                self._draw_batch(batch, num_wanted, good, bad)
        if bad:
            raise UserError(self._describe(bad))
        return good

    def _draw_batch(self, batch: list[PlannedImage], num_wanted: int, good: Good, bad: Bad) -> None:
        """Draw a batch and sort its first `num_wanted` images into good and bad; the rest is padding."""
        pixels, problems = self.sampler.draw(
            [image.prompt for image in batch], [image.seed for image in batch], batch[0].guidance_scale
        )
        for image, image_pixels, problem in list(zip(batch, pixels, problems))[:num_wanted]:
            if problem is None:
                bad.pop(image.index, None)
                good[image.index] = (image, self.encoders.submit(image_pixels))
                self.on_drawn(1)
            else:
                bad[image.index] = (image, problem)

    def _write(self, number: int, images: Good) -> None:
        in_order = [images[index] for index in sorted(images)]
        redraws = Counter()
        for image, _ in in_order:
            redraws[self.shards.class_names[image.label]] += image.redraw
        self.check()
        rows = (make_row(image, encoding.result()) for image, encoding in in_order)
        self.shards.write(number, rows, dict(+redraws), self.sampler.num_at_a_time)  # + leaves out those of none

    def _describe(self, bad: Bad) -> str:
        names = self.shards.class_names
        listed = sorted({f"{names[image.label]} ('{image.prompt}'): {problem}" for image, problem in bad.values()})
        more = f"; and {len(listed) - MAX_LISTED} more" if len(listed) > MAX_LISTED else ""
        return (
            f"--max_redraws {self.max_redraws}: after as many redraws {len(bad)} images are still bad: "
            f"{'; '.join(listed[:MAX_LISTED])}{more}. The finished shards are kept."
        )


def make_row(image: PlannedImage, image_bytes: bytes) -> dict:
    """Return a row of the set."""
    planned = ("label", "prompt", "seed", "guidance_scale", "class_index")
    return {"image": {"bytes": image_bytes, "path": None}} | {name: getattr(image, name) for name in planned}
