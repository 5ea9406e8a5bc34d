"""A score for each synthetic image: how well it fits its class, by the real images or by words."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForZeroShotImageClassification, AutoProcessor

from utils.cli.errors import UserError
from utils.data.class_names import match_labels
from utils.data.images import to_rgb
from utils.data.left_out import SCORES, SCORES_KEY
from utils.data.opened_images import map_encoded
from utils.hub.repositories import Source
from utils.quality.vectors import UnitFeatures

CHUNK = 4096  # images whose scores are computed at a time
TEMPLATE = "a photo of a {}."  # of CLIP's paper (Radford et al. 2021)


@dataclass(frozen=True)
class ScoredSet:
    """The images of a set by class and place in it, their scores, and which are left out; all `(n,)`.

    In every score more is better. `labels` are places in `class_names`.
    """

    class_names: list[str]
    labels: np.ndarray
    class_indices: np.ndarray
    scores: dict[str, np.ndarray]
    is_left_out: np.ndarray

    def save(self, folder: Path, about: dict) -> None:
        """Write `scores.parquet` with `about`, JSON with the set's `fingerprint`; at once or not at all."""
        names = np.array(self.class_names, object)[self.labels]
        columns = {"class": pa.array(names, pa.string()), "class_index": pa.array(self.class_indices, pa.int64())}
        columns |= {name: pa.array(values.astype(np.float32)) for name, values in self.scores.items()}
        columns["left_out"] = pa.array(self.is_left_out)
        table = pa.table(columns).replace_schema_metadata({SCORES_KEY: json.dumps(about)})
        partial = folder / f".{SCORES}.partial"
        pq.write_table(table, partial)
        os.replace(partial, folder / SCORES)


def score_by_probe(
    synthetic: UnitFeatures, labels: np.ndarray, real: UnitFeatures, real_labels: np.ndarray
) -> np.ndarray:
    """Return the probability `(n,)` of each synthetic image's own class, by a logistic regression on real images."""
    if len(np.unique(real_labels)) < 2:
        raise UserError("--scores probe: needs real training images of two classes or more.")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(real.take(slice(None)).numpy(), real_labels)
    places = {label: place for place, label in enumerate(probe.classes_)}
    own = np.array([places[label] for label in labels])
    scores = np.empty(len(labels), np.float32)
    for start, features in synthetic.chunks(CHUNK):
        rows = slice(start, start + len(features))
        scores[rows] = probe.predict_proba(features.numpy())[np.arange(len(features)), own[rows]]
    return scores


def score_by_distance(
    synthetic: UnitFeatures, labels: np.ndarray, real: UnitFeatures, real_labels: np.ndarray
) -> np.ndarray:
    """Return the cosine `(n,)` in [-1, 1] of each synthetic image with the most similar real one of its class."""
    scores = np.empty(len(labels), np.float32)
    for label in np.unique(labels):
        rows, others = np.flatnonzero(labels == label), real.take(np.flatnonzero(real_labels == label))
        for start in range(0, len(rows), CHUNK):
            some = rows[start : start + CHUNK]
            scores[some] = (synthetic.take(some) @ others.T).amax(1).numpy()
    return scores


def score_by_words(
    images: Dataset, labels: np.ndarray, nouns: list[str], source: Source, batch_size: int, device: str
) -> np.ndarray:
    """Return the probability `(n,)` of each image's own class among `nouns`, by a model such as CLIP.

    Source: zero-shot classification, Radford et al. 2021.

    Raises:
        UserError: the model is none of `AutoModelForZeroShotImageClassification`.
    """
    options = source.load_options()
    with source.reading("does not load as a model of images and text", also=(ValueError, KeyError, RuntimeError)):
        processor = AutoProcessor.from_pretrained(source.name, **options)
        model = AutoModelForZeroShotImageClassification.from_pretrained(
            source.name, use_safetensors=True, dtype=torch.float32, **options
        )
    model.to(device).eval()
    text = processor(text=[TEMPLATE.format(noun) for noun in nouns], return_tensors="pt", padding=True).to(device)

    def predict(pixel_values: torch.Tensor) -> torch.Tensor:
        return model(pixel_values=pixel_values, **text).logits_per_image

    return _own_probabilities(images, labels, processor.image_processor, predict, batch_size, device)


def score_by_classifier(
    images: Dataset, labels: np.ndarray, class_names: list[str], source: Source, image_processor, batch_size: int,
    device: str,
) -> np.ndarray:  # fmt: skip
    """Return the probability `(n,)` of each image's own class, by a classifier of these classes.

    Raises:
        UserError: it is not an image classifier, or its classes are others.
    """
    with source.reading("does not load as an image classifier", also=(ValueError, KeyError, RuntimeError)):
        model: nn.Module = AutoModelForImageClassification.from_pretrained(
            source.name, use_safetensors=True, dtype=torch.float32, **source.load_options()
        )
    model.to(device).eval()
    its_names = [model.config.id2label[label] for label in range(model.config.num_labels)]
    places = match_labels(class_names, its_names, f"{source.flag} {source.name}:", "the synthetic set")
    own = np.array(list(places.values()))[labels]
    return _own_probabilities(
        images, own, image_processor, lambda pixel_values: model(pixel_values=pixel_values).logits, batch_size, device
    )


@torch.inference_mode()
def _own_probabilities(
    images: Dataset, labels: np.ndarray, image_processor, predict: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int, device: str,
) -> np.ndarray:  # fmt: skip
    def prepare(row: int, encoded: dict) -> torch.Tensor:
        return image_processor(to_rgb(Image().decode_example(encoded)), return_tensors="pt")["pixel_values"][0]

    prepared = map_encoded(images, prepare, range(len(images)), "scoring images", piece=batch_size)
    scores = np.empty(len(images), np.float32)
    for start in range(0, len(images), batch_size):
        batch = torch.stack(list(islice(prepared, batch_size))).to(device)
        own = torch.tensor(labels[start : start + len(batch)], device=device)
        probabilities = predict(batch).float().softmax(1)
        scores[start : start + len(batch)] = probabilities.gather(1, own[:, None])[:, 0].cpu().numpy()
    return scores


def choose_left_out(
    scores: np.ndarray, labels: np.ndarray, drop_share: float | None = None, min_score: float | None = None
) -> np.ndarray:
    """Return which images `(n,)` bool are left out: of each class the worst `drop_share`, or those below `min_score`.

    Of a share, images are rounded down. Of equal scores the first images are kept.
    """
    if min_score is not None:
        return scores < min_score
    is_left_out = np.zeros(len(scores), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)[::-1]
        worst_first = rows[np.argsort(scores[rows], kind="stable")]
        is_left_out[worst_first[: int(drop_share * len(rows))]] = True
    return is_left_out
