"""The three commands of the README, verbatim, with the local Hub, each in its own process and home."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import generate_synthetic
import train_bridged
import train_dsi
from tests.conftest import CLASS_NAMES, save_class_folders
from tests.hub.fault_sweep import LEFT_OUT

pytest_plugins = ["tests.transfer.fixtures", "tests.local_hub.fixtures"]
ROOT = Path(__file__).parent.parent
TOKEN = "hf_user_secret"
SHORT = {
    "train_dsi.py": "--max_train_steps 2 --train_batch_size 2 --num_shots 2 --num_validation_images 1",
    "generate_synthetic.py": "--num_images_per_class 4 --num_inference_steps 2",
    "train_bridged.py": "--bridge_max_steps 2 --max_steps 2 --push_to_hub",
}
FULL = {"train_dsi.py": "", "generate_synthetic.py": "", "train_bridged.py": "--push_to_hub"}


def readme_commands() -> list[str]:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Use it: three commands")[1]
    return re.search(r"```bash\n(.*?)```", section, re.DOTALL).group(1).splitlines()


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(local_hub, real_images_dir, tiny_pipeline_dir, classifiers):
    """A Hub with a user's image set, and the scripts' default models."""
    local_hub.add_user("user", TOKEN)
    for repo_id, repo_type, folder in (
        ("user/cars", "dataset", real_images_dir),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "model", tiny_pipeline_dir),
        ("timm/resnet18.tv_in1k", "model", Path(classifiers["timm"])),
    ):
        local_hub.create_repo(repo_id, repo_type).commit(files_below(folder))
    return local_hub


@pytest.mark.parametrize("flags", [SHORT, pytest.param(FULL, marks=pytest.mark.soak)], ids=["short", "verbatim"])
def test_the_readme_commands_end_in_a_model_that_a_pipeline_loads(flags, hub, tmp_path):
    for script in flags:
        (tmp_path / script).symlink_to(ROOT / script)
    commands = readme_commands()
    assert [shlex.split(command)[2] for command in commands] == list(flags)
    for number, command in enumerate(commands):
        words = shlex.split(command)
        words = [str(Path(sys.executable).with_name(words[0])), *words[1:], *flags[words[2]].split()]
        env = hub.environment(tmp_path / f"home-{number}", TOKEN) | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert TOKEN not in done.stdout + done.stderr
    check_repositories(hub)
    written = [
        path for name in ("cars-style", "cars-syn", "cars-syn-bridged_replay") for path in (tmp_path / name).rglob("*")
    ]
    assert not [path for path in written if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not [request for request in hub.log if TOKEN in request.path + request.query]
    load = (
        "from transformers import pipeline; import sys\n"
        "classify = pipeline('image-classification', model='user/cars-syn-bridged_replay')\n"
        "print(sorted(answer['label'] for answer in classify(sys.argv[1])))"
    )
    env = hub.environment(tmp_path / "home-last")  # no token: anyone's machine
    command = [sys.executable, "-c", load, str(tmp_path / "cars-syn" / "preview.png")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == [str(sorted(CLASS_NAMES))], done.stderr[-3000:]


def check_repositories(hub) -> None:
    """Check that each step recorded the commits of the one before, and that nothing leaked."""
    token = hub.repo("user/cars-style").files()
    images = hub.repo("user/cars-syn", "dataset").files()
    model = hub.repo("user/cars-syn-bridged_replay").files()
    dsi, generation = json.loads(token["dsi_config.json"]), json.loads(images["generation_config.json"])
    bridged = json.loads(model["bridged_config.json"])
    real_commit = hub.repo("user/cars", "dataset").commits()[0].id
    assert {record["real_images"]["dataset_revision"] for record in (dsi, generation, bridged)} == {real_commit}
    assert generation["token"]["revision"] == hub.repo("user/cars-style").commits()[0].id
    assert bridged["synthetic_dataset"]["revision"] == hub.repo("user/cars-syn", "dataset").commits()[0].id
    assert b'pipe.load_textual_inversion("user/cars-style")' in token["README.md"]
    assert b"--synthetic_dataset user/cars-syn" in images["README.md"]
    assert b'model="user/cars-syn-bridged_replay"' in model["README.md"]
    for repo in hub.repos():
        names = [name for name in repo.files() if not name.startswith("unet/")]
        assert not [name for name in names if name in LEFT_OUT or name.startswith(("stage", "checkpoint"))]
        assert not [name for name, content in repo.files().items() if TOKEN.encode() in content]


def test_class_folders_go_through_all_three_steps(tiny_pipeline_dir, classifiers, tmp_path):
    save_class_folders(tmp_path / "photos", {"tabby cat": 10, "poodle": 10})
    style, images, model = (str(tmp_path / name) for name in ("style", "images", "model"))
    train_dsi.main(
        ["--train_dir", str(tmp_path / "photos"), "--pretrained_model_name_or_path", str(tiny_pipeline_dir),
         "--output_dir", style, "--max_train_steps", "2", "--num_validation_images", "0", "--num_shots", "4"]
    )  # fmt: skip
    generate_synthetic.main(
        ["--learned_embeds", style, "--output_dir", images, "--num_images_per_class", "3", "--num_inference_steps", "2"]
    )
    results = train_bridged.main(
        ["--synthetic_dataset", images, "--model_name_or_path", classifiers["timm"], "--output_dir", model,
         "--bridge_max_steps", "2", "--max_steps", "2"]
    )  # fmt: skip
    assert results["num_test_images"] == 2
    config = json.loads((tmp_path / "model" / "bridged_config.json").read_text())
    assert config["class_names"] == ["poodle", "tabby cat"]
    token = json.loads((tmp_path / "style" / "dsi_config.json").read_text())
    assert config["train_indices"] == token["train_indices"]  # the token's shots
    assert len(config["train_indices"]) == 8
