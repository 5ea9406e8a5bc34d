"""Real images that a record names, but that are missing: every script says whose record it is, and what to do."""

import shutil

import pytest

from tests.command_lines import SCRIPTS
from utils.cli.errors import UserError
from utils.cli.records import DSI_CONFIG, GENERATION_CONFIG, read_record, write_record

pytest_plugins = ["tests.transfer.fixtures", "tests.synthesis.fixtures"]
OF_SETS = {
    "train_bridged.py": "--synthetic_dataset {set} --model_name_or_path {model} --use_cpu",
    "train_bridged.py, dry run": "--synthetic_dataset {set} --dry_run",
    "train_bridged.py, audit": "--synthetic_dataset {set} --audit",
    "quality_report.py": "--synthetic_dataset {set} --model_name_or_path {model}",
    "compare_transfer.py": "--synthetic_dataset {set} --model_name_or_path {model} --use_cpu",
}
OF_TOKENS = {"generate_synthetic.py": "--learned_embeds {token} --quality_report --quality_model {model}"}
PLACES = {
    "photos": ("train_dir", "photos: not a directory", ", relative to where that run was started"),
    "/gone/photos": ("train_dir", "/gone/photos: not a directory", ", a folder on the machine of that run"),
    "./gone": ("dataset_name", "./gone: neither", ", if it is a folder relative to where that run was started"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("run", "flags"), [*OF_SETS.items(), *OF_TOKENS.items()])
def test_missing_real_images_are_told_with_the_record_that_names_them(
    run, flags, place, synthetic_dir, token_dir, classifiers, tmp_path
):
    key, problem, where = PLACES[place]
    folders = {"set": tmp_path / "syn", "token": tmp_path / "style", "model": classifiers["timm"]}
    shutil.copytree(synthetic_dir, folders["set"])
    shutil.copytree(token_dir, folders["token"])
    for path in (folders["set"] / GENERATION_CONFIG, folders["token"] / DSI_CONFIG):
        write_record(path, read_record(path) | {"real_images": {key: place}})
    recorder = folders["token" if run in OF_TOKENS else "set"]
    with pytest.raises(UserError) as error:
        SCRIPTS[run.partition(",")[0]].main([*flags.format(**folders).split(), "--output_dir", str(tmp_path / "out")])
    message = str(error.value)
    assert message.startswith(f"{key} {problem}")  # no --: it was not given
    assert message.endswith(f" (named in the record of {recorder}{where}; give --dataset_name or --train_dir).")
    assert not (tmp_path / "out").exists()
