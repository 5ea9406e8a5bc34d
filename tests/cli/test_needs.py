"""Flags that can do nothing: refused on the command line, told of in a recipe; every one that says what it needs."""

import pytest

from tests.command_lines import SCRIPTS, parse_flags, script_parsers
from utils.cli.errors import run_script
from utils.cli.options import list_needs

# what a flag lacks, without its values -> flags with which it does nothing, flags with which it does something
LACKS = {
    "without --use_peft": ("", "--use_peft"),
    "without --push_to_hub": ("", "--push_to_hub"),
    "without --torch_compile": ("", "--torch_compile"),
    "without --quality_report": ("", "--quality_report"),
    "without --learned_embeds": ("", "--learned_embeds x"),
    "without --synthetic_dataset": ("", "--synthetic_dataset x"),
    "without --num_shots or --max_train_samples": ("", "--num_shots 4"),
    "with --classes": ("--classes x", ""),
    "with --prompts_file": ("--prompts_file x", ""),
    "with --max_steps": ("--max_steps 5", ""),
    "with --bridge_max_steps": ("--bridge_max_steps 5", ""),
    "with --step_counts": ("--step_counts 5", ""),
    "with --bridge_step_counts": ("--bridge_step_counts 5", ""),
    "with --settings": ("--settings x", ""),
    "with --lr_scheduler {lr_scheduler}": ("--lr_scheduler constant", "--lr_scheduler linear"),
    "with --image_format {image_format}": ("--image_format png", "--image_format webp"),
    "with --guidance_scale {guidance_scale}, which is no guidance": (
        "--guidance_scale 0.5 1", "--guidance_scale 1 2",
    ),
    "where nothing is searched": ("--learning_rates 1e-3", "--bridge_learning_rates 1e-3 1e-4"),
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
    "with --methods {methods}, which train on synthetic images alone": (
        "--methods synthetic_only synthetic_only@plain", "--methods synthetic_only vanilla",
    ),
    "with --methods {methods}, which neither train on synthetic images nor take the steps of such a stage": (
        "--methods vanilla", "--methods vanilla bridged@plain",
    ),
}  # fmt: skip
NEVER = "here, where all real images are looked at, as they are"
CASES = {
    (script, field.name, need.lack): [other.lack for other in needs if other is not need]
    for script, parser in script_parsers().items()
    for kind in parser.dataclass_types
    for field, needs in list_needs(kind)
    for need in needs
}


def value_of(script: str, flag: str) -> list[str]:
    """Return the words that give a flag some value."""
    action = next(action for action in script_parsers()[script]._actions if action.dest == flag)
    value = str(action.choices[-1]) if action.choices else {int: "3", float: "0.5", str: "x"}.get(action.type)
    return [f"--{flag}", *([] if value is None else [value])]


def fails(capsys, script: str, flags: list[str]) -> str:
    """Return the one line of a run that ends in exit status 2."""
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: SCRIPTS[script].main(flags))
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1
    return lines[0]


def test_every_need_has_an_example_and_every_example_a_need():
    assert {lack for _, _, lack in CASES} == {*LACKS, NEVER}
    assert len(CASES) > 60


@pytest.mark.parametrize(("script", "flag", "lack"), [case for case in CASES if case[2] != NEVER])
def test_a_flag_without_what_it_needs_is_one_line_and_with_it_passes(script, flag, lack, capsys):
    given, others = value_of(script, flag), CASES[script, flag, lack]
    met = " ".join(LACKS[other][1] for other in others)
    without, with_it = (f"{flags} {met}".split() for flags in LACKS[lack])
    line = fails(capsys, script, [*given, *without])
    assert f"error: --{flag}" in line and line.endswith(f" leave --{flag} out.")
    assert f": does nothing {lack.partition('{')[0]}" in line and "{" not in line
    parse_flags(script, [*given, *with_it])


def test_flags_without_use_in_a_script_are_refused_and_not_in_its_help(capsys):
    for flag in ("num_shots", "few_shot_seed", "max_train_samples", "random_flip"):
        flags = [*value_of("quality_report.py", flag), "--synthetic_dataset", "x", "--dataset_name", "y"]
        assert NEVER in fails(capsys, "quality_report.py", flags)
        assert f"--{flag} " not in script_parsers()["quality_report.py"].format_help()


def test_what_is_off_as_by_default_asks_for_nothing(capsys):
    parse_flags("train_bridged.py", ["--method", "vanilla", "--bridge_head_warmup_steps", "0", "--no_streaming"])
    parse_flags("train_dsi.py", ["--lr_warmup_steps", "0", "--few_shot_seed", "0", "--no_hub_private_repo"])
    assert "--lora_dropout 0.0: does nothing" in fails(capsys, "train_bridged.py", ["--lora_dropout", "0"])
    assert "--use_style_token false: does" in fails(capsys, "generate_synthetic.py", ["--use_style_token", "false"])


def test_keys_of_a_recipe_that_do_nothing_are_one_remark_of_the_main_process(tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "shared.yaml"
    recipe.write_text("lora_r: 8\nlora_alpha: 4\nmix_ratio: 2\nhub_model_id: mine\nbridge_mixup_alpha: 0.3\n")
    values = parse_flags("train_bridged.py", [str(recipe)])
    assert (values["lora_r"], values["mix_ratio"]) == (8, 2.0)
    assert capsys.readouterr().err == (
        f"{recipe}: without effect in this run: mix_ratio (with --method bridged, which has no stage on both kinds of "
        "images); lora_r, lora_alpha (without --use_peft); hub_model_id (without --push_to_hub).\n"
    )
    monkeypatch.setenv("RANK", "1")
    parse_flags("train_bridged.py", [str(recipe)])
    assert capsys.readouterr().err == ""
    assert "error: --lora_r 9: does nothing" in fails(capsys, "train_bridged.py", [str(recipe), "--lora_r", "9"])
    monkeypatch.delenv("RANK")
    parse_flags("train_bridged.py", [str(recipe), "--use_peft", "--method", "mix", "--push_to_hub"])
    assert "without effect in this run: bridge_mixup_alpha (with" in capsys.readouterr().err
