"""The VAE's posteriors of all images: encoded once, stored in shards, read through a memory map."""

import hashlib
import json
import logging
import os
import platform
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import torch
from datasets import Dataset, Image
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tqdm.auto import tqdm

from utils.cli.errors import UserError
from utils.cli.memory import run_in_parts
from utils.cli.threads import num_cores
from utils.data.images import centre_square, to_model_range

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2  # increased with every change in what is encoded or how it is written
IMAGES_PER_SHARD = 256
BATCH_SIZE = 16  # batches stay within a shard, so its bytes do not depend on the process that encodes it
# Half the disk space of float32. Rounding to 1/2000 of a value is negligible compared with the noise of training, and
# every standard deviation fits: diffusers clamps the log variance to at most 20.
DTYPE = torch.float16
TOO_LARGE = "--resolution: out of memory when encoding one image at a time; lower it."


def latent_key(image_digests: Sequence[str], resolution: int, vae_identity: str, num_copies: int) -> str:
    """Return a hash, 64 hex digits, of all that decides the latents; `image_digests` has one for each image."""
    facts = [FORMAT_VERSION, IMAGES_PER_SHARD, resolution, vae_identity, num_copies, *image_digests]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class LatentCache:
    """A folder of shards, each with the posteriors of `IMAGES_PER_SHARD` images, in order.

    A shard is whole or absent, even after a crash and with several runs writing at once. Copy 0 is of the images as
    they are; copy 1, if `num_copies` is 2, of the mirrored ones.
    """

    def __init__(
        self, cache_dir: str | Path, image_digests: Sequence[str], resolution: int, vae_identity: str, num_copies: int
    ):
        self.folder = Path(cache_dir) / latent_key(image_digests, resolution, vae_identity, num_copies)
        self.num_images = len(image_digests)
        self.resolution = resolution
        self.vae_identity = vae_identity
        self.num_copies = num_copies

    def missing_shards(self, rank: int = 0, num_parts: int = 1) -> list[int]:
        """Return which of the shards `rank::num_parts` are absent or damaged, with a warning for a damaged one."""
        missing = []
        for number in range(self._num_shards)[rank::num_parts]:
            is_there = os.path.exists(self._path(number))  # checked first: another run may write it at any moment
            if not self._is_whole(number):
                missing.append(number)
                if is_there:
                    logger.warning("%s: damaged; its images are encoded again.", self._path(number))
        return missing

    @torch.no_grad()
    def encode(
        self, vae, images: Dataset, shard_numbers: list[int], show_progress: bool,
        check: Callable[[range], None] = lambda rows: None,
    ) -> None:  # fmt: skip
        """Encode the column `image`, centre-cropped, and write these shards after a `check` of their rows.

        A shard that another run is writing is left to it, and checked at the end, as that run may have died.

        Raises:
            UserError: the folder cannot be written, for example because the disk is full; the latents are not finite.
        """
        assert len(images) == self.num_images
        self._start_folder()
        undecoded = images.cast_column("image", Image(decode=False))
        total = sum(len(self._rows(number)) for number in shard_numbers)
        with tqdm(total=total, desc="encoding images", unit="image", disable=not show_progress) as progress:
            encode = partial(self._encode_shard, vae=vae, undecoded=undecoded, progress=progress, check=check)
            held = [number for number in shard_numbers if not encode(number, wait=False)]
            for number in held:
                progress.set_postfix_str("waiting for another run")
                encode(number, wait=True)

    def open(self) -> "Latents":
        """Map all shards.

        Raises:
            RuntimeError: a shard is missing or damaged.
        """
        try:
            return Latents([self._path(number) for number in range(self._num_shards)])
        except (OSError, SafetensorError) as error:
            raise RuntimeError(f"{self.folder}: a shard is missing ({error}); encode it first.") from error

    @property
    def _num_shards(self) -> int:
        return len(range(0, self.num_images, IMAGES_PER_SHARD))

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def _rows(self, number: int) -> range:
        return range(self.num_images)[number * IMAGES_PER_SHARD : (number + 1) * IMAGES_PER_SHARD]

    def _start_folder(self) -> None:
        """Make the folder with a file that explains it to people; no program reads that."""
        facts = {name: getattr(self, name) for name in ("num_images", "num_copies", "resolution", "vae_identity")}
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "latents.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def _is_whole(self, number: int) -> bool:
        try:
            with safe_open(self._path(number), framework="pt") as file:
                metadata, moments = file.metadata(), file.get_tensors()
        except (OSError, SafetensorError):
            return False
        if {name: value.dtype for name, value in moments.items()} != {"mean": DTYPE, "std": DTYPE}:
            return False
        return metadata == {"sha256": self._digest(number, moments)}

    def _digest(self, number: int, moments: dict[str, torch.Tensor]) -> str:
        """Return a hash of a shard's place, shapes and contents, so that a misplaced shard is found too."""
        digest = hashlib.sha256(f"{self.folder.name} {number}".encode())
        for name, value in sorted(moments.items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.numpy())
        return digest.hexdigest()

    def _encode_shard(
        self, number: int, vae, undecoded: Dataset, progress: tqdm, check: Callable[[range], None], wait: bool
    ) -> bool:
        """Encode and write a shard unless it is whole; return False if another run is writing it and `wait` is off."""
        try:
            with self._writing():
                lock = FileLock(self._hidden_path(number, "lock")).acquire(blocking=wait)
        except Timeout:
            return False
        with lock:
            if self._is_whole(number):
                progress.update(len(self._rows(number)))
            else:
                batches = _load_batches(undecoded, self._rows(number), self.resolution)
                moments = _encode_batches(vae, batches, self.num_copies, progress)
                check(self._rows(number))
                self._write(number, moments)
        return True

    def _write(self, number: int, moments: dict[str, torch.Tensor]) -> None:
        """Write a shard under a temporary name, flush it to disk and rename it. The caller holds its lock."""
        contents = save(moments, metadata={"sha256": self._digest(number, moments)})
        # some shared disks lock within a machine only, so runs on two machines must not share a temporary file
        temporary = self._hidden_path(number, f"{platform.node()}.{uuid.uuid4().hex}.tmp")
        with self._writing():
            for leftover in self.folder.glob(self._hidden_path(number, f"{platform.node()}.*.tmp").name):
                leftover.unlink()  # of a killed run on this machine; a live one would hold the lock
            try:
                with open(temporary, "wb") as file:
                    file.write(contents)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self._path(number))
            finally:
                temporary.unlink(missing_ok=True)

    def _hidden_path(self, number: int, ending: str) -> Path:
        return self.folder / f".{self._path(number).stem}.{ending}"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Timeout:
            raise
        except OSError as error:
            raise UserError(
                f"--latent_cache_dir {self.folder.parent}: cannot be written ({error.strerror}); free some space or "
                "choose another folder."
            ) from error


class Latents:
    """The posteriors of a cache's images by index, memory-mapped: pages that are not in use cost no memory."""

    def __init__(self, shard_paths: list[Path]):
        self._shard_paths = shard_paths
        self._shards = [load_file(path) for path in shard_paths]
        means = [shard["mean"] for shard in self._shards]
        self.num_copies = means[0].shape[0]
        self.latent_shape = tuple(means[0].shape[2:])

    def __reduce__(self):
        return Latents, (self._shard_paths,)  # otherwise all latents would be sent to spawned workers

    def mean(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the unscaled posterior means `(batch, channels, height, width)` float32 of the unmirrored images."""
        return self._take("mean", indices, torch.zeros_like(indices))

    def sample(self, indices: torch.Tensor, copies: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return unscaled latents `(batch, channels, height, width)` float32, drawn with standard normal `noise`."""
        return self._take("mean", indices, copies) + self._take("std", indices, copies) * noise

    def _take(self, name: str, indices: torch.Tensor, copies: torch.Tensor) -> torch.Tensor:
        places = [divmod(index, IMAGES_PER_SHARD) for index in indices.tolist()]
        rows = [self._shards[number][name][copy, row] for (number, row), copy in zip(places, copies.tolist())]
        return torch.stack(rows).float()


def _load_batches(images: Dataset, rows: range, resolution: int) -> Iterator[torch.Tensor]:
    """Yield `(batch, 3, height, width)` float32 in [-1, 1]; threads load the next batch while the VAE encodes one."""

    def load(image: dict) -> torch.Tensor:
        square = centre_square(Image().decode_example(image), resolution)
        return torch.from_numpy(to_model_range([square]))

    with ThreadPoolExecutor(min(num_cores(), 8)) as pool:
        starts = range(0, len(rows), BATCH_SIZE)
        # map starts its calls at once, the generator only on demand: one batch is loaded ahead
        batches = (pool.map(load, images[rows[start : start + BATCH_SIZE]]["image"]) for start in starts)
        for batch, _ in pairwise(chain(batches, [None])):
            yield torch.cat(list(batch))


def _encode_batches(vae, batches: Iterator[torch.Tensor], num_copies: int, progress: tqdm) -> dict[str, torch.Tensor]:
    """Return `mean` and `std` of the posteriors, `(copies, images, channels, height, width)` on the CPU."""
    moments, size = {"mean": [], "std": []}, BATCH_SIZE
    for pixel_values in batches:
        pixel_values = pixel_values.to(vae.device, vae.dtype)

        def encode(part: slice, pixel_values: torch.Tensor = pixel_values) -> dict[str, torch.Tensor]:
            copies = [pixel_values[part], pixel_values[part].flip(-1)][:num_copies]
            posteriors = [vae.encode(copy).latent_dist for copy in copies]
            values = {name: [getattr(posterior, name) for posterior in posteriors] for name in moments}
            return {name: torch.stack(of_copies).to("cpu", DTYPE) for name, of_copies in values.items()}

        encoded, size = run_in_parts(encode, len(pixel_values), size, TOO_LARGE)
        for name, parts in moments.items():
            parts += [part[name] for part in encoded]
        progress.update(len(pixel_values))
    moments = {name: torch.cat(parts, dim=1) for name, parts in moments.items()}
    if not all(value.isfinite().all() for value in moments.values()):
        raise UserError(
            "--pretrained_model_name_or_path: its VAE gives latents that are not finite; its weights are damaged, or "
            "do not work in this precision."
        )  # otherwise they would stay in the cache for all later runs
    return moments
