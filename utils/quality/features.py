"""Images into features: the pooled output of a pretrained backbone, in half precision on disk."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Image
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from utils.cli.errors import UserError
from utils.data.images import TOO_LARGE, describe_error, to_rgb
from utils.data.opened_images import NUM_THREADS
from utils.hub.repositories import Source, open_source


def open_feature_model(name: str, flag: str, revision: str | None = None, token: str | None = None) -> Source:
    """Return a pretrained image model, its commit pinned, without loading it.

    Raises:
        UserError: neither folder nor repository, no model, or weights in no safetensors file.
    """
    source = open_source(name, flag, "model", revision, token)
    source.file("config.json", "a checkpoint of transformers or timm")
    if not source.has_one_of([SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]):
        raise UserError(f"{flag} {name}: has no {SAFE_WEIGHTS_NAME}; features come from safetensors weights only.")
    return source


class FeatureModel:
    """A backbone without its classification head, and the image processor that belongs to it."""

    def __init__(self, source: Source, device: str | torch.device):
        """Load the model in float32.

        Raises:
            UserError: it has no image processor, is no image model, or lacks weights that its features depend on.
        """
        self.device = torch.device(device)
        options = source.load_options()
        with source.reading("has no usable image processor", also=(ValueError, KeyError)):
            self.image_processor = AutoImageProcessor.from_pretrained(source.name, **options)
        # RuntimeError: weights of other shapes than the configuration says
        with source.reading("does not load as an image model", also=(ValueError, KeyError, RuntimeError)):
            model, info = AutoModel.from_pretrained(
                source.name, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **options
            )
        if model.main_input_name != "pixel_values":
            raise UserError(f"{source.flag} {source.name}: takes {model.main_input_name} first, no image model.")
        missing = set(info["missing_keys"])
        pooler = {name for name in missing if name.startswith("pooler.")}
        if missing - pooler:
            raise UserError(
                f"{source.flag} {source.name}: its weights lack {len(missing - pooler)} of the backbone's, the first "
                f"{min(missing - pooler)}; choose a trained model."
            )
        self.model = model.to(self.device).eval()
        # a ViT classifier brings no pooler: AutoModel makes one with random weights
        self.has_pooler = not pooler
        self.has_class_token = any(name.endswith("cls_token") for name, _ in model.named_parameters())
        blank = PIL.Image.new("RGB", (64, 64))
        self.num_features = self(self.preprocess(blank)[None]).shape[1]

    def preprocess(self, image: PIL.Image.Image) -> torch.Tensor:
        """Return `(3, height, width)` float32 as the checkpoint's own processor makes it."""
        return self.image_processor(to_rgb(image), return_tensors="pt")["pixel_values"][0]

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return `(batch, num_features)` float32: the pooled output; where nothing trained pools, the class token,
        and without one the mean over all places.
        """
        outputs = self.model(pixel_values.to(self.device))
        pooled = outputs.get("pooler_output")
        if self.has_pooler and pooled is not None:
            return pooled.flatten(1)
        hidden = outputs.last_hidden_state
        if hidden.ndim == 4:  # convolutional: (batch, num_features, height, width)
            return hidden.mean((2, 3))
        return hidden[:, 0] if self.has_class_token else hidden.mean(1)


def extract_features(model: FeatureModel, images: Dataset, what: str, path: Path, batch_size: int) -> np.ndarray:
    """Return the features `(len(images), num_features)` float16, memory-mapped from a new file at `path`.

    Images are decoded and preprocessed in threads, a batch ahead of the model.

    Raises:
        UserError: an image is damaged, or a feature is too large for half precision.
    """
    if not len(images):  # an empty file cannot be mapped
        return np.zeros((0, model.num_features), np.float16)
    encoded = images.select_columns("image").cast_column("image", Image(decode=False))
    features = np.memmap(path, np.float16, "w+", shape=(len(images), model.num_features))

    def prepare(row: int, example: dict) -> torch.Tensor:
        try:
            return model.preprocess(Image().decode_example(example))
        except Exception as error:  # on damaged files Pillow raises nearly anything
            problem = describe_error(error)
            problem = problem if problem.startswith(TOO_LARGE) else f"damaged ({problem})"
            raise UserError(f"{what}: the image in row {row} is {problem}; repair, shrink or remove it.") from None

    def submit(start: int) -> Iterator[torch.Tensor]:
        rows = range(start, min(start + batch_size, len(images)))
        return threads.map(prepare, rows, encoded[rows]["image"])

    with (
        ThreadPoolExecutor(NUM_THREADS) as threads,
        tqdm(total=len(images), desc=f"features of {what}", unit="image", leave=False) as progress,
    ):
        pending = submit(0)
        for start in range(0, len(images), batch_size):
            pixel_values = torch.stack(list(pending))
            if start + batch_size < len(images):
                pending = submit(start + batch_size)
            batch = model(pixel_values).half().cpu().numpy()
            if not np.isfinite(batch).all():
                raise UserError(f"{what}: the model gives features that half precision does not hold; choose another.")
            features[start : start + len(batch)] = batch
            progress.update(len(batch))
    return features


@dataclass(frozen=True)
class UnitFeatures:
    """Features less `centre`, at length 1, made from those on disk a chunk at a time: products of two are cosines.

    Features of one model all point to about the same side; less the mean of real images, cosines tell them apart.
    `raw` is `(n, num_features)` float16, `centre` `(num_features,)` float32 or 0.
    """

    raw: np.ndarray
    centre: np.ndarray | float = 0.0

    def __len__(self) -> int:
        return len(self.raw)

    def take(self, rows: np.ndarray | slice, device: str | torch.device = "cpu") -> torch.Tensor:
        """Return `(rows, num_features)` float32."""
        features = torch.from_numpy(np.asarray(self.raw[rows], np.float32) - np.float32(self.centre))
        return torch.nn.functional.normalize(features.to(device))

    def chunks(self, size: int, device: str | torch.device = "cpu") -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the first row of each chunk, and the chunk."""
        for start in range(0, len(self), size):
            yield start, self.take(slice(start, start + size), device)
