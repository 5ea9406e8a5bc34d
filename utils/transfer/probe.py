"""Frozen features: what enters a classifier's head, and how well a logistic regression on them tells the classes."""

import numpy as np
import torch
from accelerate import PartialState
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from utils.transfer.evaluation import predict
from utils.transfer.model_parts import head_module_names

MAX_FOLDS = 5
INVERSE_REGULARISATION = 0.01  # on standardised features


class HeadInputs(nn.Module):
    """A classifier that gives, for logits, what enters its head: `(batch, features)`, means over places where it has."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.config = model.config
        self.dtype = model.dtype
        self._heads = [model.get_submodule(name) for name in head_module_names(model)]

    def forward(self, pixel_values: torch.Tensor):
        entered = {}
        hooks = [head.register_forward_pre_hook(lambda head, args: entered.update({head: args[0]})) for head in self._heads]
        try:
            self.model(pixel_values=pixel_values)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([entered[head].float().flatten(2).mean(2) if entered[head].ndim > 2 else entered[head].float()
                          for head in self._heads], dim=1)


def logistic_regression() -> object:
    """Return a classifier of features, standardised, with a penalty that suits few images."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=INVERSE_REGULARISATION, max_iter=1000))


def probe_accuracy(features: np.ndarray, labels: np.ndarray, seed: int = 0) -> float | None:
    """Return the cross-validated accuracy in [0, 1] of a regression on features `(n, features)`; None for single images.

    Each image is judged by a regression that has not seen it; there are five folds, or as many as the rarest class has
    images. A class with a single image leaves nothing to judge.
    """
    fewest = np.unique(labels, return_counts=True)[1].min()
    if fewest < 2:
        return None
    folds = StratifiedKFold(min(MAX_FOLDS, fewest), shuffle=True, random_state=seed)
    return float((cross_val_predict(logistic_regression(), features, labels, cv=folds) == labels).mean())
