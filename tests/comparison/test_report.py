import dataclasses

import numpy as np
import pytest
from huggingface_hub import ModelCard

from utils.comparison.classifiers import parse_classifiers
from utils.comparison.findings import describe_findings
from utils.comparison.gains import plot_gains
from utils.comparison.grid import Row
from utils.comparison.plots import Panel, plot_comparison
from utils.comparison.report import print_comparison, write_markdown
from utils.comparison.statistics import pack_correct, stack_correct, summarise
from utils.transfer.methods import StageSettings


def row(label, volume=None) -> Row:
    return Row(label, label, "dsi", volume)


VANILLA = row("vanilla_matched")
COSTS = {"stage1_steps": 90, "stage1_images_seen": 2880, "stage1_seconds": 2.5, "stage1_gpu_hours": 0.25}


def compare(methods=("vanilla_matched", "mix", "bridged"), shots=(1, 4), volumes=(None,), num_seeds=2, num_images=200):
    """Return results in which each run is slightly better than the last."""
    rng = np.random.default_rng(0)
    results, accuracy = {}, 0.3
    for method in methods:
        for volume in volumes if not method.startswith("vanilla") else [None]:
            results[row(method, volume)] = {}
            for num_shots in shots:
                accuracy += 0.01
                results[row(method, volume)][num_shots] = [
                    pack_correct(rng.random(num_images) < accuracy) | COSTS for _ in range(num_seeds)
                ]
    return results


@pytest.fixture
def facts():
    recipe = {"learning_rate": 1e-4, "max_steps": 30, "head_learning_rate_factor": None}
    return {
        "findings": ["Bridging loses.", "So does all else."], "seeds": [0, 1],
        "sets": {"dsi": "user/syn", "plain": "plain-{seed}"}, "own_sets": True,
        "classifiers": parse_classifiers(["timm/resnet18"]),
        "real": "user/cars",
        "chosen": {
            "resnet18": {"stage1": dataclasses.asdict(StageSettings(90, 5e-4)), "bridged": {"4": recipe, "all": recipe}}
        },
        "chosen_how": "given", "command": "accelerate launch compare_transfer.py --synthetic_dataset dsi=user/syn",
    }  # fmt: skip


def table_of(text, heading):
    """Return the cells of the first Markdown table below a heading, one list per row."""
    lines = text.split(f"## {heading}\n")[1].strip().split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in rows}) == 1, "every row has as many cells as the head"
    return rows


def test_the_report_begins_with_its_finding_and_has_valid_metadata(facts, tmp_path):
    write_markdown(tmp_path / "comparison.md", summarise(compare(), VANILLA), "vanilla_matched", **facts)
    card = ModelCard.load(tmp_path / "comparison.md")
    assert card.text.strip().startswith("Bridging loses.\n\n- So does all else.\n")
    assert card.data.datasets == ["user/cars", "user/syn"]
    assert card.data.base_model == "timm/resnet18"
    assert facts["command"] in card.text and "![accuracy of each method](comparison.png)" in card.text
    assert "\n\n![gain of each method over the reference](gain.png)\n\n## Costs\n" in card.text


def test_the_tables_hold_the_figures_of_the_summary(facts, tmp_path):
    summary = summarise(compare(volumes=(500, 1000)), VANILLA)
    write_markdown(tmp_path / "comparison.md", summary, "vanilla_matched", **facts)
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    head, _, *rows = table_of(text, "Test accuracy")
    assert head == ["method", "1 shot", "4 shots", "steps", "seconds per run"]
    assert [row[0] for row in rows] == ["vanilla_matched", "mix, 500 per class", "mix, 1000 per class",
                                        "bridged, 500 per class", "bridged, 1000 per class"]  # fmt: skip
    entry = next(
        entry for entry in summary if (entry["method"], entry["volume"], entry["num_shots"]) == ("mix", 1000, 4)
    )
    interval = f"[{entry['gain_low']:.1f}, {entry['gain_high']:.1f}]"
    assert rows[2][2] == f"{entry['mean']:.1f} ± {entry['std']:.1f}<br>{entry['gain']:+.1f} {interval}"
    assert table_of(text, "Costs")[2] == ["vanilla_matched", "90", "2,880", "2", "0.250"]
    assert "on 200 test images" in text and "over 2 seeds" in text
    assert "- `mix`: real and synthetic images" in text
    settings = text.split("## Settings")[1]
    assert "| bridged | 4 per class | 0.0001 | 30 | 10 x for a fresh head, 1 x otherwise |" in settings
    assert "| bridged | all | 0.0001 | 30 |" in settings


@pytest.mark.parametrize("method", ["bridged", "bridged_replay"])
def test_the_report_says_that_replay_redistributes_steps_if_it_does(method, facts, tmp_path):
    summary = summarise(compare(("vanilla_matched", method)), VANILLA)
    write_markdown(tmp_path / "comparison.md", summary, "vanilla_matched", **facts)
    text = (tmp_path / "comparison.md").read_text()
    assert ("methods that replay synthetic images redistribute the steps" in text) == (method == "bridged_replay")


def test_with_one_seed_and_no_baseline_the_report_has_no_deviation_and_no_gain(facts, tmp_path):
    summary = summarise(compare(methods=("mix", "bridged"), shots=(None,), num_seeds=1), None)
    write_markdown(tmp_path / "comparison.md", summary, None, **facts | {"seeds": [0]})
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "±" not in text and "gain" not in text and "one seed" in text
    assert table_of(text, "Test accuracy")[0] == ["method", "all images", "steps", "seconds per run"]


def test_long_findings_are_whole_in_the_report(facts, tmp_path):
    findings = ["Use it " + "again and " * 30 + "again.", "Or " + "not, " * 60 + "at all."]
    summary = summarise(compare(), VANILLA)
    write_markdown(tmp_path / "comparison.md", summary, "vanilla_matched", **facts | {"findings": findings})
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert all(sentence in text for sentence in findings)


def with_preparation(summary: list[dict]) -> list[dict]:
    """Return a summary as after `add_preparation`; the set of mix has no style token and no recorded seconds."""
    costs = {"mix": {"generator_seconds": None}, "bridged": {"generator_seconds": 1234.4, "style_token_seconds": 60.0}}
    return [entry | costs.get(entry["method"], {}) for entry in summary]


def test_both_tables_show_costs_next_to_the_accuracy(facts, tmp_path, capsys, monkeypatch):
    summary = with_preparation(summarise(compare(), VANILLA))
    write_markdown(tmp_path / "comparison.md", summary, "vanilla_matched", **facts)
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    head, _, *rows = table_of(text, "Test accuracy")
    assert head[3:] == ["steps", "seconds per run", "generator seconds", "style token seconds"]
    assert [row[3:] for row in rows] == [
        ["90", "2", "–", "–"], ["90", "2", "not recorded", "–"], ["90", "2", "1,234", "60"],
    ]  # fmt: skip
    note = "The seconds of generator and style token are spent once and shared by all methods with synthetic images."
    assert f"\n\n{note}\n\n" in text
    print_comparison(summary, facts["findings"], "vanilla_matched")
    narrow = capsys.readouterr().out
    assert "; steps 90; seconds per run 2; generator seconds 1,234; style token seconds 60\n" in narrow
    monkeypatch.setenv("COLUMNS", "150")
    print_comparison(summary, facts["findings"], "vanilla_matched")
    wide = capsys.readouterr().out
    assert "┃ generator seconds ┃" in wide and "not recorded" in wide and note in wide


def test_each_of_several_classifiers_has_rows_recipes_and_a_stage_1(facts, tmp_path, capsys):
    summaries = [with_preparation(summarise(compare(num_images=number), VANILLA)) for number in (200, 300)]
    names = ["vit", "resnet18"]
    summary = [{"classifier": name, **entry} for name, of_one in zip(names, summaries) for entry in of_one]
    (chosen,) = facts["chosen"].values()
    second = chosen | {"stage1": chosen["stage1"] | {"learning_rate": 1e-5}, "mix": {"4": chosen["bridged"]["4"]}}
    several = {
        "classifiers": parse_classifiers(["google/vit", "timm/resnet18"]),
        "chosen": {"vit": chosen, "resnet18": second},
    }
    write_markdown(tmp_path / "comparison.md", summary, "vanilla_matched", **facts | several)
    card = ModelCard.load(tmp_path / "comparison.md")
    assert card.data.base_model == ["google/vit", "timm/resnet18"]
    rows = [(name, method) for name in names for method in ("vanilla_matched", "mix", "bridged")]
    head, _, *accuracies = table_of(card.text, "Test accuracy")
    assert head[:4] == ["classifier", "method", "1 shot", "4 shots"]
    assert [tuple(row[:2]) for row in accuracies] == rows
    assert accuracies[5][3].startswith(f"{summaries[1][5]['mean']:.1f} ± ")
    assert [tuple(row[:2]) for row in table_of(card.text, "Costs")[2:]] == rows
    settings = card.text.split("## Settings")[1]
    assert "Models `google/vit`, `timm/resnet18`, real images" in settings
    assert [tuple(line.split(" | ")[:2]) for line in settings.splitlines() if line.startswith("| ")][1:] == [
        ("| vit", "bridged"), ("| vit", "bridged"), ("| resnet18", "mix"), ("| resnet18", "bridged"),
        ("| resnet18", "bridged"),
    ]  # fmt: skip
    assert "Stage 1 of `vit`: max steps 90, learning rate 0.0005" in settings
    assert "Stage 1 of `resnet18`: max steps 90, learning rate 1e-05" in settings
    print_comparison(summary, facts["findings"], "vanilla_matched")
    assert "\nresnet18: method bridged; 1 shot " in capsys.readouterr().out


def test_costs_that_no_two_methods_share_have_no_note(facts, tmp_path):
    summary = with_preparation(summarise(compare(methods=("vanilla_matched", "bridged")), VANILLA))
    write_markdown(tmp_path / "comparison.md", summary, "vanilla_matched", **facts)
    assert "spent once" not in (tmp_path / "comparison.md").read_text(encoding="utf-8")


def test_the_printed_table_cuts_no_number(capsys):
    results = compare(("vanilla_matched", "bridged_head_warmup"), shots=(1, 2, 4, 8, 16), volumes=(1000, 3000))
    summary = summarise(results, VANILLA)
    findings = describe_findings({"resnet18": stack_correct(results)}, VANILLA)
    print_comparison(summary, findings, "vanilla_matched")
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == findings[0]
    assert "bridged_head_warmup, 3000 per class" in printed and "…" not in printed
    for entry in summary:
        assert f"{entry['mean']:.1f} ± {entry['std']:.1f}" in printed
        if "gain" in entry:
            assert f"{entry['gain']:+.1f} [{entry['gain_low']:.1f}, {entry['gain_high']:.1f}]" in printed


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_unknown_intervals_are_words_in_every_table(num_seeds, facts, tmp_path, capsys):
    summary = summarise(compare(num_seeds=num_seeds, num_images=1), VANILLA)
    print_comparison(summary, ["It cannot be judged."], "vanilla_matched")
    write_markdown(tmp_path / "comparison.md", summary, "vanilla_matched", **facts)
    plot_comparison(tmp_path / "comparison.png", [Panel("", summary)], ["mix"])
    plot_gains(tmp_path / "gain.png", summary, "vanilla_matched")
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    for shown in (text, printed):
        assert shown.count("[not known: one test image]") == 4
        assert "nan" not in shown.lower() and "…" not in shown
    assert "on 1 test image;" in text


def test_brackets_in_names_of_sets_are_printed_as_they_are(capsys):
    summary = summarise(compare(methods=("vanilla_matched", "bridged@[red]set")), VANILLA)
    print_comparison(summary, ["bridged@[red]set gains."], "vanilla_matched")
    assert capsys.readouterr().out.count("bridged@[red]set") == 2
