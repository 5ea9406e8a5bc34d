import json

import numpy as np

import compare_transfer
from utils.data.real_images import RealImagesRecord, load_real_images
from utils.transfer import cells
from utils.transfer.cells import CellRunner

pytest_plugins = ["tests.transfer.fixtures"]


def run(classifiers, synthetic_dir, output_dir, *flags):
    return compare_transfer.main(
        ["--synthetic_dataset", str(synthetic_dir), "--model_name_or_path", classifiers["vit"], "--num_shots", "1", "2",
         "--seeds", "0", "--bridge_step_counts", "2", "--step_counts", "1", "--max_eval_samples", "6",
         "--methods", "vanilla_matched", "bridged", "bridged_keep", "synthetic_only", "--output_dir", str(output_dir),
         *flags]
    )  # fmt: skip


def test_second_run_trains_nothing_and_stage_1_is_trained_once(classifiers, synthetic_dir, tmp_path, monkeypatch):
    trained = []
    run_stage = cells.run_stage
    monkeypatch.setattr(cells, "run_stage", lambda stage, *a, **k: trained.append(stage) or run_stage(stage, *a, **k))
    first = run(classifiers, synthetic_dir, tmp_path)
    assert [stage.name for stage in trained].count("stage1") == 1
    assert {stage.settings.max_steps for stage in trained if stage.name == "vanilla"} == {3}
    trained.clear()
    assert run(classifiers, synthetic_dir, tmp_path)["summary"] == first["summary"]
    assert not trained
    assert (tmp_path / "comparison.png").is_file() and (tmp_path / "comparison.md").is_file()


def test_recipes_are_chosen_on_validation(classifiers, synthetic_dir, tmp_path, monkeypatch):
    asked = []

    def result(self, cell):
        asked.append(cell)
        best = cell.recipe.learning_rate == 1e-3
        return {"accuracy": float(best if cell.split == "validation" else not best)}

    monkeypatch.setattr(CellRunner, "result", result)
    run(classifiers, synthetic_dir, tmp_path, "--learning_rates", "1e-4", "1e-3")
    chosen = json.loads((tmp_path / "chosen_settings.json").read_text())
    assert chosen["bridged"]["2"]["learning_rate"] == 1e-3
    assert {cell.recipe.learning_rate for cell in asked if cell.split == "test" and cell.arm.name == "bridged"} == {
        1e-3
    }


def test_stage_1_is_chosen_on_validation_and_kept_for_all_methods(classifiers, synthetic_dir, tmp_path, monkeypatch):
    asked = []

    def result(self, cell):
        asked.append((cell.arm.name, cell.split, self.bridge_settings.learning_rate))
        return {"accuracy": float(self.bridge_settings.learning_rate == 1e-3)}

    monkeypatch.setattr(CellRunner, "result", result)
    run(classifiers, synthetic_dir, tmp_path, "--bridge_learning_rates", "1e-4", "1e-3", "5e-3")
    assert [ask for ask in asked if ask[1] == "validation"] == [
        ("synthetic_only", "validation", rate) for rate in (1e-4, 1e-3, 5e-3)
    ]
    assert {rate for _, split, rate in asked if split == "test"} == {1e-3}
    chosen = json.loads((tmp_path / "chosen_settings.json").read_text())
    assert chosen["stage1"]["learning_rate"] == 1e-3
    again = ["--settings", str(tmp_path / "chosen_settings.json"), "--bridge_learning_rates", "1e-4"]
    asked.clear()
    run(classifiers, synthetic_dir, tmp_path / "again", *again)
    assert {rate for _, _, rate in asked} == {1e-3}


def test_shots_are_the_images_of_load_real_images(real_images_dir):
    record = RealImagesRecord(str(real_images_dir))
    real = load_real_images(record)
    runner = CellRunner("", {}, None, real, {}, None, 0.0, None, None)
    few = load_real_images(RealImagesRecord(str(real_images_dir), num_shots=3, few_shot_seed=5))
    assert np.array_equal(real.train_indices[runner.few_shot_rows(3, 5)], few.train_indices)
