"""The images of a quality report, and their features: pooled outputs of a backbone, in half precision on disk."""

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, Image
from transformers import AutoImageProcessor, AutoModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from utils.cli.errors import UserError
from utils.cli.precision import allow_tf32
from utils.cli.records import GENERATION_CONFIG, read_record
from utils.data.class_names import match_labels
from utils.data.image_set import RealImages, RealImagesRecord
from utils.data.images import TOO_LARGE, describe_error, to_rgb
from utils.data.opened_images import map_encoded, open_all
from utils.data.real_images import load_real_images
from utils.hub.image_datasets import load_image_dataset
from utils.hub.repositories import Source, open_source
from utils.quality.vectors import THUMBNAIL_LENGTH, make_thumbnail


@dataclass(frozen=True)
class Part:
    """Images of one kind with their labels `(n,)` in the real set's order; `rows` are their rows in the whole split."""

    images: Dataset
    labels: np.ndarray
    rows: np.ndarray
    num_all: int


def load_reference_images(real_images: dict, hub_token: str | None = None) -> RealImages:
    """Load all real images of a set's record, without its limit to shots, as distances need many images.

    Each image is opened once; damaged ones are left out if the record allows that. This is for evaluation: choosing the
    settings of a few-shot experiment with it uses more than the shots.

    Raises:
        UserError: from `load_real_images` and `open_all`.
    """
    record = replace(RealImagesRecord(**real_images), num_shots=None, max_train_samples=None)
    opened = open_all(load_real_images(record, hub_token))
    for part in ("train", "test"):
        if opened.num_skipped and not len(getattr(opened.images, part)):
            raise UserError(f"{record.name}: no images are left in the {part} part; all of them are damaged.")
    return replace(opened.images, remarks=(*opened.images.remarks, *opened.remarks))


def collect_parts(synthetic: Source, real: RealImages, max_images_per_class: int) -> dict[str, Part]:
    """Return the synthetic images and the real training, held-out and test images.

    Of each class, the first `max_images_per_class` are used; test images are not limited.

    Raises:
        UserError: the synthetic set cannot be loaded, its classes are not the real ones, or a class has no images.
    """
    images, labels = _load_synthetic(synthetic, real.class_names)
    parts = {
        "synthetic": _make_part(images, labels, max_images_per_class),
        "train": _make_part(real.train, _labels(real.train), max_images_per_class, real.train_indices),
        "held_out": _make_part(real.validation, _labels(real.validation), max_images_per_class),
        "test": _make_part(real.test, _labels(real.test)),
    }
    lacking = np.setdiff1d(parts["synthetic"].labels, parts["train"].labels)
    if lacking.size:
        names = ", ".join(real.class_names[label] for label in lacking)
        raise UserError(f"--dataset_name {real.record.name}: has no training images of {names}.")
    return parts


def _load_synthetic(source: Source, class_names: list[str]) -> tuple[Dataset, np.ndarray]:
    """Return the images, and their labels in the order of `class_names`."""
    images = load_image_dataset(source, split="train")
    columns = [
        [name for name, feature in images.features.items() if isinstance(feature, kind)] for kind in (Image, ClassLabel)
    ]
    if [len(found) for found in columns] != [1, 1]:
        raise UserError(
            f"{source.flag} {source.name}: one image column and one ClassLabel column are needed; columns are "
            f"{', '.join(images.features)}."
        )
    (image_column,), (label_column,) = columns
    prefix = f"{source.flag} {source.name}:"
    places = match_labels(images.features[label_column].names, class_names, prefix, "the synthetic set")
    labels = np.array(list(places.values()))[_labels(images, label_column)]
    empty = np.setdiff1d(_wanted_labels(source, places), labels)
    if empty.size:
        raise UserError(f"{prefix} has no images of {', '.join(class_names[label] for label in empty)}.")
    return images.select_columns(image_column).rename_columns({image_column: "image"}), labels


def _wanted_labels(source: Source, places: dict[str, int]) -> list[int]:
    """Return the classes that a set should have: those in its record, else all.

    The record has the set's own names, which `places` maps to labels of the real set.
    """
    record = read_record(source.file(GENERATION_CONFIG)) if source.has_one_of([GENERATION_CONFIG]) else {}
    return [places[name] for name in record.get("settings", {}).get("classes", places) if name in places]


def _labels(images: Dataset, column: str = "label") -> np.ndarray:
    return np.asarray(images[column][:], np.int64)


def _make_part(images: Dataset, labels: np.ndarray, limit: int | None = None, split_rows=None) -> Part:
    """Return the first `limit` images of each class; `split_rows` are the images' rows in a larger split."""
    classes = [np.flatnonzero(labels == label)[:limit] for label in np.unique(labels)]
    rows = np.sort(np.concatenate(classes)) if classes else np.zeros(0, np.int64)
    split_rows = rows if split_rows is None else np.asarray(split_rows)[rows]
    return Part(images.select(rows), labels[rows], split_rows, len(images))


def open_feature_model(name: str, flag: str, revision: str | None = None, token: str | None = None) -> Source:
    """Return a pretrained image model, pinned to a commit, without loading it.

    Raises:
        UserError: it is neither a folder nor a repository, not a model, or has no safetensors weights.
    """
    source = open_source(name, flag, "model", revision, token)
    source.file("config.json", "a checkpoint of transformers or timm")
    if not source.has_one_of([SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]):
        raise UserError(f"{flag} {name}: has no {SAFE_WEIGHTS_NAME}; only safetensors weights are loaded.")
    return source


class FeatureModel:
    """A backbone without its classification head, and its image processor."""

    def __init__(self, source: Source, device: str | torch.device):
        """Load the model in float32, so that reports can be compared.

        Raises:
            UserError: it has no image processor, is not an image model, or lacks weights that its features need.
        """
        self.device = torch.device(device)
        allow_tf32(self.device)
        options = source.load_options()
        with source.reading("has no usable image processor", also=(ValueError, KeyError)):
            self.image_processor = AutoImageProcessor.from_pretrained(source.name, **options)
        # RuntimeError: the shapes of weights and config differ
        with source.reading("does not load as an image model", also=(ValueError, KeyError, RuntimeError)):
            model, info = AutoModel.from_pretrained(
                source.name, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **options
            )
        if model.main_input_name != "pixel_values":
            raise UserError(
                f"{source.flag} {source.name}: not an image model, as its input is {model.main_input_name}."
            )
        missing = set(info["missing_keys"])
        pooler = {name for name in missing if name.startswith("pooler.")}
        if missing - pooler:
            raise UserError(
                f"{source.flag} {source.name}: lacks {len(missing - pooler)} weights of the backbone, the first "
                f"{min(missing - pooler)}; choose a trained model."
            )
        self.model = model.to(self.device).eval()
        # a ViT classifier has no pooler: AutoModel makes one with random weights
        self.has_pooler = not pooler
        self.has_class_token = any(name.endswith("cls_token") for name, _ in model.named_parameters())
        blank = PIL.Image.new("RGB", (64, 64))
        self.num_features = self(self.preprocess(blank)[None]).shape[1]

    def preprocess(self, image: PIL.Image.Image) -> torch.Tensor:
        """Return `(3, height, width)` float32 from the checkpoint's image processor."""
        return self.image_processor(to_rgb(image), return_tensors="pt")["pixel_values"][0]

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return `(batch, num_features)` float32: the pooled output, or without a trained pooler the class token, or
        without one the mean over all positions.
        """
        outputs = self.model(pixel_values.to(self.device))
        pooled = outputs.get("pooler_output")
        if self.has_pooler and pooled is not None:
            return pooled.flatten(1)
        hidden = outputs.last_hidden_state
        if hidden.ndim == 4:  # convolutional: (batch, num_features, height, width)
            return hidden.mean((2, 3))
        return hidden[:, 0] if self.has_class_token else hidden.mean(1)


def extract_features(
    model: FeatureModel, images: Dataset, what: str, folder: Path, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return features `(len(images), num_features)` float16 and thumbnails `(len(images), THUMBNAIL_LENGTH)` uint8,
    memory-mapped from files in a new `folder`.

    Threads decode and preprocess images, one batch ahead of the model.

    Raises:
        UserError: an image is damaged, or a feature is too large for half precision.
    """
    if not len(images):  # an empty file cannot be mapped
        return np.zeros((0, model.num_features), np.float16), np.zeros((0, THUMBNAIL_LENGTH), np.uint8)
    folder.mkdir()
    features = np.memmap(folder / "features", np.float16, "w+", shape=(len(images), model.num_features))
    thumbnails = np.memmap(folder / "thumbnails", np.uint8, "w+", shape=(len(images), THUMBNAIL_LENGTH))

    def prepare(row: int, encoded: dict) -> torch.Tensor:
        try:
            image = Image().decode_example(encoded)
            thumbnails[row] = make_thumbnail(image)
            return model.preprocess(image)
        except Exception as error:  # Pillow raises nearly anything for damaged files
            problem = describe_error(error)
            problem = problem if problem.startswith(TOO_LARGE) else f"damaged ({problem})"
            raise UserError(f"{what}: the image in row {row} is {problem}; repair, shrink or remove it.") from None

    prepared = map_encoded(images, prepare, range(len(images)), f"features of {what}", piece=batch_size)
    for start in range(0, len(images), batch_size):
        batch = model(torch.stack(list(islice(prepared, batch_size)))).half().cpu().numpy()
        if not np.isfinite(batch).all():
            raise UserError(f"{what}: features are too large for half precision; choose another model.")
        features[start : start + len(batch)] = batch
    return features, thumbnails
