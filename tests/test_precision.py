"""The scripts' default precision, on a simulated GPU and on the CPU."""

import pytest
import torch
from torch.nn import functional as F

import compare_transfer
import train_bridged
import train_dsi
from tests.conftest import CLASS_NAMES, read_rows
from utils.cli.errors import UserError
from utils.cli.records import GENERATION_CONFIG, RUN_CONFIG, read_record, write_record
from utils.comparison.arguments import SharedStageArguments, set_precision
from utils.style.base_models import open_base_model
from utils.transfer.classifiers import load_classifier

pytest_plugins = ["tests.cli.fixtures", "tests.style.fixtures", "tests.synthesis.fixtures", "tests.transfer.fixtures"]


def parse_dsi(folder, *flags):
    return train_dsi.parse_arguments(["--dataset_name", "x", "--output_dir", str(folder), *flags])[5].mixed_precision


def test_train_dsi_uses_the_gpus_precision_or_that_of_the_resumed_run(gpu, tmp_path, caplog):
    gpu(bf16=False)
    assert parse_dsi(tmp_path) == "fp16"
    assert parse_dsi(tmp_path, "--mixed_precision", "no") == "no"
    assert "Precision: float16, the default on this GPU (--mixed_precision no is float32)." in caplog.messages
    write_record(tmp_path / RUN_CONFIG, {"options": {"mixed_precision": "no"}})  # as in earlier versions
    assert parse_dsi(tmp_path) == "no"
    assert f"Precision: float32, as in the run in {tmp_path}; a new run" in caplog.text
    assert parse_dsi(tmp_path, "--overwrite_output_dir") == "fp16"
    state = {"progress": {"options": {"mixed_precision": "bf16"}}}
    write_record(tmp_path / "checkpoint-5" / "training_state.json", state)
    assert parse_dsi(tmp_path / "other", "--resume_from_checkpoint", str(tmp_path / "checkpoint-5")) == "bf16"


def test_train_bridged_uses_the_gpus_precision_or_that_of_the_resumed_run(
    gpu, real_images_dir, tmp_path, caplog
):  # fmt: skip
    def parse(*flags):
        argv = ["--dataset_name", str(real_images_dir), "--method", "vanilla", "--output_dir", str(tmp_path), *flags]
        # a simulated GPU has no device
        args = train_bridged.parse_arguments([*argv, "--use_cpu"])[0].training
        return args.bf16, args.fp16, args.mixed_precision

    assert parse() == (False, False, "no")
    gpu(bf16=True)
    assert parse() == (False, False, "no"), "--use_cpu"
    args = train_bridged.BridgedTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    args.use_cpu = False
    line = train_bridged.set_precision(args, set())
    assert (args.bf16, args.fp16, args.mixed_precision) == (True, False, "bf16")
    assert line == "Precision: bfloat16, the default on this GPU (--no_bf16 is float32)."
    for recorded in ({"bf16": False, "fp16": False}, {"bf16": False, "fp16": True}):
        write_record(tmp_path / RUN_CONFIG, {"options": recorded})
        args = train_bridged.BridgedTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        args.use_cpu = False
        assert train_bridged.set_precision(args, {"bf16"}) is None and not args.bf16
        assert "; a new run on this device would use bfloat16." in train_bridged.set_precision(args, set())
        assert {"bf16": args.bf16, "fp16": args.fp16} == recorded


def test_a_comparison_uses_the_gpus_precision_or_that_of_its_cells(gpu, tmp_path):
    def choose(*given):
        args = SharedStageArguments()
        return set_precision(args, str(tmp_path), set(given)), args.bf16, args.fp16

    assert choose() == (None, False, False)
    gpu(bf16=True)
    assert choose()[1:] == (True, False) and choose("bf16") == (None, False, False)
    write_record(tmp_path / "cells" / "one.json", {"settings": {}})
    line, *flags = choose()
    assert flags == [False, False] and "as in the run in" in line
    write_record(tmp_path / "cells" / "one.json", {"settings": {"mixed_precision": "bf16"}})
    assert choose()[1:] == (True, False)
    assert compare_transfer.set_precision is set_precision


def test_on_a_cpu_cells_in_a_gpus_precision_are_run_again_and_reported(tmp_path):
    write_record(tmp_path / "cells" / "one.json", {"settings": {"mixed_precision": "bf16"}})
    line = set_precision(args := SharedStageArguments(), str(tmp_path), set())
    assert line == f"The runs in {tmp_path} used bfloat16: they are made again in float32." and not args.bf16


def test_an_unfinished_token_in_another_precision_resumes_in_it_and_reports_it(run_dsi, tmp_path, caplog):
    flags = {"max_train_steps": 4, "checkpointing_steps": 2}
    whole = run_dsi(output_dir=tmp_path / "whole", mixed_precision="bf16", **flags)
    run_dsi(mixed_precision="bf16", **flags)
    assert "Precision" not in caplog.text
    (tmp_path / "style" / "dsi_config.json").unlink()  # killed at the end
    resumed = run_dsi(resume_from_checkpoint="latest", **flags)
    assert f"Precision: bfloat16, as in the run in {tmp_path / 'style'};" in caplog.text
    assert resumed == whole
    assert all(map(torch.equal, read_rows(tmp_path / "whole"), read_rows(tmp_path / "style")))
    with pytest.raises(UserError, match="mixed_precision was bf16, now no"):
        run_dsi(mixed_precision="no", **flags)


def test_a_set_in_another_precision_grows_in_it_and_reports_it(options, tmp_path, capsys, caplog):
    import generate_synthetic

    argv = [*map(str, options), "--output_dir", str(tmp_path / "set"), "--num_images_per_class"]
    generate_synthetic.main([*argv, "1", "--mixed_precision", "bf16"])
    before = read_record(tmp_path / "set" / GENERATION_CONFIG)["settings"]
    generate_synthetic.main([*argv, "2"])
    assert f"Precision: bfloat16, as in the run in {tmp_path / 'set'};" in caplog.text
    assert read_record(tmp_path / "set" / GENERATION_CONFIG)["settings"] == before
    assert before["mixed_precision"] == "bf16"


def test_attention_of_every_model_is_torchs_own(tiny_xl_pipeline_dir, classifiers, monkeypatch):
    calls = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, **kw: (calls.append(1), attention(*args, **kw))[1]
    )

    def count(run) -> int:
        calls.clear()
        run()
        return len(calls)

    base_model = open_base_model(str(tiny_xl_pipeline_dir), "--pretrained_model_name_or_path")
    for text_encoder in base_model.load_text_encoders(torch.float32):
        assert count(lambda encoder=text_encoder: encoder(torch.ones((1, 4), dtype=torch.int64)))
    unet = base_model.load_unet(torch.float32)
    added = {"text_embeds": torch.zeros(1, 8), "time_ids": torch.zeros(1, 6)}
    size = unet.config.cross_attention_dim
    assert count(lambda: unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 4, size), added_cond_kwargs=added))
    vit = load_classifier(classifiers["vit"], CLASS_NAMES, True, seed=0)
    image_size = vit.config.image_size
    assert count(lambda: vit(torch.zeros(1, 3, image_size, image_size)))
