import pytest

from utils.cli.errors import UserError
from utils.cli.records import BRIDGED_CONFIG, RUN_CONFIG, read_record
from utils.transfer.run_folder import begin_run, find_unfinished

OPTIONS = {"learning_rate": 1e-4, "save_steps": 500}


@pytest.fixture
def unfinished(tmp_path):
    begin_run(tmp_path, OPTIONS)
    (tmp_path / "stage1" / "checkpoint-5").mkdir(parents=True)
    return tmp_path


def test_an_unfinished_run_goes_on_only_when_asked_and_with_its_options(unfinished):
    assert find_unfinished(unfinished, OPTIONS | {"save_steps": 5}, resume=True, overwrite=False)
    with pytest.raises(UserError, match="holds stages of an unfinished run; give --resume_from_checkpoint latest"):
        find_unfinished(unfinished, OPTIONS, resume=False, overwrite=False)
    with pytest.raises(UserError, match="begun with other options .learning_rate was 0.0001.; give the same"):
        find_unfinished(unfinished, OPTIONS | {"learning_rate": 1.0}, resume=True, overwrite=False)
    assert not find_unfinished(unfinished, OPTIONS, resume=True, overwrite=True)


def test_where_nothing_was_begun_resuming_begins(tmp_path):
    assert not find_unfinished(tmp_path / "none", OPTIONS, resume=True, overwrite=False)


def test_a_new_run_takes_away_stages_and_the_mark_of_a_finished_one_and_nothing_else(unfinished):
    for name in (BRIDGED_CONFIG, "model.safetensors", "notes.txt"):
        (unfinished / name).write_text("{}")
    begin_run(unfinished, {"learning_rate": 1.0})
    assert sorted(path.name for path in unfinished.iterdir()) == ["model.safetensors", "notes.txt", RUN_CONFIG]
    assert read_record(unfinished / RUN_CONFIG) == {"options": {"learning_rate": 1.0}}
