"""Stratified folds of the training images: each image is tested once, by a model trained on the other folds."""

from dataclasses import dataclass, replace

import numpy as np

from utils.cli.errors import UserError
from utils.data.arguments import parse_fold
from utils.data.image_set import RealImages, RealImagesRecord


def split_fold(labels: np.ndarray, fold: str, seed: int, class_names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted rows for training and for testing of a fold. `labels` are `(n,)` int, of all images.

    The folds of a seed test each image once, each fold with nearly the same number of images per class.

    Raises:
        UserError: a class has fewer images than there are folds.

    Source: scikit-learn, `StratifiedKFold`.
    """
    from sklearn.model_selection import StratifiedKFold  # takes a second to import

    number, num_folds = parse_fold(fold)
    counts = np.bincount(labels, minlength=len(class_names))
    fewest = int(np.argmin(np.where(counts, counts, len(labels) + 1)))
    if counts[fewest] < num_folds:
        remedy = f"take {counts[fewest]} folds or fewer, add" if counts[fewest] > 1 else "add"
        raise UserError(
            f"{num_folds} folds: class '{class_names[fewest]}' has {counts[fewest]} images, a fold needs one of each "
            f"class; {remedy} images, or remove the class."
        )
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels)
    return list(folds)[number - 1]


@dataclass(frozen=True)
class Folds:
    """The folds of a whole training split, `images.train`, from which nothing else is held out.

    `rows` and `labels` cover the whole split, including damaged images that `images` lacks, so that the folds equal
    those of `load_real_images` with the same `fold` and `fold_seed`.
    """

    images: RealImages
    num_folds: int
    rows: np.ndarray
    labels: np.ndarray

    @property
    def names(self) -> list[str]:
        return [f"{number}/{self.num_folds}" for number in range(1, self.num_folds + 1)]

    def split(self, fold: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices in `images.train` for training and for testing of a fold.

        Raises:
            UserError: from `split_fold`.
        """
        is_tested = np.zeros(len(self.rows), bool)
        is_tested[split_fold(self.labels, fold, seed, self.images.class_names)[1]] = True
        is_tested = is_tested[np.isin(self.rows, self.images.train_indices)]
        return np.flatnonzero(~is_tested), np.flatnonzero(is_tested)

    def record(self, fold: str, seed: int) -> RealImagesRecord:
        """Return the record with which `load_real_images` loads the test images of a fold."""
        return replace(self.images.record, fold=fold, fold_seed=seed)
