import logging
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from datasets import ClassLabel, Image, load_dataset
from safetensors.torch import load_file
from transformers import pipeline

import train_bridged
from tests.conftest import CLASS_NAMES, blank_figures, save_image_set
from utils.cli.errors import Interrupted, UserError
from utils.cli.records import GENERATION_CONFIG, read_record, write_record
from utils.transfer import stage
from utils.transfer.augmentation import CropAndFlip
from utils.transfer.methods import METHODS

pytest_plugins = ["tests.transfer.fixtures"]
SMALL_STAGE_1 = ["--bridge_max_steps", "3", "--max_eval_samples", "6", "--use_cpu"]
SMALL = ["--max_steps", "2", *SMALL_STAGE_1]


@pytest.fixture
def run(classifiers, synthetic_dir, tmp_path):
    """Run train_bridged.py on the tiny images into a folder of that name; return its results."""

    def run(name: str, *flags: str, model: str = "vit", synthetic=synthetic_dir, small=SMALL) -> dict:
        return train_bridged.main(
            ["--synthetic_dataset", str(synthetic), "--model_name_or_path", classifiers[model],
             "--output_dir", str(tmp_path / name), *small, *flags]
        )  # fmt: skip

    return run


def test_bridged_from_the_record_alone_gives_a_pipeline(run, tmp_path):
    results = run("out", model="timm")
    config = read_record(tmp_path / "out" / "bridged_config.json")
    assert (results["stage1_steps"], results["stage2_steps"]) == (2, 3)  # half of both together at two shots
    assert config["method"] == "bridged_replay"
    assert len(config["train_indices"]) == 2 * len(CLASS_NAMES)  # the record's two shots
    classify = pipeline("image-classification", model=str(tmp_path / "out"))
    assert list(classify.model.config.id2label.values()) == CLASS_NAMES
    for name in ("README.md", "report.png", "all_results.json", "run_config.json", "stage1/model.safetensors"):
        assert (tmp_path / "out" / name).is_file()
    assert not list((tmp_path / "out").glob("*.bin"))
    with pytest.raises(UserError, match="holds a classifier made with other options"):
        run("out", "--max_steps", "3", model="timm")


def test_vanilla_needs_no_synthetic_set_and_matches_steps(classifiers, real_images_dir, tmp_path):
    results = train_bridged.main(
        ["--dataset_name", str(real_images_dir), "--method", "vanilla", "--match_steps", "--num_shots", "2",
         "--model_name_or_path", classifiers["vit"], "--output_dir", str(tmp_path / "out"), "--hub_token",
         "hf_some_secret", *SMALL]
    )  # fmt: skip
    assert results["vanilla_steps"] == 5
    assert results["leep_bridged"] is None
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in written if b"hf_some_secret" in path.read_bytes()]


def test_a_set_whose_token_saw_no_mirrored_images_trains_without_them_in_both_stages(
    run, unmirrored_dir, tmp_path, monkeypatch
):
    mirrors = []
    init = CropAndFlip.__init__
    monkeypatch.setattr(
        CropAndFlip, "__init__", lambda self, *args: (init(self, *args), mirrors.append(self.random_flip))[0]
    )
    with blank_figures():
        run("out", "--method", "bridged_unguarded", synthetic=unmirrored_dir)
    assert mirrors == [False, False, False]  # of the trial run and of both stages
    config = read_record(tmp_path / "out" / "bridged_config.json")
    assert [stage["settings"]["random_flip"] for stage in config["stages"]] == [False, False]
    assert config["real_images"]["random_flip"] is False
    args, _ = train_bridged.parse_arguments(["--synthetic_dataset", str(unmirrored_dir), "--random_flip", "true"])
    assert args.real.random_flip  # a flag overrides the record


def assert_same_weights(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_few_images_with_a_fresh_head_are_advised_to_keep_the_head(run, caplog):
    run("fresh", "--num_shots", "4", "--method", "bridged")
    assert "With 12 real images of 3 classes, --head_init keep is likely to be better" in caplog.text
    lines = [record.message for record in caplog.records if "compare_transfer.py --num_folds" in record.message]
    assert len(lines) == 1 and "of its smallest class, too few to judge by" in lines[0]
    caplog.clear()
    run("many", "--num_shots", "5", "--method", "bridged")
    run("kept", "--num_shots", "4", "--method", "bridged", "--head_init", "keep")
    assert "--head_init keep is likely" not in caplog.text


def test_a_fold_with_test_images_that_the_token_has_seen_gives_a_warning(run, make_synthetic_dir, caplog):
    whole = make_synthetic_dir("whole", train_indices=list(range(60)))
    run("folded", "--fold", "1/2", synthetic=whole)
    (line,) = [record.message for record in caplog.records if "the style token has seen" in record.message]
    assert line == (
        "Warning: the style token has seen 54 real images outside the 6 that this run trains on, 6 of them test images "
        "of --fold 1/2; a method without synthetic images sees fewer real images."
    )


def test_classes_in_another_order_and_decoded_images_give_the_same_classifier(run, synthetic_dir, tmp_path, caplog):
    order = [2, 0, 1]  # label 0 of the set has the name of label 2 of the real set
    permuted = tmp_path / "permuted"
    shutil.copytree(synthetic_dir, permuted)
    path = permuted / "data" / "train-00000.parquet"
    rows = load_dataset("parquet", data_files=str(path), split="train")
    labels = [order.index(label) for label in rows["label"]]
    feature = ClassLabel(names=[CLASS_NAMES[label] for label in order])
    rows.remove_columns("label").add_column("label", labels, feature=feature).to_parquet(path)
    results = run("one")
    assert 0 < results["total_seconds_waiting"] < results["total_seconds"]
    caplog.set_level(logging.INFO)
    run("other", "--cache_images", synthetic=permuted)
    assert "Training images are decoded once: " in caplog.text
    assert_same_weights(tmp_path / "one", tmp_path / "other")


def test_every_method_takes_the_same_real_images_and_reports_its_costs(run, tmp_path):
    results = {
        "bridged": run("bridged", "--method", "bridged_unguarded", "--head_warmup_steps", "1"),
        "vanilla": run("vanilla", "--method", "vanilla", "--match_steps", "--head_warmup_steps", "1"),
        "mix": run("mix", "--method", "mix", "--mix_ratio", "1", "--match_steps"),
        "synthetic_only": run("synthetic_only", "--method", "synthetic_only", small=SMALL_STAGE_1),
    }
    configs = {method: read_record(tmp_path / method / "bridged_config.json") for method in results}
    assert len({tuple(config["train_indices"]) for config in configs.values()}) == 1
    assert [[stage["name"] for stage in config["stages"]] for config in configs.values()] == [
        ["stage1", "stage2_head", "stage2"], ["vanilla_head", "vanilla"], ["mix"], ["stage1"],
    ]  # fmt: skip
    assert {method: result["total_steps"] for method, result in results.items()} == {
        "bridged": 6, "vanilla": 6, "mix": 5, "synthetic_only": 3,
    }  # fmt: skip
    assert results["mix"]["total_images_seen"] == 32 + 4 + 32 + 4 + 32  # epochs of 18 real and 18 synthetic images
    assert results["vanilla"]["leep_bridged"] is None and results["bridged"]["leep_bridged"] <= 0


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("module", "name", "call", "method"),
    [
        ("utils.transfer.fine_tuning.StageTrainer", "training_step", 3, "bridged"),  # in stage 1, after a checkpoint
        ("utils.transfer.stage", "fine_tune", 2, "bridged"),  # between the stages
        ("utils.transfer.fine_tuning.StageTrainer", "training_step", 5, "bridged"),  # in stage 2
        ("utils.transfer.fine_tuning.StageTrainer", "training_step", 5, "bridged_replay"),  # without stage 1
        ("utils.transfer.fine_tuning.StageTrainer", "training_step", 5, "bridged_unguarded"),
        ("utils.transfer.fine_tuning.StageTrainer", "training_step", 3, "bridged_adversarial"),
        ("utils.transfer.report", "write_model_card", 1, "bridged"),  # after the last stage
    ],
)
def test_a_killed_run_resumes_in_its_stage_to_the_same_weights(run, module, name, call, method, tmp_path, monkeypatch):
    flags = ["--save_steps", "1", "--mixup_alpha", "0.2", "--method", method]
    whole = run("whole", *flags)
    owner = pkgutil.resolve_name(module)
    original, calls = getattr(owner, name), []

    def die(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, die)
        run("killed", *flags)
    with pytest.raises(UserError, match="holds stage.* of an unfinished run; give --resume_from_checkpoint latest"):
        run("killed", *flags)
    with pytest.raises(UserError, match="started with other options .mixup_alpha was 0.2"):
        run("killed", "--method", method, "--resume_from_checkpoint", "latest")
    resumed = run("killed", *flags, "--resume_from_checkpoint", "latest")
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    costs = ("seconds", "seconds_waiting", "gpu_hours")
    assert {key: value for key, value in resumed.items() if not key.endswith(costs)} == {
        key: value for key, value in whole.items() if not key.endswith(costs)
    }


def test_an_adapter_is_trained_in_both_stages_and_published_merged_and_unmerged(run, tmp_path):
    run("lora", "--use_peft", "--lora_r", "4", "--method", "bridged_keep")
    folder = tmp_path / "lora"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    image = str(next(Path(folder).glob("report.png")))
    assert len(pipeline("image-classification", model=str(folder))(image)) == len(CLASS_NAMES)
    config = read_record(folder / "bridged_config.json")
    assert (config["lora"]["lora_r"], config["stages"][1]["head_init"]) == (4, "keep")


def test_a_streamed_set_trains_for_the_epochs_that_its_record_counts(classifiers, synthetic_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s after every epoch
    streamed = tmp_path / "streamed"
    shutil.copytree(synthetic_dir, streamed)
    flags = ["--synthetic_dataset", str(streamed), "--model_name_or_path", classifiers["vit"], "--streaming",
             "--output_dir", str(tmp_path / "out"), "--method", "synthetic_only", "--bridge_num_train_epochs", "2",
             "--per_device_train_batch_size", "4", "--max_eval_samples", "6", "--use_cpu"]  # fmt: skip
    with pytest.raises(UserError, match="has no number of images; give --bridge_max_steps"):
        train_bridged.main(flags)
    record = read_record(streamed / GENERATION_CONFIG)
    write_record(streamed / GENERATION_CONFIG, record | {"num_images": 18, "num_images_per_class": 6})
    results = train_bridged.main(flags)
    assert (results["stage1_steps"], results["stage1_images_seen"]) == (10, 40)  # with a stream, every batch is full
    flags[flags.index("synthetic_only")] = "bridged_unguarded"
    results = train_bridged.main([*flags, "--max_steps", "4", "--overwrite_output_dir"])
    assert (results["stage1_steps"], results["stage2_steps"], results["stage2_images_seen"]) == (7, 7, 28)
    flags[flags.index("bridged_unguarded")] = "synthetic_only"
    results = train_bridged.main([*flags, "--bridge_alignment", "adversarial", "--overwrite_output_dir"])
    assert (results["stage1_steps"], results["stage1_images_seen"]) == (
        10,
        80,
    )  # the same number of real images, unlabelled
    stages = read_record(tmp_path / "out" / "bridged_config.json")["stages"]
    assert stages[0]["alignment"] == {"kind": "adversarial", "weight": 1.0}
    assert "real training images, used without labels (domain classifier" in (tmp_path / "out/README.md").read_text()


def save_uneven(folder, copy, names: list[str]) -> str:
    """Write 10, 5 and 1 of a folder's test images of each class; `names` are its classes in any order and case."""
    images = load_dataset(str(folder))
    order = [[name.lower() for name in names].index(name) for name in CLASS_NAMES]
    features = datasets.Features(images["train"].features | {"label": ClassLabel(names=names)})
    images["test"] = images["test"].select([row for row in range(30) if row // 3 < (10, 5, 1)[row % 3]])
    for split, rows in images.items():
        changed = rows.map(lambda row: {"label": order[row["label"]]}, features=features)
        changed.to_parquet(copy / "data" / f"{split}-00000.parquet")
    return str(copy)


def test_a_finished_classifier_is_evaluated_without_training(run, classifiers, real_images_dir, tmp_path):
    trained = run("out")
    flags = ["--output_dir", str(tmp_path / "out"), "--no_do_train"]
    results = train_bridged.main([*flags, "--do_eval", "--max_eval_samples", "6", "--use_cpu"])
    assert results == {key: value for key, value in trained.items() if key in results}
    assert read_record(tmp_path / "out" / "eval_results.json") == results
    all_images = train_bridged.main([*flags, "--do_eval", "--dataset_name", str(real_images_dir), "--use_cpu"])
    assert all_images["num_test_images"] == 30
    uneven = []
    for names in (CLASS_NAMES, ["Blue-Stripe", "RED_SQUARE", "green circle"]):
        folder = save_uneven(real_images_dir, tmp_path / names[0], names)
        uneven.append(train_bridged.main([*flags, "--do_eval", "--use_cpu", "--dataset_name", folder]))
    assert uneven[1] == pytest.approx(uneven[0])
    other = tmp_path / "other"
    save_image_set(other, {"train": 3, "test": 2}, ["cat", "dog", "suv"])
    with pytest.raises(UserError, match="out: its classes differ from those of the real set; missing: cat, dog, suv"):
        train_bridged.main([*flags, "--do_eval", "--dataset_name", str(other), "--use_cpu"])
    with pytest.raises(UserError, match="nothing is left to do; add --do_eval"):
        train_bridged.main(flags)
    with pytest.raises(UserError, match="--output_dir .*other: contains no finished classifier"):
        train_bridged.main(["--no_do_train", "--do_eval", "--output_dir", str(other)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("SYN VIT --use_peft --batch_norm train", "--batch_norm train: not possible with --use_p"),
        ("SYN VIT --use_peft --bridge_batch_norm recalibrate", "--bridge_batch_norm rec"),
        ("SYN VIT --use_peft --method bridged_recalibrate", "--batch_norm recalibrate: not possible with"),
        ("SYN VIT --bridge_alignment_weight 2", "does nothing with --method br.*, which aligns no features; add"),
        ("SYN VIT --bridge_alignment coral --bridge_alignment_weight 0", "--bridge_alignment_weight 0.0: must be abov"),
        ("SYN VIT --method vanilla --bridge_alignment coral", "--bridge_alignment coral: does nothing with --method v"),
        ("SYN VIT --method bridged_coral --bridge_alignment none --bridge_alignment_weight 2", "which aligns no fea"),
        ("SYN VIT --method bridged_coral --bridge_freeze_backbone", "--bridge_freeze_backbone: not possible with"),
        ("SYN VIT --method synthetic_only --bridge_alignment coral --mixup_alpha 0.2", "--mixup_alpha 0.2: does nothi"),
        ("SYN VIT --method bridged --batch_norm domain", "--batch_norm domain: needs synthetic images am"),
        ("SYN VIT --method bridged_domain_norm --streaming", "--batch_norm domain: needs .*, not streamed"),
        ("SYN VIT --method bridged_domain_norm --use_peft", "--batch_norm domain: not possible with --use"),
        ("SYN VIT --dropout 1", "--dropout 1.0: must be 0 or above, and below 1"),
        ("SYN VIT --mix_ratio 0", "--mix_ratio 0.0: must be above 0"),
        ("SYN VIT --bridge_mixup_alpha -1", "--bridge_mixup_alpha -1.0: must be 0 or above"),
        ("SYN VIT --method mix --streaming", "--streaming: not possible with --method mix"),
        ("SYN VIT --max_steps 0", "--max_steps 0: must be above 0, or left out"),
        ("SYN VIT --logging_steps inf", "--logging_steps: must be a finite number of"),
        ("SYN VIT --load_best_model_at_end", "requires the save and eval strategy to match"),
        ("SYN VIT --load_best_model_at_end --eval_strategy epoch --save_strategy epoch",
         "--load_best_model_at_end: not supported"),
        ("SYN VIT --resume_from_checkpoint x", "--resume_from_checkpoint x: must be latest"),
        ("--method bridged --dataset_name x", "--synthetic_dataset"),
        ("--method vanilla", "--dataset_name"),
        ("SYN VIT --num_shots 0", "--num_shots"),
        ("SYN VIT --label_column_name colour", "not in"),
        ("--synthetic_dataset_revision v1 --dataset_name x --method vanilla", "does nothing without --syn"),
        ("--synthetic_dataset nowhere", "neither an existing folder"),
        ("SYN --model_name_or_path nowhere", "--model_name_or_path"),
        # errors that the Trainer would raise late
        ("SYN VIT --per_device_eval_batch_size 0", "^--per_device_eval_batch_size 0: must be above 0"),
        ("SYN VIT --eval_strategy epoch --metric_for_best_model f1", "^--metric_for_best_model f1: not measured; "),
        ("SYN VIT --prediction_loss_only --eval_strategy steps --metric_for_best_model accuracy", "choose from loss"),
        ("SYN VIT --save_strategy best", "^--save_strategy best: needs --metric_for_best_model, and --eval_strategy"),
        ("SYN VIT --deepspeed no-file.json", "deepspeed"),
        ("SYN VIT --eval_strategy steps --eval_delay 500", "^--eval_delay 500.*; the longest stage has 18 steps"),
        ("SYN VIT --eval_strategy epoch --metric_for_best_model top5_accuracy", "more than 5 classes, got 3"),
        ("SYN VIT --dataloader_drop_last", "^--dataloader_drop_last: stage1 would take no step: its 18 images are les"),
    ],
)  # fmt: skip
def test_bad_input_is_one_user_error_before_training_and_nothing_is_written(
    flags, message, synthetic_dir, classifiers, tmp_path
):
    given = {"SYN": ["--synthetic_dataset", str(synthetic_dir)], "VIT": ["--model_name_or_path", classifiers["vit"]]}
    flags = [word for flag in flags.split() for word in given.get(flag, [flag])]
    with pytest.raises(UserError, match=message):
        train_bridged.main([*flags, "--use_cpu", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_problems_in_a_trial_run_are_found_before_images_are_read(classifiers, real_images_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(train_bridged, "load_images", lambda *_: pytest.fail("images were read"))
    with pytest.raises(UserError, match="^--optim adamw_8bit: ImportError: .*bitsandbytes"):
        train_bridged.main(
            ["--dataset_name", str(real_images_dir), "--method", "vanilla", "--optim", "adamw_8bit", "--use_cpu",
             "--model_name_or_path", classifiers["vit"], "--output_dir", str(tmp_path)]
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_trial_run_changes_no_weight(run, tmp_path, monkeypatch):
    run("tried")
    monkeypatch.setattr("utils.transfer.rehearsal.rehearse", lambda *_, **__: None)
    run("untried")
    assert_same_weights(tmp_path / "tried", tmp_path / "untried")


def test_a_run_that_diverges_publishes_nothing_and_has_no_finished_record(run, tmp_path):
    with pytest.raises(UserError, match=r"^--learning_rate 1e\+30: .* at step 2 of 2 in vanilla; try a lower rate"):
        run("out", "--method", "vanilla", "--learning_rate", "1e30", small=["--max_steps", "2", "--use_cpu"])
    assert not (tmp_path / "out" / "bridged_config.json").exists() and not list(tmp_path.glob("out/*/stage.json"))


def test_a_stage_is_evaluated_on_the_validation_images_on_request(run, monkeypatch):
    seen = []
    monkeypatch.setattr("utils.transfer.report.plot_report", lambda path, logs, *_: seen.append(logs))
    run("out", "--eval_strategy", "epoch")
    for log in seen[0].values():
        assert any("eval_accuracy" in entry for entry in log)


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        ([], 2e-5),
        (["--freeze_backbone"], 2e-5),  # the first stage trains all weights
        (["--freeze_backbone", "--bridge_freeze_backbone"], 2e-4),
        (["--method", "synthetic_only", "--bridge_freeze_backbone"], 2e-4),
        (["--use_peft"], 2e-4),
        (["--learning_rate", "3e-3"], 3e-3),
    ],
)
def test_the_default_learning_rate_depends_on_the_trained_part(classifiers, synthetic_dir, flags, rate):
    args, _ = train_bridged.parse_arguments(
        ["--synthetic_dataset", str(synthetic_dir), "--model_name_or_path", classifiers["vit"], *flags]
    )
    reason = train_bridged.choose_learning_rate(args)
    assert args.training.learning_rate == rate and (reason is None) == ("--learning_rate" in flags)


@pytest.mark.parametrize("text", ["head_init:", "match_steps:\nmix_ratio:", "{}"])
def test_an_empty_key_of_a_recipe_takes_the_value_of_the_methods_row(synthetic_dir, tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    args, _ = train_bridged.parse_arguments(
        [str(tmp_path / "recipe.yaml"), "--synthetic_dataset", str(synthetic_dir), "--method", "mix_balanced"]
    )
    assert args.chosen_method == METHODS["mix_balanced"]
    assert (args.method.head_init, args.method.match_steps, args.method.mix_ratio) == ("reset", True, 1.0)


def rewrite_train_split(folder, change):
    """Replace the train rows of an image set by `change(row)`, images as they are stored."""
    path = folder / "data" / "train-00000.parquet"
    rows = load_dataset("parquet", data_files=str(path), split="train").cast_column("image", Image(decode=False))
    rows = rows.map(change, with_indices=True)
    path.unlink()
    rows.to_parquet(path)


def tear_row_1(row, i):
    return {"image": {"bytes": b"torn", "path": None}} if i == 1 else row


@pytest.mark.parametrize(
    ("splits", "change", "message"),
    [
        ({"train": 3, "test": 2}, tear_row_1, "row 1, column 'image': damaged"),
        ({"train": 3, "test": 2}, lambda row, i: {"label": -1} if i == 2 else row,
         "1 of 9 images .* have no label, the first in row 2"),
        ({"train": 1}, lambda row, i: row, "no images are left for the validation part; give at least three"),
    ],
)  # fmt: skip
def test_unusable_images_are_found_before_training(splits, change, message, classifiers, tmp_path):
    save_image_set(tmp_path / "real", splits)
    rewrite_train_split(tmp_path / "real", change)
    with pytest.raises(UserError, match=message):
        train_bridged.main(["--dataset_name", str(tmp_path / "real"), "--method", "vanilla", "--model_name_or_path",
                            classifiers["vit"], "--output_dir", str(tmp_path / "out")])  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--audit", "--dry_run"])
def test_an_audit_looks_at_the_images_and_writes_nothing(flag, tmp_path, make_synthetic_dir, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_image_set(tmp_path / "real", {"train": 10, "test": 3})
    real = ["--dataset_name", str(tmp_path / "real"), flag]
    assert "images that do not open" not in train_bridged.main(real)
    rewrite_train_split(tmp_path / "real", tear_row_1)
    found = train_bridged.main(real)
    assert found["images that do not open"] == 1
    assert ("needed_bytes" in found) == (flag == "--dry_run")  # None: tests cannot reach the default model
    assert "row 1" in capsys.readouterr().out
    train_bridged.main([*real, "--synthetic_dataset", str(make_synthetic_dir())])
    renamed = make_synthetic_dir("other", ["red_square", "green circle", "suv"])
    with pytest.raises(UserError, match="missing: blue-stripe; extra: suv"):
        train_bridged.main([*real, "--synthetic_dataset", str(renamed)])
    assert {path.name for path in tmp_path.iterdir()} == {"real"}


@pytest.mark.parametrize(
    ("model", "flags", "words"),
    [
        ("vit", "--gradient_checkpointing", r"at batch 32, [\d.]+ without --gradient_checkpointing"),
        ("vit", "--use_peft --bf16 --dataloader_num_workers 1", r"at batch 32, [\d.]+ with --gradient_checkpointing"),
        ("timm", "--method bridged_coral --freeze_backbone", "training, 32 images at a time and as many real"),
        ("resnet", "--per_device_train_batch_size 4", r"at batch 4; [\d.]+ are free on this machine"),
    ],
)
def test_a_dry_run_reports_what_is_needed(model, flags, words, run, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    needs = run("out", *flags.split(), "--dry_run", model=model)
    printed = caplog.text + capsys.readouterr().out
    assert re.search(words, printed)
    assert re.search(r"Time: [\d,]+ images in \d+ steps of .*stage2, [\d.e+]+/s: ", printed)
    assert "Arrow copy" in printed or "classifier, stages and checkpoints" in printed
    assert needs["hours"] > 0 and needs["images_per_second"] > 0 and needs["disk_bytes"] > 0
    assert not (tmp_path / "out").exists()


def test_error_is_one_line_with_exit_status_2(tmp_path):
    result = subprocess.run(
        [sys.executable, "train_bridged.py", "--synthetic_dataset", "no folder"],
        cwd=Path(train_bridged.__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "train_bridged.py: error: --synthetic_dataset no folder: neither an existing folder nor a repository id like "
        "'user/name'."
    ]


def test_results_are_not_written_among_the_images(real_images_dir, monkeypatch):
    monkeypatch.chdir(real_images_dir)
    with pytest.raises(
        UserError, match="--output_dir real-images-vanilla: is inside --dataset_name [.], the folder of images"
    ):
        train_bridged.main(["--dataset_name", ".", "--method", "vanilla"])
    args, _ = train_bridged.parse_arguments(["--dataset_name", ".", "--dry_run"])  # which writes nothing
    assert args.training.dry_run


def test_a_signal_or_a_full_disk_says_what_is_kept_and_how_to_resume(run, tmp_path, monkeypatch):
    fine_tune = stage.fine_tune

    def interrupted_in_stage_2(*args, **kwargs):
        if Path(args[5]).name == "stage2":
            os.kill(os.getpid(), signal.SIGINT)
        return fine_tune(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as end:
        patch.setattr(stage, "fine_tune", interrupted_in_stage_2)
        run("out", "--overwrite_output_dir")
    assert end.value.signal_number == signal.SIGINT
    kept, _, command = str(end.value).partition("; resume with: accelerate launch train_bridged.py ")
    assert kept == "stage2 is kept" and command.endswith("--resume_from_checkpoint latest --no_overwrite_output_dir")
    with monkeypatch.context() as patch:
        patch.setattr("utils.transfer.report.plot_report", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b"a"))
        with pytest.raises(
            UserError, match=r"out: cannot be written \(No space left on device\); stage2 is kept; resume with"
        ):
            run("out", "--resume_from_checkpoint", "latest")
    run("out", "--resume_from_checkpoint", "latest")
    run("whole")
    assert_same_weights(tmp_path / "out", tmp_path / "whole")
