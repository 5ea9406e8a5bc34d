"""Checks of single images: what no set should hold, whatever it shows."""

import math

import torch

MAX_LEVELS_APART = 1


def find_problems(pixels: torch.Tensor, flags: list[bool]) -> tuple[torch.Tensor, list[str | None]]:
    """Return a batch's levels, and for each image what is wrong with it: None for a good one.

    `pixels` are `(batch, 3, height, width)` in [0, 1], of any dtype on any device; the levels are uint8 there, rounded
    to the nearest. `flags` is the safety checker's word. Only an image whose channels are each equal to within one of
    255 levels counts as constant: dark or pale images are real. An image that is no number has undefined levels.
    """
    # not in half precision, which has fewer levels than a byte
    levels = (pixels.float() * 255).round()
    highest, lowest = levels.amax((2, 3)), levels.amin((2, 3))
    # one copy to the host for all figures; NaN and infinity show in the sums of extremes
    figures = torch.stack([highest.amax(1), (highest - lowest).amax(1)]).tolist()
    problems = [_describe(*values, flagged) for *values, flagged in zip(*figures, flags, strict=True)]
    return levels.nan_to_num(0).to(torch.uint8), problems


def _describe(highest: float, spread: float, flagged: bool) -> str | None:
    if flagged:
        return "flagged by the safety checker"
    if not math.isfinite(spread):
        return "not a number"
    if spread > MAX_LEVELS_APART:
        return None
    return "black" if highest <= MAX_LEVELS_APART else "constant"
