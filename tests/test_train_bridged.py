import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Image, load_dataset
from transformers import pipeline

import train_bridged
from tests.conftest import CLASS_NAMES, save_image_set
from utils.cli.errors import UserError

pytest_plugins = ["tests.transfer.fixtures"]
SMALL = ["--max_steps", "2", "--bridge_max_steps", "3", "--max_eval_samples", "6", "--use_cpu"]


def test_bridged_from_the_record_alone_gives_a_pipeline(classifiers, synthetic_dir, tmp_path):
    results = train_bridged.main(
        ["--synthetic_dataset", str(synthetic_dir), "--model_name_or_path", classifiers["timm"],
         "--output_dir", str(tmp_path / "out"), *SMALL]
    )  # fmt: skip
    config = json.loads((tmp_path / "out" / "bridged_config.json").read_text())
    assert (results["stage1_steps"], results["stage2_steps"]) == (3, 2)
    assert len(config["train_indices"]) == 2 * len(CLASS_NAMES)  # the record's two shots
    assert (
        list(pipeline("image-classification", model=str(tmp_path / "out")).model.config.id2label.values())
        == CLASS_NAMES
    )
    for name in ("README.md", "report.png", "all_results.json", "run_config.json", "stage1/model.safetensors"):
        assert (tmp_path / "out" / name).is_file()
    assert not list((tmp_path / "out").rglob("training_args.bin"))
    with pytest.raises(UserError, match="holds a classifier made with other options"):
        train_bridged.main(["--synthetic_dataset", str(synthetic_dir), "--output_dir", str(tmp_path / "out")])


def test_vanilla_needs_no_synthetic_set_and_matches_steps(classifiers, real_images_dir, tmp_path):
    results = train_bridged.main(
        ["--dataset_name", str(real_images_dir), "--method", "vanilla", "--match_steps", "--num_shots", "2",
         "--model_name_or_path", classifiers["vit"], "--output_dir", str(tmp_path / "out"), "--hub_token",
         "hf_some_secret", *SMALL]
    )  # fmt: skip
    assert results["vanilla_steps"] == 5
    assert results["leep_bridged"] is None
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in written if b"hf_some_secret" in path.read_bytes()]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "bridged", "--dataset_name", "x"], "--synthetic_dataset"),
        (["--method", "vanilla"], "--dataset_name"),
        (["--synthetic_dataset", "SYN", "--num_shots", "0"], "--num_shots"),
        (["--synthetic_dataset", "SYN", "--model_name_or_path", "VIT", "--label_column_name", "colour"], "not in"),
        (["--synthetic_dataset_revision", "v1", "--dataset_name", "x", "--method", "vanilla"], "needs --synthetic_d"),
        (["--synthetic_dataset", "no folder"], "neither an existing folder"),
        (["--synthetic_dataset", "SYN", "--model_name_or_path", "no folder"], "--model_name_or_path"),
    ],
)
def test_bad_input_is_one_user_error_and_nothing_is_written(flags, message, synthetic_dir, classifiers, tmp_path):
    flags = [{"SYN": str(synthetic_dir), "VIT": classifiers["vit"]}.get(flag, flag) for flag in flags]
    with pytest.raises(UserError, match=message):
        train_bridged.main([*flags, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def rewrite_train_split(folder, change):
    """Replace the train rows of an image set by `change(row)`, images as they are stored."""
    path = folder / "data" / "train-00000.parquet"
    rows = load_dataset("parquet", data_files=str(path), split="train").cast_column("image", Image(decode=False))
    rows = rows.map(change, with_indices=True)
    path.unlink()
    rows.to_parquet(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda row, i: {"image": {"bytes": b"torn", "path": None}} if i == 1 else row,
            "row 1, column 'image': damaged",
        ),
        (lambda row, i: {"label": -1} if i == 2 else row, "1 of 9 images .* have no label, the first in row 2"),
    ],
)
def test_damaged_images_and_missing_labels_are_found_before_a_model_loads(change, message, tmp_path, monkeypatch):
    monkeypatch.setattr(train_bridged, "check_classifier", lambda *_: None)
    monkeypatch.setattr(train_bridged, "load_image_processor", lambda *_, **__: pytest.fail("a model was loaded"))
    save_image_set(tmp_path / "real", {"train": 3, "test": 2})
    rewrite_train_split(tmp_path / "real", change)
    with pytest.raises(UserError, match=message):
        train_bridged.main(["--dataset_name", str(tmp_path / "real"), "--method", "vanilla",
                            "--output_dir", str(tmp_path / "out")])  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_classes_of_the_synthetic_set_that_do_not_fit_are_listed(make_synthetic_dir, classifiers, tmp_path):
    renamed = make_synthetic_dir("renamed", ["red_square", "green circle", "blue stripe"])
    with pytest.raises(UserError, match="missing: blue-stripe; extra: blue stripe"):
        train_bridged.main(
            ["--synthetic_dataset", str(renamed), "--model_name_or_path", classifiers["vit"],
             "--output_dir", str(tmp_path / "out")]
        )  # fmt: skip


def test_error_is_one_line_with_exit_status_2(tmp_path):
    result = subprocess.run(
        [sys.executable, "train_bridged.py", "--synthetic_dataset", "no folder"],
        cwd=Path(train_bridged.__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "train_bridged.py: error: --synthetic_dataset no folder: neither an existing folder nor a repository id like "
        "'user/name'."
    ]
