"""Hours at a rate, and the disk space of a run: downloads, Arrow copies of `datasets`, latents. No torch."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
# files whose images `datasets` copies into an Arrow file; for image files, loose or in a zip, it writes only paths
COPIED_SUFFIXES = (".parquet", ".arrow", ".tar", ".tgz")
BYTES_PER_ROW = 30  # approximately, besides the path of its image; measured with datasets 5.2
BYTES_PER_MOMENT = 2  # float16


@dataclass(frozen=True)
class DiskUse:
    """Something that a run writes: what, its size in bytes (None: unknown), and its folder."""

    what: str
    num_bytes: int | None
    folder: str | Path

    @property
    def free(self) -> int:
        """The free space on the folder's disk, in bytes."""
        return shutil.disk_usage(self._existing).free

    @property
    def disk(self) -> int:
        """The id of the folder's disk."""
        return self._existing.stat().st_dev

    @property
    def _existing(self) -> Path:
        folder = Path(self.folder).absolute()  # it may not exist yet
        return next(parent for parent in (folder, *folder.parents) if parent.exists())


def estimate_hours(number: float, per_second: float) -> float:
    """Return the hours for a number of images at a rate."""
    return number / per_second / 3600


def folder_bytes(num_images: int, bytes_per_image: float, is_read: bool = False) -> int:
    """Return the bytes of a synthetic dataset in parquet files; with `is_read`, including the Arrow copy for training.

    Both store the encoded images, so the copy is as large as the files.
    """
    return round(num_images * bytes_per_image) * (2 if is_read else 1)


def latent_bytes(num_images: int, resolution: int, num_copies: int, latent_channels: int = 4, scale: int = 8) -> int:
    """Return the bytes of a latent cache: mean and standard deviation of each image and of its copies (2: mirrored
    too).

    `resolution` is in pixels per side, `scale` of which become one latent.
    """
    side = resolution // scale
    return num_images * num_copies * 2 * BYTES_PER_MOMENT * latent_channels * side * side


def copied_bytes(path: str | Path) -> int:
    """Return the approximate bytes of the Arrow copy of a local data file; only paths for what `datasets` does not
    copy."""
    if not str(path).endswith(COPIED_SUFFIXES):
        return BYTES_PER_ROW + len(str(path))
    if not str(path).endswith(".parquet"):
        return os.path.getsize(path)
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    return sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))


def arrow_bytes(paths: Iterable[str | Path]) -> int:
    """Return the approximate total bytes of the Arrow copies of local data files.

    `datasets` copies parquet, Arrow and tar files in full, uncompressed. For image files it writes the paths. Folders
    of `save_to_disk` and streams are not copied at all, which callers must consider.
    """
    return sum(map(copied_bytes, paths))
