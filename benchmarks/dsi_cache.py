"""The latent cache of train_dsi.py: the time to build it, its size, and the time that it saves a second start.

    python -m benchmarks.dsi_cache

Each pipeline is started twice for one training step, the second time with the cache of the first.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.children import Child, run_child
from benchmarks.commands import ENCODING_BAR, TRAINING_BAR, environment_of, folder_size, make_parser, our_command
from benchmarks.image_sets import write_demo_images, write_textures
from benchmarks.pipelines import DEMO_DIR, SCALED, SD15, TINY, Shape, save_pipeline
from benchmarks.report import format_table, publish_section

NUM_STEPS = 1


@dataclass(frozen=True)
class Case:
    name: str
    pipeline_dir: Path
    parquet_dir: Path
    num_images: int


def demo_case(work_dir: Path) -> Case:
    return Case("the demo's, 32 px", DEMO_DIR, write_demo_images(work_dir / "demo-set", 2_000), 2_000)


def random_case(name: str, shape: Shape, num_images: int, work_dir: Path) -> Case:
    parquet_dir = write_textures(work_dir / f"set-{shape.resolution}", num_images, shape.resolution)
    return Case(f"{name}, {shape.resolution} px", save_pipeline(shape, work_dir / name), parquet_dir, num_images)


def measure(case: Case, device: str) -> dict[str, str]:
    """Start a case twice; return its row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder)
        command = our_command(case.pipeline_dir, case.parquet_dir, work_dir, max_train_steps=NUM_STEPS)
        environment = environment_of(work_dir, device)
        first, second = (run_child(command, work_dir / f"{name}.log", environment) for name in ("first", "second"))
        # the folder of the training images; the few held-out images have a separate one
        size = max(folder_size(path) for path in (work_dir / "latents").iterdir())
    return {
        "pipeline": case.name,
        "images": f"{case.num_images:,}",
        "images/s, with mirrored copies": f"{first.units_per_second(ENCODING_BAR, case.num_images):.1f}",
        "MiB per 1,000 images": f"{size / 2**20 / case.num_images * 1_000:.1f}",
        "first start, s": f"{seconds_to_training(first):.1f}",
        "second start, s": f"{seconds_to_training(second):.1f}",
    }


def seconds_to_training(child: Child) -> float:
    return child.bars[TRAINING_BAR, NUM_STEPS][0].seconds


def main():
    args = make_parser(__doc__).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder)
        if args.small:
            cases = [random_case("a test's", TINY, 64, work_dir)]
        else:
            cases = [demo_case(work_dir), random_case("Stable Diffusion 1.5, scaled down", SCALED, 256, work_dir)]
        if device == "cuda":
            cases.append(random_case("size of Stable Diffusion 1.5", SD15, 1_000, work_dir))
        body = (
            "Seconds from the command to the first training step, for images that were never loaded before and for a "
            f"second start with the same cache.{' One CPU thread.' if device == 'cpu' else ''}\n\n"
            f"{format_table([measure(case, device) for case in cases])}"
        )
    publish_section("train_dsi", "Latent cache", body, args.small)


if __name__ == "__main__":
    main()
