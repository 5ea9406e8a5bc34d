"""What generate_synthetic.py does before it resumes a large set: plan it, and find the finished shards.

    python -m benchmarks.generate_scan

The set has 200 classes; its images are random bytes, as a scan opens none.
"""

import random
import shutil
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from benchmarks.commands import folder_size, make_parser
from benchmarks.report import format_table, publish_section
from utils.data.prompts import PLAIN_TEMPLATE
from utils.synthesis.output_folder import DATA_DIR, STATE_DIR, make_folders
from utils.synthesis.plan import GenerationPlan
from utils.synthesis.prompts import TemplatePrompts, build_templates
from utils.synthesis.runner import make_row
from utils.synthesis.shards import Shards

TITLE = "Plan and scan of a restart"
CLASS_NAMES = [f"class {number}" for number in range(200)]
REPETITIONS = 5
USUAL_IMAGE_BYTES = 50_000
PLANNED_IMAGES = 20_000  # used to measure the time and memory of the plan


def make_plan(num_images: int, images_per_shard: int) -> GenerationPlan:
    templates = tuple(build_templates("diverse", PLAIN_TEMPLATE))
    return GenerationPlan(
        num_classes=len(CLASS_NAMES), labels=tuple(range(len(CLASS_NAMES))),
        prompts=TemplatePrompts(templates, tuple(CLASS_NAMES)), guidance_scales=(2.0, 3.0),
        num_images_per_class=num_images // len(CLASS_NAMES), seed=0, batch_size=16, images_per_shard=images_per_shard,
    )  # fmt: skip


def write_shards(shards: Shards, image_bytes: int) -> None:
    rng = random.Random(0)
    for number in range(shards.plan.num_shards):
        images = (shards.plan.image(index) for index in shards.plan.shard(number))
        rows = (make_row(image, rng.randbytes(image_bytes)) for image in images)
        shards.write(number, rows, {}, shards.plan.batch_size)
    shards.write_checksums()


def median_seconds(function: Callable[[], None], before: Callable[[], None] = lambda: None) -> float:
    """Return the median time of several calls of `function`; `before` is called before each, untimed."""
    seconds = []
    for _ in range(REPETITIONS):
        before()
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure(output_dir: Path, num_images: int, num_shards: int, image_bytes: int) -> tuple[float, float, int]:
    """Write a set into a new folder and restart it several times.

    Returns the seconds with known checksums, the seconds when all files are hashed again, and the size in bytes.

    Raises:
        RuntimeError: a shard is missing, which would make a restart too fast.
    """
    images_per_shard = num_images // num_shards
    make_folders(output_dir)
    write_shards(Shards(output_dir, make_plan(num_images, images_per_shard), "f", CLASS_NAMES), image_bytes)

    def restart() -> None:
        shards = Shards(output_dir, make_plan(num_images, images_per_shard), "f", CLASS_NAMES)
        shards.check_no_foreign_files()
        missing = shards.find_missing()
        if missing:
            raise RuntimeError(f"{len(missing)} shards are missing")

    def forget() -> None:
        shutil.rmtree(output_dir / STATE_DIR)
        make_folders(output_dir)

    noted = median_seconds(restart)
    hashed = median_seconds(restart, before=forget)
    return noted, hashed, folder_size(output_dir / DATA_DIR)


def make_rows(num_images: int, noted: float, hashed: float, num_bytes: int) -> list[dict[str, str]]:
    """Return the table's rows for what `measure` returns."""
    usual = hashed * num_images * USUAL_IMAGE_BYTES / num_bytes
    return [
        {"": "plan and scan, with known checksums", "seconds": f"{noted:.2f}"},
        {"": f"the same, with all {num_bytes / 2**20:,.0f} MiB hashed again", "seconds": f"{hashed:.2f}"},
        {"": f"computed from that, for {USUAL_IMAGE_BYTES // 1000} kB per image", "seconds": f"{usual:.0f}"},
    ]


def iterate_plan(plan: GenerationPlan, num_images: int) -> int:
    """Iterate over a plan's first images in batches, as a run does; return how many there were."""
    number, count = 0, 0
    while count < num_images:
        count += sum(len(batch) for batch in plan.batches(number))
        number += 1
    return count


def describe_plan(num_images: int, images_per_shard: int) -> str:
    """Return a sentence on the time and memory of the plan itself."""
    started = time.perf_counter()
    count = iterate_plan(make_plan(num_images, images_per_shard), PLANNED_IMAGES)
    seconds = time.perf_counter() - started
    tracemalloc.start()
    iterate_plan(make_plan(num_images, images_per_shard), PLANNED_IMAGES)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (
        f"The plan is computed while images are drawn, in {seconds / count * 1e6:.0f} µs per image; at most "
        f"{peak / 2**10:,.0f} KiB are allocated for its first {count:,} images (tracemalloc)."
    )


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--num_images", type=int, default=600_000, help=f"a multiple of {len(CLASS_NAMES)}")
    parser.add_argument("--num_shards", type=int, default=300)
    parser.add_argument("--image_bytes", type=int, default=1_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), args.num_images, args.num_shards, args.image_bytes)
    body = (
        f"{args.num_images:,} images of {args.image_bytes:,} bytes and {len(CLASS_NAMES)} classes in {args.num_shards} "
        f"shards in the page cache; medians of {REPETITIONS}. Hashing files on a disk is limited by its speed.\n\n"
        f"{format_table(make_rows(args.num_images, *measured))}\n\n"
        f"{describe_plan(args.num_images, args.num_images // args.num_shards)}"
    )
    publish_section("generate_synthetic", TITLE, body, args.small)


if __name__ == "__main__":
    main()
