import pytest
import torch
from diffusers.optimization import get_scheduler

from utils.cli.errors import UserError
from utils.style.checkpoints import TrainingProgress, find_checkpoint, load_checkpoint, save_checkpoint
from utils.style.token_folder import checkpoint_folders

OPTIONS = {"seed": 0, "learning_rate": 0.1}


class Run:
    """Rows that AdamW moves along a cosine schedule."""

    def __init__(self, num_encoders=1):
        self.rows = [torch.nn.Parameter(torch.ones(2, 4 + i)) for i in range(num_encoders)]
        self.optimizer = torch.optim.AdamW(self.rows, lr=0.1)
        self.lr_scheduler = get_scheduler("cosine", self.optimizer, num_warmup_steps=2, num_training_steps=20)
        self.progress = TrainingProgress(OPTIONS, "inputs", 8)

    @property
    def state(self):
        return self.rows, self.optimizer, self.lr_scheduler, None

    def go_on(self, num_steps):
        for _ in range(num_steps):
            sum((rows - self.progress.step).pow(2).sum() for rows in self.rows).backward()
            self.optimizer.step()
            self.lr_scheduler.step()
            self.optimizer.zero_grad()
            self.progress.step += 1
            self.progress.loss_history.append(self.progress.step / 3)

    def save(self, folder, total_limit=None):
        return save_checkpoint(folder, self.progress, ["clip_l", "clip_g"][: len(self.rows)], *self.state, total_limit)


@pytest.mark.parametrize("num_encoders", [1, 2])
def test_a_run_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path, num_encoders):
    whole, first, second = (Run(num_encoders) for _ in range(3))
    whole.go_on(12)
    first.go_on(5)
    checkpoint = first.save(tmp_path)
    second.progress = load_checkpoint(checkpoint, second.progress, *second.state)
    second.go_on(7)
    assert second.progress == whole.progress
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(second.rows, whole.rows))
    assert second.lr_scheduler.get_last_lr() == whole.lr_scheduler.get_last_lr()


def test_a_checkpoint_holds_no_pickles(tmp_path):
    run = Run()
    run.go_on(1)
    suffixes = {path.suffix for path in run.save(tmp_path).iterdir()}
    assert suffixes == {".safetensors", ".json"}


def test_the_latest_checkpoints_are_kept(tmp_path):
    run = Run()
    for _ in range(4):
        run.go_on(3)
        run.save(tmp_path, total_limit=2)
    (tmp_path / "checkpoint-best").mkdir()  # somebody's own
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["checkpoint-9", "checkpoint-12"]
    assert find_checkpoint(tmp_path, "latest", OPTIONS, False).name == "checkpoint-12"


def test_a_checkpoint_that_was_not_finished_is_none(tmp_path, monkeypatch):
    run = Run()
    run.go_on(1)
    run.save(tmp_path)
    run.go_on(1)
    with monkeypatch.context() as patch:
        patch.setattr("utils.style.checkpoints.write_record", lambda *_: 1 / 0)  # killed in the middle
        with pytest.raises(ZeroDivisionError):
            run.save(tmp_path)
    assert find_checkpoint(tmp_path, "latest", OPTIONS, False).name == "checkpoint-1"
    assert run.save(tmp_path).name == "checkpoint-2"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("resume", "options", "message"),
    [
        (None, OPTIONS, "holds checkpoint-1 of an unfinished run; give --resume_from_checkpoint latest"),
        ("latest", OPTIONS | {"seed": 1}, r"was made with other options \(seed was 0, now 1\)"),
        ("nowhere", OPTIONS, "nowhere: is no checkpoint of train_dsi.py; .* has checkpoint-1"),
    ],
)
def test_what_cannot_be_gone_on_from_is_an_error(tmp_path, resume, options, message):
    run = Run()
    run.go_on(1)
    run.save(tmp_path)
    with pytest.raises(UserError, match=message):
        find_checkpoint(tmp_path, resume, options, False)


def test_options_that_do_not_change_the_result_may_differ(tmp_path):
    run = Run()
    run.progress.options = OPTIONS | {"validation_steps": 5, "output_dir": "a"}
    run.go_on(1)
    checkpoint = run.save(tmp_path)
    others = OPTIONS | {"validation_steps": 7, "output_dir": "b"}
    free = {"validation_steps", "output_dir"}
    assert find_checkpoint(tmp_path / "elsewhere", str(checkpoint), others, False, free) == checkpoint


def test_without_a_checkpoint_latest_starts_anew(tmp_path):
    assert find_checkpoint(tmp_path / "nothing", "latest", OPTIONS, False) is None


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (TrainingProgress(OPTIONS, "other", 8), "images, the prompts or the base model have changed"),
        (TrainingProgress(OPTIONS, "inputs", 16), "8 images a step over all processes, this run has 16"),
    ],
)
def test_other_images_or_another_number_of_processes_are_refused(tmp_path, start, message):
    run = Run()
    run.go_on(1)
    with pytest.raises(UserError, match=message):
        load_checkpoint(run.save(tmp_path), start, *Run().state)
