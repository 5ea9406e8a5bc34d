import torch
from PIL import Image

from utils.style.monitor import draw_rows, judge


def test_a_token_learned_only_when_the_gain_stands_out_of_its_noise():
    untrained = torch.linspace(0.4, 0.6, 16)
    arms = {"no_token": untrained, "untrained_token": untrained}
    assert judge({**arms, "trained_token": untrained - 0.05})["token_learned"]
    assert not judge({**arms, "trained_token": untrained})["token_learned"]
    noisy_gain = torch.tensor([1.0, -1.0] * 8) * 0.1 - 0.001
    assert not judge({**arms, "trained_token": untrained + noisy_gain})["token_learned"]


def test_dollars_in_names_are_drawn_as_they_are(tmp_path):
    draw_rows(tmp_path / "rows.png", {"$\\real$": [Image.new("RGB", (4, 4))]}, ["$\\x$"])
    assert (tmp_path / "rows.png").is_file()
