"""Every image that a run uses is opened once, before a model loads: damaged ones are named, or left out and counted."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from datasets import Dataset, Image
from tqdm.auto import tqdm

from utils.cli.errors import UserError
from utils.data.image_files import UNREADABLE_KINDS, read_file, unreadable_kind
from utils.data.image_set import RealImages
from utils.data.images import TOO_LARGE, describe_error, describe_reading, to_rgb

NUM_THREADS = min(16, os.cpu_count() or 1)
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class OpenedImages:
    """Images of which each was opened, without the damaged ones.

    `digests` maps part -> SHA-256 of each image's encoded bytes, in order, where they were asked for; `remarks` are
    lines for the user: what was left out, and what was guessed in reading.
    """

    images: RealImages
    digests: dict[str, list[str]]
    num_skipped: int
    remarks: list[str]


def open_all(real: RealImages, parts: tuple[str, ...] = PARTS, with_digests: bool = False) -> OpenedImages:
    """Open every image of some parts once, each in one of the processes, as training will read it.

    Damaged ones are left out where the record's `skip_bad_images` allows that. Memory grows with the digests only.

    Raises:
        UserError: an image is damaged and may not be left out, or a class has no other training images.
    """
    found = {part: _inspect_together(getattr(real, part), f"{part} images", with_digests) for part in parts}
    problems = {
        f"{part} images: row {real.parts[part].rows[row]}, column '{real.record.image_column_name}'": problem
        for part, (_, bad, _) in found.items()
        for row, problem in sorted(bad.items())
    }
    _refuse_damaged(problems, real.record.skip_bad_images)
    kept = {part: _rows_without(getattr(real, part), bad) for part, (_, bad, _) in found.items() if bad}
    _check_classes_left(real, kept.get("train"))
    digests = {part: [good[row] for row in sorted(good)] for part, (good, _, _) in found.items()}
    notes = Counter(note for _, _, notes in found.values() for note in notes.values())
    remarks = [f"Warning: {number:,} images {words}." for words, number in notes.items()]
    return OpenedImages(real.select(kept), digests, len(problems), [*_describe_skipped(problems), *remarks])


def open_synthetic(images: Dataset, name: str, skip_bad_images: bool) -> tuple[Dataset, list[str]]:
    """Open every image of a synthetic set once; return it without the damaged ones, and lines for the user.

    Raises:
        UserError: an image is damaged and may not be left out.
    """
    _, bad, _ = _inspect_together(images, "synthetic images", with_digests=False)
    problems = {f"--synthetic_dataset {name}: row {row}": bad[row] for row in sorted(bad)}
    _refuse_damaged(problems, skip_bad_images)
    return images.select(_rows_without(images, bad)) if bad else images, _describe_skipped(problems)


def _rows_without(images: Dataset, bad: dict[int, str]) -> np.ndarray:
    return np.setdiff1d(np.arange(len(images)), list(bad))


def _refuse_damaged(problems: dict[str, str], may_skip: bool) -> None:
    """Raise where images do not open, given as place -> what is wrong, unless they may be left out."""
    if not problems or may_skip:
        return
    place, problem = next(iter(problems.items()))
    state, cure = "damaged", "repair or remove what is damaged"
    if problem.startswith(TOO_LARGE):
        state, cure = "not read", "shrink or remove what is too large"
    raise UserError(
        f"{place}: {state} ({problem}); {state} in all: {len(problems)}; {cure}, or give --skip_bad_images."
    )


def _describe_skipped(problems: dict[str, str]) -> list[str]:
    if not problems:
        return []
    place, problem = next(iter(problems.items()))
    return [f"Warning: damaged images that are left out: {len(problems)}, the first is {place} ({problem})."]


def _check_classes_left(real: RealImages, kept: np.ndarray | None) -> None:
    """Raise where a class has no training images but damaged ones."""
    labels = np.asarray(real.train["label"])
    lost = np.setdiff1d(labels, labels if kept is None else labels[kept])
    if lost.size:
        names = ", ".join(real.class_names[label] for label in lost)
        raise UserError(f"--skip_bad_images: all training images of {names} are damaged.")


def _inspect_together(
    images: Dataset, what: str, with_digests: bool
) -> tuple[dict[int, str], dict[int, str], dict[int, str]]:
    """Return what `inspect_images` finds, from all processes, the notes last."""
    notes: dict[int, str] = {}
    found = inspect_images(images, what, *_own_share(), notes, with_digests)
    return _from_all_processes(*found, notes)


def content_places(images: Dataset) -> np.ndarray:
    """Return a number in [0, 1) for each image, evenly spread, that depends on nothing but its encoded bytes."""

    def place(encoded: dict | None) -> float:
        try:
            digest = hashlib.sha256(_read_encoded(encoded)).digest()
        except OSError:  # told when the images are opened
            digest = hashlib.sha256(repr(encoded).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    rank, num_parts, show_progress = _own_share()
    rows = range(rank, len(images), num_parts)
    own = dict(zip(rows, _in_threads(images, place, rows, "reading images", show_progress)))
    (places,) = _from_all_processes(own)
    return np.array([places[row] for row in range(len(images))])


def _own_share() -> tuple[int, int, bool]:
    """Return which of how many processes this is, and whether it shows a progress bar."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # without a state of accelerate, which would take up a GPU
        return 0, 1, True
    from accelerate import PartialState

    state = PartialState()
    return state.process_index, state.num_processes, state.is_local_main_process


def _from_all_processes(*found: dict[int, object]) -> tuple[dict[int, object], ...]:
    """Return dictionaries by row, each with the rows of every process."""
    if _own_share()[1] == 1:
        return found
    from accelerate.utils import gather_object

    parts = gather_object([found])
    return tuple({row: value for part in parts for row, value in part[which].items()} for which in range(len(found)))


def inspect_images(
    images: Dataset, what: str, rank: int = 0, num_parts: int = 1, show_progress: bool = True,
    notes: dict[int, str] | None = None, with_digests: bool = True,
) -> tuple[dict[int, str], dict[int, str]]:  # fmt: skip
    """Decode the images of the rows `rank`, `rank + num_parts`, ... once, in threads.

    Returns row -> SHA-256 of the encoded bytes for the good ones (nothing where not `with_digests`), and row -> what is
    wrong for the damaged ones.
    `notes`, where given, gets row -> what `describe_reading` says of a good one.
    """
    rows = range(rank, len(images), num_parts)
    hashes, problems = {}, {}
    inspect = partial(_inspect_image, with_digest=with_digests)
    found = _in_threads(images, inspect, rows, f"checking {what}", show_progress)
    for row, (digest, problem, note) in zip(rows, found):
        if problem is not None:
            problems[row] = problem
        elif with_digests:
            hashes[row] = digest
        if notes is not None and note is not None:
            notes[row] = note
    return hashes, problems


def _in_threads(images: Dataset, function: Callable, rows: range, what: str, show_progress: bool) -> Iterator:
    """Yield what a function of the encoded image gives for each of the rows, in order."""
    encoded = images.select_columns("image").cast_column("image", Image(decode=False))
    with (
        ThreadPoolExecutor(NUM_THREADS) as threads,
        tqdm(total=len(rows), desc=what, unit="image", leave=False, disable=not show_progress) as progress,
    ):
        # a piece at a time: `map` takes all that it is given, and these are the bytes of whole files
        for start in range(0, len(rows), 8 * NUM_THREADS):
            piece = rows[start : start + 8 * NUM_THREADS]
            yield from threads.map(function, encoded[piece]["image"])
            progress.update(len(piece))


def _read_encoded(encoded: dict | None) -> bytes:
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        return b""
    if encoded["bytes"] is not None:
        return encoded["bytes"]
    return read_file(encoded["path"])


def _inspect_image(encoded: dict | None, with_digest: bool) -> tuple[str | None, str | None, str | None]:
    """Return the hash of an image's bytes, what is wrong with the image, and what is to be said of its reading."""
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        return None, "no image", None
    path, content = encoded["path"], b""
    try:
        content = _read_encoded(encoded)
        image = PIL.Image.open(BytesIO(content))
        note = describe_reading(image)
        image.draft("RGB", (1, 1))  # a JPEG is decoded to an eighth of its size, which still reads all of its bytes
        image.load()
        if image.getexif().get(PIL.ExifTags.Base.Orientation) is not None:
            PIL.ImageOps.exif_transpose(image)  # as `datasets` does, which stops at EXIF that `to_rgb` ignores
        to_rgb(image)
    except Exception as error:  # on damaged files Pillow raises nearly anything
        kind = unreadable_kind(content[:32])  # such as HEIC under the name of a JPEG
        reason = f"{kind}, which is not read: {UNREADABLE_KINDS[kind][1]}" if kind else describe_error(error)
        return None, f"{reason}{f', file {path}' if path else ''}", None
    return hashlib.sha256(content).hexdigest() if with_digest else None, None, note
