"""A plugin for the tests of synthesis: a style token, flags for a small set, changed pipelines."""

import shutil
from pathlib import Path

import pytest

from tests.style.pipelines import change_config
from tests.synthesis.tokens import open_folder, save_token


@pytest.fixture(scope="session")
def token_dir(tmp_path_factory, tiny_pipeline_dir, real_images_dir):
    return save_token(tmp_path_factory.mktemp("token") / "style", tiny_pipeline_dir, real_images_dir)


@pytest.fixture(scope="session")
def options(token_dir):
    """7 images of each of 3 classes in shards of 8, batches of 3: short last shard, padded batches."""
    return [
        "--learned_embeds", str(token_dir), "--num_images_per_class", "7", "--images_per_shard", "8",
        "--batch_size", "3", "--num_inference_steps", "2",
    ]  # fmt: skip


@pytest.fixture
def copy_pipeline(tmp_path, request):
    """Return a function that copies a tiny pipeline and changes the configs of its parts."""

    def make(kind="tiny_pipeline_dir", **configs) -> Path:
        folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "copied")
        for part, settings in configs.items():
            change_config(folder / ("model_index.json" if part == "index" else f"{part}/config.json"), **settings)
        return folder

    return make


@pytest.fixture
def generator(tiny_pipeline_dir):
    return open_folder(tiny_pipeline_dir)
