"""A stage whose losses or weights are not finite ends with one line, unfinished, its last good checkpoint kept."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from tests.transfer.builders import run_plan
from utils.cli.errors import DivergedError, UserError
from utils.transfer.fine_tuning import StageTrainer
from utils.transfer.methods import StagePlan, StageSettings

pytest_plugins = ["tests.transfer.fixtures"]
INFINITE_FIRST, INFINITE_ALL = {0, 1}, set(range(6))
SETTINGS = StageSettings(6, 1e-2, per_device_train_batch_size=4, warmup_steps=0)


@pytest.fixture
def run(classifiers, images, tmp_path):
    def run(settings=SETTINGS, folder="stage1", name="vit", images=images, resume=False, **options):
        plan = StagePlan("stage1", "real", "reset", settings)
        model, result = run_plan(
            plan, classifiers[name], images, tmp_path / folder, resume=resume, use_cpu=True, **options
        )
        return model.state_dict(), result

    return run


def spoil_step(monkeypatch, number: int) -> None:
    """Make the loss of one step, counted from 1, not a number."""
    compute_loss = StageTrainer.compute_loss

    def spoiled(self, model, *args, **kwargs):
        loss = compute_loss(self, model, *args, **kwargs)
        return loss * float("nan") if model.training and self.state.global_step == number - 1 else loss

    monkeypatch.setattr(StageTrainer, "compute_loss", spoiled)


@pytest.mark.parametrize(
    ("name", "max_steps", "options"),
    [
        ("vit", 6, {}),
        ("resnet", 6, {"logging_strategy": "steps", "logging_steps": 1, "save_strategy": "steps"}),
        ("vit", 1, {"save_strategy": "steps", "save_steps": 1}),
    ],
)
def test_a_diverging_stage_ends_with_one_line_and_unfinished(run, tmp_path, name, max_steps, options):
    settings = replace(SETTINGS, max_steps=max_steps, learning_rate=1e30)  # weights of 1e30 are finite
    with pytest.raises(
        DivergedError,
        match=rf"^--learning_rate 1e\+30: .* is (nan|inf) at step \d of {max_steps} in stage1; try a lower",
    ):
        run(settings, name=name, **options)
    assert {path.name for path in (tmp_path / "stage1").iterdir()} == {"stage_settings.json"}


def test_the_checkpoint_before_a_nan_is_kept_and_resumed_from(run, tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    options |= {"logging_strategy": "steps", "logging_steps": 1}
    whole, _ = run(folder="whole", **options)
    with monkeypatch.context() as patch, pytest.raises(DivergedError, match="the loss is nan at step 3 of 6"):
        spoil_step(patch, 3)
        run(**options)
    stage = tmp_path / "stage1"
    assert {path.name for path in stage.iterdir()} == {"stage_settings.json", "checkpoint-2"}
    resumed, result = run(resume=True, **options)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    assert result.num_steps == 6 and (stage / "stage.json").exists()


def test_without_logging_a_nan_is_found_before_the_checkpoint(run, tmp_path, monkeypatch):
    spoil_step(monkeypatch, 3)
    with pytest.raises(DivergedError, match="a weight is nan at step 4 of 6"):
        run(save_strategy="steps", save_steps=2, save_total_limit=1)
    assert (tmp_path / "stage1" / "checkpoint-2" / "trainer_state.json").exists()


def test_the_checks_change_no_weight(run, monkeypatch):
    options = {"name": "timm", "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    checked, _ = run(folder="checked", **options)
    monkeypatch.setattr(StageTrainer, "check_finite", lambda *_: None)
    unchecked, _ = run(folder="unchecked", **options)
    assert all(torch.equal(value, checked[key]) for key, value in unchecked.items())


@pytest.mark.parametrize("infinite", [INFINITE_FIRST, INFINITE_ALL])
def test_steps_skipped_by_fp16_are_normal_as_long_as_some_are_taken(run, monkeypatch, infinite):
    create_optimizer, backward, calls = StageTrainer.create_optimizer, Accelerator.backward, []

    def with_scaler(self, *args):
        self.accelerator.scaler = torch.amp.GradScaler("cpu")  # as accelerate has one on a GPU
        return create_optimizer(self, *args)

    def spoil_gradients(self, *args, **kwargs):
        backward(self, *args, **kwargs)
        calls.append(None)
        if len(calls) - 1 in infinite:
            for parameter in self._models[-1].parameters():
                parameter.grad.fill_(float("inf"))

    monkeypatch.setattr(StageTrainer, "create_optimizer", with_scaler)
    monkeypatch.setattr(Accelerator, "backward", spoil_gradients)
    if infinite is INFINITE_FIRST:
        assert run()[1].num_steps == 6 and len(calls) == 6
    else:
        with pytest.raises(DivergedError, match="the gradients of every step are infinite .*--bf16 instead of fp16"):
            run()


@pytest.mark.parametrize(
    ("settings", "num_images", "message"),
    [
        (SETTINGS, 3, "^--per_device_train_batch_size 4: only 0 of 6 steps were taken, as there are too"),
        (replace(SETTINGS, learning_rate=1e-20), 12,
         "--learning_rate 1e-20: no weight of the head has moved .* a higher rate"),
    ],
)  # fmt: skip
def test_a_stage_of_too_few_steps_or_whose_head_never_moves_is_not_finished(
    run, images, tmp_path, settings, num_images, message
):
    with pytest.raises(UserError, match=message):
        run(settings, images=images.take(num_images), dataloader_drop_last=True)
    assert not (tmp_path / "stage1" / "stage.json").exists()
