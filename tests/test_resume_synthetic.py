"""A killed and resumed set, and a set from several processes, equal an uninterrupted one byte for byte."""

import random
import re
import signal
import time

import pytest
from datasets import load_dataset

from generate_synthetic import main
from tests.conftest import CLASS_NAMES, save_class_folders
from tests.processes import start_script
from tests.synthesis.tokens import shard_hashes

pytest_plugins = ["tests.synthesis.fixtures"]
# generate_synthetic.py, with one process that kills itself at a given point
CHILD = """
import os, signal
from accelerate import PartialState
import generate_synthetic
from utils.synthesis import finishing
from utils.synthesis.runner import Runner

place, call, process = os.environ["DIE_AT"].split()

def dying(function, is_counted=lambda *_: True):
    calls = []

    def wrapped(*args):
        calls.extend([None] * is_counted(*args))
        if len(calls) == int(call) and PartialState().process_index == int(process):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    return wrapped

if place == "draw":
    Runner._draw_batch = dying(Runner._draw_batch)
elif place == "rename":
    os.replace = dying(os.replace, lambda _, target: str(target).endswith(".parquet"))
elif place == "finish":
    finishing.finish_set = dying(finishing.finish_set)
generate_synthetic.run_script(generate_synthetic.main)
"""


@pytest.fixture(scope="module")
def many_shards(options):
    return [*options, "--images_per_shard", "4", "--guidance_scale", "2", "4"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, many_shards):
    """The bytes of an uninterrupted set of six shards."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    main([*many_shards, "--output_dir", str(folder)])
    hashes = shard_hashes(folder)
    assert len(hashes) == 6
    return hashes


def run(argv: list[str], tmp_path, num_processes: int = 1, die_at: str = "nowhere 0 0") -> tuple[int, str, str]:
    child = start_script(CHILD, argv, tmp_path, num_processes, DIE_AT=die_at)
    output, errors = child.communicate()
    return child.returncode, output, errors


@pytest.mark.parametrize(("die_at", "num_finished"), [
    ("draw 5 0", 2),  # in the third shard; the second may still be written
    ("rename 4 0", 3),  # between a shard's last byte and its name
    ("finish 1 0", 6),  # after the last shard, before the records
])  # fmt: skip
def test_a_killed_run_resumes_to_an_identical_set(die_at, num_finished, many_shards, whole, tmp_path):
    argv = [*many_shards, "--output_dir", str(tmp_path / "set")]
    status, _, errors = run(argv, tmp_path, die_at=die_at)
    assert status == -signal.SIGKILL, errors[-2000:]
    finished = [name for name in shard_hashes(tmp_path / "set") if name.startswith("train")]
    assert num_finished - 1 <= len(finished) <= num_finished
    assert not (tmp_path / "set" / "README.md").exists()
    results = main(argv)
    assert results["num_drawn"] == 21 - sum(4 if name != "train-00005.parquet" else 1 for name in finished)
    assert shard_hashes(tmp_path / "set") == whole
    assert len(load_dataset(str(tmp_path / "set"), split="train")) == 21


def test_a_killed_run_with_a_guidance_interval_resumes_to_an_identical_set(many_shards, whole, tmp_path):
    argv = [*many_shards, "--num_inference_steps", "3", "--guidance_interval", "0.3", "0.7"]
    status, _, errors = run([*argv, "--output_dir", str(tmp_path / "killed")], tmp_path, die_at="draw 5 0")
    assert status == -signal.SIGKILL, errors[-2000:]
    assert 0 < main([*argv, "--output_dir", str(tmp_path / "killed")])["num_drawn"] < 21
    main([*argv, "--output_dir", str(tmp_path / "alone")])
    assert shard_hashes(tmp_path / "killed") == shard_hashes(tmp_path / "alone")
    assert not set(shard_hashes(tmp_path / "alone").values()) & set(whole.values())


def test_a_terminated_run_reports_how_to_resume(many_shards, whole, tmp_path):
    argv = [*many_shards, "--output_dir", str(tmp_path / "set"), "--num_images_per_class", "700"]
    child = start_script(CHILD, argv, tmp_path, DIE_AT="nowhere 0 0")
    while len(list((tmp_path / "set" / "data").glob("train-*"))) < 3:
        assert child.poll() is None, child.communicate()[1][-2000:]
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate()
    assert child.returncode == 128 + signal.SIGTERM
    found = re.search(r"(\d+) of 525 shards are finished and kept; resume with: accelerate launch gen.*", errors)
    assert found[0].endswith("--num_images_per_class 700")
    finished = shard_hashes(tmp_path / "set")
    assert len(finished) == int(found[1]) >= 3
    assert "Traceback" not in errors
    assert finished["train-00000.parquet"] == whole["train-00000.parquet"]


def test_two_processes_draw_the_set_of_one_and_three_finish_it(many_shards, whole, tmp_path):
    argv = [*many_shards, "--output_dir", str(tmp_path / "two")]
    status, output, errors = run(argv, tmp_path, num_processes=2)
    assert status == 0, errors[-3000:]
    assert re.findall(r"MULTI_CPU \d+ processes", output) == ["MULTI_CPU 2 processes"] * 2
    assert shard_hashes(tmp_path / "two") == whole
    assert "| 21/21 " in errors  # one bar over both

    argv = [*many_shards, "--output_dir", str(tmp_path / "killed")]
    status, _, _ = run(argv, tmp_path, num_processes=2, die_at="rename 2 1")  # the second process, in its second shard
    assert status != 0
    assert 1 <= len([name for name in shard_hashes(tmp_path / "killed") if name.startswith("train")]) < 6
    status, output, errors = run(argv, tmp_path, num_processes=3)
    assert status == 0, errors[-3000:]
    assert re.findall(r"MULTI_CPU \d+ processes", output) == ["MULTI_CPU 3 processes"] * 3
    assert shard_hashes(tmp_path / "killed") == whole


@pytest.mark.soak
def test_a_balanced_set_from_real_images_is_the_same_after_a_kill_and_with_two_processes(tiny_pipeline_dir, tmp_path):
    photos = save_class_folders(tmp_path / "photos", dict(zip(CLASS_NAMES, (7, 4, 12))))
    flags = [
        "--pretrained_model_name_or_path", str(tiny_pipeline_dir), "--train_dir", str(photos), "--resolution", "32",
        "--init_images", "real", "--strength", "0.5", "1", "--num_images_per_class", "balance:5", "--batch_size", "3",
        "--num_inference_steps", "2", "--images_per_shard", "4",
    ]  # fmt: skip
    main([*flags, "--output_dir", str(tmp_path / "whole")])
    whole, argv = shard_hashes(tmp_path / "whole"), [*flags, "--output_dir", str(tmp_path / "killed")]
    status, _, errors = run(argv, tmp_path, num_processes=2, die_at="rename 2 1")
    assert status != 0, errors[-2000:]
    assert 1 <= len([name for name in shard_hashes(tmp_path / "killed") if name.startswith("train")]) < len(whole)
    status, output, errors = run(argv, tmp_path, num_processes=2)
    assert status == 0, errors[-3000:]
    assert re.findall(r"MULTI_CPU \d+ processes", output) == ["MULTI_CPU 2 processes"] * 2
    assert shard_hashes(tmp_path / "killed") == whole


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_removed_folder_ends_every_process_with_one_line(num_processes, many_shards, tmp_path):
    folder = tmp_path / "set"
    argv = [*many_shards, "--output_dir", str(folder), "--num_images_per_class", "700"]
    child = start_script(CHILD, argv, tmp_path, num_processes, DIE_AT="nowhere 0 0")
    while len(list((folder / "data").glob("train-*"))) < 3:
        assert child.poll() is None, child.communicate()[1][-2000:]
        time.sleep(0.05)
    folder.rename(tmp_path / "gone")
    _, errors = child.communicate(timeout=60)
    assert child.returncode == (2 if num_processes == 1 else 1)  # accelerate's own
    assert f"error: --output_dir {folder}: all or part of it was removed while images were drawn" in errors
    assert "FileNotFoundError" not in errors
    assert not folder.exists()


@pytest.mark.soak
def test_fifty_kills_at_random_moments_leave_an_identical_set(options, tmp_path):
    argv = [*options, "--num_images_per_class", "2000", "--images_per_shard", "40"]
    main([*argv, "--output_dir", str(tmp_path / "whole")])
    rng, num_kills = random.Random(0), 0
    while num_kills < 50:
        child = start_script(CHILD, [*argv, "--output_dir", tmp_path / "set"], tmp_path, DIE_AT="nowhere 0 0")
        try:
            _, errors = child.communicate(timeout=rng.uniform(0.5, 4))
        except TimeoutError:  # and killed
            num_kills += 1
            continue
        assert child.returncode == 0, errors[-2000:]
        for name in rng.sample(sorted((tmp_path / "set" / "data").iterdir()), 60):  # so that there is work to interrupt
            name.unlink()
    main([*argv, "--output_dir", str(tmp_path / "set")])
    assert shard_hashes(tmp_path / "set") == shard_hashes(tmp_path / "whole")
