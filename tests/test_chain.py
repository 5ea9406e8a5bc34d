"""The three commands of the README through `accelerate launch`, each in a process of its own, with folders for ids."""

import json
import os
import subprocess
import sys
from pathlib import Path

from transformers import pipeline

from tests.conftest import CLASS_NAMES

pytest_plugins = ["tests.transfer.fixtures"]
ROOT = Path(__file__).parent.parent


def launch(script, *arguments, cwd):
    """Run a script as a user does, on the CPU; return what it printed."""
    accelerate = Path(sys.executable).with_name("accelerate")
    options = ["--cpu", "--num_processes", "1", "--num_cpu_threads_per_process", "1"]
    result = subprocess.run(
        [accelerate, "launch", *options, ROOT / script, *arguments],
        cwd=cwd, capture_output=True, text=True, env=os.environ | {"HF_HOME": str(cwd / "hf-home")}, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_each_step_finds_all_it_needs_in_the_records_of_the_one_before(
    tiny_pipeline_dir, classifiers, real_images_dir, tmp_path
):
    quick = tmp_path / "quick.json"
    quick.write_text(json.dumps({"max_train_steps": 2, "train_batch_size": 2, "num_shots": 2}))
    launch(
        "train_dsi.py", str(quick), "--pretrained_model_name_or_path", tiny_pipeline_dir, "--dataset_name",
        real_images_dir, "--output_dir", "squares-style", cwd=tmp_path,
    )  # fmt: skip
    printed = launch(
        "generate_synthetic.py", "--learned_embeds", "squares-style", "--output_dir", "squares-syn",
        "--num_images_per_class", "4", "--num_inference_steps", "2", cwd=tmp_path,
    )  # fmt: skip
    assert "accelerate launch train_bridged.py --synthetic_dataset squares-syn" in printed
    launch(
        "train_bridged.py", "--synthetic_dataset", "squares-syn", "--model_name_or_path", classifiers["timm"],
        "--bridge_max_steps", "2", "--max_steps", "2", cwd=tmp_path,
    )  # fmt: skip
    record = json.loads((tmp_path / "squares-syn-bridged" / "bridged_config.json").read_text())
    assert record["real_images"]["dataset_name"] == str(real_images_dir)
    assert len(record["train_indices"]) == 6
    classify = pipeline("image-classification", model=str(tmp_path / "squares-syn-bridged"))
    assert {prediction["label"] for prediction in classify(str(tmp_path / "squares-syn" / "preview.png"))} == set(
        CLASS_NAMES
    )
