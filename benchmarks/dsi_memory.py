"""Memory of train_dsi.py as the image set grows: it must stay flat.

    python -m benchmarks.dsi_memory

The pipeline is tiny, so that the memory of the images shows; its latents are 16 x 16 with 4 channels.
"""

import tempfile
from pathlib import Path

from benchmarks.children import run_child
from benchmarks.commands import environment_of, folder_size, make_parser, our_command
from benchmarks.image_sets import write_textures
from benchmarks.pipelines import TINY, save_pipeline
from benchmarks.report import format_table, publish_section

NUM_STEPS = 200
BODY = (
    f"Peaks of the process and its children, sampled every 50 ms, over the whole command with {NUM_STEPS} steps of "
    "batch 8: anonymous memory, which must stay flat, and pages of mapped files (libraries, images, latents), which "
    "the kernel can reclaim."
)


def measure(pipeline_dir: Path, num_images: int) -> dict[str, str]:
    """Learn a token from a set of `num_images`; return its row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder)
        parquet_dir = write_textures(work_dir / "set", num_images, TINY.resolution)
        command = our_command(pipeline_dir, parquet_dir, work_dir, max_train_steps=NUM_STEPS)
        child = run_child(command, work_dir / "log.txt", environment_of(work_dir, "cpu"))
        images_size, latents_size = folder_size(parquet_dir), folder_size(work_dir / "latents")
    return {
        "images": f"{num_images:,}",
        "parquet files, MiB": f"{images_size / 2**20:,.1f}",
        "latent cache, MiB": f"{latents_size / 2**20:,.1f}",
        "RssAnon, MiB": f"{child.peaks['RssAnon']:,.0f}",
        "RssFile, MiB": f"{child.peaks['RssFile']:,.0f}",
        "whole command, s": f"{child.seconds:.0f}",
    }


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--num_images", type=int, nargs="+", default=[500, 2_000, 20_000], help="sizes of the sets")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pipeline_dir = save_pipeline(TINY, Path(folder) / "pipeline")
        rows = [measure(pipeline_dir, num_images) for num_images in args.num_images]
    body = f"{BODY}\n\n{format_table(rows)}"
    publish_section("train_dsi", "Memory over the number of images", body, args.small)


if __name__ == "__main__":
    main()
