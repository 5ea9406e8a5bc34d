"""A probe: logistic regression on the features of a network that stays as it is."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer
from torch import nn
from transformers import PreTrainedModel

from utils.transfer.evaluation import predict
from utils.transfer.model_parts import base_classifier, head_module_names

# on features of length 1; 100 is within 0.5 points of it at 1 to 50 images per class of the demo
INVERSE_REGULARISATION = 10.0
MAX_ITERATIONS = 1000
MAX_FOLDS = 5


class FeatureExtractor(nn.Module):
    """A classifier whose logits are the features `(batch, dimensions)` that enter its head.

    Feature maps are averaged over their places. A network with several heads gives what enters each, side by side.
    """

    def __init__(self, classifier: PreTrainedModel, pixel_values: torch.Tensor):
        super().__init__()
        self.classifier = classifier
        self.head_names = head_module_names(classifier)
        num_features = self.eval()(pixel_values=pixel_values[None].to(classifier.device)).logits.shape[1]
        name = base_classifier(classifier).config.name_or_path
        self.config = SimpleNamespace(num_labels=num_features, name_or_path=name)

    @property
    def dtype(self) -> torch.dtype:
        return self.classifier.dtype

    @torch.inference_mode()
    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        entered = []
        heads = [self.classifier.get_submodule(name) for name in self.head_names]
        hooks = [head.register_forward_pre_hook(lambda _, args: entered.append(_pool(args[0]))) for head in heads]
        self.classifier(pixel_values=pixel_values)
        for hook in hooks:
            hook.remove()
        return SimpleNamespace(logits=torch.cat(entered, dim=1))


def _pool(features: torch.Tensor) -> torch.Tensor:
    """Return `(batch, channels)` of features, of a map `(batch, channels, ...)` or of tokens `(batch, n, channels)`."""
    if features.ndim == 3:
        return features.mean(1)
    return features if features.ndim == 2 else features.flatten(2).mean(2)


def extract_features(
    classifier: PreTrainedModel, images, batch_size: int = 128, num_workers: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return features `(n, dimensions)` float32 and labels `(n,)` of images, in their order; as `predict` otherwise."""
    extractor = FeatureExtractor(classifier, torch.as_tensor(images[0]["pixel_values"]))
    return predict(extractor, images, batch_size, num_workers)


def build_probe(inverse_regularisation: float = INVERSE_REGULARISATION) -> Pipeline:
    """Return a logistic regression on features that are scaled to length 1, not yet fitted."""
    return make_pipeline(Normalizer(), LogisticRegression(C=inverse_regularisation, max_iter=MAX_ITERATIONS))


def cross_validated_hits(features: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
    """Return which images `(n,)` bool a probe gets right that was fitted on the others; None where it cannot be told.

    The images are divided into as many folds as half of the classes have images, at most `MAX_FOLDS`. It cannot be
    told where half of the classes have one image, or where there is a single class.
    """
    counts = list(Counter(labels.tolist()).values())
    num_folds = min(MAX_FOLDS, int(np.median(counts)))
    if num_folds < 2 or len(counts) < 2:
        return None
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=0)
    return cross_val_predict(build_probe(), features, labels, cv=folds) == labels
