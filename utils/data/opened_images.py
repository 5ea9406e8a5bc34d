"""Opens every image of a run once, before a model loads: damaged ones are an error, or left out and counted."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from datasets import Dataset, Image
from tqdm.auto import tqdm

from utils.cli.errors import UserError
from utils.cli.processes import num_launched
from utils.cli.threads import num_cores
from utils.data.image_files import UNREADABLE_KINDS, unreadable_kind
from utils.data.image_set import PARTS, RealImages
from utils.data.images import TOO_LARGE, describe_error, describe_reading, to_rgb

NUM_THREADS = min(16, num_cores())
Result = TypeVar("Result")


@dataclass(frozen=True)
class OpenedImages:
    """Images that were all opened, without the damaged ones.

    `digests` maps part -> SHA-256 of each image's encoded bytes, in order, if asked for; `remarks` are lines for the
    user on images left out and on guesses in reading.
    """

    images: RealImages
    digests: dict[str, list[str]]
    num_skipped: int
    remarks: list[str]


class Inspected(NamedTuple):
    """The results of opening images, by row.

    `digests` are SHA-256 of the encoded bytes of good images, if asked for; `problems` are those of damaged images,
    `notes` from `describe_reading` on good ones.
    """

    digests: dict[int, str]
    problems: dict[int, str]
    notes: dict[int, str]


def open_all(real: RealImages, parts: tuple[str, ...] = PARTS, with_digests: bool = False) -> OpenedImages:
    """Open every image of some parts once, divided over the processes, as training will read them.

    Damaged images are left out if the record's `skip_bad_images` allows it. Only the digests stay in memory.

    Raises:
        UserError: an image is damaged and must not be left out, or a class has only damaged training images.
    """
    found = {part: inspect_images(getattr(real, part), f"{part} images", with_digests) for part in parts}
    problems = {
        f"{part} images: row {real.parts[part].rows[row]}, column '{real.record.image_column_name}'": problem
        for part, inspected in found.items()
        for row, problem in sorted(inspected.problems.items())
    }
    remarks = _handle_damaged(problems, real.record.skip_bad_images)
    kept = {part: _good_rows(getattr(real, part), inspected) for part, inspected in found.items() if inspected.problems}
    _check_classes_left(real, kept.get("train"))
    digests = {part: [digest for _, digest in sorted(inspected.digests.items())] for part, inspected in found.items()}
    notes = Counter(note for inspected in found.values() for note in inspected.notes.values())
    remarks += [f"Warning: {number:,} images {words}." for words, number in notes.items()]
    return OpenedImages(real.select(kept), digests, len(problems), remarks)


def open_synthetic(images: Dataset, name: str, skip_bad_images: bool) -> tuple[Dataset, list[str]]:
    """Open every image of a synthetic dataset once; return it without the damaged ones, and lines for the user.

    Raises:
        UserError: an image is damaged and must not be left out.
    """
    inspected = inspect_images(images, "synthetic images")
    problems = {f"--synthetic_dataset {name}: row {row}": text for row, text in sorted(inspected.problems.items())}
    remarks = _handle_damaged(problems, skip_bad_images)
    return images.select(_good_rows(images, inspected)) if problems else images, remarks


def _good_rows(images: Dataset, inspected: Inspected) -> np.ndarray:
    return np.setdiff1d(np.arange(len(images)), list(inspected.problems))


def _handle_damaged(problems: dict[str, str], may_skip: bool) -> list[str]:
    """Return lines for the user on damaged images, given as place -> problem, if they may be left out.

    Raises:
        UserError: they must not.
    """
    if not problems:
        return []
    place, problem = next(iter(problems.items()))
    if may_skip:
        return [f"Warning: damaged images left out: {len(problems)}, the first is {place} ({problem})."]
    state, cure = "damaged", "repair or remove them"
    if problem.startswith(TOO_LARGE):
        state, cure = "not read", "shrink or remove them"
    raise UserError(
        f"{place}: {state} ({problem}); {state} in total: {len(problems)}; {cure}, or give --skip_bad_images."
    )


def _check_classes_left(real: RealImages, kept: np.ndarray | None) -> None:
    """Raise if all training images of a class are damaged."""
    labels = np.asarray(real.train["label"])
    lost = np.setdiff1d(labels, labels if kept is None else labels[kept])
    if lost.size:
        names = ", ".join(real.class_names[label] for label in lost)
        raise UserError(f"--skip_bad_images: all training images of {names} are damaged.")


def inspect_images(images: Dataset, what: str, with_digests: bool = False) -> Inspected:
    """Decode each image once, divided over processes and threads; return the results of all."""
    inspected = Inspected({}, {}, {})
    inspect = partial(inspect_image, with_digest=with_digests)
    for row, results in _for_each(images, inspect, f"checking {what}"):
        for by_row, result in zip(inspected, results):
            if result is not None:
                by_row[row] = result
    return inspected


def content_positions(images: Dataset) -> np.ndarray:
    """Return a uniformly distributed number in [0, 1) for each image, which depends only on its encoded bytes."""

    def place(row: int, encoded: dict | None) -> float:
        try:
            digest = hashlib.sha256(_read_encoded(encoded) or b"").digest()
        except OSError:  # reported when the images are opened
            digest = hashlib.sha256(repr(encoded).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    places = np.zeros(len(images))
    for row, found in _for_each(images, place, "reading images"):
        places[row] = found
    return places


def check_digests(images: Dataset, digests: Sequence[str], rows: range, where: str) -> None:
    """Check the encoded bytes of some rows against `digests`, the SHA-256 of every row.

    `where` is the flag that names them, and its value.

    Raises:
        UserError: one was replaced.
    """
    encoded = images.select_columns("image").cast_column("image", Image(decode=False))
    for row in rows:
        if hashlib.sha256(_read_encoded(encoded[row]["image"])).hexdigest() != digests[row]:
            raise UserError(f"{where}: image {row} was replaced while it was read; run the same command again.")


def _for_each(
    images: Dataset, function: Callable[[int, dict | None], Result], what: str
) -> Iterator[tuple[int, Result]]:
    """Yield each row with the result of `function` on it and its encoded image, divided over the processes."""
    if num_launched() == 1:  # without accelerate's state, which would occupy a GPU
        yield from enumerate(map_encoded(images, function, range(len(images)), what))
        return
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    rows = range(state.process_index, len(images), state.num_processes)
    own = map_encoded(images, function, rows, what, show_progress=state.is_local_main_process)
    yield from gather_object(list(zip(rows, own)))


def map_encoded(
    images: Dataset, function: Callable[[int, dict | None], Result], rows: range, what: str,
    show_progress: bool = True, piece: int = 4 * NUM_THREADS,
) -> Iterator[Result]:  # fmt: skip
    """Yield the result of `function` on each row and its encoded image, in order, computed in threads.

    They run one piece ahead of the consumer, so that few whole files are in memory.
    """
    encoded = images.select_columns("image").cast_column("image", Image(decode=False))
    with (
        ThreadPoolExecutor(NUM_THREADS) as threads,
        tqdm(total=len(rows), desc=what, unit="image", leave=False, disable=not show_progress) as progress,
    ):
        ahead = iter(())
        for start in range(0, len(rows) + piece, piece):
            current, coming = ahead, rows[start : start + piece]
            ahead = threads.map(function, coming, encoded[coming]["image"]) if coming else iter(())
            for result in current:
                progress.update()
                yield result


def _read_encoded(encoded: dict | None) -> bytes | None:
    """Return an image's encoded bytes, or None; from a local file of any name, a URL, or an archive."""
    if encoded is None or encoded["bytes"] is not None or encoded["path"] is None:
        return encoded and encoded["bytes"]
    if os.path.isfile(encoded["path"]):
        return Path(encoded["path"]).read_bytes()
    from datasets.utils.file_utils import xopen  # it takes a :: in a name for an archive; importing takes a second

    with xopen(encoded["path"], "rb") as file:
        return file.read()


def inspect_image(
    row: int, encoded: dict | None, with_digest: bool = False
) -> tuple[str | None, str | None, str | None]:
    """Return the hash of an image's bytes, its problem, and a note on how it is read; each may be None."""
    content = b""
    try:
        content = _read_encoded(encoded)
        if content is None:
            return None, "no image", None
        image = PIL.Image.open(BytesIO(content))
        note = describe_reading(image)
        image.draft("RGB", (1, 1))  # decodes a JPEG at an eighth of its size, which still reads all bytes
        image.load()
        if image.getexif().get(PIL.ExifTags.Base.Orientation) is not None:
            PIL.ImageOps.exif_transpose(image)  # as `datasets` does, which fails on EXIF that `to_rgb` ignores
        to_rgb(image)
    except Exception as error:  # on damaged files Pillow raises nearly anything
        kind = unreadable_kind(content[:32])  # such as HEIC named as JPEG
        reason = f"{kind}, which is not read: {UNREADABLE_KINDS[kind][1]}" if kind else describe_error(error)
        return None, f"{reason}, file {encoded['path']}" if encoded["path"] else reason, None
    return hashlib.sha256(content).hexdigest() if with_digest else None, None, note
