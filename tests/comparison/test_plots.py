"""The pictures of a comparison: accuracies, in colour what the answer is about, and gains over the reference."""

from itertools import combinations

import numpy as np
import PIL.Image
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from utils.comparison.gains import STYLES, plot_gains
from utils.comparison.plots import COLORS, DPI, GREY, Panel, make_panels, plot_comparison, spread

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
def figures(monkeypatch):
    """Return the figures that were saved."""
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    return drawn


@pytest.fixture
def draw(tmp_path, figures):
    """Draw panels, and return the figure."""

    def draw(*panels: Panel, highlighted=METHODS) -> Figure:
        plot_comparison(tmp_path / "comparison.png", list(panels), highlighted)
        assert PIL.Image.open(tmp_path / "comparison.png").size[0] >= 1000
        return figures[-1]

    return draw


def overlapping(figure: Figure, texts: list) -> list[tuple[str, str]]:
    """Return which of the texts lie on one another or leave the picture."""
    figure.set_dpi(DPI)
    figure.draw_without_rendering()
    boxes = [
        (text.get_text(), Text.get_window_extent(text)) for text in texts
    ]  # an annotation's own would have its leader in it
    pairs = [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]
    outside = [(one, "") for one, box in boxes if box.x0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1]
    return pairs + outside


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
        assert {text.get_text() for text in axis.texts} == set(METHODS[:3]), "each line has its name at its end"


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_what_is_highlighted_has_colour_and_bars_and_the_others_are_grey_with_their_names(num_seeds, draw):
    highlighted = ["vanilla_matched", "bridged_keep"]
    (axis,) = draw(Panel("Use it.", summary_of(num_seeds=num_seeds)), highlighted=highlighted).axes
    colors = {line.get_label(): to_hex(line.lines[0].get_color()) for line in axis.containers}
    assert colors == dict(zip(highlighted, COLORS)), "with bars, in the colours' order"
    grey = {line.get_label() for line in axis.get_lines() if to_hex(line.get_color()) == to_hex(GREY)}
    assert grey == set(METHODS) - set(highlighted)
    names = {text.get_text(): text for text in axis.texts}
    assert set(names) == set(METHODS)
    assert {name for name, text in names.items() if text.get_fontweight() == "bold"} == set(highlighted)
    assert to_hex(names["bridged_keep"].get_color()) == colors["bridged_keep"]
    assert ("standard deviation over 2 seeds" in axis.get_xlabel()) == (num_seeds == 2)


@pytest.mark.parametrize("shots, volumes", [((1, 4), (None,)), ((1,), (None,)), ((1, 4, 16), (500, 1000))])
def test_the_title_is_the_answer_and_no_text_lies_on_another(shots, volumes, draw):
    methods = [f"{method}@{name}" for method in METHODS for name in ("a", "a_set_whose_name_is_very_long_indeed")]
    title = "Use mix with 1 shot: " + "it gains, " * 20 + "it does."
    summary = summary_of(methods, shots, volumes)
    summary = [entry | ({"mean": 40.0} if entry["num_shots"] == shots[-1] else {}) for entry in summary]  # lines meet
    figure = draw(Panel(title, summary), highlighted=methods[2:8])
    (part,) = figure.subfigs
    assert part._suptitle.get_text().replace("\n", " ") == title
    names = [text for axis in part.axes for text in axis.texts] or part.axes[0].get_yticklabels()
    num_named = len(methods) + 6 * (len(part.axes) - 1)
    assert len(names) == num_named
    labels = [text for axis in part.axes for text in (axis.xaxis.label, axis.yaxis.label, axis.title)]
    assert not overlapping(figure, [part._suptitle, *names, *filter(Text.get_text, labels)])


def test_each_classifier_has_its_panel_and_answer_and_methods_one_colour(draw):
    summary = [{"classifier": name, **entry} for name in ("vit", "resnet18") for entry in summary_of()]
    summary[-1]["mean"] = 99
    answers = ["vit: use it.", "resnet18: do not.", "vit: more."]
    upper, lower = draw(
        *make_panels(summary, ["vit", "resnet18"], answers), highlighted=["mix", "synthetic_only"]
    ).subfigs
    assert (upper._suptitle.get_text(), lower._suptitle.get_text()) == tuple(answers[:2])
    assert len(upper.axes) == len(lower.axes) == 1
    bars = [{bars.get_label(): bars.lines[0] for bars in part.axes[0].containers} for part in (upper, lower)]
    assert [max(lines["synthetic_only"].get_ydata()) for lines in bars] == [35, 99]
    assert [lines["mix"].get_color() for lines in bars] == 2 * [COLORS[0]]


def test_names_are_apart_near_the_ends_of_their_lines_and_within_the_limits():
    values, heights = [10.0, 50.0, 50.5, 50.6, 99.9, 100.0], [5, 5, 3, 5, 5, 5]
    places = spread(values, heights, 0, 100)
    assert (np.diff(places) >= np.add(heights[1:], heights[:-1]) / 2 - 1e-9).all() and places.max() == 97.5
    assert places[0] == 10 and np.mean(places[1:4]) == pytest.approx(np.mean(values[1:4]))
    assert np.diff(spread([1.0] * 5, [5] * 5, 0, 10)).tolist() == [5] * 4, "too many for the limits"


def test_dollars_in_names_of_sets_are_drawn_as_they_are(draw):
    (axis,) = draw(Panel("Use bridged@$\\x$.", summary_of(("vanilla_matched", "bridged@$\\x$")))).axes
    assert "bridged@$\\x$" in {text.get_text() for text in axis.texts}


def with_gains(summary: list[dict], gains: list[tuple]) -> list[dict]:
    """Return a summary in which all rows but the first have these gains and intervals, in turn."""
    for number, entry in enumerate(summary):
        if entry["method"] != summary[0]["method"]:
            gain, low, high = gains[number % len(gains)]
            entry |= {"gain": gain, "gain_low": low, "gain_high": high, "num_test_images": 90}
    return summary


def test_gains_have_a_dot_and_an_interval_in_the_order_of_the_table(figures, tmp_path):
    gains = [(5.0, 2.0, 8.0), (-4.0, -6.0, -2.0), (1.0, -1.0, 3.0), (3.0, None, None)]
    plot_gains(tmp_path / "gain.png", with_gains(summary_of(METHODS, (1, 4)), gains), "vanilla_matched")
    one, four = figures[-1].axes
    assert (one.get_title(), four.get_title()) == ("1 shot", "4 shots")
    assert [label.get_text() for label in reversed(one.get_yticklabels())] == list(METHODS[1:])
    drawn = [list(line.get_xdata()) for line in one.get_lines()]
    assert drawn == [[2, 8], [5], [-1, 3], [1], [2, 8], [5], [-1, 3], [1], [0, 0]], "from the last row, then zero"
    assert [list(line.get_xdata()) for line in four.get_lines()][:3] == [[-6, -2], [-4], [3]]
    faces = [to_hex(line.get_markerfacecolor()) for line in one.get_lines()]
    assert faces[1] == STYLES["gains"]["color"] and faces[3] == to_hex("white")
    title = figures[-1]._suptitle.get_text()
    assert "Gain over vanilla_matched" in title and "95 % intervals" in title and "cross: interval not known" in title


def test_no_text_of_the_gains_lies_on_another(figures, tmp_path):
    methods = [f"{method}@{name}" for method in METHODS for name in ("a", "a_set_whose_name_is_very_long_indeed")]
    summary = with_gains(summary_of(methods, (1, 4, 16), (500, 1000)), [(-30.0, -55.0, -5.0), (12.0, 2.0, 22.0)])
    summary = [{"classifier": name, **entry} for name in ("vit", "resnet18") for entry in summary]
    plot_gains(tmp_path / "gain.png", summary, methods[0])
    figure = figures[-1]
    texts = [figure._suptitle, *(part._suptitle for part in figure.subfigs)]
    for axis in figure.axes:
        shown = (label for label in axis.get_yticklabels() if label.get_visible())
        low, high = axis.get_xlim()
        ticks = [text for text in axis.get_xticklabels() if low <= text.get_position()[0] <= high]
        texts += [axis.title, *shown, *ticks]
    assert len(texts) > 60 and not overlapping(figure, [text for text in texts if text.get_text()])
