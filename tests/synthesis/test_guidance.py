"""Guidance goes to the parameter that a pipeline takes it by; where it has no effect, none is recorded."""

import json

import pytest
from datasets import load_dataset
from safetensors.torch import load_file, save_file

from generate_synthetic import main
from tests.synthesis.test_sampling import assert_same, draw_alone, load
from tests.synthesis.tokens import open_folder
from utils.cli.errors import UserError
from utils.hub.repositories import Source
from utils.synthesis.generators import Generator
from utils.synthesis.lora import LoraAdapter
from utils.synthesis.sources import Sources

pytest_plugins = ["tests.synthesis.fixtures"]


@pytest.fixture
def draw(tmp_path):
    """Return a function that draws a set of two images with a pipeline, and returns its settings and rows."""

    def run(pipeline_dir, *flags, name="set"):
        (tmp_path / "names.txt").write_text("dog\ncat\n")
        main(["--pretrained_model_name_or_path", str(pipeline_dir), "--class_names_file", str(tmp_path / "names.txt"),
              "--num_images_per_class", "1", "--batch_size", "1", "--image_format", "png", "--resolution", "32",
              "--num_inference_steps", "2", "--output_dir", str(tmp_path / name), *flags])  # fmt: skip
        record = json.loads((tmp_path / name / "generation_config.json").read_text())
        return record["settings"], load_dataset(str(tmp_path / name), split="train")

    return run


@pytest.mark.parametrize("negative_prompt", ["", "ugly"])
def test_true_cfg_scale_gets_the_guidance_with_a_negative_prompt(
    negative_prompt, tiny_qwen_pipeline_dir, draw, monkeypatch
):  # fmt: skip
    flags = ["--negative_prompt", negative_prompt] if negative_prompt else []
    settings, rows = draw(tiny_qwen_pipeline_dir, "--guidance_scale", "40", *flags)
    assert (settings["guidance_parameter"], settings["guidance_scale"]) == ("true_cfg_scale", [40.0])
    user, row = load(tiny_qwen_pipeline_dir), rows[1]
    options = {"negative_prompt": negative_prompt or " ", "true_cfg_scale": 40.0}
    expected = draw_alone(user, row["prompt"], row["seed"], **options)
    assert_same(row["image"], expected)
    unguided = draw_alone(user, row["prompt"], row["seed"])
    assert abs(unguided - expected).max() > 5
    if not negative_prompt:
        settings, rows = draw(tiny_qwen_pipeline_dir, "--guidance_scale", "1", name="unguided")
        assert "guidance_parameter" not in settings
        assert_same(rows[1]["image"], unguided)
        # an adapter for few steps turns it off, as its scale is not an input of the denoiser
        lora = LoraAdapter(Source("user/qwen-lightning-4steps", "--lora"), "x.safetensors", 1.0, None, "")
        monkeypatch.setattr(Source, "has_one_of", lambda *_: False)
        sources = Sources(open_folder(tiny_qwen_pipeline_dir), [], [], set(), None, 32, [], loras=(lora,))
        assert (sources.few_steps.num_inference_steps, sources.few_steps.guidance_scale) == (4, 1.0)


def test_where_guidance_has_no_effect_it_is_said_and_not_recorded(copy_pipeline, tiny_flux_pipeline_dir, draw, capsys):
    embedded, _ = draw(tiny_flux_pipeline_dir)
    assert embedded["guidance_scale"] == [3.0] and "guidance_parameter" not in embedded
    assert "no effect" not in capsys.readouterr().out
    schnell = copy_pipeline("tiny_flux_pipeline_dir", transformer={"guidance_embeds": False})
    weights = schnell / "transformer/diffusion_pytorch_model.safetensors"
    save_file({key: value for key, value in load_file(weights).items() if "guidance" not in key}, weights)
    settings, rows = draw(schnell, "--guidance_scale", "3", "5", name="schnell")
    assert (settings["guidance_scale"], set(rows["guidance_scale"])) == ([1.0], {1.0})
    line = f"--guidance_scale 3 5: no effect on {schnell}, which takes no guidance; the set is recorded without it.\n"
    assert capsys.readouterr().out.count(line) == 1
    with pytest.raises(UserError, match="--negative_prompt 'ugly': not supported by FluxPipeline"):
        draw(schnell, "--negative_prompt", "ugly", name="other")


def test_a_set_begun_with_guidance_that_has_no_effect_continues(tiny_flux_pipeline_dir, draw, monkeypatch):
    before, _ = draw(tiny_flux_pipeline_dir)
    monkeypatch.setattr(Generator, "guidance_parameter", None)
    assert draw(tiny_flux_pipeline_dir, "--num_images_per_class", "2")[0] == before


@pytest.mark.parametrize(
    ("kind", "change", "parameter"),
    [
        ("tiny_pipeline_dir", {}, "guidance_scale"), ("tiny_sd3_pipeline_dir", {}, "guidance_scale"),
        ("tiny_qwen_pipeline_dir", {}, "true_cfg_scale"),
        ("tiny_qwen_pipeline_dir", {"transformer": {"guidance_embeds": True}}, "guidance_scale"),
        ("tiny_qwen_pipeline_dir", {"index": {"_class_name": "QwenImage21Pipeline"}}, "true_cfg_scale"),
        ("tiny_flux_pipeline_dir", {"index": {"_class_name": "Flux2KleinPipeline", "is_distilled": True}}, None),
        ("tiny_flux_pipeline_dir", {"index": {"_class_name": "Flux2KleinPipeline"}}, "guidance_scale"),
    ],
)  # fmt: skip
def test_the_parameter_is_known_from_configs(kind, change, parameter, copy_pipeline):
    generator = open_folder(copy_pipeline(kind, **change))
    assert generator.guidance_parameter == parameter
    assert generator.takes_negative_prompt is (parameter == "true_cfg_scale" or "flux" not in kind and not change)
