"""A token's training that is killed and resumed, on one process and on two, equals one that was left alone."""

import os
import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_dsi
from tests.conftest import CLASS_NAMES, read_rows, save_class_folders
from tests.processes import start_script
from utils.cli.errors import Interrupted, UserError
from utils.cli.records import RUN_CONFIG, read_record, write_record
from utils.style import checkpoints, monitor, token

pytest_plugins = ["tests.style.fixtures"]
FLAGS = {"max_train_steps": 7, "checkpointing_steps": 2, "gradient_accumulation_steps": 2, "lr_scheduler": "cosine"}
# train_dsi.py, whose first process kills itself after a checkpoint
CHILD = """
import os, signal, sys
import train_dsi
from tests.style.fixtures import NUM_TIMESTEPS
from utils.style import checkpoints, monitor

monitor.NUM_TIMESTEPS = NUM_TIMESTEPS
save = checkpoints.TrainingState.save

def save_and_die(state, *args):
    save(state, *args)
    if str(state.step) == os.environ.get("DIE_AT"):
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints.TrainingState.save = save_and_die
train_dsi.main(sys.argv[1:])
"""


class Killed(BaseException):
    pass


@pytest.fixture
def kill(monkeypatch):
    """Let a function of a module end the run at its given call."""

    def kill(module, name: str, call: int) -> None:
        original, calls = getattr(module, name), []

        def die(*args, **kwargs):
            calls.append(None)
            if len(calls) == call:
                monkeypatch.setattr(module, name, original)
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, die)

    return kill


def read_learned(folder) -> dict[str, torch.Tensor]:
    """Return all learned weights in a folder, by file and name."""
    paths = sorted(folder.glob("*.safetensors"))
    return {f"{path.name}:{name}": value for path in paths for name, value in load_file(path).items()}


@pytest.mark.parametrize(("module", "name", "call", "left"), [
    (train_dsi, "denoising_loss", 3, []),  # before the first checkpoint
    (train_dsi, "denoising_loss", 2 * 5 + 1, ["checkpoint-2", "checkpoint-4"]),  # in the middle of a step
    (checkpoints, "write_record", 2, ["checkpoint-2"]),  # while a checkpoint is written
    (train_dsi, "write_records", 1, ["checkpoint-2", "checkpoint-4", "checkpoint-6"]),  # after the last step
])  # fmt: skip
def test_a_killed_run_that_is_resumed_equals_one_that_was_left_alone(
    run_dsi, kill, tiny_pipeline_dir, tiny_xl_pipeline_dir, module, name, call, left, tmp_path
):
    model = tiny_xl_pipeline_dir if left == ["checkpoint-2"] else tiny_pipeline_dir
    flags = FLAGS | {"pretrained_model_name_or_path": model}
    whole = run_dsi(output_dir=tmp_path / "whole", **flags)
    kill(module, name, call)
    with pytest.raises(Killed):
        run_dsi(**flags)
    style = tmp_path / "style"
    assert [path.name for path in sorted(style.glob("checkpoint-*"))] == left
    assert not (style / "dsi_config.json").exists()
    assert read_record(style / RUN_CONFIG)["options"]["max_train_steps"] == 7
    (style / RUN_CONFIG).unlink()  # as in earlier versions, which wrote this record at the end
    resumed = run_dsi(resume_from_checkpoint="latest", **flags)
    assert resumed == whole  # health and every loss
    for rows in zip(read_rows(tmp_path / "whole"), read_rows(style), strict=True):
        assert torch.equal(*rows)
    assert sorted(path.name for path in style.glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert {path.name for path in style.iterdir() if path.name.startswith(".")} == set()


@pytest.mark.parametrize(  # killed with the first word, with the second, after its checkpoint
    "call", [pytest.param(12, marks=pytest.mark.soak), 24, pytest.param(36, marks=pytest.mark.soak)]
)
def test_a_run_that_restarted_from_another_word_is_resumed_exactly(run_dsi, kill, call, monkeypatch, tmp_path):
    monkeypatch.setattr(token, "INITIALIZER_WORDS", ("style", "s"))
    flags = {"max_train_steps": 25, "learning_rate": 1e-12, "checkpointing_steps": 8}
    run_dsi(**flags, output_dir=tmp_path / "alone")
    kill(train_dsi, "denoising_loss", call)
    with pytest.raises(Killed):
        run_dsi(**flags)
    run_dsi(**flags, resume_from_checkpoint="latest")
    alone, resumed = (read_record(tmp_path / name / "dsi_config.json") for name in ("alone", "style"))
    assert alone == resumed
    assert alone["num_restarts"] == 1
    assert all(map(torch.equal, read_rows(tmp_path / "alone"), read_rows(tmp_path / "style")))


@pytest.mark.parametrize("resume", ["latest", "checkpoint-2"])
def test_a_run_begun_before_there_was_an_article_keeps_its_prompts(run_dsi, kill, resume, tmp_path):
    (tmp_path / "names.yaml").write_text("red_square: orange\n")
    flags = {"max_train_steps": 3, "checkpointing_steps": 2, "class_names_file": tmp_path / "names.yaml"}
    run_dsi(**flags, article="as_written", output_dir=tmp_path / "whole")
    kill(train_dsi, "denoising_loss", 3)
    with pytest.raises(Killed):
        run_dsi(**flags, article="as_written")
    style = tmp_path / "style"
    state = style / "checkpoint-2" / checkpoints.STATE_RECORD
    for path, noted_in in ((style / RUN_CONFIG, ()), (state, ("progress",))):
        record = read_record(path)
        options = record["progress"]["options"] if noted_in else record["options"]
        assert options.pop("article") == "as_written"
        write_record(path, record)
    checkpoint = resume if resume == "latest" else style / resume
    with pytest.raises(UserError, match="article was None, now auto"):
        run_dsi(**flags, resume_from_checkpoint=checkpoint, article="auto")
    run_dsi(**flags, resume_from_checkpoint=checkpoint)
    assert torch.equal(*(read_rows(tmp_path / folder)[0] for folder in ("whole", "style")))
    assert "article" not in read_record(style / RUN_CONFIG)["options"]
    assert "article" not in read_record(style / "dsi_config.json")
    run_dsi(**flags, overwrite_output_dir=True)
    assert read_record(style / "dsi_config.json")["article"] == "auto"


def test_a_checkpoint_given_by_path_is_resumed_in_another_folder(run_dsi, tmp_path):
    whole, flags = tmp_path / "whole", FLAGS | {"max_train_steps": 13}
    (whole / "checkpoint-best").mkdir(parents=True)  # somebody's own
    run_dsi(output_dir=whole, **flags | {"checkpointing_steps": 3, "checkpoints_total_limit": 2})
    assert {path.name for path in whole.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-12", "checkpoint-best"}
    assert {path.suffix for path in (whole / "checkpoint-9").iterdir()} == {".safetensors", ".json"}  # no pickles
    with pytest.raises(UserError, match="holds a style token made with other options .num_vectors was 1, now 2"):
        run_dsi(output_dir=whole, resume_from_checkpoint="latest", **flags, num_vectors=2)
    run_dsi(resume_from_checkpoint=whole / "checkpoint-9", **flags | {"checkpointing_steps": 100})
    assert torch.equal(*(read_rows(tmp_path / folder)[0] for folder in ("whole", "style")))
    assert read_record(whole / "checkpoint-9" / checkpoints.STATE_RECORD)["progress"]["step"] == 9
    (whole / "checkpoint-9" / checkpoints.TRAINING_STATE).write_bytes(b"cut")
    with pytest.raises(UserError, match="^--resume_from_checkpoint .*checkpoint-9: is damaged .*; resume from an"):
        run_dsi(output_dir=tmp_path / "other", resume_from_checkpoint=whole / "checkpoint-9", **flags)


def test_an_unfinished_run_is_not_replaced_without_the_flag(run_dsi, kill, monkeypatch, tmp_path):
    kill(train_dsi, "denoising_loss", 2 * 3)
    with pytest.raises(Killed):
        run_dsi(**FLAGS)
    with pytest.raises(UserError, match="holds checkpoint-2 of an unfinished run; give --resume_from_checkpoint"):
        run_dsi(**FLAGS)
    with pytest.raises(UserError, match="nowhere: not a checkpoint of train_dsi.py; .* has checkpoint-2"):
        run_dsi(**FLAGS, resume_from_checkpoint="nowhere")
    with pytest.raises(UserError, match=r"was made with other options \(learning_rate was 0.1, now 0.2\)"):
        run_dsi(**FLAGS | {"learning_rate": 0.2}, resume_from_checkpoint="latest")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch --mixed_precision bf16` does
    with pytest.raises(UserError, match="mixed_precision was no"):
        run_dsi(**FLAGS, resume_from_checkpoint="latest")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    record = tmp_path / "style" / "checkpoint-2" / checkpoints.STATE_RECORD
    write_record(record, (state := read_record(record)) | {"progress": state["progress"] | {"inputs": "others"}})
    with pytest.raises(UserError, match="images, prompts or base model have changed"):
        run_dsi(**FLAGS, resume_from_checkpoint="latest")
    run_dsi(**FLAGS | {"checkpointing_steps": 100}, overwrite_output_dir=True)
    assert not list((tmp_path / "style").glob("checkpoint-*"))


def test_two_processes_give_the_same_token_as_one_and_resume_exactly(
    run_dsi, tiny_pipeline_dir, real_images_dir, tmp_path
):
    """With the same images per step: two processes of 2 x 2 images, one process of 4 x 2; with all that is trained."""
    more = {"use_peft": True, "lora_text_encoder": True, "class_tokens": True, "lora_learning_rate": 0.02}
    one = run_dsi(output_dir=tmp_path / "one", **FLAGS, **more, train_batch_size=4)
    flags = {
        "pretrained_model_name_or_path": tiny_pipeline_dir, "dataset_name": real_images_dir, "learning_rate": 0.1,
        "num_validation_images": 0, "latent_cache_dir": tmp_path / "latents-of-two", "train_batch_size": 2, **FLAGS,
        **more,
    }  # fmt: skip
    argv = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    whole = start_script(CHILD, [*argv, "--output_dir", tmp_path / "two"], tmp_path, 2)
    output, errors = whole.communicate()
    assert whole.returncode == 0, errors[-3000:]
    assert re.findall(r"MULTI_CPU \d+ processes", output) == ["MULTI_CPU 2 processes"] * 2
    learned = {name: read_learned(tmp_path / name) for name in ("one", "two")}
    assert learned["one"].keys() == learned["two"].keys()
    for name, value in learned["one"].items():
        assert torch.allclose(value, learned["two"][name], atol=1e-3), name  # steps of about 0.1
    assert read_record(tmp_path / "two" / "dsi_config.json")["health"]["loss_trained_token"] == pytest.approx(
        one["loss_trained_token"], abs=1e-4
    )

    argv += ["--output_dir", str(tmp_path / "killed")]
    killed = start_script(CHILD, argv, tmp_path, 2, DIE_AT="4")
    killed.communicate()
    assert killed.returncode != 0
    assert not (tmp_path / "killed" / "dsi_config.json").exists()
    with pytest.raises(UserError, match="8 images per step over all processes, this run has 4"):
        run_dsi(**flags, output_dir=tmp_path / "killed", resume_from_checkpoint="latest")
    resumed = start_script(CHILD, [*argv, "--resume_from_checkpoint", "latest"], tmp_path, 2)
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors[-3000:]
    resumed = read_learned(tmp_path / "killed")
    assert all(torch.equal(value, learned["two"][name]) for name, value in resumed.items())


@pytest.fixture
def inputs(tiny_pipeline_dir, tmp_path) -> dict:
    """Separate inputs of a run, by their flags."""
    nouns, templates = tmp_path / "nouns.yaml", tmp_path / "templates.txt"
    nouns.write_text("red_square: red square\n")
    templates.write_text("{class} like {token}\n")
    return {
        "pretrained_model_name_or_path": shutil.copytree(tiny_pipeline_dir, tmp_path / "pipeline"),
        "dataset_name": None,
        "train_dir": save_class_folders(tmp_path / "photos", dict.fromkeys(CLASS_NAMES, 6)),
        "class_names_file": nouns, "prompt_templates_file": templates,
    }  # fmt: skip


def replace(inputs: dict, what: str) -> str:
    """Change the contents of an input, but not its name; return its flag."""
    if what.endswith(".safetensors"):
        path = inputs["pretrained_model_name_or_path"] / what
        save_file({name: value + 0.01 for name, value in load_file(path).items()}, path, {"format": "pt"})
        return "pretrained_model_name_or_path"
    if what == "train_dir":
        image = inputs["train_dir"] / CLASS_NAMES[0] / "0.png"
        image.write_bytes((inputs["train_dir"] / CLASS_NAMES[1] / "0.png").read_bytes())
    else:
        inputs[what].write_text(inputs[what].read_text().replace("red square", "red block").replace("like", "as in"))
    return what


REPLACED = [
    "train_dir", "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "class_names_file",
    "prompt_templates_file",
]  # fmt: skip


@pytest.mark.parametrize("what", REPLACED)
def test_a_run_whose_inputs_were_replaced_is_neither_finished_nor_resumed(run_dsi, kill, inputs, what, tmp_path):
    flags = FLAGS | inputs
    finished = run_dsi(output_dir=tmp_path / "finished", **flags)
    assert run_dsi(output_dir=tmp_path / "finished", **flags)["token_learned"] == finished["token_learned"]
    kill(train_dsi, "denoising_loss", 2 * 5 + 1)
    with pytest.raises(Killed):
        run_dsi(**flags)
    if what == "train_dir":  # with the same images under another name, it resumes
        moved = {"train_dir": shutil.copytree(inputs["train_dir"], tmp_path / "moved")}
        run_dsi(
            resume_from_checkpoint=tmp_path / "style" / "checkpoint-4", output_dir=tmp_path / "new", **flags | moved
        )
    flag = replace(inputs, what)
    changed = rf"\(--{flag} {inputs[flag]} was \d+ files, sha256 \w+, now \d+ files, sha256 \w+\)"
    with pytest.raises(UserError, match=f"holds a style token made from other inputs {changed}; choose another"):
        run_dsi(output_dir=tmp_path / "finished", **flags)
    with pytest.raises(UserError, match=f"was started with other inputs {changed}"):
        run_dsi(resume_from_checkpoint="latest", **flags)
    with pytest.raises(UserError, match="images, prompts or base model have changed"):
        run_dsi(resume_from_checkpoint=tmp_path / "style" / "checkpoint-4", output_dir=tmp_path / "other", **flags)


def test_a_token_whose_images_change_during_training_is_not_finished(run_dsi, inputs, monkeypatch, tmp_path):
    train = train_dsi.train
    monkeypatch.setattr(train_dsi, "train", lambda *args: (replace(inputs, "train_dir"), train(*args)))
    with pytest.raises(UserError, match="not finished, as the inputs changed while they were read"):
        run_dsi(**FLAGS | inputs)
    assert not (tmp_path / "style" / "dsi_config.json").exists()


def test_a_signal_and_a_full_disk_report_how_to_resume(run_dsi, monkeypatch, tmp_path):
    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    end_step, calls = monitor.Monitor.end_step, []

    def after_three_steps(self):
        end_step(self)
        calls.append(None)
        if len(calls) == 3:
            interrupt()

    monkeypatch.setattr(monitor.Monitor, "end_step", after_three_steps)
    with pytest.raises(
        Interrupted, match="checkpoint-2 is kept; resume with: accelerate launch .* --resume_from"
    ) as end:
        run_dsi(**FLAGS)
    assert end.value.signal_number == signal.SIGTERM
    monkeypatch.setattr(monitor.Monitor, "end_step", end_step)
    monkeypatch.setattr(checkpoints, "save_file", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b"no room"))
    with pytest.raises(
        UserError, match="--output_dir .*style: cannot be written .No space left on device.; checkpoint"
    ):
        run_dsi(**FLAGS, resume_from_checkpoint="latest")
