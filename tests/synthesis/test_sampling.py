"""Sampling with tiny pipelines of the real classes draws what the pipeline itself draws."""

import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPAGPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from tests.synthesis.tokens import open_folder
from utils.cli.errors import UserError
from utils.synthesis.sampling import PromptCache, Sampler, find_problems, load_pipeline

KINDS = ["tiny_pipeline_dir", "tiny_xl_pipeline_dir", "tiny_sd3_pipeline_dir", "tiny_flux_pipeline_dir"]
PROMPTS = ["a red square", "a green circle", "a red square"]
SEEDS = [3, 4, 5]
SETTINGS = {"height": 32, "width": 32, "num_inference_steps": 2}


def load(folder) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_sampler(pipe, num_at_a_time=3, **options) -> Sampler:
    return Sampler(pipe, resolution=32, num_inference_steps=2, num_at_a_time=num_at_a_time, **options)


def draw_alone(pipe, prompt, seed, **options) -> np.ndarray:
    """Return the levels of the image that a user of diffusers gets."""
    generator = torch.Generator().manual_seed(seed)
    return np.rint(pipe(prompt, generator=generator, output_type="np", **SETTINGS, **options).images[0] * 255)


def assert_same(drawn, levels):
    """Return whether images are equal, up to a few values one level apart, as other kernels round differently."""
    difference = np.abs(np.asarray(levels, dtype=int) - drawn)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.fixture
def pipe(tiny_pipeline_dir):
    return load(tiny_pipeline_dir)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("negative_prompt", ["", "ugly"])
def test_images_are_those_the_pipeline_draws(kind, guidance_scale, negative_prompt, request):
    folder = request.getfixturevalue(kind)
    takes_it = kind != "tiny_flux_pipeline_dir"
    sampler = make_sampler(load(folder), negative_prompt=negative_prompt if takes_it else "")
    pixels, problems = sampler.draw(PROMPTS, SEEDS, guidance_scale)
    assert (pixels.shape, pixels.dtype, problems) == ((3, 32, 32, 3), np.uint8, [None] * 3)
    options = {"negative_prompt": negative_prompt} if negative_prompt and takes_it else {}
    user = load(folder)
    for prompt, seed, drawn in zip(PROMPTS, SEEDS, pixels):
        assert_same(drawn, draw_alone(user, prompt, seed, guidance_scale=guidance_scale, **options))
    assert np.abs(pixels[0].astype(int) - pixels[2]).mean() > 1  # the same prompt, another seed


@pytest.mark.parametrize("kind", KINDS)
def test_each_setting_changes_the_image(kind, request):
    """Otherwise the comparison with the pipeline would mean little."""
    pipe = load(request.getfixturevalue(kind))
    pixels, _ = make_sampler(pipe).draw(["a red square", "a green circle", "zzz"], [3, 3, 3], 4.0)
    guided, _ = make_sampler(pipe).draw(["a red square"], [3], 40.0)
    others = [pixels[1], guided[0]]
    if kind != "tiny_flux_pipeline_dir":
        others.append(make_sampler(pipe, negative_prompt="ugly").draw(["a red square"], [3], 4.0)[0][0])
    assert all((np.abs(other.astype(int) - pixels[0]) > 1).any() for other in others)


def test_a_pipeline_of_another_kind_gets_its_prompts_as_text(pipe):
    pag = StableDiffusionPAGPipeline(**pipe.components, requires_safety_checker=False)
    pixels, _ = make_sampler(pag, negative_prompt="ugly").draw(PROMPTS, SEEDS, 4.0)
    for prompt, seed, drawn in zip(PROMPTS, SEEDS, pixels):
        assert_same(drawn, draw_alone(pag, prompt, seed, guidance_scale=4.0, negative_prompt="ugly"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_images_on_a_gpu_are_those_of_the_cpu(kind, request):
    pipe = load(request.getfixturevalue(kind))
    expected, _ = make_sampler(pipe).draw(PROMPTS, SEEDS, 4.0)
    pixels, problems = make_sampler(pipe.to("cuda")).draw(PROMPTS, SEEDS, 4.0)
    assert problems == [None] * 3
    assert np.abs(pixels.astype(int) - expected).mean() < 1


def test_an_image_does_not_depend_on_its_batch(pipe):
    sampler = make_sampler(pipe)
    pixels, _ = sampler.draw(PROMPTS, SEEDS, 4.0)
    others, _ = sampler.draw(["z", PROMPTS[1], "zz"], [7, SEEDS[1], 8], 4.0)
    np.testing.assert_array_equal(others[1], pixels[1])
    alone, _ = sampler.draw(PROMPTS[1:2], SEEDS[1:2], 4.0)  # padded: computed by the same kernels
    np.testing.assert_array_equal(alone, pixels[1:2])
    again, _ = sampler.draw(PROMPTS * 2, SEEDS + [6, 7, 8], 4.0)  # more than fit at a time
    np.testing.assert_array_equal(again[:3], pixels)
    assert again.shape[0] == 6


def count_calls(module) -> list:
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


# diffusers encodes a prompt together with the negative one; XL uses zeros without one, and FLUX has none
@pytest.mark.parametrize(("kind", "encoder", "num_for_negative"), zip(KINDS, ["", "_2", "_3", "_2"], [2, 1, 2, 0]))
def test_each_prompt_is_encoded_once(kind, encoder, num_for_negative, request):
    pipe = load(request.getfixturevalue(kind))
    calls = count_calls(getattr(pipe, f"text_encoder{encoder}"))
    sampler = make_sampler(pipe)
    for seeds in ([1, 2, 3], [4, 5, 6]):
        sampler.draw(PROMPTS, seeds, 1.0)
    assert len(calls) == 2
    for guidance_scale in (3.0, 4.0):
        sampler.draw(PROMPTS, SEEDS, guidance_scale)
    assert len(calls) == 2 + num_for_negative


def test_cache_is_bounded_and_keeps_what_came_first(pipe):
    one = PromptCache(pipe, "").batch(["a"], False)["prompt_embeds"].nbytes
    cache = PromptCache(pipe, "", max_bytes=2 * one + 1)
    calls = count_calls(pipe.text_encoder)
    for _ in range(2):
        for prompt in ("a", "b", "c"):
            embeds = cache.batch([prompt], False)["prompt_embeds"]
            expected = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
            torch.testing.assert_close(embeds, expected)
    assert len(calls) - 6 == 4  # 'c' twice; 6 are from the test itself
    assert list(cache.kept) == ["a", "b"]


def limit_memory(pipe, num_images: int) -> list[int]:
    """Let the U-Net run out of memory above `num_images`; return the sizes that it is called with."""
    sizes = []

    def check(_, arguments):
        sizes.append(len(arguments[0]))
        if len(arguments[0]) > num_images:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    pipe.unet.register_forward_pre_hook(check)
    return sizes


def test_out_of_memory_halves_the_batch_with_one_warning(tiny_pipeline_dir, pipe, caplog):
    expected, _ = make_sampler(load(tiny_pipeline_dir), 5).draw(["a"] * 5, [1, 2, 3, 4, 5], 1.0)
    sizes, sampler = limit_memory(pipe, 2), make_sampler(pipe, 5)
    pixels, problems = sampler.draw(["a"] * 5, [1, 2, 3, 4, 5], 1.0)
    assert_same(pixels, expected)
    assert problems == [None] * 5
    assert sampler.num_at_a_time == 2
    assert sizes == [5] + [2] * 6  # two steps each for 2, for 2, and for the last one with padding
    sampler.draw(["a"] * 5, SEEDS + [1, 2], 1.0)
    assert caplog.messages == ["Out of memory with 5 images at a time; continuing with 2."]


def test_out_of_memory_with_one_image_is_an_error_that_names_the_flag(pipe):
    limit_memory(pipe, 0)
    with pytest.raises(
        UserError, match=r"^--resolution 32: a single image does not .* lower it, .*--mixed_precision bf16"
    ):
        make_sampler(pipe, 4).draw(["a"] * 4, [1, 2, 3, 4], 1.0)


def add_safety_checker(pipe, flags_all: bool) -> None:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**size, "image_size": 16, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=size, vision_config=vision, projection_dim=16))
    checker.concept_embeds_weights.fill_(-2.0 if flags_all else 2.0)  # beyond any cosine
    checker.special_care_embeds_weights.fill_(2.0)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pipe.register_modules(safety_checker=checker.eval(), feature_extractor=processor)


@pytest.mark.parametrize(("flags_all", "problem"), [(True, "flagged by the safety checker"), (False, None)])
def test_the_safety_checker_of_a_repository_stays_and_its_flags_count(pipe, flags_all, problem, tmp_path):
    add_safety_checker(pipe, flags_all)
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(open_folder(tmp_path), None, "default", torch.float32, torch.device("cpu"))
    assert isinstance(loaded.safety_checker, StableDiffusionSafetyChecker)
    for part in (pipe, loaded):
        assert make_sampler(part).draw(PROMPTS, SEEDS, 1.0)[1] == [problem] * 3


def test_nothing_is_printed_or_logged(pipe, capfd, caplog, monkeypatch):
    pipe.set_progress_bar_config(disable=False)
    add_safety_checker(pipe, flags_all=True)
    library = logging.getLogger("diffusers")
    monkeypatch.setattr(library, "handlers", [caplog.handler])
    prompt = "a very " + "long " * 80 + "prompt"
    sampler = make_sampler(pipe)
    capfd.readouterr()
    sampler.draw([prompt] * 3, SEEDS, 4.0)
    assert (capfd.readouterr(), caplog.messages) == (("", ""), [])
    draw_alone(pipe, prompt, 0)  # the pipeline itself warns about both, and still does afterwards
    assert any("truncated" in message for message in caplog.messages)
    assert any("black image" in message for message in caplog.messages)


def test_compiled_model_is_not_compiled_again_for_batches_and_guidance_scales(tiny_pipeline_dir, pipe):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    sampler = make_sampler(pipe, compile_model=True, compile_backend="eager")
    pixels, _ = sampler.draw(PROMPTS, SEEDS, 4.0)
    expected, _ = make_sampler(load(tiny_pipeline_dir)).draw(PROMPTS, SEEDS, 4.0)
    assert_same(pixels, expected)
    num_graphs = counters["stats"]["unique_graphs"]
    assert num_graphs > 0
    sampler.draw(PROMPTS, [6, 7, 8], 3.0)
    sampler.draw(PROMPTS[:2], SEEDS[:2], 2.5)
    assert counters["stats"]["unique_graphs"] == num_graphs


def record_passes(sampler) -> list[int]:
    """Return a list of the batch sizes that the denoiser of a sampler with an interval will see."""
    forward, sizes = sampler.interval.forward, []
    sampler.interval.forward = lambda sample, *args, **kwargs: (
        sizes.append(len(sample)), forward(sample, *args, **kwargs)
    )[1]  # fmt: skip
    return sizes


@pytest.mark.parametrize("kind", KINDS[:3])
def test_steps_outside_the_interval_compute_half_a_batch_without_guidance(kind, request):
    def draw(interval, scale=4.0):
        sampler = Sampler(
            load(request.getfixturevalue(kind)), resolution=32, num_inference_steps=4, num_at_a_time=3,
            negative_prompt="ugly", guidance_interval=interval,
        )  # fmt: skip
        sizes = record_passes(sampler) if interval else []
        return sampler.draw(PROMPTS, SEEDS, scale)[0], sizes

    (everywhere, _), (nowhere, _) = draw(None), draw(None, 1.0)
    whole, sizes = draw((0.0, 1.0))
    assert sizes == [6, 6, 6, 6] and (whole == everywhere).all()
    middle, sizes = draw((0.25, 0.75))
    assert sizes == [3, 6, 6, 3]
    assert (middle != everywhere).any() and (middle != nowhere).any()
    never, sizes = draw((0.9, 1.0))  # after the last step
    assert sizes == [3, 3, 3, 3]
    assert_same(never, nowhere)
    unguided, sizes = draw((0.25, 0.75), 1.0)
    assert sizes == [3, 3, 3, 3] and (unguided == nowhere).all()


@pytest.mark.parametrize(
    ("scheduler", "guided"),
    [
        ("HeunDiscreteScheduler", [6] * 4 + [3] * 3), ("KDPM2DiscreteScheduler", [6] * 4 + [3] * 3),
        ("DDIMScheduler", [6, 6, 3, 3]), ("LCMScheduler", [6, 6, 3, 3]), ("UniPCMultistepScheduler", [6, 6, 3, 3]),
    ],
)  # fmt: skip
def test_an_interval_is_of_all_passes_also_where_a_step_takes_two(scheduler, guided, pipe):
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    size = {"resolution": 32, "num_inference_steps": 4, "num_at_a_time": 3}
    unguided, _ = Sampler(pipe, **size).draw(PROMPTS, SEEDS, 1.0)
    sampler = Sampler(pipe, **size, guidance_interval=(0.0, 0.5))
    sizes = record_passes(sampler)
    first, again = (sampler.draw(PROMPTS, SEEDS, 4.0)[0] for _ in range(2))  # each call starts over
    assert sizes == 2 * guided
    assert (first == again).all() and (first != unguided).any()
    sampler.interval.low, sampler.interval.high = 0.99, 1.0  # after the last pass
    assert_same(sampler.draw(PROMPTS, SEEDS, 4.0)[0], unguided)


def flat(value: float, place=None, other: float = 0.0) -> torch.Tensor:
    """Return an image of one level, with another level at one place."""
    pixels = torch.full((3, 8, 8), float(value))
    if place is not None:
        pixels[place] = other
    return pixels


def noise(value: float | None = None) -> torch.Tensor:
    """Return an image, with a value at one place."""
    pixels = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels[1, 2, 3] = pixels[1, 2, 3] if value is None else value
    return pixels


TOP, CENTRE = (slice(None), 0), (slice(None), slice(3, 5), slice(3, 5))
JUDGED = [
    (noise(), None),
    (noise()[:1].expand(3, -1, -1), None),  # grey
    (flat(0), "black"),
    (flat(1 / 255), "black"),
    (flat(2 / 255), "constant"),
    (flat(0.5), "constant"),
    (flat(torch.nan), "not a number"),
    *((noise(value), "not a number") for value in (torch.nan, torch.inf, -torch.inf)),  # one is enough
    (flat(0, 0, 0.8), "constant"),  # one colour
    (flat(0.5, (2, slice(4)), 0.6), None),  # a change in a single channel
    (flat(100 / 255, TOP, 101 / 255), "constant"),  # a level of noise
    (flat(100 / 255, TOP, 102 / 255), None),
    (flat(0, CENTRE, 4 / 255), None),  # dark
    (flat(1, CENTRE, 251 / 255), None),  # pale
]


def test_problems_are_named_for_each_image_of_a_batch():
    batch, expected = torch.stack([pixels for pixels, _ in JUDGED]), [problem for _, problem in JUDGED]
    assert find_problems(batch, [False] * len(batch))[1] == expected
    flags = [number % 2 == 1 for number in range(len(batch))]  # also for black images, which a safety checker makes
    told = [problem if not flag else "flagged by the safety checker" for problem, flag in zip(expected, flags)]
    assert find_problems(batch, flags)[1] == told


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_levels_are_rounded_to_the_nearest_in_float32(dtype):
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    levels, _ = find_problems(pixels, [False, False])
    assert levels.dtype == torch.uint8
    np.testing.assert_array_equal(levels.numpy(), np.rint(pixels.float().numpy() * 255).astype(np.uint8))
