"""Near-duplicates: the most similar image of another set, or of the same, for each image."""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from utils.quality.features import UnitFeatures

# As far as a model can see, the same picture. A copy that was cropped or compressed hard may lie below.
COPY_SIMILARITY = 0.99
THRESHOLD_QUANTILE = 0.99
MAX_CALIBRATION_IMAGES = 10_000
QUERY_CHUNK = 2048
TARGET_CHUNK = 8192


@dataclass(frozen=True)
class Nearest:
    """For each query its most similar target: `rows` `(n,)` int, `similarities` `(n,)` float32 cosines."""

    rows: np.ndarray
    similarities: np.ndarray


def find_nearest(
    queries: UnitFeatures, targets: UnitFeatures, what: str, device: str | torch.device, query_rows=None
) -> Nearest:
    """Return the nearest target of each query, of the `query_rows` only where they are given.

    Where both are the same object, an image is not its own neighbour.
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
                if queries is targets:
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


def calibration_rows(num_images: int) -> np.ndarray:
    """Return at most `MAX_CALIBRATION_IMAGES` rows, evenly spread."""
    return np.unique(np.linspace(0, num_images - 1, min(num_images, MAX_CALIBRATION_IMAGES)).astype(int))


def similarity_threshold(real_similarities: np.ndarray) -> float:
    """Return the similarity above which two images look alike, from what real images reach among themselves.

    99 % of them stay below it. Never above that of copies: real sets hold copies too.
    """
    if not len(real_similarities):
        return COPY_SIMILARITY
    return min(float(np.quantile(real_similarities, THRESHOLD_QUANTILE)), COPY_SIMILARITY)


def closest_pairs(nearest: Nearest, num_pairs: int, within: bool) -> list[tuple[int, int, float]]:
    """Return the most similar (query, target, similarity), each query once; `within` one set, each pair once."""
    pairs = []
    seen = set()
    for query in np.argsort(-nearest.similarities, kind="stable"):
        target = int(nearest.rows[query])
        if within and (target, int(query)) in seen:
            continue
        seen.add((int(query), target))
        pairs.append((int(query), target, float(nearest.similarities[query])))
        if len(pairs) == num_pairs:
            break
    return pairs


def count_similar(nearest: Nearest, threshold: float) -> dict:
    """Return how many images have a look-alike, and how many a copy."""
    num_images = len(nearest.similarities)
    num_similar = int((nearest.similarities >= threshold).sum())
    return {
        "num_images": num_images,
        "num_similar": num_similar,
        "share_similar": num_similar / num_images,
        "num_copies": int((nearest.similarities >= COPY_SIMILARITY).sum()),
    }
