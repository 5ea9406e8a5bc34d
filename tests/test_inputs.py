"""Inputs are identified by their contents: replacing one under its name, between or during runs, is noticed."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file

import compare_transfer
import train_bridged
from tests.conftest import CLASS_NAMES, save_class_folders, save_image_set
from utils.cli.errors import UserError
from utils.cli.records import ALL_RESULTS, GENERATION_CONFIG, read_record, write_record
from utils.data.image_set import RealImagesRecord
from utils.data.real_images import identify_real_images
from utils.hub.image_datasets import load_image_dataset
from utils.hub.repositories import Source
from utils.transfer import run_method, stage

pytest_plugins = ["tests.transfer.fixtures"]
NUM_PER_CLASS = 6


class Killed(BaseException):
    pass


@pytest.fixture
def inputs(classifiers, tmp_path) -> dict[str, Path]:
    """A model, real images and a synthetic set for one test, by their flags."""
    model = shutil.copytree(classifiers["vit"], tmp_path / "model")
    real = save_class_folders(tmp_path / "photos", dict.fromkeys(CLASS_NAMES, 20))
    synthetic = tmp_path / "synthetic"
    save_synthetic(synthetic, NUM_PER_CLASS, real)
    return {"model_name_or_path": model, "train_dir": real, "synthetic_dataset": synthetic}


def save_synthetic(folder: Path, num_per_class: int, real: Path, seed: int = 0) -> None:
    from datasets import ClassLabel, Dataset, Features, Image, Value

    rng = np.random.default_rng(seed)
    rows = [
        {"image": PILImage.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)), "label": label,
         "class_index": number}
        for number in range(num_per_class)
        for label in range(len(CLASS_NAMES))
    ]  # fmt: skip
    features = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES), "class_index": Value("int64")})
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(rows), 8)):  # a set that grows has longer and more files
        shard = Dataset.from_list(rows[start : start + 8], features=features)
        shard.to_parquet(folder / "data" / f"train-{number:05d}.parquet")
    record = {
        "real_images": RealImagesRecord(train_dir=str(real), num_shots=2).to_dict(), "class_names": CLASS_NAMES,
        "token": None, "train_indices": None, "num_images": len(rows), "num_images_per_class": num_per_class,
    }  # fmt: skip
    write_record(folder / GENERATION_CONFIG, record)


def replace(flag: str, path: Path) -> None:
    """Change the contents of an input, but not its names and sizes."""
    if flag == "model_name_or_path":
        weights = load_file(path / "model.safetensors")
        save_file({name: value + 0.01 for name, value in weights.items()}, path / "model.safetensors", {"format": "pt"})
    elif flag == "train_dir":
        image = next(path.glob("*/0.png"))
        PILImage.fromarray(255 - np.asarray(PILImage.open(image))).save(image)
    else:
        save_image_set(path, {"train": NUM_PER_CLASS})
        for shard in path.glob("data/train-0000[1-9].parquet"):
            shard.unlink()


def run(inputs: dict[str, Path], folder: Path, *flags: str) -> dict:
    named = [word for flag, path in inputs.items() if flag != "train_dir" for word in (f"--{flag}", str(path))]
    return train_bridged.main(
        [*named, "--max_steps", "2", "--bridge_max_steps", "2", "--use_cpu", "--output_dir", str(folder), *flags]
    )


@pytest.mark.parametrize("flag", ["model_name_or_path", "train_dir", "synthetic_dataset"])
def test_a_classifier_of_inputs_that_were_replaced_is_not_finished(flag, inputs, tmp_path, monkeypatch):
    results = run(inputs, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(train_bridged, "load_images", lambda *_: pytest.fail("a finished run started again"))
        assert run(inputs, tmp_path / "out") == read_record(tmp_path / "out" / ALL_RESULTS)
    replace(flag, inputs[flag])
    with pytest.raises(
        UserError,
        match=rf"^--output_dir {tmp_path}/out: holds a classifier made from other inputs \(--{flag} {inputs[flag]} was "
        r"\d+ \w+, sha256 \w{32}, now \d+ \w+, sha256 \w{32}\); choose another folder or give --overwrite_output_dir.$",
    ):
        run(inputs, tmp_path / "out")
    again = run(inputs, tmp_path / "out", "--overwrite_output_dir")
    assert again["test_accuracy"] is not None and results is not again
    run(inputs, tmp_path / "out")


@pytest.mark.parametrize("flag", ["model_name_or_path", "train_dir", "synthetic_dataset"])
def test_an_interrupted_run_resumes_only_with_the_same_inputs(flag, inputs, tmp_path, monkeypatch):
    fine_tune = stage.fine_tune

    def die_in_stage_2(*args, **kwargs):
        if Path(args[5]).name == "stage2":
            raise Killed
        return fine_tune(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stage, "fine_tune", die_in_stage_2)
        run(inputs, tmp_path / "out")
    replace(flag, inputs[flag])
    with pytest.raises(UserError, match=rf"was started with other inputs \(--{flag} .* was .*, now .*\); start from"):
        run(inputs, tmp_path / "out", "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("flag", ["model_name_or_path", "train_dir", "synthetic_dataset"])
def test_a_run_whose_inputs_change_while_it_reads_them_is_not_finished(flag, inputs, tmp_path, monkeypatch):
    predict = run_method.predict

    def replace_and_predict(*args):
        replace(flag, inputs[flag])
        return predict(*args)

    monkeypatch.setattr(run_method, "predict", replace_and_predict)
    with pytest.raises(UserError, match=rf"not finished, as the inputs changed while they were read \(--{flag} "):
        run(inputs, tmp_path / "out")
    assert not (tmp_path / "out" / "bridged_config.json").exists()


def test_inputs_removed_at_the_end_do_not_cost_the_result(inputs, tmp_path, monkeypatch, caplog):
    predict = run_method.predict

    def remove_and_predict(*args):
        shutil.move(inputs["synthetic_dataset"], tmp_path / "moved")
        return predict(*args)

    monkeypatch.setattr(run_method, "predict", remove_and_predict)
    run(inputs, tmp_path / "out")
    assert "could not check whether the inputs changed during the run" in caplog.text


def test_the_first_images_of_a_set_that_grew_are_the_same(inputs, tmp_path):
    run(inputs, tmp_path / "out", "--max_synthetic_samples_per_class", "4")
    save_synthetic(inputs["synthetic_dataset"], 2 * NUM_PER_CLASS, inputs["train_dir"])
    next((tmp_path / "out").glob("stage*/stage.json")).unlink()  # would be missing
    run(inputs, tmp_path / "out", "--max_synthetic_samples_per_class", "4")
    save_synthetic(inputs["synthetic_dataset"], 2 * NUM_PER_CLASS, inputs["train_dir"], seed=1)
    with pytest.raises(UserError, match="made from other inputs"):
        run(inputs, tmp_path / "out", "--max_synthetic_samples_per_class", "4")


def test_a_folder_of_an_earlier_version_warns_that_its_inputs_are_unknown(inputs, tmp_path, caplog):
    run(inputs, tmp_path / "out")
    noted = read_record(tmp_path / "out" / "run_config.json")
    del noted["inputs"]
    write_record(tmp_path / "out" / "run_config.json", noted)
    replace("train_dir", inputs["train_dir"])
    run(inputs, tmp_path / "out")
    assert "earlier version, which did not record the contents of its inputs" in caplog.text


def compare(inputs: dict[str, Path], folder: Path, *flags: str) -> dict:
    named = [word for flag, path in inputs.items() if flag != "train_dir" for word in (f"--{flag}", str(path))]
    return compare_transfer.main(
        [*named, "--num_shots", "1", "--seeds", "0", "--bridge_step_counts", "2", "--step_counts", "1", "--use_cpu",
         "--methods", "vanilla", "bridged", "synthetic_only", "--output_dir", str(folder), *flags]
    )  # fmt: skip


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The trained stages, by the names of their folders."""
    names, fine_tune = [], stage.fine_tune

    def recorded(*args, **kwargs):
        names.append(Path(args[5]).name)
        return fine_tune(*args, **kwargs)

    monkeypatch.setattr(stage, "fine_tune", recorded)
    return names


@pytest.mark.parametrize(("flag", "retrained"), [
    ("model_name_or_path", ["vanilla", "stage1", "stage2"]),
    ("train_dir", ["vanilla", "stage2"]),  # stage 1 does not use them
    ("synthetic_dataset", ["stage1", "stage2"]),
])  # fmt: skip
def test_cells_of_replaced_inputs_are_run_again(flag, retrained, inputs, tmp_path, trained, capsys):
    compare(inputs, tmp_path / "out")
    assert trained == ["vanilla", "stage1", "stage2"]
    trained.clear()
    compare(inputs, tmp_path / "out")
    assert trained == [] and "Since the last comparison" not in capsys.readouterr().out
    replace(flag, inputs[flag])
    compare(inputs, tmp_path / "out")
    assert trained == retrained
    assert f"Since the last comparison in {tmp_path}/out: --{flag} {inputs[flag]} was " in capsys.readouterr().out


def test_cells_with_the_first_images_of_a_set_that_grew_are_kept(inputs, tmp_path, trained):
    compare(inputs, tmp_path / "out", "--volumes", "2", "4")
    trained.clear()
    save_synthetic(inputs["synthetic_dataset"], 2 * NUM_PER_CLASS, inputs["train_dir"])
    compare(inputs, tmp_path / "out", "--volumes", "2", "4", "--bridge_step_counts", "2")
    assert trained == []


def test_a_cell_whose_inputs_change_while_it_is_run_is_not_kept(inputs, tmp_path, monkeypatch):
    predict = run_method.predict

    def replace_and_predict(*args):
        replace("synthetic_dataset", inputs["synthetic_dataset"])
        return predict(*args)

    monkeypatch.setattr(run_method, "predict", replace_and_predict)
    with pytest.raises(UserError, match="--synthetic_dataset was .*, now .*: changed during the run"):
        compare(inputs, tmp_path / "out", "--methods", "bridged")
    assert not list((tmp_path / "out").glob("cells/*.json"))


def test_no_output_of_an_earlier_run_remains_among_those_of_a_new_one(inputs, tmp_path):
    run(inputs, tmp_path / "out", "--use_peft")
    run(inputs, tmp_path / "out", "--use_peft", "--no_do_train", "--do_eval")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert (tmp_path / "out" / "adapter").is_dir() and (tmp_path / "out" / "eval_results.json").is_file()
    run(inputs, tmp_path / "out", "--overwrite_output_dir")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"adapter", "eval_results.json"} and {"notes.txt", "model.safetensors"} <= names


@pytest.mark.parametrize("flags", [[], ["--overwrite_output_dir"]])
def test_files_that_no_run_has_made_are_not_overwritten(flags, inputs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("mine")
    with pytest.raises(UserError, match="out: holds model.safetensors, which would be overwritten, and is not the fo"):
        run(inputs, tmp_path / "out", *flags)
    with pytest.raises(UserError, match="out: holds a classifier .bridged_config.json.; choose another folder"):
        write_record(tmp_path / "out" / "bridged_config.json", {})
        compare(inputs, tmp_path / "out")


def test_in_its_own_folder_a_run_removes_only_what_runs_make(inputs, tmp_path):
    run(inputs, tmp_path / "out", "--use_peft")
    for name in ("model_of_mine.safetensors", "adapter/notes.txt"):
        (tmp_path / "out" / name).write_text("mine")
    run(inputs, tmp_path / "out", "--overwrite_output_dir")
    assert sorted(path.name for path in (tmp_path / "out" / "adapter").iterdir()) == ["notes.txt"]
    assert (tmp_path / "out" / "model_of_mine.safetensors").is_file()


def test_inputs_that_have_moved_are_the_same(inputs, tmp_path, monkeypatch):
    run(inputs, tmp_path / "out")
    moved = {flag: shutil.move(path, tmp_path / f"moved-{path.name}") for flag, path in inputs.items()}
    monkeypatch.setattr(train_bridged, "load_images", lambda *_: pytest.fail("a finished run started again"))
    run(moved, tmp_path / "out", "--train_dir", str(moved["train_dir"]), "--num_shots", "2")


def test_other_images_of_the_same_size_and_time_are_read_again(inputs):
    source = Source(str(inputs["synthetic_dataset"]), "--synthetic_dataset", "dataset")
    shard = inputs["synthetic_dataset"] / "data" / "train-00000.parquet"
    before, status = load_image_dataset(source, split="train")[0]["image"], os.stat(shard)
    save_synthetic(inputs["synthetic_dataset"], NUM_PER_CLASS, inputs["train_dir"], seed=1)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load_image_dataset(source, split="train")[0]["image"] != before


@pytest.mark.parametrize(("name", "matters"), [
    ("README.md", False), ("red_square/Thumbs.db", False), ("@eaDir/a.jpg", False), ("notes.txt", False),
    ("LICENSE", False), ("red_square/.DS_Store", False), ("red_square/99.png", True),
])  # fmt: skip
def test_files_next_to_images_do_not_matter(name, matters, inputs):
    record = RealImagesRecord(train_dir=str(inputs["train_dir"]))
    _, before = identify_real_images(record)
    path = inputs["train_dir"] / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((inputs["train_dir"] / "red_square" / "0.png").read_bytes())
    _, after = identify_real_images(record)
    assert (before != after) == matters


def test_a_card_that_names_other_files_is_another_input(tmp_path):
    save_image_set(tmp_path / "set", {"train": 2, "test": 2})
    card = tmp_path / "set" / "README.md"
    card.write_text("A set.")
    record = RealImagesRecord(str(tmp_path / "set"))
    _, plain = identify_real_images(record)
    card.write_text("---\nconfigs:\n- config_name: default\n  data_files: data/train-*\n---\n")
    _, named = identify_real_images(record)
    assert plain != named


def files_below(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("flag", "revision"), [
    ("model_name_or_path", "model_revision"), ("synthetic_dataset", "synthetic_dataset_revision"),
])  # fmt: skip
def test_a_repository_that_moved_on_is_another_input_and_its_earlier_commit_the_same(
    flag, revision, inputs, local_hub_server, tmp_path
):
    local_hub_server.reset()
    repository = local_hub_server.create_repo("ann/input", "model" if flag.startswith("model") else "dataset")
    first = repository.commit(files_below(inputs[flag]))
    on_hub = inputs | {flag: "ann/input"}
    run(on_hub, tmp_path / "out")
    replace(flag, inputs[flag])
    second = repository.commit(files_below(inputs[flag]))
    with pytest.raises(
        UserError,
        match=rf"made from other inputs \(--{flag} ann/input was commit {first}, now commit {second}\); choose another "
        "folder or give --overwrite_output_dir; or pin the earlier commit with the flag that ends in revision.$",
    ):
        run(on_hub, tmp_path / "out")
    assert run(on_hub, tmp_path / "out", f"--{revision}", first) == read_record(tmp_path / "out" / ALL_RESULTS)


def test_a_torn_file_of_a_set_is_one_line(inputs, tmp_path):
    record = read_record(inputs["synthetic_dataset"] / GENERATION_CONFIG)
    del record["num_images"]  # as in old sets, which have no count
    write_record(inputs["synthetic_dataset"] / GENERATION_CONFIG, record)
    (inputs["synthetic_dataset"] / "data" / "train-00001.parquet").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"^--synthetic_dataset \S+: its images cannot be read \(Parquet"):
        run(inputs, tmp_path / "out")
