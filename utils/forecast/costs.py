"""Hours at a rate, and the disk that a run fills: downloads, copies that `datasets` makes, latents. No torch."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
# whose images `datasets` copies into an Arrow file; of image files, loose or in a zip, it writes paths alone
COPIED_SUFFIXES = (".parquet", ".arrow", ".tar", ".tgz")
BYTES_PER_ROW = 30  # about, besides the path of its image; measured with datasets 5.2
BYTES_PER_MOMENT = 2  # float16


@dataclass(frozen=True)
class DiskUse:
    """Something that a run writes: what, how many bytes (None: unknown), and in which folder."""

    what: str
    num_bytes: int | None
    folder: str | Path

    @property
    def free(self) -> int:
        """What is free on the disk of the folder, in bytes."""
        return shutil.disk_usage(self._existing).free

    @property
    def disk(self) -> int:
        """What tells the disk of the folder from others."""
        return self._existing.stat().st_dev

    @property
    def _existing(self) -> Path:
        folder = Path(self.folder).absolute()  # which need not exist yet
        return next(parent for parent in (folder, *folder.parents) if parent.exists())


def estimate_hours(number: float, per_second: float) -> float:
    """Return the hours that so many images take at a rate."""
    return number / per_second / 3600


def folder_bytes(num_images: int, bytes_per_image: float, is_read: bool = False) -> int:
    """Return the bytes of a synthetic set in parquet files; with `is_read`, and of the Arrow copy that training makes.

    Images are stored as they are in both, so that the copy is as large as the files.
    """
    return round(num_images * bytes_per_image) * (2 if is_read else 1)


def latent_bytes(num_images: int, resolution: int, num_copies: int, latent_channels: int = 4, scale: int = 8) -> int:
    """Return the bytes of a latent cache: mean and deviation of each image, and of its mirrored copy if there is one.

    `resolution` is in pixels a side, `scale` of which become one latent.
    """
    a_side = resolution // scale
    return num_images * num_copies * 2 * BYTES_PER_MOMENT * latent_channels * a_side * a_side


def copied_bytes(path: str | Path) -> int:
    """Return about how large the Arrow copy of a local data file will be: 0 for what `datasets` does not copy."""
    if not str(path).endswith(COPIED_SUFFIXES):
        return BYTES_PER_ROW + len(str(path))
    if not str(path).endswith(".parquet"):
        return os.path.getsize(path)
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    return sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))


def arrow_bytes(paths: Iterable[str | Path]) -> int:
    """Return about how large the Arrow copies of local data files will be together.

    `datasets` copies parquet, Arrow and tar files whole, as large as they are uncompressed. Of image files it writes
    the paths; a folder of `save_to_disk` and a stream it does not copy at all, which callers have to know.
    """
    return sum(map(copied_bytes, paths))
