import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from utils.cli.errors import UserError
from utils.style.base_models import open_base_model
from utils.style.saved_pipelines import MIRRORS

pytest_plugins = ["tests.local_hub.fixtures"]


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


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("FluxPipeline", "is a FluxPipeline"),
        ("StableDiffusionInpaintPipeline", "is a StableDiffusionInpaintPipeline"),
        ("MyStableDiffusionPipeline", "is a MyStableDiffusionPipeline"),
        (["my_pipeline", "My"], r"is a \['my_pipeline', 'My'\], a community pipeline, whose code is not run"),
        (None, r"its model_index.json names no pipeline class \(_class_name\)"),
    ],
)
def test_another_architecture_is_an_error_that_lists_the_supported(kind, problem, copied):
    change_config(copied / "model_index.json", _class_name=kind)
    supported = "StableDiffusionPipeline .*, StableDiffusionXLPipeli"
    with pytest.raises(UserError, match=f"^--model .*copied: {problem}; supported: {supported}"):
        open_folder(copied)


def test_a_model_trained_on_other_noise_is_an_error_before_anything_loads(copied):
    change_config(copied / "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])
    change_config(copied / "scheduler" / "scheduler_config.json", _class_name="EDMEulerScheduler", sigma_data=1.0)
    base_model = open_folder(copied)
    with pytest.raises(UserError, match=r"^--model .*copied: its scheduler \(EDMEulerScheduler\) has EDM's noise"):
        base_model.load_noise_scheduler()


def test_a_distilled_model_is_told(copied, caplog):
    change_config(copied / "unet" / "config.json", time_cond_proj_dim=32)
    assert open_folder(copied).load_noise_scheduler().config.prediction_type == "v_prediction"
    assert ["looks distilled for few steps (its denoiser" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize(
    ("part", "entry", "problem"),
    [
        ("vae", ["diffusers", "AutoencoderTiny"], "its vae is AutoencoderTiny; wanted is AutoencoderKL"),
        ("text_encoder", ["x", "RobertaModel"], "its text_encoder is RobertaModel; wanted is CLIPTextModel"),
        ("unet", [None, None], "its unet is None; wanted is UNet2DConditionModel"),
        ("unet", None, "its unet is None; wanted is UNet2DConditionModel"),
    ],
)
def test_a_part_of_another_class_is_an_error(part, entry, problem, copied):
    change_config(copied / "model_index.json", **{part: entry})
    with pytest.raises(UserError, match=f"^--model .*copied: {problem}.$"):
        open_folder(copied)


def test_an_inpainting_unet_is_an_error_whatever_the_pipeline_is_called(copied):
    change_config(copied / "unet" / "config.json", in_channels=9)
    with pytest.raises(UserError, match="copied: its U-Net has 9 in_channels, its VAE 4 latent channels; they must be"):
        open_folder(copied)


def test_weights_that_are_no_safetensors_are_an_error_before_anything_loads(copied):
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        [weights] = (copied / part).glob("*.safetensors")
        torch.save({}, copied / part / f"{name}.bin")
        weights.unlink()
    with pytest.raises(UserError, match=r"copied: has no safetensors weights for text_encoder, unet, only pickled"):
        open_folder(copied)


def rename_to_fp16(folder, *parts):
    for part in parts:
        [weights] = (folder / part).glob("*.safetensors")
        weights.rename(weights.with_suffix(".fp16.safetensors"))


@pytest.mark.parametrize("parts", [["unet"], ["text_encoder", "vae", "unet"]])
def test_parts_in_half_precision_only_are_loaded(parts, copied, tiny_pipeline_dir, caplog):
    plain = open_folder(tiny_pipeline_dir)
    assert caplog.messages == []
    rename_to_fp16(copied, *parts)
    half = open_folder(copied)
    assert [f"the weights of {', '.join(parts)} are there" in message for message in caplog.messages] == [True]
    for model, other in (
        (plain.load_unet(torch.float32), half.load_unet(torch.float32)),
        (plain.load_vae(), half.load_vae()),
        (plain.load_text_encoders(torch.float32)[0], half.load_text_encoders(torch.float32)[0]),
    ):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert half.vae_identity == plain.vae_identity  # of the same bytes


def test_a_repository_in_half_precision_only_is_loaded(copied, local_hub):
    rename_to_fp16(copied, "text_encoder", "vae", "unet")
    files = {str(path.relative_to(copied)): path for path in copied.rglob("*") if path.is_file()}
    commit = local_hub.create_repo("ann/half", "model").commit(files)
    base_model = open_base_model("ann/half", "--model")
    assert base_model.vae_identity == f"ann/half@{commit}"
    assert len(base_model.load_text_encoders(torch.float32)) == len(base_model.load_tokenizers()) == 1
    pipe = base_model.load_pipeline(base_model.load_unet(torch.float32))
    assert type(pipe).__name__ == "StableDiffusionPipeline"


STATISTICS = {"latents_mean": [-1.6, 2.2, 1.3, -0.3], "latents_std": [8.4, 5.9, 5.4, 5.2]}  # as of playground-v2.5


@pytest.mark.parametrize(
    ("kind", "settings", "ignored"),
    [
        ("tiny_pipeline_dir", {}, None),
        ("tiny_pipeline_dir", STATISTICS, "latents_mean and latents_std"),
        ("tiny_pipeline_dir", {"shift_factor": 0.6, "scaling_factor": 1.5}, "shift_factor"),
        ("tiny_xl_pipeline_dir", {}, None),
        ("tiny_xl_pipeline_dir", {"scaling_factor": 0.5, **STATISTICS}, None),
        ("tiny_xl_pipeline_dir", {"latents_mean": STATISTICS["latents_mean"]}, "latents_mean"),
        ("tiny_xl_pipeline_dir", {"shift_factor": 0.6, **STATISTICS}, "shift_factor"),
    ],
)
def test_the_pipelines_decoding_undoes_what_training_does_to_latents(
    kind, settings, ignored, request, tmp_path, caplog
):
    import diffusers

    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "copied")
    change_config(folder / "vae" / "config.json", **settings)
    base_model = open_folder(folder)
    told = [message for message in caplog.messages if ": ignored in training, as in a " in message]
    assert [message.endswith(f"Pipeline: {ignored} of its VAE.") for message in told] == [True] * bool(ignored)
    pipe = getattr(diffusers, base_model.pipeline_class).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mode()
        expected = pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, output_type="pt")
    scaled = base_model.scale_latents(latents)
    # in place of what the last step gives, the pipeline decodes what training takes for the picture
    drawn = pipe(
        "a", num_inference_steps=1, height=32, width=32, output_type="pt",
        callback_on_step_end=lambda *_: {"latents": scaled},
    ).images  # fmt: skip
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(base_model.unscale_latents(scaled), latents)


def test_statistics_of_another_number_of_channels_are_an_error(tiny_xl_pipeline_dir, tmp_path):
    folder = shutil.copytree(tiny_xl_pipeline_dir, tmp_path / "copied")
    change_config(folder / "vae" / "config.json", latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    with pytest.raises(UserError, match="copied: its VAE's latents_mean and latents_std must have 4 values.$"):
        open_folder(folder)


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
    assert base_model.family.title == "Stable Diffusion XL"
    assert len(base_model.load_tokenizers()) == len(base_model.load_text_encoders(torch.float32)) == 2
    assert {encoder.dtype for encoder in base_model.load_text_encoders(torch.bfloat16)} == {torch.bfloat16}
    assert base_model.load_vae().dtype == torch.float32


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_weights_of_other_names_are_an_error(part, copied):
    path = next((copied / part).glob("*.safetensors"))
    save_file({f"module.{name}": value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    base_model = open_folder(copied)
    load = getattr(base_model, {"text_encoder": "load_text_encoders"}.get(part, f"load_{part}"))
    with pytest.raises(UserError, match=rf"^--model .*copied: \d+ weights of its {part} are missing, such as"):
        load(*[torch.float32] * (part != "vae"))


@pytest.mark.parametrize(
    ("part", "settings", "problem"),
    [
        ("vae", {"scaling_factor": None}, "its VAE's scaling_factor is None; a number other than 0"),
        ("vae", {"scaling_factor": 0}, "its VAE's scaling_factor is 0"),
        ("vae", {"block_out_channels": []}, "its configs do not say at how many pixels it draws"),
        ("unet", {"sample_size": None}, "its configs do not say at how many pixels it draws .sample_size None"),
    ],
)
def test_configs_without_a_number_are_an_error_before_anything_loads(part, settings, problem, copied):
    change_config(copied / part / "config.json", **settings)
    with pytest.raises(UserError, match=f"^--model .*copied: {problem}"):
        open_folder(copied)
