"""The notebook: its commands parse, and on a CPU with the demo's models it leads from a zip to a classifier."""

import os
import re
import sys
import zipfile
from ast import literal_eval
from io import BytesIO
from pathlib import Path

import nbformat
import pytest
from datasets import load_dataset
from nbclient import NotebookClient

from tests.command_lines import parse_flags, split_command

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "photos_to_classifier.ipynb"
CLASSES = ("Trouser", "Sneaker", "Bag")
IMAGES_PER_CLASS = 12


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def parameters_of(notebook) -> nbformat.NotebookNode:
    """Return the cell whose tag says that it holds the settings, as papermill finds it."""
    [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    return cell


def zip_photos(path: Path) -> None:
    """Write a zip of class folders within one folder, and with what macOS adds."""
    split = load_dataset(str(ROOT / "demo/fashion-mnist"), split="train")
    names = split.features["label"].names
    labels = split["label"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/photos/._1.png", b"")
        for name in CLASSES:
            rows = [row for row, label in enumerate(labels) if names[label] == name][:IMAGES_PER_CLASS]
            for number, image in enumerate(split.select(rows)["image"]):
                image.save(png := BytesIO(), "PNG")
                archive.writestr(f"photos/{name}/{number}.png", png.getvalue())


def test_the_notebook_is_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in cells if cell.outputs or cell.execution_count is not None] == []


def test_every_command_of_the_notebook_parses_with_its_own_settings(notebook):
    settings = {"photos": "photos", "push": "--push_to_hub"}
    exec(parameters_of(notebook).source, settings)
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code").replace("\\\n", " ")
    commands = re.findall(r"^!python (.*)$", source, re.MULTILINE)
    for command in commands:
        parse_flags(*split_command(command.format_map(settings)))
    assert len(commands) == 5


@pytest.mark.parametrize("run", ["%run ", pytest.param("!python ", marks=pytest.mark.soak)])
def test_the_notebook_leads_from_a_zip_to_a_classifier(notebook, tmp_path, monkeypatch, run):
    """`%run` instead of `!python` runs the scripts in the kernel, so that torch is imported once, not six times."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    zip_photos(tmp_path / "photos.zip")
    settings = {
        "REPOSITORY": "not-cloned",
        "PHOTOS": str(tmp_path / "photos.zip"),
        "NAME": str(tmp_path / "photos"),
        "PUBLISH": False,
        "STYLE_FLAGS": "--pretrained_model_name_or_path demo/generator --max_train_steps 4 --train_batch_size 4 "
        "--num_validation_images 1 --initializer_token photo",
        "SYNTHETIC_FLAGS": "--lora demo/few_steps --num_images_per_class 3 --batch_size 9",
        "CLASSIFIER": "demo/classifier",
        "CLASSIFIER_FLAGS": "--max_steps 2 --bridge_max_steps 2",
        "COMPARISON_FLAGS": "--methods vanilla_mixup bridged_replay --seeds 0 --step_counts 2 --bridge_step_counts 2",
    }
    parameters = parameters_of(notebook)
    own_settings = {}
    exec(parameters.source, own_settings)
    assert own_settings.keys() - {"__builtins__"} == settings.keys()
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    for cell in notebook.cells:
        cell.source = cell.source.replace("!python ", run)

    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output["data"] for output in outputs if "data" in output]
    printed = "\n".join(output["text"] for output in outputs if output.output_type == "stream")
    texts = [data["text/plain"] for data in shown]  # rich's too, which knows that it prints in a notebook
    [predictions] = [literal_eval(text) for text in texts if "'score'" in text]
    assert sum("image/png" in data for data in shown) == 5
    assert "train 27 images" in printed
    assert re.search(r"^Use (vanilla_mixup|bridged_replay)", "\n".join([printed, *texts]), re.MULTILINE)
    assert {prediction["label"] for prediction in predictions} == set(CLASSES)
