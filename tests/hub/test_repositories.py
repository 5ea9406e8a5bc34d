import pytest
from huggingface_hub import constants

from utils.cli.errors import UserError
from utils.hub.repositories import open_source


def test_a_folder_gives_its_files_and_has_no_commit(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    source = open_source(str(tmp_path), "--model")
    assert source.file("a.json") == tmp_path / "a.json"
    assert source.revision is None
    assert source.has_one_of(["b.json", "a.json"]) and not source.has_one_of(["b.json"])
    with pytest.raises(UserError, match="--model .*: the folder has no b.json."):
        source.file("b.json")
    with pytest.raises(UserError, match="the folder has no b.json, so it is not a checkpoint."):
        source.file("b.json", "a checkpoint")


def test_a_revision_of_a_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="is a local folder; a revision \\('main'\\)"):
        open_source(str(tmp_path), "--model", revision="main")


@pytest.mark.parametrize("name", ["no-such-folder", "./a/b", "a/b/c", "/nowhere", ""])
def test_a_name_that_is_neither_folder_nor_id_is_an_error(name):
    with pytest.raises(UserError, match="neither an existing folder nor a repository id"):
        open_source(name, "--model")


def test_an_unreachable_repository_is_one_line(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--model user/model: .*; unset HF_HUB_OFFLINE to download it"):
        open_source("user/model", "--model")
    with pytest.raises(UserError, match=f"does not have config.json of it at revision '{'0' * 40}'; unset"):
        open_source("user/model", "--model", revision="0" * 40).file("config.json")


def test_a_token_is_not_in_the_description_of_a_source():
    assert "hf_secret" not in repr(open_source("user/model", "--model", revision="0" * 40, token="hf_secret"))
