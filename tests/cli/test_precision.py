"""The default precision, and the message about it."""

import pytest
import torch

from utils.cli.precision import (
    allow_tf32,
    choose_precision,
    device_precision,
    precision_from_options,
    recorded_precision,
)
from utils.cli.records import RUN_CONFIG, write_record

pytest_plugins = ["tests.cli.fixtures"]


def test_a_cpu_computes_in_float32_without_a_message(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert choose_precision(None) == ("no", None)
    assert choose_precision("bf16") == ("bf16", None)
    assert choose_precision(None, "no", "x") == ("no", None)


@pytest.mark.parametrize(("bf16", "own", "title"), [(True, "bf16", "bfloat16"), (False, "fp16", "float16")])
def test_a_gpu_computes_in_bfloat16_or_else_float16_and_reports_it(gpu, monkeypatch, bf16, own, title):
    gpu(bf16)
    assert choose_precision(None, to_change="--x") == (own, f"Precision: {title}, the default on this GPU (--x).")
    assert choose_precision(None, own, "x")[0] == own
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # the default of `accelerate launch`
    assert choose_precision(None)[0] == own
    assert choose_precision("no") == ("no", None)
    assert choose_precision(None, use_cpu=True) == ("no", None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert device_precision() == "no"


def test_accelerates_choice_wins_over_the_device_and_a_flag_over_both(gpu, monkeypatch):
    gpu(bf16=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert choose_precision(None, "bf16", "x") == ("fp16", None)
    assert choose_precision("no", "bf16", "x") == ("no", None)


def test_a_run_resumes_in_its_precision_on_another_device_and_reports_it(gpu):
    line = "Precision: {}, as in the run in x; a new run on this device would use {}."
    assert choose_precision(None, "bf16", "x") == ("bf16", line.format("bfloat16", "float32"))
    gpu(bf16=True)
    assert choose_precision(None, "no", "x") == ("no", line.format("float32", "bfloat16"))


def test_the_precision_of_a_run_is_read_from_the_record_of_either_script(tmp_path):
    assert recorded_precision(tmp_path) is None
    for options, precision in (
        ({"mixed_precision": "fp16"}, "fp16"),
        ({"bf16": True, "fp16": False}, "bf16"),
        ({"bf16": False, "fp16": False}, "no"),
        ({"seed": 0}, None),
    ):
        write_record(tmp_path / RUN_CONFIG, {"options": options})
        assert precision_from_options(options) == recorded_precision(tmp_path) == precision
    write_record(tmp_path / RUN_CONFIG, {})  # another record
    assert recorded_precision(tmp_path) is None


def test_tf32_is_for_gpus(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    allow_tf32("cpu")
    assert chosen == []
    allow_tf32(torch.device("cuda:1"))
    assert chosen == ["high"]
