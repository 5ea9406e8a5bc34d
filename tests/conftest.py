"""Fixtures: a local Hub instead of the network, tiny models of the real classes, a small labelled image dataset."""

import atexit
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from tests.local_hub import LocalHub

# Before anything of Hugging Face is imported: the clients read their environment once.
_work_dir = tempfile.TemporaryDirectory(prefix="tests-")
_hub = LocalHub(Path(_work_dir.name) / "hub", lfs_threshold=2**20)
_hub.__enter__()
atexit.register(_hub.__exit__)
_environment = _hub.environment(Path(_work_dir.name) / "hf-home") | {"TOKENIZERS_PARALLELISM": "false"}
# as with `accelerate launch`: threads on busy cores wait for each other
_environment["OMP_NUM_THREADS"] = "1"
os.environ.clear()
os.environ.update(_environment)

import numpy as np
import pytest
from PIL import Image as PILImage

CLASS_NAMES = ["red_square", "green circle", "blue-stripe"]


@pytest.fixture(scope="session")
def local_hub_server():
    """The session's Hub, which the clients in this process talk to as well."""
    return _hub


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Reset the state that `Accelerator` keeps between runs in one process."""
    from accelerate.state import AcceleratorState, PartialState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def draw_image(label: int, rng: np.random.Generator) -> PILImage.Image:
    """Return a 32-pixel image of a class: its own colour and shape at a random place, on noise."""
    pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
    top, left = rng.integers(2, 14, 2)
    rows, columns = np.mgrid[:32, :32]
    square = (rows >= top) & (rows < top + 14) & (columns >= left) & (columns < left + 14)
    circle = (rows - top - 7) ** 2 + (columns - left - 7) ** 2 < 49
    stripe = (rows >= top) & (rows < top + 6)
    pixels[(square, circle, stripe)[label], label] = 230
    return PILImage.fromarray(pixels)


def save_image_set(folder, splits: dict[str, int], class_names=tuple(CLASS_NAMES)) -> None:
    """Write a labelled parquet folder with `splits[name]` images of each class."""
    from datasets import ClassLabel, Dataset, Features, Image

    features = Features({"image": Image(), "label": ClassLabel(names=list(class_names))})
    rng = np.random.default_rng(0)
    for split, per_class in splits.items():
        labels = [label for _ in range(per_class) for label in range(len(class_names))]
        rows = {"image": [draw_image(label, rng) for label in labels], "label": labels}
        (folder / "data").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{split}-00000.parquet")


def save_class_folders(folder: Path, counts: dict[str, int]) -> Path:
    """Write `counts[name]` images of each class; the order of `counts` decides how a class is drawn."""
    rng = np.random.default_rng(0)
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            draw_image(label, rng).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def real_images_dir(tmp_path_factory):
    """A labelled folder: three classes, 20 training and 10 test images of each, 32 pixels."""
    folder = tmp_path_factory.mktemp("data") / "real-images"
    save_image_set(folder, {"train": 20, "test": 10})
    return folder


def pipeline_fixture(name: str, kind: str):
    """Return a fixture: the folder of a pipeline of `tests/tiny_pipelines.py`, saved once per session."""

    def save(tmp_path_factory) -> Path:
        from tests.tiny_pipelines import save_pipeline

        return save_pipeline(kind, tmp_path_factory.mktemp("models") / name)

    return pytest.fixture(scope="session")(save)


tiny_pipeline_dir = pipeline_fixture("tiny-pipeline", "stable_diffusion")
tiny_xl_pipeline_dir = pipeline_fixture("tiny-xl-pipeline", "stable_diffusion_xl")
tiny_sd3_pipeline_dir = pipeline_fixture("tiny-sd3-pipeline", "stable_diffusion_3")
tiny_flux_pipeline_dir = pipeline_fixture("tiny-flux-pipeline", "flux")
tiny_qwen_pipeline_dir = pipeline_fixture("tiny-qwen-pipeline", "qwen_image")


@contextmanager
def blank_figures():
    """Create figures as usual but save a single pixel: drawing takes longer than a tiny model's work."""
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **_: PILImage.new("RGB", (1, 1)).save(path))
        yield


def read_rows(folder) -> list:
    """Return the learned rows `(num_vectors, dim)` of each text encoder in a token's folder."""
    from utils.style.token import load_learned_embeds

    return load_learned_embeds(folder / "learned_embeds.safetensors")
