"""What a user should know of an image set before anything is trained: the parts, and what may not be meant."""

import numpy as np

from utils.data.class_names import list_names, near_equal_names
from utils.data.image_set import RealImages

MISSING_VALUES = ("nan", "none", "null", "n/a", "na", "<na>")  # what programs write where there is no label


def describe_parts(real: RealImages, unused: dict[str, int]) -> str:
    """Return a line that says which split serves as what; `unused` maps the other splits to their numbers of images."""
    listed = []
    for part in ("train", "validation", "test"):
        source = real.parts[part]
        how = f"carved off '{source.split}'" if source.is_carved else f"split '{source.split}'"
        listed.append(f"{part} {len(source.rows):,} images ({how})")
    left = ", ".join(f"'{split}' ({number:,} images)" for split, number in unused.items())
    return f"{real.record.name}: {', '.join(listed)}{f'; not used: {left}' if left else ''}."


def list_doubts(real: RealImages) -> list[str]:
    """Return warnings: classes that look like one, that are tested without having been trained, or not tested."""
    doubts = [
        # ascii: two Unicode forms of a letter look the same
        f"Warning: the classes {', '.join(map(ascii, names))} differ in case, spaces or Unicode form only; they stay "
        "separate classes, and train_dsi.py refuses two that are the same in a prompt: merge or rename them."
        for names in near_equal_names(real.class_names)
    ]
    counts = {
        part: np.bincount(np.asarray(getattr(real, part)["label"], int), minlength=len(real.class_names))
        for part in real.parts
    }
    absent = np.flatnonzero(sum(counts.values()) == 0)
    if absent.size:
        names = list_names([real.class_names[label] for label in absent])
        doubts.append(f"Warning: no part has images of {names}; the classifier has an output for each all the same.")
    missing_values = [name for name in real.class_names if name.casefold() in MISSING_VALUES]
    if missing_values:
        doubts.append(
            f"Warning: the class {list_names(missing_values)} may stand for images without a label; it is a class here."
        )
    for part in ("validation", "test"):
        untrained = np.flatnonzero((counts[part] > 0) & (counts["train"] == 0))
        if untrained.size:
            doubts.append(
                f"Warning: {part} images of classes without training images: {counts[part][untrained].sum():,} "
                f"({list_names([real.class_names[label] for label in untrained])}); all of them count as wrong."
            )
        missing = np.flatnonzero((counts[part] == 0) & (counts["train"] > 0))
        if missing.size and counts[part].any():
            doubts.append(
                f"Warning: the {part} part has images of {(counts[part] > 0).sum()} of {len(real.class_names)} classes "
                f"(none of {list_names([real.class_names[label] for label in missing])}); per-class means cover only "
                "these."
            )
    return doubts
