import dataclasses
import json
import math
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import compare_transfer
from tests.command_lines import parse_flags
from utils.cli.errors import DivergedError, UserError
from utils.cli.records import GENERATION_CONFIG, read_record, write_record
from utils.cli.step_runner import StepRunner
from utils.comparison import cells
from utils.comparison.cells import CellRunner
from utils.comparison.grid import Recipe, Row, make_cell, plan_cell
from utils.comparison.statistics import pack_correct
from utils.data.image_set import RealImagesRecord
from utils.data.real_images import load_real_images
from utils.hub import cards
from utils.transfer import stage
from utils.transfer.methods import METHODS, StageSettings
from utils.transfer.run_method import MethodResult, select_images
from utils.transfer.stage import Pretrained
from utils.transfer.synthetic_images import open_synthetic

pytest_plugins = ["tests.transfer.fixtures"]

NAMES = ["vanilla_matched", "bridged", "bridged_keep", "synthetic_only"]
RIGHT = {"correct": "gA==", "num_images": 2}  # the first of two images


@pytest.fixture(scope="module")
def run(classifiers, synthetic_dir):
    """Run compare_transfer.py on the tiny images into a folder; return its results."""

    def run(output_dir, *flags, synthetic=synthetic_dir) -> dict:
        steps = [] if "--settings" in flags else ["--bridge_step_counts", "2", "--step_counts", "1"]
        return compare_transfer.main(
            ["--synthetic_dataset", str(synthetic), "--model_name_or_path", classifiers["vit"], "--num_shots", "1", "2",
             "--seeds", "0", *steps, "--max_eval_samples", "6", "--methods", *NAMES, "--output_dir", str(output_dir),
             *flags]
        )  # fmt: skip

    return run


def trainings(monkeypatch) -> list:
    """Return a list that collects (settings, images, folder) of every stage that is really trained."""
    trained = []
    fine_tune = stage.fine_tune

    def recorded(model, images, image_processor, settings, training_args, output_dir, *args, **kwargs):
        trained.append((settings, images, output_dir))
        return fine_tune(model, images, image_processor, settings, training_args, output_dir, *args, **kwargs)

    monkeypatch.setattr(stage, "fine_tune", recorded)
    return trained


def pixels(images) -> list[bytes]:
    return [image.tobytes() for image in images["image"]]


def without_seconds(comparison: dict) -> dict:
    entries = [{key: value for key, value in entry.items() if key != "seconds"} for entry in comparison["summary"]]
    return comparison | {"summary": entries}


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """A comparison that was killed in its second stage 2 and run again: its folder, result, and what was trained."""
    output_dir = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        trained = trainings(monkeypatch)
        fine_tune = stage.fine_tune

        def killed(model, images, image_processor, settings, *args, **kwargs):
            if len(trained) == 4:
                raise KeyboardInterrupt
            return fine_tune(model, images, image_processor, settings, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(stage, "fine_tune", killed)
            with pytest.raises(KeyboardInterrupt):
                run(output_dir)
        comparison = run(output_dir)
    return output_dir, comparison, trained


def test_a_killed_comparison_resumes_and_stage_1_is_trained_once(finished):
    output_dir, comparison, trained = finished
    names = [folder.name for _, _, folder in trained]
    assert sorted(names) == ["stage1"] + 4 * ["stage2"] + 2 * ["vanilla"]
    assert {settings.max_steps for settings, _, folder in trained if folder.name == "vanilla"} == {3}
    assert read_record(output_dir / "comparison.json")["summary"] == comparison["summary"]
    assert (output_dir / "comparison.png").is_file() and (output_dir / "gain.png").is_file()
    assert cards.text(comparison["findings"][0], None) in (output_dir / "comparison.md").read_text(encoding="utf-8")
    assert not list((output_dir / "work").iterdir()), "weights of cells are not kept"
    entry = comparison["summary"][2]
    assert (entry["method"], entry["num_shots"]) == ("bridged", 1)
    assert (entry["steps"], entry["images_seen"]) == (2 + 1, 2 * 18 + 3)


def test_without_a_reference_no_picture_of_gains_is_left(tmp_path):
    (tmp_path / "gain.png").touch()  # of an earlier comparison in this folder
    correct = {"vit": {Row("mix", "mix", "dsi"): {1: np.eye(1, 2, dtype=bool)}}}
    entry = {"method": "mix", "volume": None, "num_shots": 1, "mean": 50.0, "std": None, "values": [50.0]}
    compare_transfer.draw_pictures(tmp_path, [entry], correct, ["Use mix."], None)
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.png"]


def test_all_methods_train_on_the_same_real_images(finished, real_images_dir):
    _, _, trained = finished
    for num_shots in (1, 2):
        few = load_real_images(RealImagesRecord(str(real_images_dir), num_shots=num_shots, few_shot_seed=0))
        seen = [pixels(images) for _, images, folder in trained if folder.name != "stage1"]
        assert seen.count(pixels(few.train)) == 3


def test_a_second_run_trains_nothing_and_gives_the_same_results(finished, run, monkeypatch):
    output_dir, comparison, _ = finished
    trained = trainings(monkeypatch)
    assert run(output_dir) == comparison
    assert not trained


@pytest.mark.soak  # a short form with folds is below
def test_workers_give_the_same_results_as_one_process(finished, run, tmp_path):
    output_dir, comparison, _ = finished
    flags = "--num_shots", "1", "--methods", "vanilla_matched", "bridged", "bridged_keep", "--num_workers", "2"
    flags += ("--cache_images",)  # the same pixels
    other = run(tmp_path, *flags)
    alone = {(entry["method"], entry["num_shots"]): entry for entry in without_seconds(comparison)["summary"]}
    for entry in without_seconds(other)["summary"]:
        assert entry == alone[entry["method"], 1]
    assert len(list((tmp_path / "stage1").iterdir())) == 1
    other_stems, stems = ({path.stem for path in (at / "cells").iterdir()} for at in (tmp_path, output_dir))
    assert other_stems <= stems


def test_a_shared_stage_1_is_trained_under_its_lock(run, tmp_path, monkeypatch):
    held, trained = [], stage.fine_tune
    lock = CellRunner._lock

    @contextmanager
    def noted(self, name):
        held.append(name)
        with lock(self, name):
            yield
        held.remove(name)

    def fine_tune(*args, **kwargs):
        folder = next(arg for arg in args if isinstance(arg, Path))
        assert f"{folder.parent.name}-{folder.name}" in held
        return trained(*args, **kwargs)

    monkeypatch.setattr(CellRunner, "_lock", noted)
    monkeypatch.setattr(stage, "fine_tune", fine_tune)
    run(tmp_path, "--num_shots", "1", "--methods", "bridged_keep")
    assert not held


@pytest.mark.parametrize(("launched", "flags"), [("bf16", []), ("no", ["--bf16", "--use_cpu"])])
def test_every_cell_has_the_precision_of_the_flag_or_the_launch(run, tmp_path, monkeypatch, launched, flags):
    precisions = []

    def fine_tune(model, images, image_processor, settings, training_args, *args, **kwargs):
        precisions.append(training_args.mixed_precision)
        return trained(model, images, image_processor, settings, training_args, *args, **kwargs)

    trained = stage.fine_tune
    monkeypatch.setattr(stage, "fine_tune", fine_tune)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    run(tmp_path, "--num_shots", "1", "--methods", "bridged", *flags)
    assert precisions == ["bf16", "bf16"]
    (cell,) = (tmp_path / "cells").iterdir()
    assert read_record(cell)["settings"]["mixed_precision"] == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    run(tmp_path, "--num_shots", "1", "--methods", "bridged")
    assert precisions[2:] == ["no", "no"], "cells and stages of another precision are not taken for these"


@pytest.fixture(scope="module")
def two(run, classifiers, tmp_path_factory):
    """A comparison of two classifiers of different architectures, and its folder."""
    output_dir = tmp_path_factory.mktemp("two")
    flags = "--methods", "vanilla_matched", "bridged", "--model_name_or_path", classifiers["vit"], classifiers["resnet"]
    return output_dir, run(output_dir, *flags)


def test_each_of_two_classifiers_has_the_same_results_as_alone(two, finished, run, classifiers, tmp_path):
    output_dir, comparison = two
    _, of_vit, _ = finished
    flags = "--methods", "vanilla_matched", "bridged", "--model_name_or_path", classifiers["resnet"]
    of_resnet = run(tmp_path, *flags)
    alone = [{"classifier": "vit", **entry} for entry in without_seconds(of_vit)["summary"]]
    alone = [entry for entry in alone if entry["method"] in ("vanilla_matched", "bridged")]
    alone += [{"classifier": "resnet", **entry} for entry in without_seconds(of_resnet)["summary"]]
    assert without_seconds(comparison)["summary"] == alone
    assert {path.name for path in (tmp_path / "cells").iterdir()} < {
        path.name for path in (output_dir / "cells").iterdir()
    }
    assert len(list((output_dir / "stage1").iterdir())) == 2
    assert [sentence.split(":")[0] for sentence in comparison["findings"][:2]] == ["vit", "resnet"]
    settings = comparison["settings"]["classifiers"]
    rates = {label: (chosen["stage1"]["learning_rate"], chosen["bridged"]["1"]["learning_rate"])
             for label, chosen in settings.items()}  # fmt: skip
    assert rates == {"vit": (5e-5, 2e-5), "resnet": (5e-4, 2e-4)}, "by the kind of each"
    assert settings["resnet"] == of_resnet["settings"]
    inputs = {flag for flag in comparison["inputs"] if flag.startswith("--model")}
    assert inputs == {f"--model_name_or_path {classifiers[name]}" for name in ("vit", "resnet")}


def test_records_of_one_classifier_have_the_earlier_format_and_of_several_name_them(two, finished, classifiers):
    (of_two, _), (of_one, comparison, _) = two, finished
    options = read_record(of_one / "run_config.json")["options"]
    assert options["model_name_or_path"] == classifiers["vit"]
    assert (options["learning_rates"], options["bridge_learning_rates"]) == ([2e-5], [5e-5])
    assert "classifier" not in comparison["summary"][0] and "stage1" in comparison["settings"]
    assert "stage1" in read_record(of_one / "chosen_settings.json")
    options = read_record(of_two / "run_config.json")["options"]
    assert options["model_name_or_path"] == [classifiers["vit"], classifiers["resnet"]]
    assert options["learning_rates"] is None
    assert set(read_record(of_two / "chosen_settings.json")["classifiers"]) == {"vit", "resnet"}


def test_recipes_of_two_classifiers_train_the_same_cells_again(two, run, classifiers, monkeypatch):
    output_dir, comparison = two
    trained = trainings(monkeypatch)
    flags = ["--methods", "vanilla_matched", "bridged", "--settings", str(output_dir / "chosen_settings.json")]
    assert run(output_dir, *flags, "--model_name_or_path", classifiers["vit"], classifiers["resnet"]) == comparison
    alone = run(output_dir, *flags, "--model_name_or_path", classifiers["resnet"])
    assert alone["settings"] == comparison["settings"]["classifiers"]["resnet"] and not trained


def test_each_classifier_is_searched_and_errors_name_it(run, classifiers, tmp_path, monkeypatch):
    monkeypatch.setattr(CellRunner, "result", lambda self, cell: RIGHT | {
        "accuracy": float(cell.recipe.learning_rate == {"vit": 1e-3, "resnet": 1e-4}[self.classifier])
    })  # fmt: skip
    models = ["--model_name_or_path", classifiers["vit"], classifiers["resnet"]]
    run(tmp_path, *models, "--learning_rates", "1e-4", "1e-3")
    chosen = read_record(tmp_path / "chosen_settings.json")["classifiers"]
    assert {label: of_one["bridged"]["1"]["learning_rate"] for label, of_one in chosen.items()} == {
        "vit": 1e-3, "resnet": 1e-4,
    }  # fmt: skip
    monkeypatch.undo()
    diverge(monkeypatch, lambda cell: cell.row.name == "bridged")
    with pytest.raises(UserError, match="the loss is nan .in the cell 'bridged, 1 shot, seed 0' of vit.$"):
        run(tmp_path / "out", *models)


def pretrained_of(name):
    return Pretrained(name, None, {"revision": "main"})


@pytest.fixture
def runner(real_images_dir, synthetic_dir, tmp_path):
    real = load_real_images(RealImagesRecord(str(real_images_dir)))
    sources = {("dsi", seed): open_synthetic(str(synthetic_dir)) for seed in (0, 1)}
    training_args = cells.TrainingArguments(output_dir=str(tmp_path), report_to="none")
    return CellRunner(pretrained_of("base"), real, sources, StageSettings(0, 0.0), training_args, tmp_path)


def cell_of(name, num_shots=1, seed=0, volume=None, bridge=None):
    bridge = bridge or StageSettings(2, 5e-4, mixup_alpha=0.2)
    return make_cell(Row(name, name, "dsi", volume), num_shots, seed, Recipe(1e-4, 2), bridge)


def test_stage_1_is_shared_by_shots_and_heads_and_by_nothing_else(runner):
    shared = runner.bridge_dir(cell_of("bridged"))
    for cell in (cell_of("bridged", 4), cell_of("bridged_keep", None), cell_of("bridged_imprint"),
                 cell_of("bridged_head_warmup"), cell_of("synthetic_only")):  # fmt: skip
        assert runner.bridge_dir(cell) == shared
    longer = StageSettings(3, 5e-4, mixup_alpha=0.2)
    others = [cell_of("bridged", seed=1), cell_of("bridged", volume=2), cell_of("bridged", volume=3),
              cell_of("bridged_no_mixup"), cell_of("bridged", bridge=longer)]  # fmt: skip
    assert len({shared, *map(runner.bridge_dir, others)}) == 6
    assert runner.bridge_dir(cell_of("bridged_plain")) == runner.bridge_dir(cell_of("bridged_no_mixup"))
    assert runner.bridge_dir(cell_of("vanilla_matched")) is None
    other_model = dataclasses.replace(runner, pretrained=pretrained_of("other"))
    assert other_model.bridge_dir(cell_of("bridged")) != shared


def test_an_aligned_stage_1_is_shared_by_recipes_of_the_same_real_images_only(runner):
    first = cell_of("bridged_coral")
    same = dataclasses.replace(first, recipe=Recipe(1e-2, 9), split="validation")
    assert runner.bridge_dir(same) == runner.bridge_dir(first)
    others = [cell_of("bridged_coral", 2), cell_of("bridged_coral", None), cell_of("bridged_coral", seed=1),
              cell_of("bridged_adversarial"), cell_of("bridged_adversarial", 2), cell_of("bridged_keep")]  # fmt: skip
    others = {runner.bridge_dir(cell) for cell in others}
    assert len(others | {runner.bridge_dir(first)}) == 7
    inputs = dict.fromkeys(("train_dir", "dataset_name"), "3 images, sha256 other")
    changed = dataclasses.replace(runner, shared_inputs=inputs)
    assert changed.bridge_dir(first) != runner.bridge_dir(first)
    assert changed.bridge_dir(cell_of("bridged_keep")) == runner.bridge_dir(cell_of("bridged_keep"))


def test_a_cell_is_kept_only_for_exactly_the_same_settings(runner):
    path = runner.path(cell_of("mix"))
    changes = [{"max_eval_samples": 5}, {"pretrained": pretrained_of("other")},
               {"settings": StageSettings(0, 0.0, weight_decay=0.5)}]  # fmt: skip
    paths = {dataclasses.replace(runner, **change).path(cell_of("mix")) for change in changes}
    paths |= {
        runner.path(cell_of("mix", None)), runner.path(cell_of("mix", volume=2)), runner.path(cell_of("mix_mixup")),
    }  # fmt: skip
    paths.add(runner.path(dataclasses.replace(cell_of("mix"), split="validation")))
    assert len(paths | {path}) == 8
    assert runner.path(cell_of("mix")) == path


def test_volumes_are_nested_shots_match_a_run_and_mix_repeats_real_images_to_its_ratio(runner, real_images_dir):
    source = runner.sources["dsi", 0]
    small, large, whole = (runner.load_synthetic(source, volume) for volume in (2, 4, None))
    assert (len(small), len(large), len(whole)) == (6, 12, 18)
    assert set(pixels(small)) < set(pixels(large)) < set(pixels(whole))
    assert [np.bincount(images["label"]).tolist() for images in (small, large)] == [[2] * 3, [4] * 3]
    few = load_real_images(RealImagesRecord(str(real_images_dir), num_shots=3, few_shot_seed=5))
    assert np.array_equal(runner.real.train_indices[runner.few_shot_rows(3, 5)], few.train_indices)
    assert np.array_equal(runner.few_shot_rows(None, 5), np.arange(len(runner.real.train)))
    real = runner.real.train.select(runner.few_shot_rows(1, seed=0))
    assert len(select_images(METHODS["mix"], real, large)["both"]) == 3 + 12
    balanced = select_images(METHODS["mix_balanced"], real, large)["both"]
    assert pixels(balanced)[:12] == 4 * pixels(real) and pixels(balanced)[12:] == pixels(large)


def test_the_error_of_a_cell_names_the_cell(runner, monkeypatch):
    def run_stage(*args, **kwargs):
        raise UserError("--batch_norm odd: no.")

    monkeypatch.setattr("utils.transfer.run_method.run_stage", run_stage)
    monkeypatch.setattr(CellRunner, "_eval_items", lambda *_: [])
    message = r"^--batch_norm odd: no\. \(in the cell 'bridged, 1 shot, 2 per class, seed 0'\)$"
    with pytest.raises(UserError, match=message):
        runner.result(cell_of("bridged", volume=2))


def test_workers_begin_with_one_cell_for_each_stage_1(runner):
    first, second = cell_of("bridged", 1), cell_of("bridged", 1, seed=1)
    rest = [cell_of("bridged", 4), cell_of("bridged_keep", 4, seed=1)]
    vanilla = cell_of("vanilla", 1)
    order = cells.order_for_workers(runner, [first, *rest, vanilla, second])
    assert order[:2] in ([first, second], [first, rest[1]]) and set(order) == {first, second, vanilla, *rest}
    assert order[2] == vanilla


def test_each_worker_sees_one_gpu_in_turn(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    gpus = cells.visible_gpus()
    seen = []
    for number in range(3):
        cells.use_one_gpu(number, gpus)
        seen.append(cells.os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["4", "6", "4"]


def fake_results(monkeypatch, best_on_validation) -> list:
    """Let cells return an accuracy by their settings; return the list of requested cells."""
    asked = []

    def result(self, cell):
        asked.append(cell)
        return RIGHT | {"accuracy": float(best_on_validation(cell) == (cell.split == "validation"))}

    monkeypatch.setattr(CellRunner, "result", result)
    return asked


def test_recipes_are_chosen_on_validation_and_other_shots_take_those_of_the_next_smaller(run, tmp_path, monkeypatch):
    asked = fake_results(monkeypatch, lambda cell: cell.recipe.learning_rate == 1e-3)
    run(tmp_path, "--learning_rates", "1e-4", "1e-3", "--search_shots", "1")
    assert read_record(tmp_path / "chosen_settings.json")["bridged"]["1"]["learning_rate"] == 1e-3
    assert {cell.num_shots for cell in asked if cell.split == "validation"} == {1}
    tested = {(cell.num_shots, cell.recipe.learning_rate) for cell in asked if cell.split == "test"}
    assert {(1, 1e-3), (2, 1e-3)} <= tested and {rate for shots, rate in tested if shots} == {1e-3}


def test_stage_1_is_chosen_on_validation_and_kept_for_all_methods(run, tmp_path, monkeypatch):
    asked = fake_results(monkeypatch, lambda cell: cell.bridge.learning_rate == 1e-3)
    run(tmp_path, "--bridge_learning_rates", "1e-4", "1e-3", "5e-3")
    assert [(cell.row.name, cell.bridge.learning_rate) for cell in asked if cell.split == "validation"] == [
        ("synthetic_only", rate) for rate in (1e-4, 1e-3, 5e-3)
    ]
    assert {cell.bridge.learning_rate for cell in asked if cell.split == "test"} == {1e-3}
    assert read_record(tmp_path / "chosen_settings.json")["stage1"]["learning_rate"] == 1e-3
    asked.clear()
    run(tmp_path / "again", "--settings", str(tmp_path / "chosen_settings.json"))
    assert {cell.bridge.learning_rate for cell in asked} == {1e-3}


def record_stages(monkeypatch) -> list[StageSettings]:
    """Return a list that collects the settings of every stage of the requested cells; nothing is trained."""
    stages = []

    def result(self, cell):
        stages.extend(stage.settings for stage in plan_cell(cell, self.settings))
        return RIGHT | {"accuracy": 1.0}

    monkeypatch.setattr(CellRunner, "result", result)
    return stages


def test_chosen_settings_have_what_was_searched_and_give_the_same_cells(finished, run, monkeypatch, capsys):
    output_dir, comparison, _ = finished
    path = output_dir / "chosen_settings.json"
    searched = {"max_steps": 2, "learning_rate": 5e-5, "mixup_alpha": 0.2, "head_learning_rate_factor": 10.0}
    assert read_record(path)["stage1"] == searched
    trained = trainings(monkeypatch)
    assert run(output_dir, "--settings", str(path)) == comparison
    # files of earlier versions have all settings of stage 1
    old = output_dir / "old.json"
    write_record(old, read_record(path) | {"stage1": comparison["settings"]["stage1"]})
    capsys.readouterr()
    assert run(output_dir, "--settings", str(old)) == comparison
    assert not trained and "old.json" not in capsys.readouterr().out


def test_flags_that_are_not_searched_override_the_settings_file_for_every_method(run, tmp_path, monkeypatch, capsys):
    stages = record_stages(monkeypatch)
    run(tmp_path / "first")
    path = tmp_path / "first" / "chosen_settings.json"
    flags = "--weight_decay", "0.3", "--augmentation", "basic", "--per_device_train_batch_size", "4"
    full = StageSettings(7, 1e-3, 5.0, mixup_alpha=0.4, weight_decay=0.1).to_dict()
    write_record(tmp_path / "old.json", read_record(path) | {"stage1": full})
    for settings in (path, tmp_path / "old.json"):
        stages.clear()
        capsys.readouterr()
        run(tmp_path / "again", "--settings", str(settings), *flags)
        used = {(stage.weight_decay, stage.augmentation, stage.per_device_train_batch_size) for stage in stages}
        assert used == {(0.3, "basic", 4)}
        lines = [line for line in capsys.readouterr().out.splitlines() if str(settings) in line]
        assert len(lines) == (settings != path)
    assert "augmentation robust, per_device_train_batch_size 32, weight_decay 0.1" in lines[0]
    assert (7, 1e-3, 5.0, 0.4) in {
        (stage.max_steps, stage.learning_rate, stage.head_learning_rate_factor, stage.mixup_alpha) for stage in stages
    }


@pytest.mark.parametrize(
    "flag",
    ["--learning_rates 1e-4", "--step_counts 3", "--num_train_epochs 30", "--head_learning_rate_factors 2",
     "--bridge_learning_rates 1e-4", "--bridge_step_counts 3", "--bridge_num_train_epochs 5",
     "--bridge_mixup_alphas 0", "--bridge_head_learning_rate_factor 10", "--search_seeds 0", "--search_shots 1",
     "--search_learning_rate"],
)  # fmt: skip
def test_flags_that_a_settings_file_decides_are_refused_together_with_it(flag, run, tmp_path):
    name = flag.split()[0]
    lack = "without a search" if name == "--search_seeds" else "with --settings"
    with pytest.raises(UserError, match=f"^{name}[^:]*: does nothing {lack}; .*leave {name} out"):
        run(tmp_path / "out", "--settings", "chosen.json", *flag.split())
    assert not (tmp_path / "out").exists()


def test_recipe_keys_that_a_settings_file_decides_are_reported_together(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("synthetic_dataset: [x]\nsettings: a.json\nnum_train_epochs: 3\nlearning_rates: [1.0e-4]\n")
    with pytest.raises(UserError, match="^a.json: cannot be read"):
        compare_transfer.main([str(recipe)])
    told = f"{recipe}: no effect in this run: learning_rates, num_train_epochs (with --settings).\n"
    assert capsys.readouterr().err == told
    # empty values and switches that are off have no effect
    recipe.write_text("synthetic_dataset: [x]\nsettings: a.json\nlearning_rates:\nsearch_learning_rate: false\n")
    with pytest.raises(UserError, match="^a.json: cannot be read"):
        compare_transfer.main([str(recipe)])
    assert capsys.readouterr().err == ""


def test_one_test_image_gives_strict_json_and_words_instead_of_figures(run, tmp_path, monkeypatch, capsys):
    def result(self, cell):
        return pack_correct(np.array([cell.row.name == "bridged"])) | {"accuracy": 1.0}

    monkeypatch.setattr(CellRunner, "result", result)
    run(tmp_path)
    written = (tmp_path / "comparison.json").read_text(encoding="utf-8")
    entry = next(
        entry for entry in json.loads(written, parse_constant=pytest.fail)["summary"] if entry["method"] == "bridged"
    )
    assert (entry["gain"], entry["gain_low"], entry["gain_high"], entry["std"]) == (100.0, None, None, None)
    report = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    for shown in (capsys.readouterr().out, report):
        assert "cannot be judged at 1 shot (+100.0 [not known: one test image])" in shown.replace("\\", "")
        assert "nan" not in shown.lower() and "None" not in shown
    assert "on 1 test image;" in report


def test_a_set_whose_token_saw_no_mirrored_images_is_compared_without_them(run, unmirrored_dir, tmp_path, monkeypatch):
    stages = record_stages(monkeypatch)
    run(tmp_path / "first", synthetic=unmirrored_dir)
    assert len(stages) > len(NAMES) and not any(stage.random_flip for stage in stages)
    # recipes searched with mirrored images do not apply here
    chosen = read_record(tmp_path / "first" / "chosen_settings.json")
    chosen["stage1"]["random_flip"] = True
    write_record(tmp_path / "chosen.json", chosen)
    stages.clear()
    run(tmp_path / "second", "--settings", str(tmp_path / "chosen.json"), synthetic=unmirrored_dir)
    assert stages and not any(stage.random_flip for stage in stages)


def diverge(monkeypatch, diverges) -> None:
    """Let the cells diverge for which `diverges(cell)` is true."""

    def run_cell(self, cell):
        if diverges(cell):
            raise DivergedError("--learning_rate 1: the loss is nan")
        return RIGHT | {"accuracy": 0.0}  # not better than a diverged candidate if that counted

    monkeypatch.setattr(CellRunner, "_run", run_cell)


def test_a_diverging_candidate_loses_the_search_with_a_warning(run, tmp_path, monkeypatch, capsys):
    diverge(monkeypatch, lambda cell: cell.recipe.learning_rate == 1e-4 or cell.bridge.learning_rate == 1e-4)
    rates = ["--learning_rates", "1e-4", "1e-3", "--bridge_learning_rates", "1e-4", "1e-3"]
    run(tmp_path, *rates)
    chosen = read_record(tmp_path / "chosen_settings.json")
    assert chosen["stage1"]["learning_rate"] == chosen["bridged"]["2"]["learning_rate"] == 1e-3
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning: a candidate of the")]
    assert len(warnings) == 1 + 3 * 2  # of stage 1, and of three methods at one and two shots
    assert "of the search was dropped: --learning_rate 1: the loss is nan (in the cell 'bridged, 1 shot" in warnings[3]


def test_a_search_in_which_all_diverge_is_a_one_line_error(run, tmp_path, monkeypatch):
    diverge(monkeypatch, lambda cell: cell.split == "validation")
    with pytest.raises(UserError, match="every candidate of vanilla_matched with 1 shot diverged; give lower rates"):
        run(tmp_path / "real", "--learning_rates", "1e-4", "1e-3")
    with pytest.raises(UserError, match="every candidate of stage 1 .--bridge_learning_rates. diverged"):
        run(tmp_path / "bridge", "--bridge_learning_rates", "1e-4", "1e-3")


def test_a_cell_of_the_table_that_diverges_ends_the_comparison_and_does_not_count(run, tmp_path, monkeypatch):
    diverge(monkeypatch, lambda cell: cell.row.name == "synthetic_only")
    with pytest.raises(UserError, match="the loss is nan .in the cell 'synthetic_only, seed 0'"):
        run(tmp_path)
    assert len(list((tmp_path / "cells").iterdir())) == 6 and not (tmp_path / "comparison.json").exists()


def test_problems_in_a_trial_run_are_found_before_images_are_read(
    synthetic_dir, tmp_path, monkeypatch, save_classifier_of
):
    monkeypatch.setattr(compare_transfer, "load_real_images", lambda *_: pytest.fail("images were read"))
    monkeypatch.setattr("utils.transfer.rehearsal.imprint_head", lambda *_: 1 / 0)
    model = ["--model_name_or_path", save_classifier_of("vit"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ZeroDivisionError):  # it is tried if a method needs it
        compare_transfer.main(["--synthetic_dataset", str(synthetic_dir), "--methods", "bridged_imprint", *model])
    monkeypatch.setattr("utils.transfer.rehearsal.predict", lambda *_: [][0])
    with pytest.raises(UserError, match="^--model_name_or_path .*: a trial run of two RGB images fails .IndexError"):
        compare_transfer.main(["--synthetic_dataset", str(synthetic_dir), "--methods", "bridged", *model])
    assert not (tmp_path / "out").exists()


def test_the_small_search_is_the_same_for_every_method(run, tmp_path, monkeypatch):
    asked = fake_results(monkeypatch, lambda cell: cell.recipe.learning_rate == pytest.approx(8e-5))
    flags = "--search_learning_rate", "--methods", "vanilla", "mix", "bridged", "synthetic_only", "--volumes", "2", "4"
    run(tmp_path, *flags)
    assert len(asked) == len(set(asked)), "equal cells are one"
    searched = [cell for cell in asked if cell.split == "validation"]
    bridges = [cell for cell in searched if cell.row.name == "synthetic_only"]
    assert [cell.bridge.learning_rate for cell in bridges] == pytest.approx([1.25e-5, 5e-5, 2e-4])
    for name in ("vanilla", "mix", "bridged"):
        rates = [cell.recipe.learning_rate for cell in searched if cell.row.name == name and cell.num_shots == 2]
        assert rates == pytest.approx([5e-6, 2e-5, 8e-5])
    assert {cell.row.volume for cell in searched} == {4, None}
    assert {cell.recipe.learning_rate for cell in asked if cell.split == "test"} == {8e-5, 0.0}


def test_without_shots_all_images_are_taken_for_the_default_epochs(classifiers, synthetic_dir, tmp_path, monkeypatch):
    asked = fake_results(monkeypatch, lambda cell: True)
    compare_transfer.main(
        ["--synthetic_dataset", str(synthetic_dir), "--model_name_or_path", classifiers["vit"], "--volumes", "2", "4",
         "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path)]
    )  # fmt: skip
    names = {cell.row.name for cell in asked}
    assert names == {"vanilla", "vanilla_matched", "vanilla_mixup", "linear_probe", "mix", "bridged", "bridged_keep",
                     "bridged_replay", "synthetic_only"}  # fmt: skip
    bridged = [cell for cell in asked if cell.row.name == "bridged"]
    assert sorted((cell.seed, cell.row.volume) for cell in bridged) == [
        (seed, volume) for seed in range(3) for volume in (2, 4)
    ]
    # 30 epochs of the real images (the rest is for validation), 5 of 12 synthetic ones at every volume, 4 per step
    record = read_record(synthetic_dir / GENERATION_CONFIG)["real_images"]
    num_steps = 30 * math.ceil(len(load_real_images(RealImagesRecord(record["dataset_name"])).train) / 4)
    found = {(cell.num_shots, cell.recipe.max_steps, cell.bridge.max_steps) for cell in bridged}
    assert found == {(None, num_steps, 15)}


@pytest.fixture
def set_of_names(synthetic_dir, tmp_path):
    """A synthetic set that was made from a list of class names."""
    folder = tmp_path / "of-names"
    shutil.copytree(synthetic_dir, folder)
    record = read_record(folder / GENERATION_CONFIG)
    write_record(folder / GENERATION_CONFIG, record | {"real_images": None})
    return folder


def test_given_real_images_override_the_record(run, set_of_names, real_images_dir, tmp_path, monkeypatch):
    fake_results(monkeypatch, lambda cell: True)
    message = "^--dataset_name: .* list of class names, .*give --dataset_name or --train_dir"
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", synthetic=set_of_names)
    run(tmp_path / "out", "--dataset_name", str(real_images_dir), synthetic=set_of_names)
    options = read_record(tmp_path / "out" / "run_config.json")["options"]
    assert options["dataset_name"] == str(real_images_dir) and options["num_shots"] == [1, 2]


def test_a_revision_goes_with_the_path_of_its_set(monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr(compare_transfer, "open_synthetic", lambda *arguments: opened.append(arguments))
    (tmp_path / "a@b").mkdir()
    compare_transfer.open_sources({"a": "user/set-{seed}@v1", "b": "user/other", "c": str(tmp_path / "a@b")}, [0, 1])
    assert opened == [("user/set-0", "v1", None, False), ("user/set-1", "v1", None, False),
                      ("user/other", None, None, False), (str(tmp_path / "a@b"), None, None, False)]  # fmt: skip


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--volumes", "2", "7"], r"--volumes 7: \S+ has only 6 images of a class"),
        (["--num_shots", "20"], r"--num_shots 20: a class of the real set has only 1\d training images"),
        (["--num_shots", "0"], "--num_shots 0: must be above 0"),
        (["--search_shots", "4"], "--search_shots 4: not among --num_shots"),
        (["--seeds", "1", "1"], "--seeds 1 1: duplicate values"),
        (["--seeds", "-1"], "--seeds -1: must be 0 or above"),
        (["--volumes", "0"], "--volumes 0: must be above 0"),
        (["--num_workers", "0"], "--num_workers 0: must be above 0"),
        (["--label_smoothing_factor", "1"], "--label_smoothing_factor 1.0: must be 0 or above, and below 1"),
        (["--bridge_mixup_alphas", "-1"], "--bridge_mixup_alphas -1.0: must be 0 or above"),
        (
            ["--learning_rates", "1e-4", "1e-3", "--search_learning_rate"],
            "searches around one value, but --learning_rates",
        ),
        (["--settings", "x.json", "--search_learning_rate"], "--search_learning_rate: does nothing with --settings"),
        (["--settings", "pyproject.toml"], "pyproject.toml: cannot be read as a record"),
        (
            ["--model_name_or_path", "a/b", "c/d", "--model_revision", "v1"],
            "^--model_revision v1: does nothing with several --model_name_or_path; write MODEL@REVISION for each",
        ),
        (["--model_name_or_path", "a/b", "a/b"], "--model_name_or_path a/b a/b: duplicate values"),
        (["--methods", "bridged@other"], "--methods bridged@other: no synthetic set 'other'"),
    ],
)
def test_bad_values_are_one_line_errors(flags, message, run, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_launched_processes_and_sets_without_settings_or_for_other_images_are_refused(
    run, synthetic_dir, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="--num_processes 2: .* use --num_workers"):
        patch.setenv("WORLD_SIZE", "2")
        run(tmp_path / "out")
    with pytest.raises(UserError, match="--synthetic_dataset: give at least one"):
        compare_transfer.main(["--num_shots", "1"])
    for record in ({"bridged": {}}, {"stage1": {"max_steps": 2}}, {"stage1": {"seeps": 2}}):
        write_record(tmp_path / "chosen.json", record)
        with pytest.raises(UserError, match=r"--settings \S+: not a chosen_settings.json"):
            run(tmp_path / "out", "--settings", str(tmp_path / "chosen.json"))
    other = tmp_path / "other"
    shutil.copytree(synthetic_dir, other)
    record = read_record(other / GENERATION_CONFIG)
    write_record(other / GENERATION_CONFIG, record | {"real_images": {**record["real_images"], "dataset_name": "a/b"}})
    with pytest.raises(UserError, match="was made for 'a/b', .* give --dataset_name or --train_dir"):
        run(tmp_path / "out", "--synthetic_dataset", f"a={synthetic_dir}", f"b={other}")


FOLD_FLAGS = ("--num_folds", "4", "--methods", "vanilla_matched", "bridged", "synthetic_only")


@pytest.fixture
def run_folds(classifiers, synthetic_dir):
    """Run compare_transfer.py with four folds into a folder; return its results."""

    def run_folds(output_dir, *flags, synthetic=synthetic_dir) -> dict:
        steps = ["--bridge_step_counts", "2", "--step_counts", "1"]
        return compare_transfer.main(
            ["--synthetic_dataset", str(synthetic), "--model_name_or_path", classifiers["vit"], *FOLD_FLAGS, *steps,
             "--output_dir", str(output_dir), *flags]
        )  # fmt: skip

    return run_folds


@pytest.mark.parametrize("shots", [None, 2])
def test_every_image_is_tested_once_per_repeat_by_a_model_that_saw_none_of_its_fold(
    run_folds, real_images_dir, tmp_path, monkeypatch, shots
):
    seen, whole = [], load_real_images(RealImagesRecord(str(real_images_dir), train_val_split=0.01))
    every = [image.tobytes() for part in (whole.train, whole.validation) for image in part["image"]]
    assert len(set(every)) == 60

    def run_method(stages, images, evaluated, *args, **kwargs):
        tested = [item["pixel_values"].numpy().tobytes() for item in evaluated]
        seen.append((pixels(images["real"]) if "real" in images else None, tested, len(evaluated)))
        logits = np.eye(3)[[item["labels"] for item in evaluated]]
        return MethodResult(None, {"vanilla_steps": 1}, {}, logits, np.array([item["labels"] for item in evaluated]))

    monkeypatch.setattr(cells, "run_method", run_method)
    comparison = run_folds(tmp_path, "--num_repeats", "2", *(["--num_shots", str(shots)] if shots else []))
    assert len(seen) == 3 * 2 * 4
    of_vanilla = [(trained, tested) for trained, tested, _ in seen[::3]]
    for repeat in (of_vanilla[:4], of_vanilla[4:]):
        assert (
            len({image for _, tested in repeat for image in tested}) == sum(len(tested) for _, tested in repeat) == 60
        )
    assert {len(trained) for trained, _ in of_vanilla} == {45 if shots is None else 6}
    # the tested images, as the scripts load that fold
    for number, (trained, _) in enumerate(of_vanilla):
        record = RealImagesRecord(str(real_images_dir), fold=f"{number % 4 + 1}/4", fold_seed=number // 4)
        assert not set(trained) & set(pixels(load_real_images(record).test))
    assert comparison["seeds"] == [0, 1] and comparison["num_folds"] == 4
    (first, *_) = comparison["summary"]
    assert first["values"] == [100.0] * 8 and first["num_test_images"] == 60


def test_folds_are_named_their_cells_kept_and_workers_give_the_same(run_folds, tmp_path, monkeypatch, capsys):
    trained, flags = trainings(monkeypatch), ("--num_folds", "2", "--methods", "vanilla_matched", "bridged")
    comparison = run_folds(tmp_path / "alone", *flags)
    assert len([folder for *_, folder in trained if folder.name == "stage1"]) == 1, "the set is the same in every fold"
    names = sorted(path.name for path in (tmp_path / "alone" / "cells").iterdir())
    assert len(names) == 4 and names[0].startswith("bridged-allshots-seed0-fold1of2-test-")
    settings = read_record(tmp_path / "alone" / "cells" / names[0])["settings"]
    assert (settings["real_images"]["fold"], settings["real_images"]["fold_seed"]) == ("1/2", 0)
    protocol = (
        "2 folds over 60 images: every image is tested once, by models that have trained on other folds only (30 "
    )
    printed = capsys.readouterr().out
    report = (tmp_path / "alone" / "comparison.md").read_text(encoding="utf-8")
    assert protocol in printed and protocol in report and protocol in comparison["protocol"][0]
    assert "over 2 folds" in report and "mean ± deviation over 2 folds" in " ".join(printed.split())
    assert "not searched on these images" in report and "style token of" not in report
    count = len(trained)
    assert run_folds(tmp_path / "alone", *flags) == comparison and len(trained) == count
    other = run_folds(tmp_path / "other", *flags, "--num_workers", "2")
    assert without_seconds(other) == without_seconds(comparison)


def test_test_images_that_a_style_token_has_seen_are_reported(
    run_folds, make_synthetic_dir, tmp_path, monkeypatch, capsys
):
    fake_results_of_folds(monkeypatch)
    whole = make_synthetic_dir("whole", train_indices=list(range(60)))
    comparison = run_folds(tmp_path / "out", "--num_shots", "2", synthetic=whole)
    (line,) = [line for line in comparison["findings"] if "style token" in line and "test images" in line]
    assert line.startswith("The style token of dsi has seen all test images of the models that use its images")
    (beyond,) = [line for line in comparison["findings"] if "do not train on" in line]
    assert "up to 39 real images that the runs with 2 shots" in beyond
    for printed in (capsys.readouterr().out, (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")):
        assert line in printed.replace("\\", "")
    # one set for each fold, whose token has seen that fold's training part
    for number in range(1, 5):
        record = RealImagesRecord(str(whole_dir_of(whole)), fold=f"{number}/4", fold_seed=0)
        rows = load_real_images(record).train_indices.tolist()
        folder = make_synthetic_dir(f"set-{number}", train_indices=rows)
        shutil.copytree(folder, tmp_path / f"set-{number}")
    comparison = run_folds(tmp_path / "per-fold", synthetic=tmp_path / "set-{fold}")
    assert not any("style token" in line for line in comparison["findings"])


def whole_dir_of(synthetic) -> str:
    return read_record(synthetic / GENERATION_CONFIG)["real_images"]["dataset_name"]


def fake_results_of_folds(monkeypatch) -> None:
    def result(self, cell):
        _, tested = self.folds.split(cell.fold, cell.seed)
        return pack_correct(np.arange(len(tested)) % 2 == 0) | {"accuracy": 0.5}

    monkeypatch.setattr(CellRunner, "result", result)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_folds", "1"], "--num_folds 1: must be 2 or above"),
        (["--num_folds", "21"], "21 folds: class '.*' has 20 images, .*; take 20 folds or fewer"),
        (["--num_shots", "16"], "--num_shots 16: a class of the real set has only 15 training images"),
        (["--num_repeats", "2", "--seeds", "4"], "--num_repeats 2: --seeds must have one value per repeat, has 1"),
        (
            ["--learning_rates", "1e-4", "1e-3"],
            "--learning_rates: needs validation images, but --num_folds 4",
        ),
        (["--search_learning_rate"], "--search_learning_rate: needs validation images"),
        (["--max_eval_samples", "6"], "--max_eval_samples 6: does nothing with --num_folds"),
        (["--test_split", "test"], "--test_split test: does nothing with --num_folds"),
        (["--token_per_fold"], "--token_per_fold: makes the synthetic sets whose --synthetic_dataset path contains"),
        (["--token_per_fold", "--synthetic_dataset", "x-{fold}", "--num_repeats", "2"], "must contain '{seed}' too"),
        (["--token_per_fold", "--synthetic_dataset", "x-{fold}"], "--dataset_name is missing"),
    ],
)
def test_flags_that_do_not_go_with_folds_are_one_line_errors(flags, message, run_folds, tmp_path):
    with pytest.raises(UserError, match=message):
        run_folds(tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_sets_per_fold_without_folds_are_a_one_line_error(run, tmp_path):
    with pytest.raises(UserError, match="--synthetic_dataset set-{fold}: '{fold}' needs --num_folds"):
        run(tmp_path / "out", synthetic="set-{fold}")


def test_token_per_fold_runs_both_scripts_with_the_fold_and_its_set_is_compared(
    run_folds, make_synthetic_dir, real_images_dir, tmp_path, monkeypatch
):
    ran = []

    def run_step(self, step):
        ran.append(step)
        if "generate_synthetic.py" in step.command[0]:
            fold = ran[-2].command[ran[-2].command.index("--fold") + 1]
            rows = load_real_images(RealImagesRecord(str(real_images_dir), fold=fold)).train_indices
            shutil.copytree(make_synthetic_dir(step.name, train_indices=rows.tolist()), step.finished.parent)

    monkeypatch.setattr(StepRunner, "run", run_step)
    fake_results_of_folds(monkeypatch)
    flags = ["--token_per_fold", "--dataset_name", str(real_images_dir), "--dsi_recipe", "dsi.yaml", "--no_random_flip"]
    comparison = run_folds(tmp_path / "out", *flags, synthetic=tmp_path / "syn-{seed}-{fold}")
    assert not any("style token" in line for line in comparison["findings"])
    learn, draw = ran[2].command, ran[3].command
    assert Path(learn[0]).name == "train_dsi.py" and learn[1] == "dsi.yaml" and len(ran) == 8
    for flag, value in (("--fold", "2/4"), ("--fold_seed", "0"), ("--dataset_name", str(real_images_dir)),
                        ("--random_flip", "false"), ("--output_dir", f"{tmp_path}/syn-0-2-style")):  # fmt: skip
        assert learn[learn.index(flag) + 1] == value
    assert draw[draw.index("--learned_embeds") + 1] == f"{tmp_path}/syn-0-2-style"
    parse_flags("train_dsi.py", list(learn[2:]))
    parse_flags("generate_synthetic.py", list(draw[1:]))

    def fail(self, step):
        raise RuntimeError(f"{step.name} failed, see x.log; the same make command resumes here")

    monkeypatch.setattr(StepRunner, "run", fail)
    with pytest.raises(
        UserError, match="--token_per_fold: style token .* failed, see x.log; run the same command again"
    ):
        run_folds(tmp_path / "out", *flags, synthetic=tmp_path / "syn-{seed}-{fold}")
