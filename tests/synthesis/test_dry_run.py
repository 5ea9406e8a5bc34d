"""Measurements and estimates of a dry run."""

import diffusers
import pytest

from generate_synthetic import main
from tests.style.pipelines import change_config
from utils.synthesis import dry_run
from utils.synthesis.dry_run import ALTERNATIVES, Alternative, BatchCost, watch_denoiser
from utils.synthesis.guidance import find_denoiser
from utils.synthesis.sampling import Sampler

pytest_plugins = ["tests.synthesis.fixtures"]
PROMPTS, SEEDS = ["a red square", "a green circle", "a red square"], [3, 4, 5]


@pytest.mark.parametrize("kind", ["tiny_pipeline_dir", "tiny_sd3_pipeline_dir", "tiny_flux_pipeline_dir"])
@pytest.mark.parametrize(("scale", "interval", "num_guided"), [(1.0, None, 0), (4.0, None, 4), (4.0, (0.25, 0.75), 2)])
def test_a_pass_counts_the_images_that_the_denoiser_computes(kind, scale, interval, num_guided, request):
    if kind == "tiny_flux_pipeline_dir":
        num_guided = 0  # its denoiser takes the scale as an input
        if interval:
            pytest.skip("FLUX has no guidance interval")
    pipe = diffusers.DiffusionPipeline.from_pretrained(request.getfixturevalue(kind))
    sampler = Sampler(pipe, resolution=32, num_inference_steps=4, num_at_a_time=3, guidance_interval=interval)
    before = sampler.interval.forward if interval else find_denoiser(pipe).forward
    cost = BatchCost(num_images=3)
    with watch_denoiser(sampler, cost):
        sampler.draw(PROMPTS, SEEDS, scale)
    assert cost.num_seen == 3 * (4 + num_guided)
    assert cost.denoiser_seconds > 0
    holder = sampler.interval or find_denoiser(pipe)
    assert holder.forward == before


def test_the_cost_of_a_setting_is_its_passes_plus_the_rest():
    # 10 images with guidance: 60 s for 20 steps of two passes each, 5 s for the rest
    cost = BatchCost(num_images=10, seconds=65.0, denoiser_seconds=60.0, num_seen=10 * 20 * 2)
    assert cost.seconds_per_image(Alternative(20, 3.0), doubles=True) == pytest.approx(6.5)
    assert cost.seconds_per_image(Alternative(12, 3.0), doubles=True) == pytest.approx(0.5 + 24 * 0.15)
    assert cost.seconds_per_image(Alternative(12, 1.0), doubles=True) == pytest.approx(0.5 + 12 * 0.15)
    assert cost.seconds_per_image(Alternative(12, 3.0), doubles=False) == pytest.approx(0.5 + 12 * 0.15)


@pytest.fixture
def measured(monkeypatch):
    """Set the cost of batches of three images: 0.1 s for a pass and 0.5 s for the rest of an image."""
    scales = []

    def draw_batch(plan, start, scale, sampler, settings, sizes):
        scales.append(scale)
        sizes.append(1000)
        num_passes = settings["num_inference_steps"] * (2 if scale > 1 else 1)
        return BatchCost(3, 3 * (0.5 + 0.1 * num_passes), 0.3 * num_passes, 3 * num_passes)

    monkeypatch.setattr(dry_run, "draw_batch", draw_batch)
    return scales


def test_alternatives_are_printed_below_the_requested_settings(measured, options, tmp_path, capsys):
    estimate = main([*options, "--guidance_scale", "4", "--output_dir", str(tmp_path / "none"), "--dry_run"])
    assert estimate["seconds"] == pytest.approx(21 * (0.5 + 0.1 * 4))
    expected = {"25 steps, guidance 3": 5.5, "12 steps, guidance 3": 2.9, "12 steps, no guidance": 1.7}
    expected["4 steps with an acceleration adapter (--lora), no guidance"] = 0.9
    assert estimate["alternatives"] == pytest.approx({text: 21 * seconds for text, seconds in expected.items()})
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(next(line for line in lines if line.startswith("With other settings")))
    assert "0.1 s per pass of the denoiser and 0.5 s for the rest" in lines[start]
    assert [line.split("  ")[1] for line in lines[start + 1 :]] == ["as requested: 2 steps, guidance 4", *expected]
    assert lines[start + 1].endswith("  19 s") and lines[start + 2].endswith("  116 s")


def test_the_requested_settings_are_not_an_alternative(measured, options, tmp_path):
    flags = [*options, "--num_inference_steps", "12", "--output_dir", str(tmp_path / "none"), "--dry_run"]
    same = main([*flags, "--guidance_scale", "3"])["alternatives"]
    assert len(same) == len(ALTERNATIVES) - 1 and "12 steps, guidance 3" not in same
    others = ["--guidance_interval", "0.2", "0.8"], ["--guidance_scale", "1", "3"]
    for other in others:  # neither takes as long
        assert len(main([*flags, *other])["alternatives"]) == len(ALTERNATIVES)


def test_scales_without_guidance_count_by_their_share(measured, options, tmp_path):
    flags = [*options, "--output_dir", str(tmp_path / "none"), "--dry_run", "--guidance_scale"]
    estimate = main([*flags, "3", "1", "4"])
    assert set(measured) == {3.0, 1.0}  # one of each kind, warmed up
    assert measured == [3.0, 3.0, 1.0, 1.0]
    assert estimate["seconds"] == pytest.approx(21 * (2 * 0.9 + 0.7) / 3)
    measured.clear()
    main([*flags, "3", "4"])
    assert measured == [3.0, 3.0]


def test_a_distilled_generator_has_no_alternatives(measured, copy_pipeline, tmp_path, capsys):
    folder = copy_pipeline()
    change_config(folder / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    change_config(folder / "scheduler/scheduler_config.json", _class_name="LCMScheduler")
    (tmp_path / "names.txt").write_text("dog\n")
    estimate = main(["--pretrained_model_name_or_path", str(folder), "--class_names_file", str(tmp_path / "names.txt"),
                     "--batch_size", "3", "--num_images_per_class", "3", "--dry_run"])  # fmt: skip
    assert estimate["alternatives"] == {}
    assert "With other settings" not in capsys.readouterr().out
