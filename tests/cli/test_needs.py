"""Flags without effect: refused on the command line, reported in a recipe; checks every flag with needs."""

import pytest
from transformers import Trainer, TrainingArguments

from tests.command_lines import SCRIPTS, parse_flags, script_parsers
from utils.cli.errors import run_script
from utils.cli.options import list_needs

# what a flag lacks, without values -> flags with which it has no effect, flags with which it has one
LACKS = {
    "without --use_peft": ("", "--use_peft"),
    "without --num_folds": ("", "--num_folds 5"),
    "with --num_folds": ("--num_folds 5", ""),
    "without --token_per_fold": ("", "--num_folds 5 --token_per_fold"),
    "without --fold": ("", "--dataset_name x --fold 1/5"),
    "with --fold, which tests on training images": ("--fold 1/5", ""),
    "without --push_to_hub": ("", "--push_to_hub"),
    "without --lora": ("", "--lora x"),
    "without --torch_compile": ("", "--torch_compile"),
    "without --quality_report": ("", "--quality_report"),
    "without --learned_embeds": ("", "--learned_embeds x"),
    "with --use_style_token false": ("--use_style_token false", ""),
    "without --synthetic_dataset": ("", "--synthetic_dataset x"),
    "without --num_shots or --max_train_samples": ("", "--dataset_name x --num_shots 4"),
    "without --metric_for_best_model": ("", "--eval_strategy epoch --metric_for_best_model loss"),
    "without --dataset_name or --train_dir": ("", "--dataset_name x"),
    "without --no_do_train": ("", "--no_do_train"),
    "with --no_do_train": ("--no_do_train", ""),
    "with --dry_run": ("--dry_run", ""),
    "with --audit": ("--audit", ""),
    "without --audit": ("", "--audit"),
    "without --contexts_file": ("", "--contexts_file x"),
    "with --prompt_set {prompt_set}": ("--prompt_set diverse", ""),
    "with --streaming": ("--streaming --synthetic_dataset x", ""),
    "without --include_class_name": ("--include_class_name false", ""),
    "with --summary": ("--summary", ""),
    "without words among --scores": ("--scores probe", "--scores words"),
    "without classifier among --scores": ("--scores probe", "--scores classifier"),
    "with --classes": ("--classes x", ""),
    "with --prompts_file": ("--prompts_file x", ""),
    "with --max_steps": ("--max_steps 5", ""),
    "with --bridge_max_steps": ("--bridge_max_steps 5", ""),
    "with --step_counts": ("--step_counts 5", ""),
    "with --bridge_step_counts": ("--bridge_step_counts 5", ""),
    "with --settings": ("--settings x", ""),
    "with --lr_scheduler {lr_scheduler}": ("--lr_scheduler constant", "--lr_scheduler linear"),
    "with --lr_scheduler_type {lr_scheduler_type}, which has no warm-up": (
        "--lr_scheduler_type constant", "--lr_scheduler_type constant_with_warmup",
    ),
    "with --optim {optim}, which does not take it": ("--optim sgd", "--optim adamw_torch"),
    "with --eval_strategy {eval_strategy}": ("", "--eval_strategy steps"),
    "with --save_strategy {save_strategy}": ("--save_strategy no", "--save_strategy steps"),
    "with --save_strategy no and --lr_scheduler_type {lr_scheduler_type}": (
        "--save_strategy no", "--save_strategy epoch",
    ),
    "with --report_to {report_to}": ("", "--report_to trackio"),
    "with --report_to none": ("", "--report_to trackio"),
    "with --dataloader_num_workers 0": ("--dataloader_num_workers 0", "--dataloader_num_workers 1"),
    **{
        f"with --method {{method}}, which trains on synthetic images alone, and --bridge_{name}": (
            f"--method synthetic_only --bridge_{name} 1", "--method bridged",
        )
        for name in ("learning_rate", "weight_decay", "warmup_steps", "per_device_train_batch_size")
    },
    "with --image_format {image_format}": ("--image_format png", "--image_format webp"),
    "with --init_images {init_images}": ("", "--init_images real"),
    "with --guidance_scale {guidance_scale}, which turns guidance off": (
        "--guidance_scale 0.5 1", "--guidance_scale 1 2",
    ),
    "with several --model_name_or_path": ("--model_name_or_path x y", "--model_name_or_path x"),
    "without a search": ("--learning_rates 1e-3", "--bridge_learning_rates 1e-3 1e-4"),
    "with --method {method}, which trains on synthetic images alone": ("--method synthetic_only", "--method mix"),
    "with --method {method}, which has no stage on synthetic images alone": ("--method mix", "--method synthetic_only"),
    "with --method {method}, which has a stage on synthetic images alone": ("--method bridged", "--method vanilla"),
    "with --method {method}, which has no stage on synthetic images alone, nor its steps": (
        "--method vanilla", "--method vanilla_matched",
    ),
    "with --method {method}, which takes no steps of a stage on synthetic images": (
        "--method vanilla", "--method vanilla --match_steps",
    ),
    "with --method {method}, which takes the steps of --bridge_num_train_epochs or --bridge_max_steps": (
        "--method mix --no_match_steps", "--method mix",
    ),
    "with --method {method}, which has a fresh head in its only stage": ("--method vanilla", "--method bridged_keep"),
    "with --method {method}, which has no stage on both kinds of images": ("--method bridged", "--method mix_mixup"),
    "with --method {method}, which aligns no features": ("--method bridged", "--method bridged_coral"),
    "with --method {method}, which takes no optimiser step": ("--method linear_probe", "--method lp_ft"),
    "with --method {method}, which starts from the head of a probe": ("--method lp_ft", "--method bridged"),
    "with --methods {methods}, which take no optimiser step": (
        "--methods linear_probe", "--methods linear_probe vanilla",
    ),
    "with --methods {methods}, which train on synthetic images alone": (
        "--methods synthetic_only synthetic_only@plain", "--methods synthetic_only vanilla",
    ),
    "with --methods {methods}, which neither train on synthetic images nor take the steps of such a stage": (
        "--methods vanilla", "--methods vanilla bridged@plain",
    ),
    "with --methods {methods}, none of which takes it on synthetic images alone": (
        "--methods mix vanilla_matched", "--methods mix synthetic_only@plain",
    ),
}  # fmt: skip
NEVER = {
    "here: all real images are compared, unchanged",
    "here, where only the finished classifier is published",
    "here, where workers persist for a whole stage",
    "here, where a batch goes through the model in parts when out of memory",
}
CASES = {
    (script, field.name, need.lack): [other.lack for other in needs if other is not need]
    for script, parser in script_parsers().items()
    for kind in parser.dataclass_types
    for field, needs in list_needs(kind)
    for need in needs
}


def value_of(script: str, flag: str) -> list[str]:
    """Return command-line words that give a flag some value."""
    action = next(action for action in script_parsers()[script]._actions if action.dest == flag)
    value = str(action.choices[-1]) if action.choices else {int: "3", float: "0.5", str: "x"}.get(action.type)
    return [f"--{flag}", *([] if value is None else [value])]


def fails(capsys, script: str, flags: list[str]) -> str:
    """Return the single line of a run that ends with exit status 2."""
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: SCRIPTS[script].main(flags))
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1
    return lines[0]


def test_every_need_has_an_example_and_every_example_a_need():
    assert {lack for _, _, lack in CASES} == {*LACKS, *NEVER}
    assert len(CASES) > 100


@pytest.mark.parametrize(("script", "flag", "lack"), [case for case in CASES if case[2] not in NEVER])
def test_a_flag_without_what_it_needs_is_one_line_and_with_it_passes(script, flag, lack, capsys):
    given, others = value_of(script, flag), CASES[script, flag, lack]
    met = " ".join(LACKS[other][1] for other in others)
    without, with_it = (f"{met} {flags}".split() for flags in LACKS[lack])  # of two --method, the last wins
    line = fails(capsys, script, [*given, *without])
    assert f"error: --{flag}" in line and line.endswith(f" leave --{flag} out.")
    assert f": does nothing {lack.partition('{')[0]}" in line and "{" not in line
    parse_flags(script, [*given, *with_it])


def test_flags_without_use_in_a_script_are_refused_and_hidden_from_help(capsys):
    for flag in ("num_shots", "few_shot_seed", "max_train_samples", "random_flip"):
        flags = [*value_of("quality_report.py", flag), "--synthetic_dataset", "x", "--dataset_name", "y"]
        assert "here: all real images" in fails(capsys, "quality_report.py", flags)
        assert f"--{flag} " not in script_parsers()["quality_report.py"].format_help()


@pytest.mark.parametrize(
    "flag", ["hub_strategy", "hub_always_push", "dataloader_persistent_workers", "auto_find_batch_size"]
)
def test_flags_of_the_trainer_that_stages_set_themselves_are_refused(flag, capsys):
    flags = [*value_of("train_bridged.py", flag), "--push_to_hub", "--dataloader_num_workers", "2"]
    assert ": does nothing here, where" in fails(capsys, "train_bridged.py", flags)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train_bridged.py", "--no_do_train --do_eval"),
        ("train_bridged.py", "--eval_strategy epoch --eval_delay 2 --metric_for_best_model loss"),
        ("train_bridged.py", "--lr_scheduler_type constant --optim schedule_free_adamw --warmup_steps 5"),
        ("train_bridged.py", "--save_strategy no --eval_strategy epoch --lr_scheduler_type reduce_lr_on_plateau "
                             "--metric_for_best_model accuracy --greater_is_better true"),
        ("train_bridged.py", "--optim lion_8bit --adam_beta1 0.8"),
        ("train_bridged.py", "--save_strategy epoch --save_total_limit 3"),
        ("train_bridged.py", "--method synthetic_only --learning_rate 1e-3 --bridge_weight_decay 0"),
        ("train_bridged.py", "--method vanilla --synthetic_dataset x --allow_missing_classes --streaming"),
        ("train_bridged.py", "--freeze_backbone --head_warmup_steps 0.5"),
        ("train_dsi.py", "--class_names_file x --include_class_name false"),
        ("generate_synthetic.py", "--train_dir x --random_flip false --skip_bad_images"),
        ("generate_synthetic.py", "--dry_run --push_to_hub --quality_report"),
        # stage 1 is searched by training on synthetic images alone, whatever the methods are
        ("compare_transfer.py", "--methods mix --bridge_step_counts 3 4 --bridge_mixup_alphas 0.3"),
        ("compare_transfer.py", "--methods bridged_no_mixup --search_learning_rate --bridge_mixup_alphas 0.3"),
    ],
)  # fmt: skip
def test_a_flag_that_has_an_effect_passes(script, flags):
    parse_flags(script, flags.split())


@pytest.mark.parametrize(
    ("script", "flags", "lack"),
    [
        ("train_bridged.py", "--eval_steps 5 --eval_strategy epoch", "with --eval_strategy epoch"),
        ("train_bridged.py", "--save_steps 5 --save_strategy epoch", "with --save_strategy epoch"),
        ("train_bridged.py", "--adam_epsilon 1e-6 --optim lion_8bit", "with --optim lion_8bit, which does not take it"),
        ("train_bridged.py", "--project x --report_to wandb", "with --report_to wandb"),
        ("train_bridged.py", "--bridge_warmup_steps 5 --lr_scheduler_type constant", "with --lr_scheduler_type const"),
        ("generate_synthetic.py", "--class_names_file x --train_val_split 0.1", "without --dataset_name or --train"),
        ("compare_transfer.py", "--methods bridged_no_mixup bridged_plain mix --bridge_mixup_alphas 0.3 0.4", "with"),
        ("compare_transfer.py", "--methods mix --bridge_learning_rates 1e-4 1e-3 --bridge_step_counts 4", "with --me"),
        ("compare_transfer.py", "--methods mix --bridge_head_learning_rate_factor 3 --search_learning_rate", "with"),
    ],
)
def test_a_flag_made_useless_by_another_value_is_one_line(script, flags, lack, capsys):
    assert f": does nothing {lack}" in fails(capsys, script, flags.split())


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_flags_of_adam_are_refused_exactly_if_the_trainer_does_not_use_them(optim, tmp_path, capsys):
    def made(**adam):
        return Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), optim=optim, **adam))

    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        flags = ["--optim", optim, f"--{name}", "0.5"]
        if made() == made(**{name: 0.5}):
            assert "which does not take it" in fails(capsys, "train_bridged.py", flags)
        else:
            parse_flags("train_bridged.py", flags)


def test_flags_that_are_off_as_by_default_need_nothing(capsys):
    parse_flags("train_bridged.py", ["--method", "vanilla", "--bridge_head_warmup_steps", "0", "--no_streaming"])
    parse_flags("train_dsi.py", ["--lr_warmup_steps", "0", "--few_shot_seed", "0", "--no_hub_private_repo"])
    assert "--lora_dropout 0.0: does nothing" in fails(capsys, "train_bridged.py", ["--lora_dropout", "0"])
    assert "--use_style_token false: does" in fails(capsys, "generate_synthetic.py", ["--use_style_token", "false"])


def test_recipe_keys_without_effect_are_one_line_of_the_main_process(tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "shared.yaml"
    recipe.write_text("lora_r: 8\nlora_alpha: 4\nmix_ratio: 2\nhub_model_id: mine\nbridge_mixup_alpha: 0.3\n")
    values = parse_flags("train_bridged.py", [str(recipe)])
    assert (values["lora_r"], values["mix_ratio"]) == (8, 2.0)
    assert capsys.readouterr().err == (
        f"{recipe}: no effect in this run: mix_ratio (with --method bridged_replay, which has no stage on both "
        "kinds of images); lora_r, lora_alpha (without --use_peft); hub_model_id (without --push_to_hub).\n"
    )
    monkeypatch.setenv("RANK", "1")
    parse_flags("train_bridged.py", [str(recipe)])
    assert capsys.readouterr().err == ""
    assert "error: --lora_r 9: does nothing" in fails(capsys, "train_bridged.py", [str(recipe), "--lora_r", "9"])
    monkeypatch.delenv("RANK")
    parse_flags("train_bridged.py", [str(recipe), "--use_peft", "--method", "mix", "--push_to_hub"])
    assert "no effect in this run: bridge_mixup_alpha (with" in capsys.readouterr().err
