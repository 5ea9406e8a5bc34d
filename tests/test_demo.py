"""The embedded default: its data, its generator, and that a style token really learns a style."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from diffusers import StableDiffusionPipeline

import generate_synthetic
import train_dsi
from demo.run import print_ending
from demo.style_figures import as_array, border_brightness, saturation
from utils.cli.records import COMPARISON, GENERATION_CONFIG, read_record, write_record
from utils.cli.step_runner import StepRunner

ROOT = Path(__file__).parent.parent


@pytest.fixture
def in_root(monkeypatch):
    """Run from the repository root, as the paths in the demo's recipes are relative to it."""
    monkeypatch.chdir(ROOT)


def test_the_real_images_are_balanced_and_no_image_is_in_two_parts(in_root):
    splits = load_dataset("demo/fashion-mnist")
    pixels = {}
    for name, split in splits.items():
        assert np.bincount(split["label"]).tolist() == [200] * 10
        pixels[name] = {image.tobytes() for image in split["image"]}
    assert not pixels["train"] & pixels["test"]
    assert not pixels["train"] & pixels["validation"]


def test_the_generator_draws_in_a_plain_pipeline_on_a_cpu(in_root):
    pipe = StableDiffusionPipeline.from_pretrained("demo/generator")
    assert {part.dtype for part in (pipe.text_encoder, pipe.unet, pipe.vae)} == {torch.float32}
    assert pipe("A bag photo", num_inference_steps=1).images[0].size == (32, 32)


def test_the_target_style_is_not_one_of_the_named_styles(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "demo" / "build")
    from styles import STYLE_NAMES, is_chromatic, style_parameters

    assert len(STYLE_NAMES) == 100
    for name in STYLE_NAMES:
        foreground, _, _ = style_parameters(name)
        assert max(foreground) - min(foreground) >= 0.25 * max(foreground)
    assert not is_chromatic("lightgrey")
    sys.modules.pop("styles")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 5))])
def test_a_style_token_moves_the_images_towards_the_real_ones(seed, in_root, tmp_path, capsys):
    """The real images are light grey on black: border brightness 0.00, saturation 0.00.

    The bounds held with room to spare over five seeds of shots, token and images: `demo/README.md` has the figures.
    """
    style = tmp_path / "style"
    seeds = ["--seed", str(seed), "--few_shot_seed", str(seed)]
    health = train_dsi.main(
        ["demo/recipes/dsi_full.yaml", "--max_train_steps", "100", "--lr_warmup_steps", "5", "--output_dir", str(style),
         "--num_validation_images", "0", *seeds]
    )  # fmt: skip
    figures = {}
    for use_token in ("true", "false"):
        images = tmp_path / f"images-{use_token}"
        generate_synthetic.main(
            ["demo/recipes/generate_full.yaml", "--learned_embeds", str(style), "--use_style_token", use_token,
             "--num_images_per_class", "5", "--seed", str(seed), "--output_dir", str(images)]
        )  # fmt: skip
        pixels = as_array(load_dataset(str(images), split="train"))
        figures[use_token] = border_brightness(pixels), saturation(pixels)
    shown = {name: [round(value, 3) for value in values] for name, values in figures.items()}
    losses = {name: value for name, value in health.items() if name.endswith("_token")}
    with capsys.disabled():
        print(f"\nseed {seed}: border brightness and saturation with (true) and without token {shown}; {losses}")
    assert health["token_learned"]
    assert health["loss_trained_token"] < health["loss_no_token"]
    assert figures["true"][0] < 0.05 < 0.25 < figures["false"][0]
    assert figures["true"][1] < 0.10 < 0.25 < figures["false"][1]


def test_the_demo_ends_with_the_method_to_use_then_costs_figures_and_pictures(tmp_path, capsys):
    (tmp_path / "comparison").mkdir()
    write_record(tmp_path / "comparison" / COMPARISON, {"findings": ["Use mix with 1 shot.", "Another sentence."]})
    (tmp_path / "style.txt").write_text("border brightness 0.01\n")
    (tmp_path / "steps.json").write_text('{"comparison": {"seconds": 230.2, "peak_memory_gib": 1.3}}')
    print_ending(StepRunner(ROOT, tmp_path), seconds=348)
    lines = capsys.readouterr().out.split("\n")
    assert lines[1] == "\033[1mUse mix with 1 shot.\033[0m"
    text = "\n".join(lines)
    places = [text.index(part) for part in ("230 s    1.3 GiB", "348 s", "border brightness", "style.png")]
    assert places == sorted(places)
    assert "Another sentence." not in text


@pytest.mark.soak  # in `make test`, the test of the demo's style checks the loss on its own images
def test_the_token_lowers_the_loss_of_images_that_it_has_not_seen(in_root, tmp_path):
    health = train_dsi.main(
        ["--pretrained_model_name_or_path", "demo/generator", "--dataset_name", "demo/fashion-mnist",
         "--initializer_token", "photo", "--max_train_samples", "50", "--max_train_steps", "40", "--train_batch_size",
         "32", "--learning_rate", "1e-2", "--num_validation_images", "0", "--output_dir", str(tmp_path / "style")]
    )  # fmt: skip
    assert health["images"] == "validation images"
    assert health["token_learned"]
    assert health["loss_trained_token"] < 0.9 * health["loss_untrained_token"]
    assert health["loss_trained_token"] < health["loss_no_token"]


def test_three_steps_with_the_adapter_draw_what_twelve_guided_ones_do(in_root, tmp_path):
    def draw(name: str, *flags: str) -> np.ndarray:
        flags = ["--num_images_per_class", "3", "--batch_size", "30", "--image_format", "png", *flags]
        generate_synthetic.main(
            ["--pretrained_model_name_or_path", "demo/generator", "--dataset_name", "demo/fashion-mnist",
             "--scheduler", "default", "--output_dir", str(tmp_path / name), *flags]
        )  # fmt: skip
        return as_array(load_dataset(str(tmp_path / name), split="train")).astype(float)

    three_steps = ["--num_inference_steps", "3", "--guidance_scale", "1"]
    guided = draw("guided", "--num_inference_steps", "12", "--guidance_scale", "1.2")
    errors = {
        name: np.abs(draw(name, *flags) - guided).mean()
        for name, flags in (("with", ["--lora", "demo/few_steps"]), ("without", three_steps))
    }
    recorded = read_record(tmp_path / "with" / GENERATION_CONFIG)["settings"]
    assert recorded["num_inference_steps"] == 3 and recorded["guidance_scale"] == [1.0]
    assert errors["with"] < 0.6 * errors["without"]
