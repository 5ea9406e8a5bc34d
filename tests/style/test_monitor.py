import torch
from PIL import Image

from utils.style.monitor import WINDOW, draw_rows, has_plateaued, judge


def test_a_token_learned_only_if_the_gain_exceeds_its_standard_error():
    untrained = torch.linspace(0.4, 0.6, 16)
    arms = {"no_token": untrained, "untrained_token": untrained}
    assert judge({**arms, "trained_token": untrained - 0.05})["token_learned"]
    assert not judge({**arms, "trained_token": untrained})["token_learned"]
    noisy_gain = torch.tensor([1.0, -1.0] * 8) * 0.1 - 0.001
    assert not judge({**arms, "trained_token": untrained + noisy_gain})["token_learned"]


def looks(*means, noise=0.0, num_images=16):
    """Return each image's loss at each look, with the given means and noise between looks."""
    generator = torch.Generator().manual_seed(0)
    images = torch.linspace(0.4, 0.6, num_images)
    return [(mean + images + noise * torch.randn(num_images, generator=generator)).tolist() for mean in means]


def test_training_has_plateaued_if_a_window_of_looks_gained_nothing_beyond_its_noise():
    falling = [-0.01 * number for number in range(12)]
    level = [0.0, -0.1, *[-0.1] * WINDOW]
    assert not any(has_plateaued(looks(*falling[:number], noise=0.002)) for number in range(1, 13))
    assert not has_plateaued(looks(*level[:-1], noise=0.002)), "the window is not over"
    assert has_plateaued(looks(*level, noise=0.002))
    assert has_plateaued(looks(*level)), "without noise, too"
    assert not has_plateaued(looks(*level[:-1], -0.12, noise=0.002)), "the last look gained"
    assert has_plateaued(looks(*level, -0.05, -0.05, -0.05)), "what gets worse has, too"


def test_a_tiny_gain_over_very_many_images_does_not_count():
    creeping = looks(0.0, -0.1, -0.1002, -0.1004, -0.1006, noise=1e-5, num_images=4096)
    assert has_plateaued(creeping)
    assert not has_plateaued(looks(0.0, -0.1, -0.102, -0.104, -0.106, noise=1e-5, num_images=4096))


def test_dollars_in_names_are_drawn_as_they_are(tmp_path):
    draw_rows(tmp_path / "rows.png", {"$\\real$": [Image.new("RGB", (4, 4))]}, ["$\\x$"])
    assert (tmp_path / "rows.png").is_file()
