"""quality_report.py end to end, in process, with tiny models of the real classes."""

import io
import json
import shutil
from contextlib import nullcontext, redirect_stdout

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Features, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

from quality_report import main
from tests.conftest import CLASS_NAMES, blank_figures, save_image_set
from utils.cli.errors import UserError
from utils.cli.records import GENERATION_CONFIG, read_record, write_record
from utils.hub.repositories import Source
from utils.quality.features import collect_parts, load_reference_images

pytest_plugins = ["tests.local_hub.fixtures"]

WRITTEN = ["duplicates.png", "quality.json", "quality.png"]


@pytest.fixture(scope="module")
def real_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "cars"
    save_image_set(folder, {"train": 20, "validation": 10, "test": 10})
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A ResNet with random weights, wide enough to distinguish the images."""
    folder = tmp_path_factory.mktemp("models") / "resnet"
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def set_dir(tmp_path_factory, real_dir):
    """A set of images other than the real ones, with a record like the generator's."""
    folder = tmp_path_factory.mktemp("sets") / "cars-syn"
    save_image_set(folder, {"train": 30})
    change_images(folder, lambda row, image: image.transpose(Image.Transpose.ROTATE_90).point(lambda value: value // 2))
    real = {"dataset_name": str(real_dir), "num_shots": 2}
    write_record(folder / GENERATION_CONFIG, {"real_images": real, "settings": {}, "class_names": CLASS_NAMES})
    return folder


@pytest.fixture
def copied_set(set_dir, tmp_path):
    return shutil.copytree(set_dir, tmp_path / "copied")


def read_shard(path) -> list[Image.Image]:
    return [Image.open(io.BytesIO(row["image"]["bytes"])) for row in pq.read_table(path).to_pylist()]


def change_images(folder, change, split="train") -> None:
    """Replace each image with `change(row, image)`."""
    path = folder / "data" / f"{split}-00000.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    for number, row in enumerate(rows):
        buffer = io.BytesIO()
        change(number, Image.open(io.BytesIO(row["image"]["bytes"]))).convert("RGB").save(buffer, "png")
        row["image"]["bytes"] = buffer.getvalue()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def keep_rows(folder, is_kept) -> None:
    path = folder / "data" / "train-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.filter(pa.array(map(is_kept, table.to_pylist()))), path)


def report(folder, model_dir, output_dir, *flags, draws_figures=False) -> dict:
    argv = ["--synthetic_dataset", str(folder), "--model_name_or_path", str(model_dir), "--output_dir",
            str(output_dir), "--num_pairs", "2", *flags]  # fmt: skip
    with nullcontext() if draws_figures else blank_figures():
        return main(argv)


@pytest.fixture(scope="module")
def finished(set_dir, model_dir, tmp_path_factory):
    """The record of a report, its folder, and what was printed."""
    output_dir = tmp_path_factory.mktemp("reports") / "report"
    with redirect_stdout(io.StringIO()) as printed:
        record = report(set_dir, model_dir, output_dir, draws_figures=True)
    return record, output_dir, printed.getvalue()


def levels(record):
    return {verdict["subject"]: verdict["level"] for verdict in record["verdicts"]}


def test_record_pictures_and_the_terminal_show_the_same(finished):
    record, output_dir, printed = finished
    assert sorted(path.name for path in output_dir.iterdir()) == WRITTEN
    assert read_record(output_dir / "quality.json") == json.loads(json.dumps(record))
    for name in ("quality.png", "duplicates.png"):
        pixels = np.asarray(Image.open(output_dir / name).convert("L"))
        assert min(pixels.shape) > 300 and pixels.std() > 10
    for words in (*CLASS_NAMES, *(verdict["text"] for verdict in record["verdicts"]), record["caveats"][0]):
        assert words in printed
    assert f"Written to {output_dir}" in printed


def test_darkened_rotated_images_are_distinguished_from_all_real_images_of_the_record(finished, real_dir):
    record, _, _ = finished
    assert record["real_images"]["dataset_name"] == str(real_dir)
    assert {name: count["used"] for name, count in record["num_images"].items()} == {
        "synthetic": 90, "train": 60, "held_out": 30, "test": 30
    }  # fmt: skip
    frechet = record["distance"]["frechet"]
    assert record["distance"]["num_images"] == 30  # the number of held-out real ones, in each class
    assert frechet["synthetic"] > 2 * frechet["floor"] > 0
    assert record["distance"]["kernel"]["synthetic"] > record["distance"]["kernel"]["floor"]
    shifts = [entry["shift"] for entry in record["classes"]]
    assert shifts == sorted(shifts, reverse=True) and shifts[0] > 0.5
    assert levels(record)["whole set"] != "good"


def test_a_planted_copy_of_a_test_image_is_found_and_a_repetition_once_among_the_first_of_each_class(
    copied_set, real_dir, model_dir, tmp_path
):
    real = read_shard(real_dir / "data" / "test-00000.parquet")[29]
    first = read_shard(copied_set / "data" / "train-00000.parquet")[0]
    change_images(copied_set, lambda row, image: {8: real, 50: real, 3: first}.get(row, image))
    flags = "--max_images_per_class", "5", "--num_pairs", "3", "--batch_size", "4"
    record = report(copied_set, model_dir, tmp_path / "report", *flags)
    assert record["num_images"]["synthetic"] == {"used": 15, "all": 90}
    assert record["num_images"]["test"] == {"used": 30, "all": 30}
    assert any("15 of 90" in caveat for caveat in record["caveats"])
    found = record["duplicates"]["test"]
    assert found["num_copies"] == 1 and len(found["pairs"]) == 3
    assert found["pairs"][0].pop("similarity") == pytest.approx(1, abs=1e-4)
    assert found["pairs"][0] == {
        "is_copy": True, "synthetic_row": 8, "synthetic_class": CLASS_NAMES[2], "other_row": 29,
        "other_class": CLASS_NAMES[2],
    }  # fmt: skip
    assert levels(record)["copies of test images"] == "bad"
    assert levels(record)["copies of training images"] != "bad"
    within = record["duplicates"]["synthetic"]
    assert within["num_copies"] == 2
    assert {within["pairs"][0][key] for key in ("synthetic_row", "other_row")} == {0, 3}
    assert within["pairs"][1]["similarity"] < 0.9999 and not within["pairs"][1]["is_copy"]
    assert [found["num_copies_of_real"], within["num_copies_of_real"]] == [0, 0]


@pytest.mark.parametrize("strength", [0.02, 1])
def test_copies_do_not_depend_on_how_well_the_model_distinguishes_images(strength, model_dir, tmp_path):
    """Other real images of the same clothes, of which two are copies of test images, one compressed."""
    demo = load_dataset("demo/fashion-mnist")
    real, synthetic = tmp_path / "real" / "data", tmp_path / "synthetic" / "data"
    for folder, parts in ((real, {"train": "train", "test": "test"}), (synthetic, {"train": "validation"})):
        folder.mkdir(parents=True)
        for split, part in parts.items():
            demo[part].select(range(1000)).to_parquet(folder / f"{split}-00000.parquet")
    copied = [demo["test"][row]["image"] for row in (4, 9)]
    copied[1].save(tmp_path / "compressed.jpg", quality=75)
    copied[1] = Image.open(tmp_path / "compressed.jpg")
    change_images(synthetic.parent, lambda row, image: copied[row] if row < 2 else image)
    model = ResNetForImageClassification.from_pretrained(shutil.copytree(model_dir, tmp_path / "model"))
    with torch.no_grad():  # almost the same features for all images
        for name, parameter in model.named_parameters():
            if name.endswith("convolution.weight"):
                parameter.mul_(strength)
    model.save_pretrained(tmp_path / "model")
    flags = "--dataset_name", str(real.parent)
    found = report(synthetic.parent, tmp_path / "model", tmp_path / "report", *flags)["duplicates"]
    assert {kind: figures["num_copies"] for kind, figures in found.items()} == {"test": 2, "train": 0, "synthetic": 0}
    assert {pair["other_row"] for pair in found["test"]["pairs"]} == {4, 9}


def test_a_planted_copy_of_a_training_image_has_its_row_in_the_split(copied_set, real_images_dir, model_dir, tmp_path):
    # without a validation split, about a tenth of the training images is held out
    train = read_shard(real_images_dir / "data" / "train-00000.parquet")
    change_images(copied_set, lambda row, image: train[59 - row] if row < 20 else image)
    flags = "--dataset_name", str(real_images_dir), "--num_pairs", "20"
    record = report(copied_set, model_dir, tmp_path / "report", *flags)
    used = record["num_images"]["train"]["used"]
    assert used + record["num_images"]["held_out"]["used"] == 60
    pairs = record["duplicates"]["train"]["pairs"]
    copies = [pair for pair in pairs if pair["is_copy"]]
    assert used - 40 <= len(copies) <= 20
    assert all(pair["other_row"] == 59 - pair["synthetic_row"] for pair in copies)


def test_diversity_and_repetitions_do_not_depend_on_the_distance_of_the_set(real_dir, model_dir, tmp_path):
    folder = tmp_path / "inverted"
    save_image_set(folder, {"train": 20})
    change_images(folder, lambda row, image: image.point(lambda value: 255 - value))
    record = report(folder, model_dir, tmp_path / "report", "--dataset_name", str(real_dir))
    assert levels(record)["whole set"] == "bad"
    assert record["duplicates"]["synthetic"]["num_copies"] == 0
    assert record["duplicates"]["synthetic"]["share_similar"] < 0.2


def test_a_model_with_equal_features_for_all_images_is_refused(set_dir, model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "blind")
    model = ResNetForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.resnet.embedder.parameters():
            parameter.zero_()
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="gives all real images the same features"):
        report(set_dir, folder, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_real_images_as_synthetic_ones_are_near_the_floor(real_dir, model_dir, tmp_path):
    folder = tmp_path / "like-real"
    save_image_set(folder, {"train": 40})  # the real training images, and as many similar ones
    record = report(folder, model_dir, tmp_path / "report", "--dataset_name", str(real_dir))
    assert record["distance"]["frechet"]["synthetic"] < 2 * record["distance"]["frechet"]["floor"]
    assert max(entry["shift"] for entry in record["classes"]) < 0.5
    assert levels(record)["copies of training images"] == "bad"


def test_images_of_one_class_under_another_name_are_confused(copied_set, real_dir, model_dir, tmp_path):
    train = read_shard(real_dir / "data" / "train-00000.parquet")
    change_images(copied_set, lambda row, image: train[row % 60 // 3 * 3 + (row % 3 + 1) % 3])
    record = report(copied_set, model_dir, tmp_path / "report")
    first = record["nearest_class"]["confusions"][0]
    assert CLASS_NAMES.index(first["nearest"]) == (CLASS_NAMES.index(first["class"]) + 1) % 3
    assert first["share"] > (first["real_share"] or 0)
    assert record["nearest_class"]["own_share"]["synthetic"] < 0.3 < record["nearest_class"]["own_share"]["held_out"]


def test_repeating_one_image_per_class_gives_no_diversity(copied_set, model_dir, tmp_path):
    images = read_shard(copied_set / "data" / "train-00000.parquet")
    change_images(copied_set, lambda row, image: images[row % 3])
    record = report(copied_set, model_dir, tmp_path / "report", draws_figures=True)
    assert record["diversity"]["synthetic"] < 1e-3 < record["diversity"]["real"]
    assert max(entry["diversity"] for entry in record["classes"]) < 1e-3
    assert levels(record)["diversity"] == levels(record)["repetitions"] == "bad"


def test_a_set_of_some_classes_is_compared_with_those(copied_set, model_dir, tmp_path):
    keep_rows(copied_set, lambda row: row["label"] != 1)
    record_path = copied_set / GENERATION_CONFIG
    chosen = [CLASS_NAMES[0], CLASS_NAMES[2]]
    write_record(record_path, {**read_record(record_path), "settings": {"classes": chosen}})
    record = report(copied_set, model_dir, tmp_path / "report")
    assert {entry["class"] for entry in record["classes"]} == set(chosen)
    assert record["distance"]["num_train"] == record["num_images"]["train"]["used"] * 2 // 3


@pytest.mark.parametrize("per_class", [1, 2])
def test_few_real_images_give_a_report_with_caveats(set_dir, model_dir, tmp_path, per_class):
    folder = tmp_path / "few"
    save_image_set(folder, {"train": per_class})
    record = report(set_dir, model_dir, tmp_path / "report", "--dataset_name", str(folder), draws_figures=True)
    assert levels(record)["diversity"] == "unknown"
    assert any("held-out" in caveat for caveat in record["caveats"])
    assert "NaN" not in (tmp_path / "report" / "quality.json").read_text()


def test_sets_on_the_hub_are_read_by_id(set_dir, real_dir, model_dir, local_hub, tmp_path):
    local_hub.add_user("ada", "hf_ada")
    for name, folder in (("ada/syn", set_dir), ("ada/real", real_dir)):
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        local_hub.create_repo(name, "dataset").commit(files)
    flags = "--dataset_name", "ada/real"
    record = report("ada/syn", model_dir, tmp_path / "report", *flags)
    assert len(record["synthetic"]["revision"]) == 40 == len(record["real_images"]["dataset_revision"])
    assert record["num_images"]["synthetic"]["used"] == 90


def test_class_names_in_another_case_are_matched(set_dir, real_dir, tmp_path):
    names = [CLASS_NAMES[2].upper(), CLASS_NAMES[0].title(), CLASS_NAMES[1]]
    table = pq.read_table(set_dir / "data" / "train-00000.parquet")
    labels = [(label + 1) % 3 for label in table["label"].to_pylist()]
    folder = tmp_path / "other-case"
    (folder / "data").mkdir(parents=True)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    columns = {"image": table["image"].to_pylist(), "label": labels}
    pq.write_table(pa.table(columns, schema=features.arrow_schema), folder / "data" / "train-00000.parquet")
    write_record(folder / GENERATION_CONFIG, {"settings": {"classes": names}})
    real = load_reference_images({"dataset_name": str(real_dir)})
    given, found = (
        collect_parts(Source(str(path), "--synthetic_dataset", "dataset"), real, 1000)["synthetic"].labels.tolist()
        for path in (set_dir, folder)
    )
    assert found == given


@pytest.fixture(scope="module")
def folders(set_dir, real_dir, model_dir, tmp_path_factory):
    """Name -> a folder for flags; some are sets that do not match the real images."""
    root = tmp_path_factory.mktemp("bad")
    save_image_set(root / "other", {"train": 2}, ("red_square", "green circle", "yellow"))
    save_image_set(root / "renamed", {"train": 2}, ("red square", *CLASS_NAMES[1:]))
    save_image_set(root / "plain", {"train": 2})
    for name, source in (("empty", set_dir), ("lacking", real_dir)):
        shutil.copytree(source, root / name)
        keep_rows(root / name, lambda row: row["label"] != 1)
    (root / "file").write_text("")
    return {"set": set_dir, "real": real_dir, "model": model_dir} | {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--synthetic_dataset is missing"),
        ("--synthetic_dataset no-such-set", "--synthetic_dataset no-such-set: neither"),
        ("--synthetic_dataset {plain}", "has no generation_config.json that names the real images"),
        ("--synthetic_dataset {other} --dataset_name {real}", "set; missing: blue-stripe; extra: yellow."),
        ("--synthetic_dataset {renamed} --dataset_name {real}", "renamed: 'red_square' is 'red square' in the synth"),
        ("--synthetic_dataset {empty}", "has no images of green circle"),
        ("--synthetic_dataset {set} --dataset_name {lacking}", "no training images of green"),
        ("--synthetic_dataset {set} --num_shots 3", "--num_shots 3: does nothing here"),
        ("--synthetic_dataset {set} --batch_size 0", "--batch_size 0: must be above 0"),
        ("--synthetic_dataset {set} --max_images_per_class 0", "must be above 0"),
        ("--synthetic_dataset {set} --num_pairs 0", "--num_pairs 0: must be above 0"),
        ("--synthetic_dataset {set} --model_name_or_path {plain}", "has no config.json"),
        ("--synthetic_dataset {set} --output_dir {file}", "is a file"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(flags, message, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        main(f"--model_name_or_path {{model}} {flags}".format(**folders).split())
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--num_processes 2: the report is made by one process; start it with `python"):
        main(["--synthetic_dataset", "set"])
