import json
import math
from dataclasses import dataclass

import pytest

from utils.cli.errors import UserError
from utils.cli.options import resolve_options
from utils.cli.records import read_record, write_record, write_run_config


@dataclass
class Options:
    hub_token: str = "hf_secret"
    placeholder_token: str = "<s>"
    seed: int = 3


def test_a_record_is_read_as_it_was_written(tmp_path):
    write_record(tmp_path / "new" / "r.json", {"a": [1, 2]})
    assert read_record(tmp_path / "new" / "r.json") == {"a": [1, 2]}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 2}', '{"a": 1}'])
def test_a_file_that_is_not_a_record_of_this_version_is_an_error(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match="r.json"):
        read_record(tmp_path / "r.json")


def test_run_config_holds_options_and_versions_but_no_access_token(tmp_path):
    write_run_config(tmp_path, resolve_options([Options()]), started=0)
    text = (tmp_path / "run_config.json").read_text()
    record = json.loads(text)
    assert record["options"] == {"placeholder_token": "<s>", "seed": 3}
    assert {"torch", "diffusers", "transformers"} <= set(record["versions"])
    assert record["peak_memory_gib"] > 0
    assert "hf_secret" not in text


def test_a_record_is_strictly_json_and_old_ones_with_nan_are_read(tmp_path):
    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    values = {"a": [1.5, float("nan")], "b": {"c": float("inf"), "d": (-float("inf"), "NaN")}, "e": None}
    write_record(path := tmp_path / "r.json", values)
    as_read = {"a": [1.5, None], "b": {"c": None, "d": [None, "NaN"]}, "e": None}
    assert json.loads(path.read_text(), parse_constant=refuse) == {"schema_version": 1} | as_read
    assert read_record(path) == as_read
    path.write_text('{"schema_version": 1, "a": NaN}')
    assert math.isnan(read_record(path)["a"])
