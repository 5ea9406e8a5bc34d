"""The pictures and the table of a quality report show the images and names of its record unchanged."""

import numpy as np
from PIL import Image

from utils.quality.presentation import plot_pairs, print_quality


def test_each_pair_is_shown_image_above_image(tmp_path):
    colours = {"synthetic": [(250, 0, 0), (0, 250, 0), (0, 0, 250)], "test": [(250, 250, 0), (0, 250, 250)]}
    images = {
        kind: [{"image": Image.new("RGB", (8, 8), colour)} for colour in chosen] for kind, chosen in colours.items()
    }
    pair = {"synthetic_row": 7, "synthetic_class": "$\\car$", "other_row": 8, "other_class": "bus"}
    pair |= {"similarity": 0.9, "is_copy": False}
    duplicates = {"test": {"threshold": 0.95, "pairs": [pair, pair]}}
    plot_pairs(tmp_path / "pairs.png", duplicates, {"test": [(2, 1), (0, 0)]}, images)
    pixels = np.asarray(Image.open(tmp_path / "pairs.png").convert("RGB"))

    def centre(colour) -> np.ndarray:
        return np.argwhere((pixels == colour).all(-1)).mean(0)

    assert not (pixels == (0, 250, 0)).all(-1).any()  # of no pair
    above, below, second, under = map(centre, [(0, 0, 250), (0, 250, 250), (250, 0, 0), (250, 250, 0)])
    assert above[0] < below[0] and second[0] < under[0]
    assert abs(above[1] - below[1]) < 1 and abs(second[1] - under[1]) < 1 and above[1] < second[1]


def test_brackets_in_names_are_printed_as_they_are(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    figures = dict.fromkeys(("shift", "shift_floor", "diversity", "real_diversity", "own_share", "real_own_share"), 1.0)
    count = {"used": 1}
    print_quality({
        "classes": [{"class": "[red]car :car:", "num_images": 1, **figures}],
        "num_images": {"synthetic": count, "train": count, "held_out": count, "test": count},
        "synthetic": {"id": "[bold]set"}, "model": {"id": "[dim]model"}, "verdicts": [], "caveats": [],
    })  # fmt: skip
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("[red]car :car:", "[bold]set", "[dim]model"))
