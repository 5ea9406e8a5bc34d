"""What people look at: the picture shows what was logged and predicted, the table what was measured and its cost."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from utils.transfer.report import add_totals, plot_report, print_results

STAGES = ["stage1_head", "stage1", "stage2_head", "stage2"]
TEST_RESULTS = {
    "test_accuracy": 0.85125, "test_accuracy_low": 0.83, "test_accuracy_high": 0.87, "test_macro_f1": 0.8,
    "test_expected_calibration_error": 0.0625, "num_test_images": 1200,
}  # fmt: skip


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Draw a report of a classifier that confuses every second image with the next class; return panels by title."""
    save, figures = Figure.savefig, []

    def remember(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    def draw(log_histories: dict, class_names: list[str], logits: np.ndarray | None = None) -> dict:
        labels = np.arange(4 * len(class_names)) // 4
        if logits is None:
            logits = 3 * np.eye(len(class_names))[np.minimum(labels + np.arange(len(labels)) % 2, labels[-1])]
        plot_report(tmp_path / "report.png", log_histories, logits.astype(np.float32), labels, class_names)
        with Image.open(tmp_path / "report.png") as picture:
            assert min(picture.size) > 500
        return {axis.get_title(): axis for axis in figures[-1].axes}

    monkeypatch.setattr(Figure, "savefig", remember)
    return draw


def history(num_steps: int) -> list[dict]:
    losses = [{"step": step, "loss": 1 / step} for step in range(1, num_steps + 1)]
    return [*losses, {"step": num_steps, "eval_loss": 0.5, "eval_accuracy": 0.75}, {"step": num_steps, "train_loss": 9}]


def drawn_by(panels: dict) -> list:
    """Return all axes of the figure of some."""
    return panels["mix"].get_figure(root=True).axes


def overlapping(texts: list) -> list[tuple[str, str]]:
    """Return which of the texts of a figure lie on one another."""
    figure = texts[0].get_figure(root=True)
    figure.set_dpi(150)  # as it was saved
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    return [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]


@pytest.mark.parametrize(("num_stages", "grid"), [(1, (1, 1)), (2, (2, 1)), (3, (2, 2)), (4, (2, 2))])
def test_each_stage_has_its_learning_curves(num_stages, grid, draw):
    panels = draw({name: history(3 + i) for i, name in enumerate(STAGES[:num_stages])}, ["a", "b", "c"])
    assert [title for title in panels if title in STAGES] == STAGES[:num_stages]
    for i, name in enumerate(STAGES[:num_stages]):
        assert panels[name].get_subplotspec().get_gridspec().get_geometry() == grid
        training, validation = panels[name].lines
        assert training.get_xydata().tolist() == [[step, 1 / step] for step in range(1, 4 + i)]
        assert validation.get_xydata().tolist() == [[3 + i, 0.5]]
    (legend,) = panels["stage1_head"].figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["training loss", "validation loss", "validation accuracy"]


@pytest.mark.parametrize(("num_classes", "has_numbers"), [(2, True), (12, True), (20, False)])
def test_a_matrix_of_few_classes_has_their_names_and_as_many_numbers_as_can_be_read(num_classes, has_numbers, draw):
    names = [f"Mercedes-Benz C-Class Sedan of the year {2000 + i}" for i in range(num_classes)]
    matrix = draw({"mix": []}, names)[f"{4 * num_classes} test images, rows sum to 1"]
    (image,) = matrix.images
    expected = (np.eye(num_classes) + np.eye(num_classes)[[*range(1, num_classes), num_classes - 1]]) / 2
    assert np.array_equal(image.get_array(), expected)
    shown = [label.get_text() for label in matrix.get_yticklabels()]
    assert len(set(shown)) == num_classes and shown[1] == "Mercedes-Benz…r 2001"
    assert bool(matrix.texts) == has_numbers
    for labels in (matrix.get_xticklabels(), matrix.get_yticklabels(), matrix.texts):
        assert not labels or not overlapping(labels)


def test_many_classes_have_a_list_of_the_most_frequent_confusions(draw):
    names = [f"$Mercedes-Benz$ C-Class Sedan of the year {2000 + i}" for i in range(100)]
    logits = np.eye(100)[np.arange(400) // 4]
    logits[20:23], logits[60] = np.eye(100)[7], np.eye(100)[3]  # three images of class 5, one of class 15
    listed = next(axis for axis in drawn_by(draw({"mix": []}, names, logits)) if axis.texts)
    assert [(name.get_text(), text.get_text()) for name, text in zip(listed.get_yticklabels(), listed.texts)] == [
        ("$Mercedes-Ben…r 2005 → $Mercedes-Ben…r 2007", "3 of 4"),
        ("$Mercedes-Ben…r 2015 → $Mercedes-Ben…r 2003", "1 of 4"),
    ]
    assert [bar.get_width() for bar in listed.patches] == [3, 1]
    assert listed.figure._suptitle.get_text() == "400 test images of 100 classes\nconfusions, true → predicted: all 2"
    listed = next(axis for axis in drawn_by(draw({"mix": []}, names)) if axis.texts)
    assert "the 20 most frequent of 99" in listed.figure._suptitle.get_text()
    assert len(listed.texts) == 20
    assert not overlapping([listed.figure._suptitle, *listed.get_yticklabels(), *listed.texts])


def test_calibration_is_accuracy_over_confidence(draw):
    panel = draw({"mix": []}, ["a", "b", "c"])["calibration, test images"]
    _, curve = panel.lines
    confidence = np.exp(3) / (np.exp(3) + 2)
    assert np.allclose(curve.get_xydata(), [[confidence, 8 / 12]])


def test_a_model_that_broke_down_is_drawn(draw):
    draw({"vanilla": [{"step": 1, "loss": float("nan")}]}, ["a", "b"], np.full((8, 2), np.nan))


def stage_results(name: str, factor: int, gpu_hours: float | None) -> dict:
    costs = {
        "steps": factor * 100, "images_seen": factor * 3200, "seconds": factor * 10.1, "seconds_waiting": factor * 0.5,
        "gpu_hours": gpu_hours,
    }  # fmt: skip
    return {f"{name}_{key}": value for key, value in costs.items()}


def test_totals_are_sums_over_the_stages():
    results = {"x": 1} | stage_results("stage1", 1, 0.25) | stage_results("stage2", 2, 0.5)
    totals = add_totals(results, ["stage1", "stage2"])
    assert {key: totals[key] for key in totals if key not in results} == {
        "total_steps": 300, "total_images_seen": 9600, "total_seconds": pytest.approx(30.3), "total_gpu_hours": 0.75,
        "total_seconds_waiting": 1.5,
    }  # fmt: skip
    assert totals["x"] == 1
    assert add_totals(results | {"stage2_gpu_hours": None}, ["stage1", "stage2"])["total_gpu_hours"] is None


def test_the_table_has_metrics_then_leep_then_a_row_for_each_stage(capsys):
    results = {"leep_pretrained": -4.3, "leep_bridged": -3.41, "leep_num_images": 40, "leep_num_source_classes": 1000}
    for factor, name in enumerate(["stage1_head", "stage1", "stage2"], start=1):
        results |= stage_results(name, factor, None)
    results = add_totals(results, ["stage1_head", "stage1", "stage2"])
    print_results("bridged: out[a]", results | TEST_RESULTS)
    rows = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]
            for line in capsys.readouterr().out.splitlines() if line[0] in "│┃"]  # fmt: skip
    assert rows == [
        ["bridged: out[a]", "value"],
        ["Accuracy", "0.8512 (95 % interval 0.8300 to 0.8700)"],
        ["Macro F1", "0.8000"],
        ["Expected calibration error", "0.0625"],
        ["Test images", "1,200"],
        ["LEEP before synthetic images", "-4.3000 on 40 images, fewer than its 1000"],
        ["", "source classes: too good to compare"],
        ["LEEP after synthetic images", "-3.4100 on 40 images"],
        ["stage", "steps", "images seen", "seconds", "s waiting", "GPU-hours"],
        ["stage1_head", "100", "3,200", "10.1", "0.5", "not measured"],
        ["stage1", "200", "6,400", "20.2", "1.0", "not measured"],
        ["stage2", "300", "9,600", "30.3", "1.5", "not measured"],
        ["total", "600", "19,200", "60.6", "3.0", "not measured"],
    ]


@pytest.mark.parametrize(
    ("results", "line"),
    [
        ({"leep_pretrained": None, "leep_bridged": None}, None),  # from an evaluation alone
        ({"leep_pretrained": -1.0, "leep_num_images": 7, "leep_num_source_classes": 8}, "too good to compare"),
        ({"leep_pretrained": -1.0, "leep_num_images": 8, "leep_num_source_classes": 8}, "-1.0000 on 8 images │"),
        ({"num_test_classes": 1, "num_classes": 2}, "Macro F1 │ 0.8000 (over 1 of 2 classes) │"),
        ({"num_test_classes": 2, "num_classes": 2}, "Macro F1 │ 0.8000 │"),
    ],
)
def test_the_table_has_only_what_was_measured_and_the_numbers_of_images(results, line, capsys):
    print_results("out", TEST_RESULTS | results)
    text = " ".join(capsys.readouterr().out.split())
    assert "0.8512" in text and "stage" not in text
    assert line in text if line else "LEEP" not in text
