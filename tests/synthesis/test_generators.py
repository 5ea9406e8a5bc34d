"""Generators: facts from their configs, and loading."""

import json

import pytest
import torch
from safetensors.torch import save_file

from generate_synthetic import main
from tests.style.pipelines import change_scheduler, publish, rename_to_fp16
from tests.synthesis.tokens import PLACEHOLDER, open_folder
from utils.cli.errors import UserError
from utils.data.prompts import token_text
from utils.style.families import FAMILIES, Family
from utils.style.token import save_learned_embeds
from utils.synthesis.generators import open_generator
from utils.synthesis.sampling import Sampler, load_pipeline
from utils.synthesis.sources import StyleToken, read_plain_sources

pytest_plugins = ["tests.synthesis.fixtures", "tests.local_hub.fixtures"]
KINDS = ["tiny_pipeline_dir", "tiny_xl_pipeline_dir", "tiny_sd3_pipeline_dir", "tiny_flux_pipeline_dir"]
CPU = torch.device("cpu")


@pytest.mark.parametrize(("kind", "scheduler", "takes_style_tokens", "takes_negative_prompt", "resolution", "step"), [
    ("tiny_pipeline_dir", "DPMSolverMultistepScheduler", True, True, 32, 8),
    ("tiny_xl_pipeline_dir", "DPMSolverMultistepScheduler", True, True, 32, 8),
    ("tiny_sd3_pipeline_dir", "default", False, True, 32, 16),
    ("tiny_flux_pipeline_dir", "default", False, False, 256, 16),
])  # fmt: skip
def test_the_arguments_of_a_generator_are_known_before_it_loads(
    kind, scheduler, takes_style_tokens, takes_negative_prompt, resolution, step, copy_pipeline, request, monkeypatch
):
    generator = open_folder(request.getfixturevalue(kind))
    assert generator.default_scheduler == scheduler
    assert generator.family.takes_style_tokens is takes_style_tokens
    assert generator.takes_negative_prompt is takes_negative_prompt
    assert generator.native_resolution == resolution  # side of the latents times two, the tiny VAE's scale
    generator.check_scheduler(scheduler, 25)
    assert generator.few_steps is None
    # at full size, the resolution is a multiple of a patch
    full = open_folder(copy_pipeline(kind, vae={"block_out_channels": [128, 256, 512, 512]}))
    assert full.resolution_step == step
    assert full.native_resolution == 4 * resolution
    # without an entry in the table, the parameters of the pipeline's call decide
    monkeypatch.setitem(FAMILIES, generator.pipeline_class, Family())
    assert generator.takes_negative_prompt is takes_negative_prompt


def test_a_generator_without_a_resolution_in_its_config_needs_the_flag(copy_pipeline, tmp_path):
    generator = open_folder(copy_pipeline("tiny_flux_pipeline_dir", index={"_class_name": "ChromaPipeline"}))
    with pytest.raises(UserError, match="^--model .*copied: its configs do not give .*; add --resolution.$"):
        _ = generator.native_resolution
    (tmp_path / "names.txt").write_text("dog\n")
    sources = read_plain_sources(generator.source.name, None, None, str(tmp_path / "names.txt"), resolution=48)
    assert sources.resolution == 48


@pytest.mark.parametrize(
    "kind", ["StableDiffusionInpaintPipeline", "StableDiffusionControlNetPipeline", "WanPipeline", ["mine", "My"], None]
)
def test_another_pipeline_is_an_error_that_lists_the_supported(kind, copy_pipeline):
    folder = copy_pipeline(index={"_class_name": kind})
    with pytest.raises(UserError, match="^--model .*copied: .*; supported: StableDiffusionPipeline, .*FluxPipe") as e:
        open_folder(folder)
    problem, supported = str(e.value).split("supported")
    assert ("names no pipeline class" if kind is None else f"is a {kind}") in problem
    assert "ControlNet" not in supported


@pytest.mark.parametrize(("kind", "scheduler", "listed"), [
    ("tiny_pipeline_dir", "FlowMatchEulerDiscreteScheduler", "default, DDIMScheduler, .*LCM.*UniPCMultistepScheduler"),
    ("tiny_pipeline_dir", "DPMSolverSDEScheduler", "default, DDIMScheduler"),
    ("tiny_sd3_pipeline_dir", "DPMSolverMultistepScheduler", "default, FlowMatchEulerDiscreteScheduler.$"),
    ("tiny_flux_pipeline_dir", "Mine", "default, FlowMatchEulerDiscreteScheduler.$"),
])  # fmt: skip
def test_scheduler_that_does_not_fit_is_an_error_that_lists_the_others(kind, scheduler, listed, request):
    generator = open_folder(request.getfixturevalue(kind))
    with pytest.raises(UserError, match=f"^--scheduler {scheduler}: does not fit .* one of {listed}"):
        generator.check_scheduler(scheduler, 25)


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
TURBO = {**SD, "prediction_type": "epsilon", "timestep_spacing": "trailing"}
ODD = {  # scheduler class, its config, settings of the U-Net, suitable flags
    "sdxl-turbo": ("EulerAncestralDiscreteScheduler", TURBO, {}, {"num_inference_steps": 4, "guidance_scale": [1.0]}),
    "lcm": ("LCMScheduler", SD, {"time_cond_proj_dim": 32}, {"num_inference_steps": 4}),
    "playground": ("EDMDPMSolverMultistepScheduler", {"sigma_data": 0.5, "prediction_type": "epsilon"}, {}, None),
    "cosxl": ("EDMEulerScheduler", {"sigma_data": 1.0, "prediction_type": "v_prediction"}, {}, None),
    "rectified flow": ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, {}, None),
}


@pytest.mark.parametrize("name", ODD)
def test_a_distilled_or_differently_trained_generator_keeps_its_scheduler(name, copy_pipeline):
    class_name, config, unet, suited = ODD[name]
    folder = copy_pipeline("tiny_xl_pipeline_dir", vae={"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4})
    change_scheduler(folder, class_name, config)
    if unet:  # random weights for the added embedding
        unet_kind = type(load_pipeline(open_folder(folder), None, "default", torch.float32, CPU).unet)
        unet_kind.from_config(unet_kind.load_config(folder / "unet") | unet).save_pretrained(folder / "unet")
    generator = open_folder(folder)
    assert generator.default_scheduler == "default"
    generator.check_scheduler(generator.default_scheduler, 25)
    few_steps = generator.few_steps
    assert few_steps is None if suited is None else few_steps.flags == suited
    assert few_steps is None or "looks distilled for few steps" in few_steps.why
    pipe = load_pipeline(generator, None, generator.default_scheduler, torch.float32, CPU)
    assert type(pipe.scheduler).__name__ == class_name
    pixels, problems = Sampler(pipe, resolution=32, num_inference_steps=2, num_at_a_time=2).draw(["a", "b"], [0, 1], 3)
    assert (pixels.shape, problems) == ((2, 32, 32, 3), [None, None])


@pytest.mark.parametrize(("given", "chosen", "warned"), [
    ([], "--num_inference_steps 4 --guidance_scale 1", None),
    (["--num_inference_steps", "25"], "--guidance_scale 1", "--num_inference_steps 25"),
    (["--num_inference_steps", "2", "--guidance_scale", "1"], None, None),
])  # fmt: skip
def test_a_distilled_generator_sets_its_sampling_flags_and_reports_them_once(
    given, chosen, warned, copy_pipeline, tmp_path, capsys
):
    change_scheduler(folder := copy_pipeline(), "EulerDiscreteScheduler", TURBO)
    (tmp_path / "names.txt").write_text("dog\n")
    main(["--pretrained_model_name_or_path", str(folder), "--class_names_file", str(tmp_path / "names.txt"),
          "--batch_size", "1", "--dry_run", *given])  # fmt: skip
    lines = [line for line in capsys.readouterr().out.splitlines() if "'trailing')" in line]
    assert [line.startswith(f"{chosen}, as --pretrained_model") for line in lines] == [True] * bool(chosen)
    assert [f"WARNING: {warned}: known to draw noise" in line for line in lines] == [bool(warned)] * bool(chosen)


def test_more_steps_than_the_scheduler_has_are_an_error(copy_pipeline):
    change_scheduler(folder := copy_pipeline(), "LCMScheduler", SD)
    with pytest.raises(
        UserError, match="^--num_inference_steps 60: does not work with the LCMScheduler of .*copied .*than 50"
    ):
        open_folder(folder).check_scheduler("default", 60)


@pytest.mark.parametrize(("class_name", "config", "reason"), [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "no attribute 'init_noise_sigma'"),
    ("EulerAncestralDiscreteScheduler", {**TURBO, "prediction_type": "sample"}, "not implemented yet: sample"),
    ("RePaintScheduler", SD, "missing 2 required"),
])  # fmt: skip
def test_a_scheduler_that_the_pipeline_cannot_use_is_an_error_that_names_the_generator(
    class_name, config, reason, copy_pipeline
):
    change_scheduler(folder := copy_pipeline("tiny_xl_pipeline_dir"), class_name, config)
    generator = open_folder(folder)
    with pytest.raises(UserError, match=f"^--model .*copied: its {class_name} does not work in a .*XL.*{reason}"):
        generator.check_scheduler("default", 25)


def test_a_scheduler_that_would_change_the_noise_is_an_error(copy_pipeline):
    change_scheduler(folder := copy_pipeline(), "HeunDiscreteScheduler", {})
    generator = open_folder(folder)
    assert generator.default_scheduler == "default"
    with pytest.raises(UserError, match="^--scheduler DDIMScheduler: has other noise levels .* try default.$"):
        generator.check_scheduler("DDIMScheduler", 25)


def make_token(folder, rows: list[torch.Tensor], num_vectors: int) -> StyleToken:
    path = save_learned_embeds(folder, [PLACEHOLDER] if len(rows) == 1 else ["clip_l", "clip_g"], rows)
    return StyleToken("my-style", None, "", PLACEHOLDER, num_vectors, path)


@pytest.mark.parametrize("num_vectors", [1, 3])
@pytest.mark.parametrize(("kind", "widths"), [("tiny_pipeline_dir", [16]), ("tiny_xl_pipeline_dir", [16, 24])])
def test_style_token_is_in_every_text_encoder(kind, widths, num_vectors, tmp_path, request):
    rows = [torch.randn(num_vectors, width) for width in widths]
    token = make_token(tmp_path, rows, num_vectors)
    pipe = load_pipeline(open_folder(request.getfixturevalue(kind)), token, "default", torch.float32, CPU)
    prompt = pipe.maybe_convert_prompt(f"a style {PLACEHOLDER}", pipe.tokenizer)
    assert prompt == f"a style {token_text(PLACEHOLDER, num_vectors)}"
    for value, number in zip(rows, ["", "_2"]):
        tokenizer, text_encoder = getattr(pipe, f"tokenizer{number}"), getattr(pipe, f"text_encoder{number}")
        ids = tokenizer(prompt, add_special_tokens=False).input_ids[2:]
        torch.testing.assert_close(text_encoder.get_input_embeddings().weight[ids], value)


def test_placeholder_comes_from_the_record_not_from_the_file(generator, tmp_path):
    save_file({"*": torch.ones(1, 16)}, tmp_path / "learned.safetensors")
    token = StyleToken("my-style", None, "", PLACEHOLDER, 1, tmp_path / "learned.safetensors")
    assert PLACEHOLDER in load_pipeline(generator, token, "default", torch.float32, CPU).tokenizer.get_vocab()


@pytest.mark.parametrize("rows", [[torch.ones(2, 24)], [torch.ones(1, 16)], [torch.ones(2, 16), torch.ones(2, 24)]])
def test_style_token_of_another_generator_is_an_error(rows, generator, tiny_flux_pipeline_dir, tmp_path):
    token = make_token(tmp_path, rows, num_vectors=2)
    with pytest.raises(UserError, match=r"^--learned_embeds my-style: .* take \[\(2, 16\)\]; choose a token that was"):
        load_pipeline(generator, token, "default", torch.float32, CPU)
    with pytest.raises(UserError, match="^--learned_embeds my-style: .* FluxPipeline, which takes no style tokens; "):
        load_pipeline(open_folder(tiny_flux_pipeline_dir), token, "default", torch.float32, CPU)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "force_upcast", "vae_dtype"),
    [(torch.float16, True, torch.float32), (torch.float16, False, torch.float16),
     (torch.bfloat16, True, torch.bfloat16)],
)  # fmt: skip
def test_vae_is_in_float32_if_it_overflows_in_half_precision(kind, dtype, force_upcast, vae_dtype, copy_pipeline):
    generator = open_folder(copy_pipeline(kind, vae={"force_upcast": force_upcast}))
    pipe = load_pipeline(generator, None, "default", dtype, CPU)
    assert pipe.vae.dtype == vae_dtype
    denoiser = pipe.components.get("unet") or pipe.components["transformer"]
    assert denoiser.dtype == pipe.text_encoder.dtype == dtype
    sampler = Sampler(pipe, resolution=32, num_inference_steps=2, num_at_a_time=2)
    assert sampler.draw(["a", "b"], [0, 1], 2.0)[1] == [None, None]
    assert pipe.vae.dtype == vae_dtype


def test_vae_is_in_float32_by_default(copy_pipeline):
    path = (folder := copy_pipeline()) / "vae" / "config.json"
    config = json.loads(path.read_text())
    del config["force_upcast"]
    path.write_text(json.dumps(config))
    assert load_pipeline(open_folder(folder), None, "default", torch.float16, CPU).vae.dtype == torch.float32


@pytest.mark.parametrize(("kind", "parts"), [
    ("tiny_pipeline_dir", ["unet"]),
    ("tiny_xl_pipeline_dir", ["text_encoder", "text_encoder_2", "unet", "vae"]),
    ("tiny_flux_pipeline_dir", ["transformer", "text_encoder_2"]),
])  # fmt: skip
def test_parts_that_exist_only_in_half_precision_are_loaded(kind, parts, copy_pipeline, request, local_hub, caplog):
    rename_to_fp16(folder := copy_pipeline(kind), parts)
    half = load_pipeline(open_folder(folder), None, "default", torch.float32, CPU)
    assert sum("only in half precision; variant 'fp16' is loaded" in text for text in caplog.messages) == 1
    plain = load_pipeline(open_folder(request.getfixturevalue(kind)), None, "default", torch.float32, CPU)
    publish(local_hub, f"ann/{kind}", folder)
    published = open_generator(f"ann/{kind}", "--model", None, None)
    for pipe in (half, load_pipeline(published, None, "default", torch.float32, CPU)):
        for part in parts:
            pairs = zip(plain.components[part].parameters(), pipe.components[part].parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_code_in_a_repository_is_not_run(copy_pipeline):
    folder = copy_pipeline(index={"unet": ["my_unet", "MyUNet"]})
    (folder / "unet" / "my_unet.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass MyUNet: pass\n")
    with pytest.raises(UserError, match="^--model .*copied: its pipeline cannot be loaded"):
        load_pipeline(open_folder(folder), None, "default", torch.float32, CPU)
    assert not (folder / "ran").exists()


def test_a_number_of_steps_that_gives_nan_timesteps_is_refused(copy_pipeline):
    folder = copy_pipeline()
    # noise as in the demo's generator, which leaves next to nothing of an image
    noise = {"beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001, "beta_end": 0.02}
    change_scheduler(folder, "DDIMScheduler", noise | {"num_train_timesteps": 1000, "timestep_spacing": "trailing"})
    generator = open_folder(folder)
    generator.check_scheduler("KDPM2AncestralDiscreteScheduler", 12)
    with pytest.raises(
        UserError, match=r"^--num_inference_steps 4: does not work with the KDPM2Anc.* \(its timesteps are NaN\)"
    ):
        generator.check_scheduler("KDPM2AncestralDiscreteScheduler", 4)
