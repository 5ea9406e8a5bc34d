"""`make bridge`: its steps, the stop at doubtful names, the answer, and the flags that train what it recommends."""

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from recipes import bridge
from recipes.final_report import Answer, embed_picture, read_answer, training_flags
from tests.command_lines import SCRIPTS, parse_flags, split_command
from tests.conftest import blank_figures
from utils.cli.errors import UserError
from utils.cli.records import write_record
from utils.cli.step_runner import StepRunner
from utils.style import monitor
from utils.transfer.methods import METHODS

pytest_plugins = ["tests.transfer.fixtures"]
STAGE1 = {"max_steps": 90, "learning_rate": 5e-4}
RECIPE = {"learning_rate": 1e-4, "max_steps": 30, "head_learning_rate_factor": None}


def save_photos(folder: Path, class_names=("poodle", "tabby cat"), number: int = 8) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (len(class_names), number, 16, 16, 3), dtype=np.uint8)
    for name, images in zip(class_names, pixels):
        (folder / name).mkdir(parents=True)
        for place, image in enumerate(images):
            Image.fromarray(image).save(folder / name / f"{place}.png")
    return folder


def save_comparison(folder: Path, use: str | None, means: dict[str, float], gain: tuple, **options) -> Path:
    """Write the records of a comparison of a real-only and a synthetic method, in that order, and their gain."""
    real_only, synthetic = means
    rows = {name: {"method": name, "volume": None} for name in means}
    found = {
        "num_shots": None, "use": use and rows[use], "real_only": rows[real_only], "synthetic": rows[synthetic],
        "leader": None, "gain": dict(zip(("mean", "low", "high", "num_images"), gain)),
    }  # fmt: skip
    summary = [
        {"method": name, "volume": None, "num_shots": None, "mean": mean, "std": 1.25, "values": [mean] * 3}
        for name, mean in means.items()
    ]
    settings = {"stage1": STAGE1, **{name: {"all": RECIPE} for name in METHODS}}
    record = {"recommendations": {"resnet": [found]}, "summary": summary, "settings": settings}
    write_record(folder / "comparison.json", record | {"findings": ["Use it."], "baseline": None})
    usual = {"batch_norm": "frozen", "augmentation": "robust", "label_smoothing_factor": 0.0, "weight_decay": 0.01}
    usual |= {"model_name_or_path": "a/resnet", "model_revision": None, "per_device_train_batch_size": 32}
    write_record(folder / "run_config.json", {"options": usual | options})
    return folder


@pytest.mark.parametrize(
    ("use", "sentence"),
    [
        ("mix", "Use mix: 83.0 ± 1.2 % where real images alone give 78.0 ± 1.2 % (vanilla): +5.0 points [2.0, 8.0]."),
        ("vanilla", "Use vanilla, real images alone: 78.0 ± 1.2 %; with synthetic images, the best method (mix) gives"),
        (None, "It cannot be judged whether synthetic images help: mix gives 83.0 ± 1.2 %, real images alone 78.0"),
    ],
)
def test_the_answer_is_a_sentence_and_a_method(use, sentence, tmp_path):
    answer = read_answer(save_comparison(tmp_path, use, {"vanilla": 78.0, "mix": 83.0}, (5.0, 2.0, 8.0, 99)))
    assert answer.sentence.startswith(sentence)
    assert answer.sentence.endswith("± is the standard deviation over seeds. Brackets are a 95 % interval.")
    assert answer.method == (use or "bridged_replay")


@pytest.mark.parametrize("method", METHODS)
def test_the_recommended_method_is_trained_with_the_settings_of_the_comparison(method, tmp_path):
    save_comparison(tmp_path, None, {"vanilla": 78.0, "mix": 83.0}, (5.0, 2.0, 8.0, 99), weight_decay=0.05)
    flags = training_flags(tmp_path, Answer("", method, None, "resnet"))
    parsed = parse_flags("train_bridged.py", ["--synthetic_dataset", "x", *flags])
    assert (parsed["method"], parsed["model_name_or_path"]) == (method, "a/resnet")
    if METHODS[method].takes_steps:
        assert parsed["weight_decay"] == 0.05 and parsed["augmentation"] == "robust"
    if METHODS[method].takes_recipe:
        assert (parsed["learning_rate"], parsed["max_steps"]) == (1e-4, 30)
    if "synthetic" in METHODS[method].kinds:
        assert (parsed["bridge_learning_rate"], parsed["bridge_max_steps"]) == (5e-4, 90)


@pytest.fixture
def in_process(monkeypatch):
    """Run the steps in this process, and return their names in order."""
    names = []

    def run(runner, step, show=False):
        script, flags = split_command(step.text)
        log = runner.log_path(step)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file, contextlib.redirect_stdout(file), blank_figures():
            SCRIPTS[script].main(flags)
        runner.costs[step.name] = {"seconds": 1.0, "peak_memory_gib": None, "command": step.text}
        (runner.runs_dir / "steps.json").write_text(json.dumps(runner.costs))
        assert step.finished.exists()
        names.append(step.name)
        return True

    monkeypatch.setattr(StepRunner, "run", run)
    monkeypatch.setattr(monitor, "NUM_TIMESTEPS", 1)
    return names


def write_recipes(folder: Path, tiny_pipeline_dir, classifier: str) -> list[str]:
    recipes = {
        "dsi": {"pretrained_model_name_or_path": str(tiny_pipeline_dir), "max_train_steps": 1,
                "num_validation_images": 0, "initializer_token": "a"},
        "synthesis": {"num_inference_steps": 1, "batch_size": 4},
        "comparison": {"model_name_or_path": classifier, "methods": ["vanilla", "mix"], "seeds": [0],
                       "step_counts": 1, "bridge_step_counts": 1},
    }  # fmt: skip
    flags = []
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        flags += [f"--{name}_recipe", str(folder / f"{name}.yaml")]
    return flags


def test_photos_become_an_answer_and_a_page_and_a_doubtful_name_stops_first(
    in_process, tiny_pipeline_dir, classifiers, tmp_path, monkeypatch
):
    photos = save_photos(tmp_path / "photos", ("crane", "tabby cat"))
    recipes = write_recipes(tmp_path, tiny_pipeline_dir, classifiers["timm"])
    argv = ["--images", str(photos), "--num_images_per_class", "2", "--output_dir", str(tmp_path / "out"), *recipes]
    monkeypatch.setattr(bridge, "choose_num_folds", lambda _: 2)  # five folds twice take long
    monkeypatch.setattr(bridge, "NUM_REPEATS", 1)
    with pytest.raises(UserError, match="names.yaml: doubtful nouns for 'crane'; edit them there, then run the same"):
        bridge.main(argv)
    assert in_process == ["audit"]
    with pytest.raises(UserError, match="is of other images .python train_bridged.py .*choose another folder"):
        bridge.main(["--images", str(save_photos(tmp_path / "others")), *argv[2:]])
    names = tmp_path / "out" / "names.yaml"
    names.write_text(names.read_text().replace("crane: crane", "crane: crane bird"))
    sentence = bridge.main(argv)
    assert in_process[1:] == [
        "audit", "style token", "synthetic set", "scores", "quality report", "comparison", "classifier"
    ]  # fmt: skip
    assert "crane: crane bird" in names.read_text(), "an edited file is kept"
    assert yaml.safe_load((tmp_path / "out" / "style" / "dsi_config.json").read_text())["prompt_nouns"][0] == (
        "crane bird"
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert sentence.split("(")[0] in page
    assert {f"<td>{name}</td>" in page for name in set(in_process)} == {True}
    assert page.count("data:image/") >= 6
    assert re.findall(r'(?:src|href)="(?!data:)', page) == [], "nothing is loaded from elsewhere"
    assert "images of" in page, "the audit's table"


def test_folds_are_for_few_images_without_test_images_of_their_own(tmp_path):
    from utils.data.image_set import RealImagesRecord
    from utils.data.real_images import load_real_images

    def choose(folder: Path) -> int | None:
        return bridge.choose_num_folds(load_real_images(RealImagesRecord(dataset_name=str(folder))))

    assert choose(save_photos(tmp_path / "few", number=12)) == 5
    assert choose(save_photos(tmp_path / "fewer", number=3)) == 3
    assert choose(save_photos(tmp_path / "many", number=60)) is None
    save_photos(tmp_path / "own" / "train", number=12)
    save_photos(tmp_path / "own" / "test", number=4)
    assert choose(tmp_path / "own") is None


def test_images_that_leave_none_to_test_on_and_recipes_that_are_none_are_named_first(tmp_path):
    argv = ["--images", str(save_photos(tmp_path / "single", number=1)), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="^--images .*single: 2 images of 2 classes leave none to test on; add some"):
        bridge.main(argv)
    (tmp_path / "list.yaml").write_text("- a")
    for name in ("list.yaml", "missing.yaml"):
        with pytest.raises(UserError, match=name):
            bridge.main([*argv, "--comparison_recipe", str(tmp_path / name)])
    assert not (tmp_path / "out").exists()


def test_recipes_of_this_folder_are_watched_and_a_set_only_grows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("dsi.yaml").write_text("seed: 1")
    assert [bridge.with_slash(path) for path in ("dsi.yaml", "user/cars", "cars", "/", None)] == [
        "./dsi.yaml", "user/cars", "cars", "/", None
    ]  # fmt: skip
    write_record(tmp_path / "out" / "synthetic" / "generation_config.json", {"num_images_per_class": 9})
    step = bridge.draw_set(bridge.Job("photos", tmp_path / "out", 5))
    assert "--num_images_per_class 9" in step.text
    assert "has 9 images per class; a set can only grow" in capsys.readouterr().out


def test_a_large_picture_is_embedded_as_a_small_one(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (900, 3000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    Image.fromarray(noise[:9, :9]).save(tmp_path / "small.png")
    large, small = (embed_picture(tmp_path / f"{name}.png") for name in ("large", "small"))
    assert large.startswith("data:image/jpeg;base64,") and len(large) < (tmp_path / "large.png").stat().st_size / 5
    assert small.startswith("data:image/png;base64,")


def test_bad_values_are_named(capsys):
    for flags, message in {
        "": "the following arguments are required: --images", "--images x --drop_share 1": "must be in [0, 1)",
        "--images x --num_images_per_class 0": "must be above 0",
    }.items():  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            bridge.main(flags.split())
        assert ended.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(UserError, match="neither a folder"):
        bridge.main(["--images", "nowhere/at-all"])
