"""Problems of labelled images, found before any training: damaged files, duplicates, leaks between splits."""

import contextlib
import io
import os
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import PIL.Image
from datasets import Dataset, Image, concatenate_datasets
from rich.console import Console
from rich.table import Table
from rich.text import Text

from utils.cli.tables import print_table
from utils.data.image_set import PARTS, RealImages
from utils.data.images import TOO_LARGE, to_rgb, upright_size
from utils.data.opened_images import inspect_image, map_encoded

MAX_EXAMPLES = 3
FEW_IMAGES = 500  # for fewer images, starting processes takes longer than the check
# cleanvision's names of issues -> ours
ODDITIES = {
    "dark": "very dark",
    "light": "very bright",
    "blurry": "blurred",
    "odd_size": "much smaller or larger than most",
    "odd_aspect_ratio": "very narrow",
}
THUMBNAIL = 16  # pixels a side
LOWEST_CORRELATION = 0.99
LOWEST_CONTRAST = 4  # standard deviation of levels up to 255; an image below it is plain


@dataclass(frozen=True)
class Place:
    """Where an image is: its split, its row there, its class, and its file name, if it has one."""

    split: str
    row: int
    class_name: str
    file: str | None

    def __str__(self) -> str:
        return f"{self.split} {self.file or f'row {self.row}'}"


@dataclass(frozen=True)
class ImageAudit:
    """What was found.

    `counts` maps split -> images per class, `(num_classes,)` int; `sizes` is `(n, 2)` int, width and height in pixels
    of the readable images. `copies` are groups of images with the same pixels, `look_alikes` groups with the same
    perceptual hash and thumbnail but other pixels; `oddities` maps a description -> its images, `readings` a note of
    `describe_reading` -> its images.
    """

    class_names: list[str]
    counts: dict[str, np.ndarray]
    sizes: np.ndarray
    damaged: dict[Place, str]
    copies: list[list[Place]]
    look_alikes: list[list[Place]]
    oddities: dict[str, list[Place]]
    readings: dict[str, list[Place]]


def audit_images(real: RealImages) -> ImageAudit:
    """Check every image of every split, on all cores, with the pixels that training sees.

    Source: cleanvision, for copies, look-alikes (64-bit perceptual hash, then `_are_alike`) and odd images.
    """
    counts, damaged, places, sizes, good, readings = {}, {}, [], [], [], {}
    for split in PARTS:
        images, rows = getattr(real, split), []
        labels = np.asarray(images["label"], dtype=int)
        counts[split] = np.bincount(labels, minlength=len(real.class_names))
        looked_at = map_encoded(images, _look_at, range(len(images)), f"checking {split} images")
        for row, (label, (file, size, problem, note)) in enumerate(zip(labels, looked_at)):
            place = Place(split, row, real.class_names[label], file)
            if problem is not None:
                damaged[place] = problem
                continue
            rows.append(row)
            places.append(place)
            sizes.append(size)
            if note is not None:
                readings.setdefault(note, []).append(place)
        good.append(images.select(rows))
    images = concatenate_datasets(good).cast_column("image", Image())  # a dataset may store encoded bytes
    copies, look_alikes, oddities = _find_issues(images, places)
    sizes = np.array(sizes).reshape(-1, 2)
    return ImageAudit(real.class_names, counts, sizes, damaged, copies, look_alikes, oddities, readings)


def _look_at(row: int, encoded: dict | None) -> tuple[str | None, tuple[int, int] | None, str | None, str | None]:
    """Return an image's file with its folder (in class folders, its class), its size, problem and note."""
    path = (encoded or {}).get("path")
    file = os.sep.join(str(path).split(os.sep)[-2:]) if path else None
    _, problem, note = inspect_image(row, encoded)
    if problem is not None:
        return file, None, problem, None
    with PIL.Image.open(path if encoded["bytes"] is None else BytesIO(encoded["bytes"])) as image:
        return file, upright_size(image), None, note


def _find_issues(images: Dataset, places: list[Place]) -> tuple[list, list, dict[str, list[Place]]]:
    """Return copies, look-alikes and oddities."""
    if not len(images):
        return [], [], {}
    from cleanvision import Imagelab  # takes seconds to import

    images = images.with_transform(_read)  # one image at a time, when it is checked
    lab = Imagelab(hf_dataset=images, image_key="image")
    num_processes = 1 if len(images) < FEW_IMAGES else None  # None: one for each core
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its own tables
        lab.find_issues(
            {name: {} for name in (*ODDITIES, "exact_duplicates", "near_duplicates")},
            n_jobs=num_processes,
            verbose=False,
        )
    copies, similar = (lab.info[kind]["sets"] for kind in ("exact_duplicates", "near_duplicates"))
    copies, look_alikes = (
        [[places[row] for row in rows] for rows in groups] for groups in (copies, _confirm(similar, copies, images))
    )
    oddities = {
        what: [places[row] for row in np.flatnonzero(lab.issues[f"is_{name}_issue"])] for name, what in ODDITIES.items()
    }
    return copies, look_alikes, oddities


def _read(batch: dict) -> dict:
    return {"image": [to_rgb(image) for image in batch["image"]]}


def _confirm(similar: list[list[int]], copies: list[list[int]], images: Dataset) -> list[list[int]]:
    """Return groups of rows with similar thumbnails: plain or small images share a hash by chance."""
    number_of_copy = {row: number for number, rows in enumerate(copies) for row in rows}
    confirmed = []
    for rows in similar:
        groups = []  # a thumbnail, and the rows similar to it
        for row in rows:
            thumbnail = _thumbnail(images[row]["image"])
            group = next((group for other, group in groups if _are_alike(thumbnail, other)), None)
            if group is None:
                groups.append((thumbnail, [row]))
            else:
                group.append(row)
        confirmed += [group for _, group in groups if len({number_of_copy.get(row, -row - 1) for row in group}) > 1]
    return confirmed


def _thumbnail(image: PIL.Image.Image) -> np.ndarray:
    return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), PIL.Image.Resampling.LANCZOS), np.float32)


def _are_alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two thumbnails show the same, at any brightness.

    Among 6,000 images of Fashion-MNIST, 324 pairs of different clothes have the same hash, of which 2 have a
    correlation above 0.99; of resized, compressed or brightened copies of photos, 885 of 897 do; of cropped ones fewer.
    """
    if min(one.std(), other.std()) < LOWEST_CONTRAST:
        return bool(np.abs(one - other).mean() < LOWEST_CONTRAST)
    return bool(np.corrcoef(one.ravel(), other.ravel())[0, 1] > LOWEST_CORRELATION)


def print_audit(audit: ImageAudit, name: str) -> None:
    """Print images and classes per split, and the findings with examples and advice."""
    console = Console()
    title = Text(f"images of {name}", "table.title")  # Text: brackets in names are not markup
    table = Table("split", "images", "classes", "images per class", "fewest", title=title)
    for split, counts in audit.counts.items():
        present = counts[counts > 0]
        if not present.size:
            table.add_row(split, "0", f"0 of {len(counts)}", "", "")
            continue
        least = np.argsort(counts, kind="stable")[:MAX_EXAMPLES]
        fewest = ", ".join(f"{audit.class_names[label]} {counts[label]}" for label in least)
        spread = f"{present.min()} to {present.max()}, median {np.median(present):.0f}"
        table.add_row(split, f"{counts.sum():,}", f"{len(present)} of {len(counts)}", spread, Text(fewest))
    print_table(table, console)
    if len(audit.sizes):
        low, middle, high = (np.percentile(audit.sizes, share, axis=0).astype(int) for share in (0, 50, 100))
        console.print(
            f"Width x height in pixels: median {middle[0]} x {middle[1]}; widths {low[0]} to {high[0]}, heights "
            f"{low[1]} to {high[1]}."
        )
    findings = list_findings(audit)
    if not findings:
        console.print("No problems were found.")
        return
    table = Table("what was found", "", "examples", "what to do", title="findings")
    for finding in findings:
        table.add_row(finding.what, f"{finding.number:,}", Text("\n".join(finding.examples)), finding.advice)
    print_table(table, console)


@dataclass(frozen=True)
class Finding:
    """A kind of problem: how often it occurs, a few examples, and what to do."""

    what: str
    number: int
    examples: list[str]
    advice: str


def list_findings(audit: ImageAudit) -> list[Finding]:
    """Return the problems that were found, the most serious first."""
    leaks, alike = _differing(audit.copies, "split"), _differing(audit.look_alikes, "split")
    mislabelled = _differing(audit.copies, "class_name")
    repeated = [group for group in audit.copies if group not in leaks and group not in mislabelled]
    empty = [
        f"{audit.class_names[label]} in {split}"
        for split, counts in audit.counts.items()
        for label in np.flatnonzero(counts == 0)
    ]
    large = [f"{place}: {problem}" for place, problem in audit.damaged.items() if problem.startswith(TOO_LARGE)]
    damaged = [f"{place}: {problem}" for place, problem in audit.damaged.items() if not problem.startswith(TOO_LARGE)]
    findings = [
        ("images that do not open", damaged, "repair or remove them: training stops at the first"),
        ("images too large to open", large, "shrink or remove them: training stops at the first"),
        *((f"images {what}", places, "if that is wrong, convert them") for what, places in audit.readings.items()),
        ("classes without images", empty, "add images, or remove the class"),
        ("copies in more than one split", _describe(leaks), "keep one: they make validation or test too easy"),
        ("copies with different labels", _describe(mislabelled, with_class=True), "keep the right one"),
        ("copies within a split", _describe(repeated), "harmless where they are few"),
        ("look-alikes in more than one split", _describe(alike), "look at them: the same scene, or chance?"),
        *((f"{what} images", places, "look at them") for what, places in audit.oddities.items()),
    ]
    return [
        Finding(what, len(found), [str(example) for example in found[:MAX_EXAMPLES]], advice)
        for what, found, advice in findings
        if found
    ]


def _differing(groups: list[list[Place]], what: str) -> list[list[Place]]:
    """Return the groups whose images differ in the attribute `what`: `split` or `class_name`."""
    return [group for group in groups if len({getattr(place, what) for place in group}) > 1]


def _describe(groups: list[list[Place]], with_class: bool = False) -> list[str]:
    def describe(place: Place) -> str:
        return f"{place} ({place.class_name})" if with_class else str(place)

    return [" = ".join(map(describe, group[:MAX_EXAMPLES])) for group in groups]
