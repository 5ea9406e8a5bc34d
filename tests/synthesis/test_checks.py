import numpy as np
import pytest
import torch

from utils.synthesis.sampling import find_problems


def flat(value) -> torch.Tensor:
    return torch.full((3, 8, 8), value, dtype=torch.float32)


def problem_of(pixels, flagged=False):
    return find_problems(pixels.unsqueeze(0), [flagged])[1][0]


def test_what_is_wrong_is_named():
    assert problem_of(flat(0)) == "black"
    assert problem_of(flat(0.5)) == "constant"
    assert problem_of(flat(torch.nan)) == "not a number"
    assert problem_of(torch.rand(3, 8, 8), flagged=True) == "flagged by the safety checker"
    assert problem_of(torch.rand(3, 8, 8)) is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_no_number_is_found(value):
    pixels = torch.rand(3, 8, 8)
    pixels[1, 2, 3] = value
    assert problem_of(pixels) == "not a number"


def test_black_image_of_a_safety_checker_is_told_as_flagged():
    assert problem_of(flat(0), flagged=True) == "flagged by the safety checker"


def test_one_colour_is_constant():
    pixels = flat(0)
    pixels[0] = 0.8
    assert problem_of(pixels) == "constant"


def test_change_in_a_single_channel_is_an_image():
    pixels = flat(0.5)
    pixels[2, :4] = 0.6
    assert problem_of(pixels) is None


def test_one_level_of_noise_is_still_constant_and_two_are_not():
    pixels = flat(100 / 255)
    pixels[:, 0] = 101 / 255
    assert problem_of(pixels) == "constant"
    pixels[:, 0] = 102 / 255
    assert problem_of(pixels) is None
    assert problem_of(flat(1 / 255)) == "black"
    assert problem_of(flat(2 / 255)) == "constant"


def test_dark_and_pale_images_are_good():
    dark = flat(0)
    dark[:, 3:5, 3:5] = 4 / 255
    assert problem_of(dark) is None
    assert problem_of(1 - dark) is None


def test_images_of_a_batch_are_judged_each_by_itself():
    batch = torch.stack([torch.rand(3, 8, 8), flat(0), torch.rand(3, 8, 8), flat(torch.nan)])
    assert find_problems(batch, [False, False, True, False])[1] == [
        None, "black", "flagged by the safety checker", "not a number",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_levels_are_rounded_to_the_nearest_in_float32(dtype):
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    levels, _ = find_problems(pixels, [False, False])
    assert levels.dtype == torch.uint8
    np.testing.assert_array_equal(levels.numpy(), np.rint(pixels.float().numpy() * 255).astype(np.uint8))
