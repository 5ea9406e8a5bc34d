import json
import shutil

import pytest
import torch

from utils.cli.errors import UserError
from utils.style.base_models import MIRRORS, open_base_model


@pytest.fixture
def copied(tiny_pipeline_dir, tmp_path):
    return shutil.copytree(tiny_pipeline_dir, tmp_path / "copied")


def open_folder(folder):
    return open_base_model(str(folder), "--model")


def change_config(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(("gone", "mirror"), MIRRORS.items())
def test_an_id_that_is_gone_is_an_error_that_names_its_mirror(gone, mirror):
    with pytest.raises(UserError, match=f"^--model {gone}: is gone from the Hub; its mirror is {mirror}.$"):
        open_base_model(gone, "--model")


def test_an_id_that_is_there_again_is_taken(tiny_pipeline_dir, monkeypatch):
    monkeypatch.setitem(MIRRORS, str(tiny_pipeline_dir), "elsewhere")
    assert open_folder(tiny_pipeline_dir).pipeline_class == "StableDiffusionPipeline"


@pytest.mark.parametrize("kind", ["FluxPipeline", "StableDiffusionInpaintPipeline", None])
def test_another_architecture_is_an_error_that_lists_the_supported(copied, kind):
    change_config(copied / "model_index.json", _class_name=kind)
    with pytest.raises(UserError, match=f"is a {kind}; supported: StableDiffusionPipeline .*, StableDiffusionXLPipeli"):
        open_folder(copied)


def test_a_model_that_predicts_the_image_is_an_error(copied):
    change_config(copied / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(UserError, match="predicts 'sample'; supported: epsilon, v_prediction"):
        open_folder(copied).load_noise_scheduler()


def test_weights_that_are_no_safetensors_are_not_loaded(copied):
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match="its unet cannot be loaded .*safetensors"):
        open_folder(copied).load_unet(torch.float32)


def test_resolution_and_scale_are_the_models_own(copied):
    base_model = open_folder(copied)
    assert base_model.native_resolution == 32  # 16 latents a side, a VAE of two levels
    assert base_model.latent_scale == base_model.load_vae().config.scaling_factor
    change_config(copied / "vae" / "config.json", scaling_factor=0.5)
    assert open_folder(copied).latent_scale == 0.5


def test_a_folders_vae_is_told_from_another_by_its_weights(copied, tiny_pipeline_dir):
    assert open_folder(copied).vae_identity == open_folder(tiny_pipeline_dir).vae_identity
    weights = copied / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert open_folder(copied).vae_identity != open_folder(tiny_pipeline_dir).vae_identity


def test_both_parts_of_xl_are_loaded(tiny_xl_pipeline_dir):
    base_model = open_folder(tiny_xl_pipeline_dir)
    assert base_model.is_xl
    assert len(base_model.load_tokenizers()) == len(base_model.load_text_encoders(torch.float32)) == 2
    assert {encoder.dtype for encoder in base_model.load_text_encoders(torch.bfloat16)} == {torch.bfloat16}
    assert base_model.load_vae().dtype == torch.float32
