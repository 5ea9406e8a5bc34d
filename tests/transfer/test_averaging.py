"""Averages of weights: of two stages, and over the steps of the last one, with resume and evaluation."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

import train_bridged
from tests.conftest import CLASS_NAMES
from tests.transfer.builders import OPTIONS, run_plan
from tests.transfer.test_stage_resume import Killed, assert_same, kill_in_step
from tests.transfer.two_processes import contiguous
from utils.cli.errors import UserError
from utils.cli.records import read_record
from utils.transfer import stage
from utils.transfer.averaging import average_weights, warmed_up_decay
from utils.transfer.classifiers import load_classifier, load_image_processor
from utils.transfer.fine_tuning import StageTrainer, build_trainer
from utils.transfer.methods import METHODS, StagePlan, StageSettings, plan_stages
from utils.transfer.stage import describe_stage

pytest_plugins = ["tests.transfer.fixtures"]
EMA = StageSettings(7, 1e-2, 3.0, mixup_alpha=0.4, per_device_train_batch_size=4, ema_decay=0.9)
PLAN = StagePlan("stage1", "real", "reset", EMA)


def test_weights_and_statistics_are_averaged_but_not_counts(save_classifier_of):
    path = save_classifier_of("resnet")
    first, second = (load_classifier(path, CLASS_NAMES, True, seed) for seed in (0, 1))
    with torch.no_grad():
        for number, value in enumerate(second.state_dict().values()):
            value.add_(number + 1)
    earlier, later = ({key: value.clone() for key, value in model.state_dict().items()} for model in (first, second))
    average_weights(second, earlier, 0.25)
    counts = [key for key, value in later.items() if not value.is_floating_point()]
    assert counts and any("running_var" in key for key in later)
    for key, value in second.state_dict().items():
        expected = later[key] if key in counts else 0.25 * later[key] + 0.75 * earlier[key]
        torch.testing.assert_close(value, expected)
    averaged = {key: value.clone() for key, value in second.state_dict().items()}
    average_weights(second, averaged, 0.7)  # with itself, as frozen statistics are
    assert all(torch.equal(value, averaged[key]) for key, value in second.state_dict().items())


@pytest.fixture
def run(classifiers, synthetic_dir, tmp_path):
    def run(*flags, name="out"):
        """Train three steps and two of bridged transfer, and return the folder."""
        train_bridged.main([
            "--synthetic_dataset", str(synthetic_dir), "--model_name_or_path", classifiers["resnet"], "--use_cpu",
            "--max_eval_samples", "6", "--bridge_max_steps", "3", "--max_steps", "2", "--learning_rate", "1e-2",
            "--output_dir", str(tmp_path / name), "--resume_from_checkpoint", "latest", *flags,
        ])  # fmt: skip
        return tmp_path / name

    return run


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_row_and_the_flag_average_the_weights_of_both_stages(run, monkeypatch):
    folder = run("--method", "wise_ft")
    first, second, found = (weights_of(folder / part) for part in ("stage1", "stage2", "."))
    floats = [key for key, value in found.items() if value.is_floating_point()]
    assert any(not torch.equal(first[key], second[key]) for key in floats)
    for key in floats:
        torch.testing.assert_close(found[key], (first[key] + second[key]) / 2)
    config = read_record(folder / "bridged_config.json")
    assert (config["average"], config["stages"][1]["average"], config["stages"][1]["averaged_with"]) == (
        0.5, 0.5, "stage1",
    )  # fmt: skip
    assert "average" not in config["stages"][0]
    assert "Its weights are an average: 50 % stage2" in (folder / "README.md").read_text()
    # if killed while the classifier is evaluated, both stages are loaded and averaged again
    (folder / "bridged_config.json").unlink()
    monkeypatch.setattr(stage, "fine_tune", lambda *_: pytest.fail("a stage was trained again"))
    again = weights_of(run("--method", "wise_ft"))
    assert all(torch.equal(value, again[key]) for key, value in found.items())


def test_the_flag_sets_the_share_and_records_without_it_have_no_entry(run):
    averaged, plain = (
        run("--method", "bridged_keep", "--average", "0.25"),
        run("--method", "bridged_keep", name="plain"),
    )
    first, second, found = (weights_of(averaged / part) for part in ("stage1", "stage2", "."))
    torch.testing.assert_close(found["classifier.1.weight"], torch.lerp(*(
        part["classifier.1.weight"] for part in (first, second)
    ), 0.25))  # fmt: skip
    assert all(torch.equal(value, weights_of(plain)[key]) for key, value in second.items())
    assert "changed by flags" in (averaged / "README.md").read_text()
    record, settings = (json.loads((plain / name).read_text()) for name in ("bridged_config.json", "stage2/stage.json"))
    assert not {"average", "averaged_with", "ema_decay"} & {
        *record, *record["stages"][1], *record["stages"][1]["settings"], *settings["settings"],
    }  # fmt: skip


def test_a_head_warmup_is_averaged_with_the_first_stage(run):
    folder = run("--method", "wise_ft", "--head_warmup_steps", "1")
    first, last, found = (weights_of(folder / part)["classifier.1.weight"] for part in ("stage1", "stage2", "."))
    torch.testing.assert_close(found, (first + last) / 2)


SHARE = r"--average 0\.5 \(given, or from --method wise_ft\): "


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method vanilla --average 0.5", f"{SHARE}needs a second stage that starts from the head of the first"),
        ("--method bridged --average 0.5", f"{SHARE}needs a second stage"),
        ("--method wise_ft --head_init reset", f"{SHARE}needs a second stage"),
        ("--method wise_ft --use_peft", f"{SHARE}not possible with --use_peft"),
        ("--method bridged_keep --average 1", "--average 1.0: must be above 0 and below 1"),
        ("--ema_decay 0", "--ema_decay 0.0: must be above 0 and below 1"),
        ("--method linear_probe --ema_decay 0.9", "--ema_decay 0.9: does nothing with --method linear_probe, which"),
        ("--method synthetic_only --ema_decay 0.9", "--ema_decay 0.9: does nothing with --method synthetic_only, whi"),
        ("--method lp_ft --head_init keep", "--head_init keep: does nothing with --method lp_ft, which starts from"),
    ],
)
def test_bad_averages_are_one_line_before_a_model_is_opened(flags, message, synthetic_dir, monkeypatch):
    monkeypatch.setattr(train_bridged, "identify_inputs", lambda *_: pytest.fail("a model was opened"))
    with pytest.raises(UserError, match=f"^{message}") as error:
        train_bridged.main(["--synthetic_dataset", str(synthetic_dir), *flags.split()])
    assert "\n" not in str(error.value)


def test_only_the_last_stage_has_a_moving_average():
    settings = replace(EMA, head_warmup_steps=2)
    stages = plan_stages(METHODS["bridged_keep"], EMA, settings)
    assert [(part.name, part.settings.ema_decay) for part in stages] == [
        ("stage1", None), ("stage2_head", None), ("stage2", 0.9),
    ]  # fmt: skip
    (row,) = plan_stages(METHODS["ema"], StageSettings(2, 1e-3), StageSettings(3, 1e-3))
    assert (row.settings.ema_decay, row.settings.mixup_alpha, row.settings.max_steps) == (0.999, 0.2, 5)
    assert METHODS["ema"].with_flags({"ema_decay": 0.5}).stages[0].settings == {"mixup_alpha": 0.2}
    assert "ema_decay" not in replace(EMA, ema_decay=None).to_dict() and EMA.to_dict()["ema_decay"] == 0.9
    assert [warmed_up_decay(0.9, number) for number in (1, 10, 80, 1000)] == [2 / 11, 11 / 20, 0.9, 0.9]


class Notes(TrainerCallback):
    """The weights after each step, and the evaluations during training."""

    def __init__(self):
        self.weights, self.losses = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append([value.detach().double().numpy().copy() for value in model.parameters()])

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.losses.append(metrics["eval_loss"])


def build(path, images, folder, settings, **options):
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, **(OPTIONS | options))
    model = load_classifier(path, CLASS_NAMES, True, seed=0)
    return build_trainer(model, images, load_image_processor(path), settings, args, folder, images)


def test_a_stage_ends_with_the_average_of_its_steps_computed_by_hand(classifiers, images, tmp_path):
    trainer = build(classifiers["resnet"], images, tmp_path, replace(EMA, batch_norm="train", ema_decay=0.45))
    trainer.add_callback(notes := Notes())
    trainer.train_to_end(None)
    expected = notes.weights[0]
    for number, weights in enumerate(notes.weights[1:], start=1):
        decay = min(0.45, (1 + number) / (10 + number))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, weights)]
    assert len(notes.weights) == 7
    pairs = list(zip(trainer.model.parameters(), expected, notes.weights[-1], strict=True))
    for value, wanted, _ in pairs:
        np.testing.assert_allclose(value.detach().numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert any(np.abs(wanted - last).max() > 1e-3 for _, wanted, last in pairs)
    # BatchNorm's running averages are those of the last step
    counts = [value for name, value in trainer.model.named_buffers() if "num_batches" in name]
    assert counts and all(value == 7 for value in counts)


def test_the_average_is_evaluated_during_training_which_continues_without_it(classifiers, images, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1}
    runs = []
    for folder, settings in (("average", EMA), ("plain", replace(EMA, ema_decay=None))):
        trainer = build(classifiers["vit"], images, tmp_path / folder, settings, **options)
        trainer.add_callback(notes := Notes())
        trainer.train_to_end(None)
        runs.append((trainer, notes))
    (averaged, notes), (plain, plain_notes) = runs
    for own, other in zip(notes.weights, plain_notes.weights, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(own, other))
    averaged.average = None  # evaluate the model itself
    assert notes.losses[-1] == pytest.approx(averaged.evaluate()["eval_loss"], rel=1e-6)
    assert abs(notes.losses[-1] - plain_notes.losses[-1]) > 1e-4
    assert plain_notes.losses[-1] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)


@pytest.fixture
def run_stage(classifiers, images, tmp_path):
    def run(folder, resume=False, **options):
        options = {"save_strategy": "steps", "save_steps": 2} | options
        model, _ = run_plan(PLAN, classifiers["resnet"], images, tmp_path / folder, resume=resume, **options)
        return contiguous(model.state_dict())

    return run


def test_a_killed_stage_resumes_to_the_same_average(run_stage, tmp_path, monkeypatch):
    alone = run_stage("alone")
    kill_in_step(monkeypatch, 6)
    with pytest.raises(Killed):
        run_stage("killed")
    # the checkpoint holds both
    last, average = weights_of(tmp_path / "killed" / "checkpoint-4"), torch.load(
        tmp_path / "killed" / "checkpoint-4" / "average.pt", weights_only=True
    )  # fmt: skip
    assert int(average["n_averaged"]) == 4
    assert not torch.equal(last["classifier.1.weight"], average["module.classifier.1.weight"])
    assert_same(alone, run_stage("killed", resume=True))


def test_a_stage_killed_while_saving_takes_the_average_of_its_last_checkpoint(run_stage, tmp_path, monkeypatch):
    alone = run_stage("alone")

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stage, "save_classifier", kill)
        run_stage("killed")
    monkeypatch.setattr(StageTrainer, "training_step", kill)
    assert_same(alone, run_stage("killed", resume=True))


def test_a_checkpoint_with_a_damaged_average_is_skipped(run_stage, tmp_path, monkeypatch):
    alone = run_stage("alone", save_total_limit=None)
    (tmp_path / "alone" / "stage.json").unlink()
    path = tmp_path / "alone" / "checkpoint-7" / "average.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert_same(alone, run_stage("alone", resume=True))


def test_the_decay_is_among_the_settings_of_a_stage_that_has_one(classifiers, images, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path))
    pretrained = stage.Pretrained(classifiers["vit"], None, {})
    described = [
        describe_stage(replace(PLAN, settings=settings), images, pretrained, CLASS_NAMES, args)
        for settings in (EMA, replace(EMA, ema_decay=None))
    ]
    assert described[0] == described[1] | {"ema_decay": 0.9}
