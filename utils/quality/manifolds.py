"""Precision and recall of synthetic images: whether they look real, and whether they cover the real images."""

import numpy as np
import torch

NUM_NEIGHBOURS = 3  # the paper's


def precision_and_recall(
    real: np.ndarray, synthetic: np.ndarray, num_neighbours: int = NUM_NEIGHBOURS
) -> tuple[float, float]:
    """Return the share of synthetic features among the real ones, and the share of real ones among the synthetic.

    Both are `(n, num_features)`, with more than `num_neighbours` rows. A feature is among a set if it is closer to one
    of the set's features than that one's `num_neighbours`-th nearest neighbor in the set. Both shares depend on the
    number of images: compare sets of equal size. All pairs are kept in memory.

    Source: Improved Precision and Recall Metric for Assessing Generative Models, Kynkäänniemi et al. 2019.
    """
    real, synthetic = (torch.from_numpy(np.asarray(features, np.float64)) for features in (real, synthetic))
    between = torch.cdist(synthetic, real, compute_mode="donot_use_mm_for_euclid_dist")
    real_radii, synthetic_radii = _radii(real, num_neighbours), _radii(synthetic, num_neighbours)
    precision = (between <= real_radii[None]).any(1).double().mean()
    recall = (between <= synthetic_radii[:, None]).any(0).double().mean()
    return precision.item(), recall.item()


def _radii(features: torch.Tensor, num_neighbours: int) -> torch.Tensor:
    """Return the distance `(n,)` of each feature to its `num_neighbours`-th nearest neighbor, not counting itself."""
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.kthvalue(num_neighbours + 1, dim=1).values
