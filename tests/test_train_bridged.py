import json

import pytest
from transformers import pipeline

import train_bridged
from tests.conftest import CLASS_NAMES
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


def test_vanilla_needs_no_synthetic_set_and_matches_steps(classifiers, real_images_dir, tmp_path):
    results = train_bridged.main(
        ["--dataset_name", str(real_images_dir), "--method", "vanilla", "--match_steps", "--num_shots", "2",
         "--model_name_or_path", classifiers["vit"], "--output_dir", str(tmp_path / "out"), *SMALL]
    )  # fmt: skip
    assert results["vanilla_steps"] == 5
    assert results["leep_bridged"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "bridged", "--dataset_name", "x"], "--synthetic_dataset"),
        (["--method", "vanilla"], "--dataset_name"),
        (["--synthetic_dataset", "SYN", "--num_shots", "0"], "--num_shots"),
        (["--synthetic_dataset", "SYN", "--label_column_name", "colour"], "not in"),
        (["--synthetic_dataset", "no folder"], "neither an existing folder"),
        (["--synthetic_dataset", "SYN", "--model_name_or_path", "no folder"], "--model_name_or_path"),
    ],
)
def test_bad_input_is_one_user_error_and_nothing_is_written(flags, message, synthetic_dir, tmp_path):
    flags = [str(synthetic_dir) if flag == "SYN" else flag for flag in flags]
    with pytest.raises(UserError, match=message):
        train_bridged.main([*flags, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
