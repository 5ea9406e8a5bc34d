"""filter_synthetic.py end to end, in process, with tiny models of the real classes."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizerFast,
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
)

import train_bridged
from compare_transfer import open_sources
from filter_synthetic import main
from tests.conftest import CLASS_NAMES, blank_figures, draw_image, save_image_set
from utils.cli.errors import UserError
from utils.cli.records import BRIDGED_CONFIG, GENERATION_CONFIG, read_record, write_record
from utils.quality.scores import choose_left_out
from utils.synthesis.finishing import left_out_section
from utils.synthesis.shards import shard_name, synthetic_features
from utils.transfer.synthetic_images import load_synthetic, open_synthetic

NUM_PER_CLASS = 20
WRONG = (3, 8)  # class_index of images that show the next class


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A classifier with random weights, wide enough to tell the images apart."""
    folder = tmp_path_factory.mktemp("models") / "resnet"
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(CLASS_NAMES)), "label2id": {name: i for i, name in enumerate(CLASS_NAMES)}}
    config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", **labels)
    ResNetForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def set_dir(tmp_path_factory):
    """A set in which two images of each class show the next one, in the order in which the generator writes it."""
    root = tmp_path_factory.mktemp("sets")
    save_image_set(root / "real", {"train": 10, "test": 2})
    rng, rows = np.random.default_rng(1), []
    for index in range(NUM_PER_CLASS):
        for label in range(3):
            path = root / "image.png"
            draw_image((label + (index in WRONG)) % 3, rng).save(path)
            rows.append({"image": {"bytes": path.read_bytes(), "path": None}, "label": label, "class_index": index,
                         "prompt": "", "seed": 0, "guidance_scale": 3.0})  # fmt: skip
    folder = root / "cars-syn"
    (folder / "data").mkdir(parents=True)
    table = pa.Table.from_pylist(rows, schema=synthetic_features(CLASS_NAMES).arrow_schema)
    pq.write_table(table, folder / shard_name(0))
    record = {"real_images": {"dataset_name": str(root / "real"), "num_shots": 5}, "fingerprint": "abc"}
    write_record(folder / GENERATION_CONFIG, {**record, "settings": {}, "class_names": CLASS_NAMES})
    return folder


@pytest.fixture
def run(set_dir, model_dir, tmp_path):
    folder = shutil.copytree(set_dir, tmp_path / "cars-syn")

    def run(*flags: str) -> dict:
        with blank_figures():
            return main(["--synthetic_dataset", str(folder), "--model_name_or_path", str(model_dir), *flags])

    run.folder = folder
    return run


@pytest.mark.parametrize("score", ["probe", "distance"])
def test_images_that_show_another_class_are_left_out_of_training(run, score, capsys):
    images = {path.name: path.read_bytes() for path in (run.folder / "data").iterdir()}
    about = run("--drop_by", score)
    assert (about["num_images"], about["num_left_out"], about["drop_share"]) == (60, 6, 0.1)
    scores = pq.read_table(run.folder / "scores.parquet").to_pydict()
    assert set(scores) == {"class", "class_index", "probe", "distance", "left_out"}
    left_out = {key for key, is_out in zip(zip(scores["class"], scores["class_index"]), scores["left_out"]) if is_out}
    assert left_out == {(name, index) for name in CLASS_NAMES for index in WRONG}
    assert "Real images: 15, those that training takes." in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (run.folder / "data").iterdir()} == images
    source = open_synthetic(str(run.folder))
    assert source.left_out.counts() == {"num_rejected": 0, "num_filtered": 6}
    section = left_out_section(run.folder, source.record | {"num_images": 60})
    assert "leaves 6 of 60 images out: 0 were rejected by people" in section and "(filter.png)" in section
    assert left_out_section(run.folder, source.record | {"fingerprint": "of another set"}) == ""
    assert len(load_synthetic(source, CLASS_NAMES)) == 54


def test_a_smallest_score_decides_instead_of_a_share_and_leaves_no_class_without_images(run):
    assert run("--scores", "probe", "--min_score", "0.05")["num_left_out"] == 6
    before = (run.folder / "scores.parquet").read_bytes()
    with pytest.raises(UserError, match=r"--min_score 1: would leave no image of red_square, green circle, blue"):
        run("--scores", "probe", "--min_score", "1")
    assert (run.folder / "scores.parquet").read_bytes() == before


def test_a_share_takes_the_worst_of_each_class_and_of_equal_ones_the_last():
    scores, labels = np.array([0.5, 0.1, 0.5, 0.5, 0.9, 0.2]), np.array([0, 0, 0, 0, 1, 1])
    assert np.flatnonzero(choose_left_out(scores, labels, 0.5)).tolist() == [1, 3, 5]
    assert np.flatnonzero(choose_left_out(scores, labels, 0.2)).tolist() == []
    assert np.flatnonzero(choose_left_out(scores, labels, min_score=0.5)).tolist() == [1, 5]


def test_a_classifier_scores_its_own_classes_and_one_of_ours_has_to_be_of_real_images(run, model_dir, tmp_path):
    classifier = shutil.copytree(model_dir, tmp_path / "classifier")
    run("--scores", "classifier", "--classifier", str(classifier))
    scores = pq.read_table(run.folder / "scores.parquet")
    model = ResNetForImageClassification.from_pretrained(classifier).eval()
    processor = ConvNextImageProcessor.from_pretrained(classifier)
    row = pq.read_table(run.folder / shard_name(0)).to_pylist()[4]
    (tmp_path / "image.png").write_bytes(row["image"]["bytes"])
    with torch.no_grad():
        logits = model(**processor(Image.open(tmp_path / "image.png"), return_tensors="pt")).logits
    assert scores["classifier"][4].as_py() == pytest.approx(logits.softmax(1)[0, row["label"]].item(), abs=1e-5)
    write_record(classifier / BRIDGED_CONFIG, {"synthetic_dataset": {"name": "cars-syn"}})
    with pytest.raises(UserError, match="was trained on synthetic images .cars-syn."):
        run("--scores", "classifier", "--classifier", str(classifier))


def test_a_model_of_images_and_text_scores_by_the_class_names(run, tmp_path):
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizerFast(vocab={word: number for number, word in enumerate(vocabulary)}, merges=[])
    size = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = {"vocab_size": len(vocabulary), "eos_token_id": len(vocabulary) - 1, "bos_token_id": len(vocabulary) - 2}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=size | text, vision_config=size | {"image_size": 32, "patch_size": 8})
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    CLIPProcessor(CLIPImageProcessor(size=32, crop_size=32), tokenizer).save_pretrained(tmp_path / "clip")
    run("--scores", "words", "--words_model", str(tmp_path / "clip"))
    scores = pq.read_table(run.folder / "scores.parquet")["words"].to_numpy()
    assert np.all((scores > 0) & (scores < 1)) and len(np.unique(scores)) > 50
    means = [scores[label::3].mean() for label in range(3)]
    assert sum(means) == pytest.approx(1, abs=0.05)  # of three classes on about the same images


def test_training_leaves_images_out_and_says_and_counts_it_unless_all_are_asked_for(run, model_dir, tmp_path, caplog):
    run()
    caplog.set_level(logging.INFO)
    flags = [
        "--model_name_or_path",
        str(model_dir),
        "--method",
        "synthetic_only",
        "--bridge_max_steps",
        "1",
        "--use_cpu",
    ]
    flags += ["--bridge_per_device_train_batch_size", "4", "--no_leep", "--synthetic_dataset", str(run.folder)]
    with blank_figures():
        kept = train_bridged.main([*flags, "--output_dir", str(tmp_path / "kept")])
        assert "cars-syn: 6 images are left out (6 by their scores in scores.parquet)" in caplog.text
        every = train_bridged.main([*flags, "--output_dir", str(tmp_path / "all"), "--use_rejected"])
    assert (kept["num_rejected"], kept["num_filtered"]) == (0, 6) and "num_filtered" not in every
    assert "0 were rejected by reviewers and 6 left out by their scores" in (tmp_path / "kept/README.md").read_text()
    records = [read_record(tmp_path / name / BRIDGED_CONFIG)["synthetic_dataset"] for name in ("kept", "all")]
    assert records[0]["left_out"]["num_filtered"] == 6 and "left_out" not in records[1]
    (run.folder / "scores.parquet").unlink()
    with pytest.raises(
        UserError, match="synthetic_dataset .* was 60 images, sha256 .* without 6 of .*, now 60 images,"
    ):
        train_bridged.main([*flags, "--output_dir", str(tmp_path / "kept")])


def test_a_comparison_takes_one_set_with_and_without_its_rejected_images(run):
    run("--scores", "probe")
    sets = {"kept": str(run.folder), "all": str(run.folder)}
    sources = open_sources(sets, [0, 1], use_rejected=["all"])
    assert {key[0]: len(source.left_out) for key, source in sources.items()} == {"kept": 6, "all": 0}
    assert len({source.key for source in sources.values()}) == 2
    with pytest.raises(UserError, match=r"--use_rejected other: must be a name of --synthetic_dataset \(kept, all\)"):
        open_sources(sets, [0], use_rejected=["other"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--scores probe probe", "--scores probe probe: duplicate values"),
        ("--scores probe --drop_by distance", r"--drop_by distance: must be one of --scores \(probe\)"),
        ("--drop_share 0.2 --min_score 0.1", "--min_score: replaces"),
        ("--drop_share 1", "--drop_share 1.0: must be 0 or above, and below 1"),
        ("--scores classifier", "--scores classifier: needs --classifier"),
        ("--words_model clip", "--words_model clip: does nothing without words among --scores"),
        ("--batch_size 0", "--batch_size 0: must be above 0"),
        ("--synthetic_dataset user/cars", "--synthetic_dataset user/cars: not a folder; download"),
        ("--synthetic_dataset {real}", "a synthetic set of generate_synthetic.py"),
        ("--train_dir nowhere", "nowhere"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(flags, message, run, set_dir):
    with pytest.raises(UserError, match=message):
        run(*flags.replace("{real}", str(set_dir.parent / "real")).split())
    assert not Path(run.folder, "scores.parquet").exists()
