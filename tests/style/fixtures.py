"""Running train_dsi.py in process on tiny models of the real classes."""

from contextlib import nullcontext

import pytest

import train_dsi
from tests.conftest import blank_figures
from utils.style import monitor

NUM_TIMESTEPS = 2  # for measuring the loss


@pytest.fixture
def run_dsi(tiny_pipeline_dir, real_images_dir, tmp_path, monkeypatch):
    """Run the script with a few steps; keywords are flags, the output folder is `tmp_path / 'style'`.

    What takes longer than a tiny model's training is cut short: the loss is measured at two timesteps, and figures are
    drawn only with `draws_figures`.
    """
    monkeypatch.setattr(monitor, "NUM_TIMESTEPS", NUM_TIMESTEPS)

    def run(draws_figures=False, **flags):
        options = {
            "pretrained_model_name_or_path": tiny_pipeline_dir, "dataset_name": real_images_dir,
            "output_dir": tmp_path / "style", "max_train_steps": 3, "train_batch_size": 2, "learning_rate": 0.1,
            "num_validation_images": 0, "latent_cache_dir": tmp_path / "latents", **flags,
        }  # fmt: skip
        argv = [part for key, value in options.items() if value is not None for part in (f"--{key}", str(value))]
        with nullcontext() if draws_figures else blank_figures():
            return train_dsi.main(argv)

    return run
