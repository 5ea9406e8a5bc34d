"""With two processes, shared messages are printed once and folders are published once."""

import shutil

import pytest

import generate_synthetic
import train_bridged
import train_dsi
from tests.processes import start_script

pytest_plugins = ["tests.local_hub.fixtures", "tests.transfer.fixtures", "tests.synthesis.fixtures"]
TOKEN = "hf_user_secret"
SCRIPTS = [train_dsi, generate_synthetic, train_bridged]


def program(script) -> str:
    return f"import {script.__name__} as script\nscript.run_script(script.main)"


@pytest.fixture
def argv_of(real_images_dir, tiny_pipeline_dir, classifiers, synthetic_dir, options):
    """The flags of a short run of each script."""
    return {
        train_dsi: ["--dataset_name", real_images_dir, "--pretrained_model_name_or_path", tiny_pipeline_dir,
                    "--max_train_steps", 1, "--train_batch_size", 2, "--num_shots", 2, "--num_validation_images", 0],
        generate_synthetic: options,
        train_bridged: ["--synthetic_dataset", synthetic_dir, "--model_name_or_path", classifiers["timm"],
                        "--bridge_max_steps", 1, "--max_steps", 1],
    }  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_finished_folder_is_published_and_reported_once(script, argv_of, local_hub, tmp_path):
    local_hub.add_user("user", TOKEN)
    argv = [str(word) for word in [*argv_of[script], "--output_dir", tmp_path / "made"]]
    script.main(argv)
    child = start_script(program(script), [*argv, "--push_to_hub"], tmp_path, num_processes=2, HF_TOKEN=TOKEN)
    output, errors = child.communicate()
    assert child.returncode == 0, errors[-2000:]
    assert output.count("Published: ") == 1
    assert output.count("is already finished, nothing to do") == (script is not generate_synthetic)
    num_commits = len([request for request in local_hub.log if "/commit/" in request.path])
    # shards of a synthetic set may be committed before the rest
    assert num_commits in ((1, 2) if script is generate_synthetic else (1,))


@pytest.mark.parametrize("script", SCRIPTS)
def test_processes_unaware_of_each_other_do_nothing(script, argv_of, local_hub, tmp_path):
    local_hub.add_user("user", TOKEN)
    argv = [*argv_of[script], "--output_dir", tmp_path / "made", "--push_to_hub"]
    environment = {"HF_TOKEN": TOKEN, "ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}
    child = start_script(program(script), argv, tmp_path, num_processes=2, **environment)
    _, errors = child.communicate()
    assert child.returncode != 0
    assert "--num_processes 2: without GPUs, each process works alone; set ACCELERATE_USE_CPU=true" in errors
    assert local_hub.repos() == [] and not (tmp_path / "made").exists()


LONG_PROMPT = "A {class} in the style of {token}" + 80 * ", red"


@pytest.mark.parametrize(
    ("script", "flags", "lines"),
    [
        (train_bridged, ["--streaming", "--skip_bad_images"], ["images of a stream are not opened in advance"]),
        pytest.param(
            generate_synthetic, ["--prompt_templates", LONG_PROMPT], ["are truncated after class name"],
            marks=pytest.mark.soak,
        ),
        pytest.param(
            train_dsi, [], ["its card names the classes of 'label' square,", "shift_factor of its VAE: ignored"],
            marks=pytest.mark.soak,
        ),
    ],
)  # fmt: skip
def test_common_warnings_of_all_processes_are_printed_once(
    script, flags, lines, argv_of, copy_pipeline, real_images_dir, tmp_path
):
    if script is train_dsi:
        renamed = shutil.copytree(real_images_dir, tmp_path / "images")
        names = "{'0': square, '1': circle, '2': stripe}"
        (renamed / "README.md").write_text(
            "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
            f"      class_label:\n        names: {names}\n---\n"
        )
        pipeline_dir = copy_pipeline(vae={"shift_factor": 0.1})
        flags = ["--dataset_name", renamed, "--pretrained_model_name_or_path", pipeline_dir]
    argv = [*argv_of[script], *flags, "--output_dir", tmp_path / script.__name__]
    _, errors = (child := start_script(program(script), argv, tmp_path, num_processes=2)).communicate()
    assert child.returncode == 0, errors[-2000:]
    assert [errors.count(line) for line in lines] == [1] * len(lines), errors
