import numpy as np

from utils.synthesis.checks import find_problem


def flat(value) -> np.ndarray:
    return np.full((8, 8, 3), value, dtype=np.float32)


def test_find_problem_names_what_is_wrong():
    assert find_problem(flat(0)) == "black"
    assert find_problem(flat(0.5)) == "constant"
    assert find_problem(flat(np.nan)) == "not a number"
    assert find_problem(np.random.default_rng(0).random((8, 8, 3)), flagged=True) == "flagged by the safety checker"


def test_constant_colour_is_constant():
    pixels = flat(0)
    pixels[..., 0] = 0.8
    assert find_problem(pixels) == "constant"


def test_dark_and_pale_images_are_good():
    dark = flat(0)
    dark[3:5, 3:5] = 4 / 255
    assert find_problem(dark) is None
    assert find_problem(1 - dark) is None
