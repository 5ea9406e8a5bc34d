"""Memory of generate_synthetic.py as the set grows: it must stay flat.

    python -m benchmarks.generate_memory

The pipeline is minimal, so that many images are drawn quickly; at 64 x 64 pixels it would show if a run kept them.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.children import Child, run_child
from benchmarks.commands import environment_of, folder_size, make_parser
from benchmarks.drawing import NOUNS, Case, quick_case
from benchmarks.pipelines import QUICK
from benchmarks.report import format_table, publish_section

TITLE = "Memory over the number of images"
BODY = (
    "Peaks of the process, sampled every 50 ms, over the whole command: anonymous memory, which must stay flat, and "
    "pages of mapped files, which the kernel can reclaim. PNG, {images_per_shard:,} images per shard. "
    "From the first to the last set, anonymous memory grows by {growth:,.0f} MiB and the pixels by {pixels:,.0f} MiB."
)


def draw(case: Case) -> tuple[Child, dict[str, str]]:
    """Draw a case; return its run and its row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder)
        child = run_child(case.our_command(work_dir), work_dir / "log.txt", environment_of(work_dir, "cpu"))
        images_size = folder_size(work_dir / "set" / "data")
    return child, {
        "images": f"{case.num_images:,}",
        "shards, MiB": f"{images_size / 2**20:,.1f}",
        "RssAnon, MiB": f"{child.peaks['RssAnon']:,.0f}",
        "RssFile, MiB": f"{child.peaks['RssFile']:,.0f}",
        "whole command, s": f"{child.seconds:.0f}",
    }


def main():
    parser = make_parser(__doc__)
    parser.add_argument(
        "--num_images", type=int, nargs="+", default=[1_000, 20_000],
        help="images of each set, multiples of 10 (default: 1000 20000)",
    )  # fmt: skip
    parser.add_argument("--images_per_shard", type=int, default=1_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        case = quick_case(1, Path(folder), batch_size=50, images_per_shard=args.images_per_shard)
        cases = [replace(case, num_images_per_class=num // len(NOUNS)) for num in args.num_images]
        children, rows = zip(*(draw(case) for case in cases))
    growth = children[-1].peaks["RssAnon"] - children[0].peaks["RssAnon"]
    pixels = (cases[-1].num_images - cases[0].num_images) * 3 * QUICK.resolution**2 / 2**20
    text = BODY.format(images_per_shard=args.images_per_shard, growth=growth, pixels=pixels)
    body = f"{text}\n\n{format_table(rows)}"
    publish_section("generate_synthetic", TITLE, body, args.small)


if __name__ == "__main__":
    main()
