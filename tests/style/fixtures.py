"""Running train_dsi.py in process on tiny models of the real classes."""

import pytest

import train_dsi


@pytest.fixture
def run_dsi(tiny_pipeline_dir, real_images_dir, tmp_path):
    """Run the script with a few steps; keywords are flags, the output folder is `tmp_path / 'style'`."""

    def run(**flags):
        options = {
            "pretrained_model_name_or_path": tiny_pipeline_dir, "dataset_name": real_images_dir,
            "output_dir": tmp_path / "style", "max_train_steps": 3, "train_batch_size": 2, "learning_rate": 0.1,
            "num_validation_images": 0, "latent_cache_dir": tmp_path / "latents", **flags,
        }  # fmt: skip
        argv = [part for key, value in options.items() if value is not None for part in (f"--{key}", str(value))]
        return train_dsi.main(argv)

    return run
