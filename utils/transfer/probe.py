"""A probe: logistic regression on the features of a frozen network; also as the network's head."""

import logging
import warnings
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer
from torch import nn
from transformers import PreTrainedModel

from utils.cli.errors import UserError
from utils.cli.processes import warn_once
from utils.data.splits import balanced_indices
from utils.transfer.evaluation import predict
from utils.transfer.model_parts import base_classifier, head_module_names

# for features of length 1; on the demo, 100 is within 0.5 points of it at 1 to 50 images per class
INVERSE_REGULARISATION = 10.0
MAX_ITERATIONS = 1000
MAX_FOLDS = 5
# candidates for a probe that becomes a head
INVERSE_REGULARISATIONS = (0.1, 1.0, 10.0, 100.0, 1000.0)
MAX_FITTED_IMAGES = 50_000  # 0.4 GB with 2,048 features
MAX_SEARCHED_IMAGES = 5_000  # of these, used in the search
NO_PROBE = "--head_init probe (given, or from --method linear_probe or lp_ft): {problem}."
MAX_DIFFERENCE = 1e-3  # of logits, relative; the order of summation differs

logger = logging.getLogger(__name__)


class FeatureExtractor(nn.Module):
    """A classifier whose logits are the input features `(batch, dimensions)` of its head.

    Feature maps are averaged over positions. For a network with several heads, their inputs are concatenated.
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
    """Return `(batch, channels)` for features, a map `(batch, channels, ...)` or tokens `(batch, n, channels)`."""
    if features.ndim == 3:
        return features.mean(1)
    return features if features.ndim == 2 else features.flatten(2).mean(2)


def extract_features(
    classifier: PreTrainedModel, images, batch_size: int = 128, num_workers: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return features `(n, dimensions)` float32 and labels `(n,)` of images, in order; otherwise like `predict`."""
    extractor = FeatureExtractor(classifier, torch.as_tensor(images[0]["pixel_values"]))
    return predict(extractor, images, batch_size, num_workers)


def build_probe(inverse_regularisation: float = INVERSE_REGULARISATION) -> Pipeline:
    """Return an unfitted logistic regression on features scaled to length 1."""
    return make_pipeline(Normalizer(), LogisticRegression(C=inverse_regularisation, max_iter=MAX_ITERATIONS))


def cross_validated_predictions(
    features: np.ndarray, labels: np.ndarray, extra: tuple[np.ndarray, np.ndarray, float] | None = None
) -> np.ndarray | None:
    """Return predictions `(n,)` for each image by a probe fitted on other images, or None if that is not possible.

    The number of folds is the median number of images per class, at most `MAX_FOLDS`; a class with one image is unknown
    to the probe that predicts it. It is not possible if half of the classes have one image, or with a single class.
    `extra` holds features and labels that every probe is also fitted on, and their total weight relative to the other
    images.
    """
    counts = list(Counter(labels.tolist()).values())
    num_folds = min(MAX_FOLDS, int(np.median(counts)))
    if num_folds < 2 or len(counts) < 2:
        return None
    predictions = np.empty_like(labels)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        folds = list(StratifiedKFold(num_folds, shuffle=True, random_state=0).split(features, labels))
    for fitted, tested in folds:
        fitted_features, fitted_labels, weights = features[fitted], labels[fitted], np.ones(len(fitted))
        if extra is not None:
            others, other_labels, weight = extra
            fitted_features = np.concatenate([fitted_features, others])
            fitted_labels = np.concatenate([fitted_labels, other_labels])
            weights = np.concatenate([weights, np.full(len(others), weight * len(fitted) / len(others))])
        probe = build_probe().fit(fitted_features, fitted_labels, logisticregression__sample_weight=weights)
        predictions[tested] = probe.predict(features[tested])
    return predictions


def choose_probe_images(labels: np.ndarray, number: int = MAX_FITTED_IMAGES) -> np.ndarray:
    """Return the indices of the images to fit a probe on: all, or at most `number`, balanced over classes."""
    if len(labels) > number:
        logger.info(f"The probe is fitted on {number:,} of {len(labels):,} images, balanced over classes.")
    return balanced_indices(labels, number, seed=0)


@torch.no_grad()
def probe_head(model: PreTrainedModel | PeftModel, images, batch_size: int = 128, num_workers: int = 0) -> str:
    """Set the head to a logistic regression on its input features, fitted on `images`, and return how in words.

    A linear head gets plain features. So instead of scaling each feature vector to length 1, as in `build_probe`, all
    are scaled by 1 over their mean length, and the weights are divided by that length: the network predicts the same as
    the regression. On the demo this costs nothing (0.6 points better to 0.2 worse at 1 to 50 images per class). The
    regularisation is chosen from `INVERSE_REGULARISATIONS` by cross-validated loss; if a class has one image, it is
    `INVERSE_REGULARISATION`. `images` are `EvalImages` or a list of their items. All processes extract features, the
    first one fits. The model is left in eval mode.

    Raises:
        UserError: a class has no image, there is a single class, or the head is not one linear layer on one feature
            vector per image.

    Source: scikit-learn, LogisticRegression; as a start of fine-tuning, LP-FT, Kumar et al. 2022.
    """
    config = base_classifier(model).config
    head = _find_linear_head(model, torch.as_tensor(images[0]["pixel_values"]))
    features, labels = extract_features(model, images, batch_size, num_workers)
    missing = [class_name for label, class_name in config.id2label.items() if label not in labels]
    if missing:
        raise UserError(NO_PROBE.format(problem=f"no image of {', '.join(missing)}"))
    if config.num_labels < 2:
        raise UserError(NO_PROBE.format(problem="needs at least two classes, got one"))
    fitted = [None]
    if PartialState().is_main_process:
        fitted = [fit_probe(features, labels, head.bias is not None)]
    broadcast_object_list(fitted)  # fitted once: processes share cores, and must agree bit by bit
    weight, bias, how = fitted[0]
    head.weight.copy_(torch.from_numpy(weight))
    if head.bias is not None:
        head.bias.copy_(torch.from_numpy(bias))
    return f"logistic regression on the features of {len(labels):,} images, {how}"


def can_probe(model: PreTrainedModel | PeftModel, pixel_values: torch.Tensor, labels: np.ndarray) -> bool:
    """Return whether `probe_head` can set the model's head for images with these labels; one image is given."""
    if len(np.unique(labels)) < max(2, base_classifier(model).config.num_labels):
        return False
    try:
        _find_linear_head(model, pixel_values)
    except UserError:
        return False
    return True


@torch.no_grad()
def _find_linear_head(model: PreTrainedModel | PeftModel, pixel_values: torch.Tensor) -> nn.Linear:
    """Return the head, after checking on one image that its output for one feature vector is the logits."""
    heads = [model.get_submodule(name) for name in head_module_names(model)]
    if len(heads) == 1 and isinstance(heads[0], nn.Linear):
        entered = []
        hook = heads[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        logits = model.eval()(pixel_values=pixel_values[None].to(model.device)).logits
        hook.remove()
        expected = heads[0](entered[0])
        if entered[0].ndim == 2 and torch.allclose(logits, expected, rtol=MAX_DIFFERENCE, atol=MAX_DIFFERENCE):
            return heads[0]
    name = base_classifier(model).config.name_or_path
    raise UserError(NO_PROBE.format(problem=f"the head of {name} is not one linear layer on one feature vector"))


def fit_probe(features: np.ndarray, labels: np.ndarray, has_bias: bool = True) -> tuple[np.ndarray, np.ndarray, str]:
    """Return weights `(classes, dimensions)` and biases `(classes,)`, float32, for plain features, and how in words.

    `labels` contain all values from 0 to the number of classes - 1. For two classes, the regression has one weight
    vector; each class gets half of it, with opposite signs.
    """
    length = float(np.linalg.norm(features, axis=1).mean()) or 1.0
    scaled = features / length
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported below if it matters
        strength, how = _choose_regularisation(scaled, labels, has_bias)
        regression = _regression(strength, has_bias).fit(scaled, labels)
    if regression.n_iter_.max() >= MAX_ITERATIONS:
        warn_once(f"Warning: the probe has not converged after {MAX_ITERATIONS} iterations; it is used anyway.")
    weight, bias = regression.coef_ / length, np.broadcast_to(regression.intercept_, len(regression.coef_))
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight.astype(np.float32), bias.astype(np.float32), f"C={strength:g} ({how})"


def _regression(strength: float, has_bias: bool) -> LogisticRegression:
    return LogisticRegression(C=strength, fit_intercept=has_bias, max_iter=MAX_ITERATIONS)


def _choose_regularisation(features: np.ndarray, labels: np.ndarray, has_bias: bool) -> tuple[float, str]:
    rows = balanced_indices(labels, MAX_SEARCHED_IMAGES, seed=0)
    features, labels = features[rows], labels[rows]
    num_folds = min(MAX_FOLDS, min(Counter(labels.tolist()).values()))
    if num_folds < 2:
        return INVERSE_REGULARISATION, "the default, as a class has one image"
    search = GridSearchCV(
        _regression(INVERSE_REGULARISATION, has_bias), {"C": INVERSE_REGULARISATIONS}, refit=False,
        # not by accuracy, which takes few values with few images
        scoring="neg_log_loss", cv=StratifiedKFold(num_folds, shuffle=True, random_state=0),
    ).fit(features, labels)  # fmt: skip
    return search.best_params_["C"], f"by {num_folds}-fold cross-validation"
