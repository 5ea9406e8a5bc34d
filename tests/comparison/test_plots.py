"""The picture of a comparison: its answer as the title, and in colour what the answer is about."""

import numpy as np
import PIL.Image
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from utils.comparison.grid import Row
from utils.comparison.plots import GREY, Panel, make_panels, plot_comparison, spread

METHODS = ("vanilla_matched", "mix", "bridged", "bridged_keep", "synthetic_only")


def summary_of(methods=METHODS, shots=(1, 4), volumes=(None,), num_seeds=2):
    """Return a summary in which each entry is a little better than the one before."""
    summary, mean = [], 30.0
    for method in methods:
        for volume in volumes if not method.startswith("vanilla") else [None]:
            for num_shots in shots:
                mean += 0.5
                summary.append({
                    "method": method, "volume": volume, "num_shots": num_shots, "mean": mean,
                    "std": 1.0 if num_seeds > 1 else None, "values": [mean] * num_seeds, "num_seeds": num_seeds,
                })  # fmt: skip
    return summary


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draw panels, and return the figure."""
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))

    def draw(*panels: Panel) -> Figure:
        plot_comparison(tmp_path / "comparison.png", list(panels))
        assert PIL.Image.open(tmp_path / "comparison.png").size[0] >= 1000
        return drawn[-1]

    return draw


@pytest.mark.parametrize(
    "shots, volumes, num_axes", [((1, 4, 16), (None,), 1), ((None,), (None,), 1), ((1, 4), (500, 1000), 3)]
)
def test_the_plot_has_axes_for_shots_and_some_for_each_shot_count_over_volumes(shots, volumes, num_axes, draw):
    summary = summary_of(METHODS[:3], shots, volumes)
    axes = draw(Panel("", summary)).axes
    assert len(axes) == num_axes
    if shots == (None,):
        assert [text.get_text() for text in axes[0].get_yticklabels()] == ["bridged", "mix", "vanilla_matched"]
        return
    means = [line.get_ydata().tolist() for line in axes[0].get_lines()]
    last = [entry for entry in summary if entry["method"] == "bridged" and entry["volume"] == volumes[-1]]
    assert [entry["mean"] for entry in last] in means
    for axis, num_shots in zip(axes[1:], shots):
        entries = [entry for entry in summary if entry["num_shots"] == num_shots and entry["method"] == "mix"]
        assert [entry["mean"] for entry in entries] in [list(line.get_ydata()) for line in axis.get_lines()]


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_what_is_highlighted_is_in_colour_and_the_others_are_grey_with_their_names(num_seeds, draw):
    highlighted = ["bridged_keep", "vanilla_matched"]
    (axis,) = draw(Panel("Use it.", summary_of(num_seeds=num_seeds), highlighted)).axes
    colors = {line.get_label(): to_hex(line.lines[0].get_color()) for line in axis.containers}
    assert {method for method, color in colors.items() if color != to_hex(GREY)} == set(highlighted)
    assert colors["bridged_keep"] != colors["vanilla_matched"]
    names = {text.get_text(): text for text in axis.texts}
    assert set(names) == set(METHODS)
    assert [method for method in METHODS if names[method].get_fontweight() == "bold"] == [
        "vanilla_matched", "bridged_keep",
    ]  # fmt: skip
    assert to_hex(names["bridged_keep"].get_color()) == colors["bridged_keep"]


@pytest.mark.parametrize("shots", [(1, 4), (1,)])
def test_the_title_is_the_answer_and_no_text_lies_on_another(shots, draw):
    methods = [f"{method}@{name}" for method in METHODS for name in ("a", "a_set_whose_name_is_very_long_indeed")]
    title = "Use mix with 1 shot: " + "it gains, " * 20 + "it does."
    figure = draw(Panel(title, summary_of(methods, shots), ["mix@a"]))
    figure.set_dpi(130)  # as it was saved
    figure.draw_without_rendering()
    (part,) = figure.subfigs
    assert part._suptitle.get_text().replace("\n", " ") == title
    axis = part.axes[0]
    texts = [part._suptitle, *(axis.texts or axis.get_yticklabels())]
    assert len(texts) == 1 + len(methods)
    # Text's own extent: an annotation's has its leader in it
    boxes = [type(texts[0]).get_window_extent(text) for text in texts]
    assert not any(one.overlaps(other) for number, one in enumerate(boxes) for other in boxes[:number])
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)


def test_each_classifier_has_its_panel_and_answer(draw):
    correct = {
        name: {Row(label, label, "dsi"): {1: right, 4: right} for label, right in rights.items()}
        for name, rights in (
            ("vit", {"vanilla_matched": np.eye(1, 90, dtype=bool), "mix_mixup": np.ones((1, 90), bool)}),
            ("resnet18", {"vanilla_matched": np.ones((1, 90), bool), "mix_mixup": np.ones((1, 90), bool)}),
        )
    }
    summary = [
        {"classifier": name, **entry} for name in correct for entry in summary_of(("vanilla_matched", "mix_mixup"))
    ]
    summary[-1]["mean"] = 99
    vit, resnet = make_panels(summary, correct, ["vit: use it.", "resnet18: do not.", "vit: more."])
    assert (vit.title, vit.highlighted) == ("vit: use it.", ["mix_mixup", "vanilla_matched"])
    assert (resnet.title, resnet.highlighted) == ("resnet18: do not.", ["vanilla_matched"])
    upper, lower = draw(vit, resnet).subfigs
    assert (upper._suptitle.get_text(), lower._suptitle.get_text()) == (vit.title, resnet.title)
    assert upper.axes[0].get_position(original=False).height > 0 and len(upper.axes) == len(lower.axes) == 1
    drawn = [part.axes[0].get_lines()[-3].get_ydata().tolist() for part in (upper, lower)]
    assert [max(values) for values in drawn] == [summary[3]["mean"], 99]


def test_a_method_has_the_same_colour_in_every_panel(draw):
    summary = summary_of()
    upper, lower = draw(
        Panel("", summary, ["mix", "bridged"]), Panel("", summary, ["vanilla_matched", "bridged"])
    ).subfigs
    colors = [
        {line.get_label(): line.lines[0].get_color() for line in part.axes[0].containers} for part in (upper, lower)
    ]
    assert colors[0]["bridged"] == colors[1]["bridged"]
    assert len({colors[0]["mix"], colors[0]["bridged"], colors[1]["vanilla_matched"]}) == 3


def test_places_are_apart_near_their_values_and_within_the_limits():
    values = [10.0, 50.0, 50.5, 50.6, 99.9, 100.0]
    places = spread(values, 5, 0, 100)
    assert np.diff(places).min() >= 5 - 1e-9 and places.max() <= 100
    assert places[0] == 10 and places[2] == pytest.approx(np.mean(values[1:4]))
    assert np.diff(spread([1.0] * 5, 5, 0, 10)).tolist() == [5] * 4, "too many for the limits"


def test_dollars_in_names_of_sets_are_drawn_as_they_are(draw):
    (axis,) = draw(Panel("Use bridged@$\\x$.", summary_of(("vanilla_matched", "bridged@$\\x$")))).axes
    assert "bridged@$\\x$" in {text.get_text() for text in axis.texts}
