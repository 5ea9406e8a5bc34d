"""Similar images: in the features of a model, calibrated by real images, and in their pixels."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm.auto import tqdm

from utils.quality.vectors import Thumbnails, UnitFeatures

QUERY_CHUNK = 2048
TARGET_CHUNK = 8192
MAX_CALIBRATION_IMAGES = 10_000
THRESHOLD_QUANTILE = 0.99
UNCALIBRATED_THRESHOLD = 0.99  # without real images to calibrate it
# Of thumbnails. Among 6,000 images of Fashion-MNIST, 644 crops of photos and 1,797 digits, no pair is above it,
# mirrored or not (highest: 0.9973). Of copies with some contrast, compressed to JPEG quality 75, resized by 10% or 5%
# brighter or darker, 94 to 100% are above it; of images of 32 pixels in strong colors, which JPEG distorts, half.
COPY_CORRELATION = 0.998
COPY_DIFFERENCE = 10.0  # mean, in levels of 255: plain gradients correlate in any colors


@dataclass(frozen=True)
class Nearest:
    """The most similar target of each query: `rows` `(n,)` int, `similarities` `(n,)` float32 cosines."""

    rows: np.ndarray
    similarities: np.ndarray


def find_nearest(
    queries: UnitFeatures, targets: UnitFeatures, what: str, device: str | torch.device, query_rows=None
) -> Nearest:
    """Return the nearest target of each query (default of `query_rows`: all).

    If both are the same images, an image is not its own neighbor.
    """
    query_rows = np.arange(len(queries)) if query_rows is None else query_rows
    rows = np.zeros(len(query_rows), np.int64)
    similarities = np.zeros(len(query_rows), np.float32)
    with tqdm(total=len(query_rows), desc=what, unit="image", leave=False) as progress:
        for start in range(0, len(query_rows), QUERY_CHUNK):
            chunk_rows = query_rows[start : start + QUERY_CHUNK]
            chunk = queries.take(chunk_rows, device)
            best = torch.full((len(chunk),), -torch.inf, device=device)
            best_rows = torch.zeros(len(chunk), dtype=torch.int64, device=device)
            for first, target in targets.chunks(TARGET_CHUNK, device):
                cosines = chunk @ target.T
                if queries.raw is targets.raw:
                    own = torch.from_numpy(chunk_rows - first).to(device)
                    inside = (own >= 0) & (own < len(target))
                    cosines[inside.nonzero()[:, 0], own[inside]] = -torch.inf
                values, columns = cosines.max(1)
                best_rows = torch.where(values > best, columns + first, best_rows)
                best = torch.maximum(values, best)
            rows[start : start + len(chunk)] = best_rows.cpu().numpy()
            similarities[start : start + len(chunk)] = best.cpu().numpy()
            progress.update(len(chunk))
    return Nearest(rows, similarities)


def find_copies(
    queries: Thumbnails, targets: Thumbnails, what: str, device: str | torch.device, query_rows=None
) -> np.ndarray:
    """Return the row of the target that each query is a copy of, -1 if there is none; arguments as in `find_nearest`.

    Resized, mirrored, compressed or slightly brighter copies are found; cropped copies and copies of plain images are
    not. It takes two searches.
    """
    query_rows = np.arange(len(queries)) if query_rows is None else query_rows
    copies = np.full(len(query_rows), -1)
    for view in (replace(queries, is_mirrored=True), queries):
        nearest = find_nearest(view, targets, what, device, query_rows)
        correlated = np.flatnonzero(nearest.similarities >= COPY_CORRELATION)
        for start in range(0, len(correlated), QUERY_CHUNK):
            chunk = correlated[start : start + QUERY_CHUNK]
            rows = nearest.rows[chunk]
            is_copy = np.abs(view.levels(query_rows[chunk]) - targets.levels(rows)).mean(1) <= COPY_DIFFERENCE
            copies[chunk[is_copy]] = rows[is_copy]
    return copies


def similarity_threshold(real_similarities: np.ndarray) -> float:
    """Return the similarity above which two images look alike: 99% of real images that are not copies are below it."""
    if not len(real_similarities):
        return UNCALIBRATED_THRESHOLD
    return float(np.quantile(real_similarities, THRESHOLD_QUANTILE))


def closest_pairs(nearest: Nearest, copies: np.ndarray, num_pairs: int, within: bool) -> list[tuple[int, int]]:
    """Return pairs of query and target, copies first, then the most similar; each query once, and `within` a set each
    pair once.
    """
    targets = np.where(copies >= 0, copies, nearest.rows)
    pairs = {}
    for query in map(int, np.lexsort((-nearest.similarities, copies < 0))):
        target = int(targets[query])
        if not (within and (target, query) in pairs):
            pairs[query, target] = None
        if len(pairs) == num_pairs:
            break
    return list(pairs)


def count_similar(nearest: Nearest, copies: np.ndarray, threshold: float) -> dict:
    """Return how many images have a look-alike, including copies, and how many have a copy."""
    num_images = len(copies)
    num_similar = int(((nearest.similarities >= threshold) | (copies >= 0)).sum())
    return {
        "num_images": num_images,
        "num_similar": num_similar,
        "share_similar": num_similar / num_images,
        "num_copies": int((copies >= 0).sum()),
    }
