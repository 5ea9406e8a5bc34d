from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.style.pipelines import pickle_weights, publish, rename_to_fp16
from tests.synthesis.tokens import open_folder as open_generator
from utils.cli.errors import UserError
from utils.style.base_models import open_base_model
from utils.style.families import FAMILIES, ROW_NAMES
from utils.style.saved_pipelines import MIRRORS

ROOT = Path(__file__).parents[2]
pytest_plugins = ["tests.local_hub.fixtures", "tests.synthesis.fixtures"]


def open_folder(folder):
    return open_base_model(str(folder), "--model")


def test_a_family_is_named_only_in_the_table():
    names = [*FAMILIES, *ROW_NAMES]
    paths = [path for path in ROOT.glob("utils/**/*") if path.suffix in (".py", ".jinja")] + list(ROOT.glob("*.py"))
    naming = [path.name for path in paths if any(name in path.read_text(encoding="utf-8") for name in names)]
    assert naming == ["families.py"]


@pytest.mark.parametrize(("gone", "mirror"), MIRRORS.items())
def test_a_removed_repository_is_an_error_that_names_its_mirror(gone, mirror):
    with pytest.raises(UserError, match=f"^--model {gone}: was removed from the Hub; its mirror is {mirror}.$"):
        open_base_model(gone, "--model")


def test_a_restored_repository_is_used(tiny_pipeline_dir, monkeypatch):
    monkeypatch.setitem(MIRRORS, str(tiny_pipeline_dir), "elsewhere")
    assert open_folder(tiny_pipeline_dir).pipeline_class == "StableDiffusionPipeline"


NO_SIZE = "its configs do not give its resolution"
SUPPORTED = r"; supported: StableDiffusionPipeline \(Stable Diffusion 1.x and 2.x\), StableDiffusionXLPipeline \(.*XL\)"


@pytest.mark.parametrize(("configs", "problem"), [
    # another architecture
    ({"index": {"_class_name": "FluxPipeline"}}, f"is a FluxPipeline{SUPPORTED}"),
    ({"index": {"_class_name": "StableDiffusionInpaintPipeline"}}, f"is a StableDiffusionInp.*{SUPPORTED}"),
    ({"index": {"_class_name": "MyStableDiffusionPipeline"}}, f"is a MyStableDiffusionPipeline{SUPPORTED}"),
    ({"index": {"_class_name": ["mine", "My"]}}, rf"is a \['mine', 'My'\], a community .* is not run{SUPPORTED}"),
    ({"index": {"_class_name": None}}, rf"its model_index.json names no pipeline class \(_class_name\){SUPPORTED}"),
    # parts of another class
    ({"index": {"vae": ["diffusers", "AutoencoderTiny"]}}, "its vae must be AutoencoderKL, got AutoencoderTiny"),
    ({"index": {"text_encoder": ["x", "Roberta"]}}, "its text_encoder must be CLIPTextModel, got Roberta"),
    ({"index": {"unet": [None, None]}}, "its unet must be UNet2DConditionModel, got None"),
    ({"index": {"unet": None}}, "its unet must be UNet2DConditionModel, got None"),
    # missing numbers, and those of an inpainting model
    ({"unet": {"in_channels": 9}}, r"its U-Net has 9 in_channels, its VAE 4 latent .* must be equal \(.*tokens\)"),
    ({"vae": {"scaling_factor": None}}, "its VAE's scaling_factor must be a number other than 0, got None"),
    ({"vae": {"scaling_factor": 0}}, "its VAE's scaling_factor must be a number other than 0, got 0"),
    ({"vae": {"block_out_channels": []}}, rf"{NO_SIZE} \(.*block_out_channels \[\] of its VAE\)"),
    ({"unet": {"sample_size": None}}, rf"{NO_SIZE} \(sample_size None of its U-Net.*\)"),
])  # fmt: skip
def test_a_pipeline_that_takes_no_token_is_an_error_before_anything_loads(configs, problem, copy_pipeline):
    with pytest.raises(UserError, match=f"^--model .*copied: {problem}.$"):
        open_folder(copy_pipeline(**configs))


def test_statistics_of_another_number_of_channels_are_an_error(copy_pipeline):
    statistics = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    with pytest.raises(UserError, match="copied: its VAE's latents_mean and latents_std must have 4 values.$"):
        open_folder(copy_pipeline("tiny_xl_pipeline_dir", vae=statistics))


def test_a_distilled_model_gives_a_warning(copy_pipeline, caplog):
    base_model = open_folder(copy_pipeline(unet={"time_cond_proj_dim": 32}))
    assert base_model.load_noise_scheduler().config.prediction_type == "v_prediction"
    assert ["looks distilled for few steps (its denoiser" in message for message in caplog.messages] == [True]


def test_weights_other_than_safetensors_are_an_error_before_anything_loads(copy_pipeline):
    folder = copy_pipeline()
    for part in ("unet", "text_encoder"):
        pickle_weights(folder, part)
    settings = {"resolution": 32, "negative_prompt": "", "scheduler": "default", "num_inference_steps": 2}
    for check in (open_folder, lambda folder: open_generator(folder).check(settings)):
        with pytest.raises(UserError, match=r"^--model .*copied: has no safetensors weights for text_encoder, unet, "):
            check(folder)


@pytest.mark.parametrize("parts", [["unet"], ["text_encoder", "vae", "unet"]])
def test_parts_that_exist_only_in_half_precision_are_loaded(parts, copy_pipeline, tiny_pipeline_dir, local_hub, caplog):
    plain = open_folder(tiny_pipeline_dir)
    assert caplog.messages == []
    rename_to_fp16(folder := copy_pipeline(), parts)
    half = open_folder(folder)
    assert [f"weights of {', '.join(parts)} only in half" in message for message in caplog.messages] == [True]
    for model, other in (
        (plain.load_unet(torch.float32), half.load_unet(torch.float32)),
        (plain.load_vae(), half.load_vae()),
        (plain.load_text_encoders(torch.float32)[0], half.load_text_encoders(torch.float32)[0]),
    ):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert half.vae_identity == plain.vae_identity  # of the same bytes
    # the same from a repository
    commit = publish(local_hub, f"ann/half-{len(parts)}", folder)
    base_model = open_base_model(f"ann/half-{len(parts)}", "--model")
    assert base_model.vae_identity == f"ann/half-{len(parts)}@{commit}"
    assert len(base_model.load_text_encoders(torch.float32)) == len(base_model.load_tokenizers()) == 1
    pipe = base_model.load_pipeline(base_model.load_unet(torch.float32))
    assert type(pipe).__name__ == "StableDiffusionPipeline"


STATISTICS = {"latents_mean": [-1.6, 2.2, 1.3, -0.3], "latents_std": [8.4, 5.9, 5.4, 5.2]}  # as of playground-v2.5


@pytest.mark.parametrize(("kind", "settings", "ignored"), [
    ("tiny_pipeline_dir", {}, None),
    ("tiny_pipeline_dir", STATISTICS, "latents_mean and latents_std"),
    ("tiny_pipeline_dir", {"shift_factor": 0.6, "scaling_factor": 1.5}, "shift_factor"),
    ("tiny_xl_pipeline_dir", {}, None),
    ("tiny_xl_pipeline_dir", {"scaling_factor": 0.5, **STATISTICS}, None),
    ("tiny_xl_pipeline_dir", {"latents_mean": STATISTICS["latents_mean"]}, "latents_mean"),
    ("tiny_xl_pipeline_dir", {"shift_factor": 0.6, **STATISTICS}, "shift_factor"),
])  # fmt: skip
def test_the_pipelines_decoding_undoes_what_training_does_to_latents(kind, settings, ignored, copy_pipeline, caplog):
    import diffusers

    folder = copy_pipeline(kind, vae=settings)
    base_model = open_folder(folder)
    warned = [message for message in caplog.messages if "ignored in training" in message]
    expected = f": {ignored} of its VAE: ignored in training, as in a "
    assert [expected in message for message in warned] == [True] * bool(ignored)
    pipe = getattr(diffusers, base_model.pipeline_class).from_pretrained(folder)
    assert base_model.latent_scale == pipe.vae.config.scaling_factor
    pipe.set_progress_bar_config(disable=True)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mode()
        expected = pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, output_type="pt")
    scaled = base_model.scale_latents(latents)
    # instead of the last step's result, the pipeline decodes the latents that training decodes
    drawn = pipe(
        "a", num_inference_steps=1, height=32, width=32, output_type="pt",
        callback_on_step_end=lambda *_: {"latents": scaled},
    ).images  # fmt: skip
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(base_model.unscale_latents(scaled), latents)


def test_the_identity_of_a_folders_vae_depends_on_its_weights(copy_pipeline, tiny_pipeline_dir):
    folder = copy_pipeline()
    assert open_folder(folder).vae_identity == open_folder(tiny_pipeline_dir).vae_identity
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert open_folder(folder).vae_identity != open_folder(tiny_pipeline_dir).vae_identity


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_weights_of_other_names_are_an_error(part, copy_pipeline):
    path = next(((folder := copy_pipeline()) / part).glob("*.safetensors"))
    save_file({f"module.{name}": value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    base_model = open_folder(folder)
    load = getattr(base_model, {"text_encoder": "load_text_encoders"}.get(part, f"load_{part}"))
    with pytest.raises(UserError, match=rf"^--model .*copied: its {part} lacks \d+ weights, such as"):
        load(*[torch.float32] * (part != "vae"))
