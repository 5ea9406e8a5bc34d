import fnmatch

import pytest

from utils.cli.errors import UserError
from utils.hub.repositories import NEVER_PUBLISHED, open_source


def test_a_folder_gives_its_files_and_has_no_commit(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    source = open_source(str(tmp_path), "--model")
    assert source.file("a.json") == tmp_path / "a.json"
    assert source.commit() is None
    with pytest.raises(UserError, match="--model .*: the folder has no b.json"):
        source.file("b.json")


def test_a_revision_of_a_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="is a local folder, a revision \\('main'\\)"):
        open_source(str(tmp_path), "--model", revision="main")


@pytest.mark.parametrize("name", ["no-such-folder", "./a/b", "a/b/c", "/nowhere", ""])
def test_what_is_neither_folder_nor_id_is_an_error(name):
    with pytest.raises(UserError, match="neither an existing folder nor a repository id"):
        open_source(name, "--model")


def test_a_repository_out_of_reach_is_one_line():
    with pytest.raises(UserError, match="--model user/model: .*the Hub cannot be reached"):
        open_source("user/model", "--model").file("config.json")


@pytest.mark.parametrize(
    ("path", "is_published"),
    [
        ("model.safetensors", True),
        ("data/train-00000.parquet", True),
        ("run_config.json", True),
        ("training_args.bin", False),
        ("stage1/training_args.bin", False),
        ("stage1/checkpoint-30/optimizer.pt", False),
        ("checkpoint-30/model.safetensors", False),
        ("data/train-00001.parquet.tmp", False),
    ],
)
def test_training_state_is_never_published(path, is_published):
    # huggingface_hub filters with fnmatch, whose * also matches /
    is_ignored = any(fnmatch.fnmatch(path, pattern) for pattern in NEVER_PUBLISHED)
    assert is_ignored != is_published
