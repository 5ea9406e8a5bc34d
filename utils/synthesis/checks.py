"""Checks of single images: what no set should hold, whatever it shows."""

import numpy as np

MAX_LEVELS_APART = 1


def find_problem(pixels: np.ndarray, flagged: bool = False) -> str | None:
    """Return what is wrong with an image, None for a good one.

    `pixels` is `(height, width, 3)` float32 in [0, 1]; `flagged` is the safety checker's word. Only an image whose
    pixels are equal to within one of 255 levels counts as constant: dark or pale images are real.
    """
    if flagged:
        return "flagged by the safety checker"
    if not np.isfinite(pixels).all():
        return "not a number"
    levels = np.rint(pixels * 255)
    if np.ptp(levels, axis=(0, 1)).max() > MAX_LEVELS_APART:
        return None
    return "black" if levels.max() <= MAX_LEVELS_APART else "constant"
