"""Drawing of shards: bad images are redrawn, and encoding and writing run in parallel to sampling."""

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
MAX_WAITING = 256  # images that wait for encoding; 200 MB at 512 pixels
MAX_LISTED = 10
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_AT_THE_END = 0.1


def start_accelerator(mixed_precision: str | None, recorded: str | None = None, folder: str = "") -> Accelerator:
    """Return the `Accelerator`; warn about the chosen precision.

    `recorded` is the precision of the existing set in `folder`.

    Raises:
        UserError: the device does not support the precision; or from `check_processes_joined`.
    """
    precision, line = choose_precision(mixed_precision, recorded, folder)
    if line:
        warn_once(line)
    try:
        # a process may still draw or upload its last shard when the others are done
        accelerator = Accelerator(
            mixed_precision=precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))]
        )
    except ValueError as error:  # fp16 without a GPU, bf16 on a GPU without it
        raise UserError(f"--mixed_precision {precision}: {error}") from None
    check_processes_joined(accelerator.num_processes)
    report_threads(accelerator.device.type)
    allow_tf32(accelerator.device)
    return accelerator


def draw_missing(
    shards: Shards, sources: Sources, settings: dict, max_redraws: int, accelerator: Accelerator
) -> tuple[int, float]:
    """Draw this process's share of the missing shards; return the images of all processes, and the seconds of this one.

    Shards are distributed by number. If none is missing, no generator is loaded.

    Raises:
        UserError: from `Runner.make_shards` and `load_pipeline`; or the set's folder was removed.
    """
    [missing] = broadcast_object_list([shards.find_missing() if accelerator.is_main_process else None])
    if not missing:
        return 0, 0.0
    process, num_processes = accelerator.process_index, accelerator.num_processes
    mine, num_images = missing[process::num_processes], sum(len(shards.plan.shard(number)) for number in missing)
    sampler = load_sampler(sources, settings, accelerator) if mine else None
    progress = SharedProgress(shards.output_dir / STATE_DIR, process, num_processes, num_images)
    accelerator.wait_for_everyone()  # all counts of an earlier run are removed
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
    """Threads that encode images. With too many images waiting, `submit` blocks."""

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
        """Return a future of the image file for `(height, width, 3)` uint8 pixels."""
        self._places.acquire()
        future = self._threads.submit(encode_image, pixels, self.image_format, self.quality)
        future.add_done_callback(lambda _: self._places.release())
        return future


def encode_image(pixels: np.ndarray, image_format: str, quality: int) -> bytes:
    """Return `(height, width, 3)` uint8 pixels as the bytes of an image file.

    `quality`, 1 to 100, is for JPEG and WebP; PNG is lossless.
    """
    buffer = io.BytesIO()
    options = {} if image_format == "png" else {"quality": quality}
    PILImage.fromarray(pixels).save(buffer, format=image_format, **options)
    return buffer.getvalue()


class SharedProgress:
    """A progress bar in the main process for all processes; each process writes its count to a folder."""

    def __init__(self, folder: Path, process_index: int, num_processes: int, total: int):
        self.process_index = process_index
        self.num_done, self._looked_at = 0, 0.0
        self._counts = [folder / f"drawn-{index}" for index in range(num_processes)]
        self._counts[process_index].unlink(missing_ok=True)  # of an earlier run
        self.bar = tqdm(total=total, desc="synthetic images", unit="image", disable=process_index != 0)

    def update(self, count: int) -> None:
        """Count images that this process has drawn."""
        self.num_done += count
        if time.monotonic() - self._looked_at >= SECONDS_BETWEEN_LOOKS:
            self._looked_at = time.monotonic()
            self._show()

    def finish(self) -> None:
        """Report that this process has drawn its share; the main one waits for the others and shows their progress."""
        self._show()
        while self.process_index == 0 and self.bar.n < self.bar.total:
            time.sleep(SECONDS_AT_THE_END)
            self._show()

    def _show(self) -> None:
        # in the main process too: if the folder was removed, this fails, and it does not wait for the others
        self._counts[self.process_index].write_text(str(self.num_done))
        if self.process_index != 0:
            return
        # a count is empty while it is being written
        others = [int(path.read_text() or 0) for path in self._counts[1:] if path.exists()]
        self.bar.update(max(self.num_done + sum(others) - self.bar.n, 0))


# the shard so far, by image index: good images with their future bytes; bad images with the reason
Good = dict[int, tuple[PlannedImage, Future]]
Bad = dict[int, tuple[PlannedImage, str]]


@dataclass(frozen=True)
class Runner:
    """Draws shards. `on_drawn` gets the number of images drawn; `check` raises if a shard must not be written."""

    sampler: Sampler
    shards: Shards
    encoders: Encoders
    max_redraws: int
    on_drawn: Callable[[int], None]
    check: Callable[[], None] = lambda: None

    def make_shards(self, numbers: Iterable[int]) -> None:
        """Draw, encode and write shards; each is written while the next is drawn.

        Raises:
            UserError: images are still bad after all redraws; the message lists classes and prompts.
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
        # Bad images are collected and redrawn together: one batch for each would cost far more
        for _ in range(self.max_redraws):
            for batch, num_wanted in plan.redraw_batches([image for image, _ in bad.values()]):
                self._draw_batch(batch, num_wanted, good, bad)
        if bad:
            raise UserError(self._describe(bad))
        return good

    def _draw_batch(self, batch: list[PlannedImage], num_wanted: int, good: Good, bad: Bad) -> None:
        """Draw a batch and sort its first `num_wanted` images into good and bad; the others are padding."""
        pixels, problems = draw_planned(self.sampler, batch)
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
        self.shards.write(number, rows, dict(+redraws), self.sampler.num_at_a_time)  # + drops zero counts

    def _describe(self, bad: Bad) -> str:
        names = self.shards.class_names
        listed = sorted({f"{names[image.label]} ('{image.prompt}'): {problem}" for image, problem in bad.values()})
        more = f"; and {len(listed) - MAX_LISTED} more" if len(listed) > MAX_LISTED else ""
        return (
            f"--max_redraws {self.max_redraws}: {len(bad)} images are still bad after as many redraws: "
            f"{'; '.join(listed[:MAX_LISTED])}{more}. The finished shards are kept."
        )


def draw_planned(sampler: Sampler, batch: list[PlannedImage]) -> tuple[np.ndarray, list[str | None]]:
    """Return the pixels and problems of a batch of the plan, as `Sampler.draw` does."""
    prompts, seeds, (guidance_scale, strength) = *zip(*((image.prompt, image.seed) for image in batch)), batch[0].kind
    from_images = () if strength is None else (strength, [image.init_image for image in batch])
    return sampler.draw(list(prompts), list(seeds), guidance_scale, *from_images)


def make_row(image: PlannedImage, image_bytes: bytes) -> dict:
    """Return a row of the set."""
    planned = ("label", "prompt", "seed", "guidance_scale", "class_index")
    planned += () if image.strength is None else ("strength", "init_image")
    return {"image": {"bytes": image_bytes, "path": None}} | {name: getattr(image, name) for name in planned}
