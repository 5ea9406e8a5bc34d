import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from utils.cli.errors import UserError
from utils.cli.options import free_options, option
from utils.cli.parsing import ScriptArgumentParser
from utils.cli.processes import without_overwrite_flag
from utils.cli.records import RUN_CONFIG, read_record
from utils.cli.run_folder import RunFolder
from utils.transfer.arguments import BridgedTrainingArguments

OPTIONS = {"learning_rate": 1e-4, "save_steps": 500}
RECORD = "result.json"


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path, "a result", OPTIONS, RECORD, traces=("stage1", "checkpoint-*"), free={"save_steps"})


@pytest.fixture
def unfinished(folder):
    folder.begin()
    for name in ("checkpoint-5", "checkpoint-10", "stage1"):
        (folder.path / name).mkdir()
    return folder


def with_options(folder: RunFolder, **options) -> RunFolder:
    return dataclasses.replace(folder, options=OPTIONS | options)


def test_an_unfinished_run_resumes_only_if_asked_and_with_its_options(unfinished):
    assert [path.name for path in unfinished.find_traces()] == ["stage1", "checkpoint-5", "checkpoint-10"]
    assert with_options(unfinished, save_steps=5).is_resumable(True)
    with pytest.raises(
        UserError, match="holds checkpoint-10 of an unfinished run; give --resume_from_checkpoint latest"
    ):
        unfinished.is_resumable(False)
    with pytest.raises(
        UserError, match=r"started with other options \(learning_rate was 0.0001, now 1.0\); give the same"
    ):
        with_options(unfinished, learning_rate=1.0).is_resumable(True)
    assert not dataclasses.replace(unfinished, overwrite=True).is_resumable(True)


def test_resuming_without_an_unfinished_run_starts_one(folder):
    assert not folder.is_resumable(True) and not folder.is_finished


def test_a_new_run_removes_only_traces_and_record_of_the_earlier_one(unfinished):
    for name in (RECORD, "model.safetensors", "notes.txt"):
        (unfinished.path / name).write_text("{}")
    with_options(unfinished, learning_rate=1.0).begin()
    assert sorted(path.name for path in unfinished.path.iterdir()) == ["model.safetensors", "notes.txt", RUN_CONFIG]
    noted = {"makes": "a result", "options": OPTIONS | {"learning_rate": 1.0}}
    assert read_record(unfinished.path / RUN_CONFIG) == noted


def test_a_finished_run_is_not_repeated_and_other_options_are_refused(folder):
    folder.begin()
    folder.finish({"accuracy": 0.5})
    assert folder.is_finished and with_options(folder, save_steps=5).is_finished
    with pytest.raises(
        UserError, match=r"holds a result made with other options \(learning_rate was 0.0001, now 1.0\)"
    ):
        _ = with_options(folder, learning_rate=1.0).is_finished
    assert not dataclasses.replace(folder, overwrite=True).is_finished
    with pytest.raises(UserError, match="is a file; choose a folder"):
        _ = dataclasses.replace(folder, path=folder.path / RECORD).is_finished


@dataclass
class Flags:
    seed: int = option(0, "Seed.")
    colour: str = option("red", "Colour.")
    output_dir: str = option("out", "Folder.", affects_result=False)


def test_flags_that_do_not_affect_the_result_are_known(tmp_path):
    assert free_options([Flags()]) == {"output_dir"}
    free = free_options([BridgedTrainingArguments(output_dir=str(tmp_path))])
    of_the_result = {"learning_rate", "max_steps", "seed", "bf16", "optim", "max_eval_samples", "num_train_epochs"}
    of_no_result = {"logging_steps", "per_device_eval_batch_size", "save_steps", "eval_strategy", "report_to"}
    of_no_result.add("auto_find_batch_size")  # refused now, but in records of earlier versions
    assert not of_the_result & free and of_no_result <= free
    assert {"train_sampling_strategy", "neftune_noise_alpha", "deepspeed"}.isdisjoint(free)


def test_a_record_fills_in_flags_that_are_not_given(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"colour": "blue"}))
    for argv, expected in (
        ([], (7, "green")),
        (["--seed=3"], (3, "green")),
        ([str(tmp_path / "recipe.json")], (7, "blue")),
    ):
        parser = ScriptArgumentParser([Flags])
        (flags,) = parser.parse(argv)
        parser.fill_in([flags], {"seed": 7, "colour": "green", "unknown": 1})
        assert (flags.seed, flags.colour) == expected


@pytest.mark.parametrize("where", ["/proc/out", "/dev/full", "/dev/full/out", "{file}", "{file}/out/below"])
def test_a_folder_that_cannot_be_created_is_one_line(folder, where, tmp_path):
    (tmp_path / "file").write_text("")
    path = Path(where.format(file=tmp_path / "file"))
    with pytest.raises(UserError, match=rf"^--output_dir {path}: \S+ (is a file; choose a folder|cannot be written)"):
        dataclasses.replace(folder, path=path).check_writable()


def test_the_check_does_not_create_the_folder(folder, tmp_path):
    dataclasses.replace(folder, path=tmp_path / "new" / "out").check_writable()
    assert list(tmp_path.iterdir()) == []


def test_the_resume_command_does_not_start_from_scratch(unfinished):
    run = dataclasses.replace(unfinished, overwrite=True)
    with pytest.raises(UserError) as error, run.working("accelerate launch x.py recipe.yaml --a 1"):
        os.write(os.open("/dev/full", os.O_WRONLY), b"no room")
    assert str(error.value).endswith(
        "checkpoint-10 is kept; resume with: accelerate launch x.py recipe.yaml --a 1 --resume_from_checkpoint latest "
        "--no_overwrite_output_dir"
    )


@pytest.mark.parametrize("words", ["--overwrite_output_dir", "--overwrite-output-dir true", "--overwrite_output_dir=1"])
def test_a_resume_command_overwrites_nothing_and_is_otherwise_unchanged(words):
    command = f"accelerate launch x.py recipe.yaml {words} --a 'b c' --d"
    assert (
        without_overwrite_flag(command) == "accelerate launch x.py recipe.yaml --a 'b c' --d --no_overwrite_output_dir"
    )
