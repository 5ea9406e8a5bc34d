"""The recipes: flags of their scripts, class names without a warning, a miniature of each set in all three steps."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value
from PIL import Image as PILImage

import generate_synthetic
import train_bridged
import train_dsi
from recipes import check
from recipes.plan import count_compared_images, make_plan, read_models, read_sets
from recipes.reproduce import beside_the_paper, list_steps, main
from tests.command_lines import parse_flags, split_command
from tests.conftest import blank_figures
from tests.local_hub.faults import Fault
from utils.cli.errors import UserError
from utils.cli.parsing import read_mapping
from utils.cli.records import write_record
from utils.cli.step_runner import Step, StepRunner
from utils.data.class_names import prompt_nouns
from utils.data.name_doctor import diagnose

pytest_plugins = ["tests.transfer.fixtures", "tests.local_hub.fixtures"]
ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
SETS = read_sets()
RATES = read_mapping(RECIPES / "rates.yaml", "rates")
# columns beside image and label, as the published sets have them
OTHER_COLUMNS = {
    "aircraft": {"family": Value("string"), "manufacturer": Value("string")},
    "pets": {"image_id": Value("string"), "label_cat_dog": ClassLabel(names=["cat", "dog"])},
    "cub200": {"bbox": Sequence(Value("int64"))},
}
OTHER_VALUES = {"label_cat_dog": 0, "bbox": [0, 0, 4, 4]}


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    """Run from the repository root, as the recipes name their class names from there."""
    monkeypatch.chdir(ROOT)


def read_recipe(name: str, step: str) -> tuple[str, dict]:
    """Return a recipe's comment as one line, and its values."""
    text = (RECIPES / name / f"{step}.yaml").read_text()
    header = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    return header, yaml.safe_load(text)


@pytest.mark.parametrize("step", ["dsi", "synthetic", "bridged", "compare"])
@pytest.mark.parametrize("name", SETS)
def test_a_recipe_parses_with_its_script_and_its_header_says_what_it_is(name, step):
    header, values = read_recipe(name, step)
    facts, (_, dsi) = SETS[name], read_recipe(name, "dsi")
    command = next(line for line in (RECIPES / name / f"{step}.yaml").read_text().splitlines() if ".py " in line)
    script, flags = split_command(command.removeprefix("#"))
    assert flags[0] == f"recipes/{name}/{step}.yaml"
    parsed = parse_flags(script, flags)
    assert {key: parsed[key] for key in values} == values
    assert f"{facts['num_classes']} classes" in header
    for split, number in facts["num_images"].items():
        assert f"{number:,} {split}" in header
    assert f"{dsi['dataset_name']}, commit {dsi.get('dataset_revision', 'not known')}," in header
    assert f"columns {dsi['image_column_name']} and {dsi['label_column_name']}" in header
    assert all(str(figure) in header for figure in facts["paper"].values())
    plan = make_plan(name, "resnet18", RATES, 1000)
    hours = {"dsi": plan.dsi_hours, "synthetic": plan.synthetic_hours, "compare": plan.comparison_hours}
    expected = f"{hours[step]:.1f} h" if step in hours else f"{plan.bridged_hours:.2f} h"
    assert f"Hardware and time: {expected}" in header


@pytest.mark.parametrize("name", SETS)
def test_the_class_names_pass_the_doctor(name):
    corrections = read_mapping(RECIPES / name / "class_names.yaml", "class names")
    assert len(corrections) == SETS[name]["num_classes"]
    nouns = prompt_nouns(list(corrections), corrections)
    assert diagnose(nouns, nouns) == []  # as if the nouns were all that is known: nobody vouches for them


def save_miniature(name: str, folder: Path, change_name=str, num_test: int = 1, without: str | None = None) -> None:
    """Write an image set of a set's columns, class names and splits: two tiny images of a class to train on.

    `change_name` changes class names, `num_test` is how many other images a class has, `without` leaves a column out.
    """
    _, dsi = read_recipe(name, "dsi")
    class_names = list(map(change_name, read_mapping(RECIPES / name / "class_names.yaml", "class names")))
    others = OTHER_COLUMNS.get(name, {})
    columns = {"image": Image(), dsi["label_column_name"]: ClassLabel(names=class_names), **others}
    features = Features({column: feature for column, feature in columns.items() if column != without})
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    images = [PILImage.fromarray(image) for image in pixels]
    for split in SETS[name]["num_images"]:
        labels = list(range(len(class_names))) * (2 if split == "train" else num_test)
        rows = {"image": [images[label % 4] for label in labels], dsi["label_column_name"]: labels}
        rows |= {column: [OTHER_VALUES.get(column, "x")] * len(labels) for column in others}
        rows.pop(without, None)
        Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{split}-00000.parquet")


def upload(name: str, folder: Path, local_hub) -> str:
    """Put a miniature where the recipe has its image set, and return its commit."""
    dataset_name = read_recipe(name, "dsi")[1]["dataset_name"]
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    if ("dataset", dataset_name) not in local_hub.repositories:
        local_hub.create_repo(dataset_name, "dataset")
    return local_hub.repo(dataset_name, "dataset").commit(files)


@pytest.mark.parametrize("name", SETS)
def test_a_miniature_of_each_set_goes_through_all_three_steps(
    name, local_hub, tiny_pipeline_dir, classifiers, tmp_path, caplog
):
    # the copy of Stanford Cars on the Hub probably has its class names in lower case
    change_name = str.lower if name == "cars" else str
    save_miniature(name, tmp_path / "set", change_name)
    commit = upload(name, tmp_path / "set", local_hub)
    style, images, model = (str(tmp_path / step) for step in ("style", "synthetic", "bridged"))
    with blank_figures():
        train_dsi.main(
            [f"recipes/{name}/dsi.yaml", "--dataset_revision", "main", "--pretrained_model_name_or_path",
             str(tiny_pipeline_dir), "--output_dir", style, "--max_train_steps", "1", "--num_validation_images", "0"]
        )  # fmt: skip
        generate_synthetic.main(
            [f"recipes/{name}/synthetic.yaml", "--learned_embeds", style, "--output_dir", images,
             "--num_images_per_class", "1", "--num_inference_steps", "1", "--batch_size", "50",
             "--strict_class_names"]
        )  # fmt: skip
        results = train_bridged.main(
            [f"recipes/{name}/bridged.yaml", "--synthetic_dataset", images, "--model_name_or_path", classifiers["timm"],
             "--output_dir", model, "--bridge_max_steps", "1", "--max_steps", "1"]
        )  # fmt: skip
    num_classes = SETS[name]["num_classes"]
    assert results["num_test_images"] == num_classes
    record = json.loads((tmp_path / "bridged" / "bridged_config.json").read_text())
    names = read_mapping(RECIPES / name / "class_names.yaml", "class names")
    assert record["class_names"] == list(map(change_name, names))
    assert record["real_images"]["dataset_revision"] == commit
    generated = json.loads((tmp_path / "synthetic" / "generation_config.json").read_text())
    assert generated["settings"]["prompt_nouns"] == list(names.values())
    assert generated["num_images"] == num_classes - len(read_recipe(name, "synthetic")[1].get("exclude_classes", []))
    if name == "cars":
        assert "196 class names matched in spite of case" in caplog.text
        assert "'AM General Hummer SUV 2000' is 'am general hummer suv 2000'" in caplog.text


def publish_for_check(name: str, folder: Path, local_hub, monkeypatch, license: str | None = None, **changes) -> str:
    """Publish a miniature with a card, let the recipe expect its commit and numbers of images, return the commit."""
    save_miniature(name, folder, **changes)
    license = license or SETS[name].get("card_license")
    (folder / "README.md").write_text(f"---\npretty_name: x\n{f'license: {license}' if license else ''}\n---\n# x\n")
    commit = upload(name, folder, local_hub)
    num_classes, others = SETS[name]["num_classes"], check.read_expected

    def read_expected(asked: str):
        if asked != name:
            return others(asked)
        num_images = {split: num_classes * (2 if split == "train" else 1) for split in SETS[name]["num_images"]}
        expected = others(name)
        return replace(expected, revision=expected.revision and commit, num_images=num_images)

    monkeypatch.setattr(check, "read_expected", read_expected)
    return commit


def test_check_finds_that_all_miniatures_agree_and_reads_no_image(local_hub, tmp_path, monkeypatch, capsys):
    commits = [publish_for_check(name, tmp_path / name, local_hub, monkeypatch) for name in SETS]
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(Image, "decode_example", lambda *_, **__: pytest.fail("decoded an image"))
    assert check.main([]) == 0
    printed = capsys.readouterr().out
    assert "10 of 10 image sets agree with their recipes, 0 differ, 0 could not be seen in full." in printed
    assert all(commit in printed for commit in commits)
    assert printed.count("the recipe names no commit") == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_test": 2}, "split 'test': 74 images, not 37"),
        (
            {"change_name": lambda name: name.replace("pug", "pugs")},
            "renamed: 'pugs' is 'pug' in the recipe.",
        ),
        ({"change_name": lambda name: name.replace("pug", "mops")}, "missing: mops; extra: pug."),
        ({"without": "label"}, "no column 'label'; columns are image, image_id, label_cat_dog"),
        ({"license": "mit"}, "the card's license is 'mit', not 'cc-by-sa-4.0'"),
    ],
)
def test_check_finds_what_differs(changes, message, local_hub, tmp_path, monkeypatch, capsys):
    publish_for_check("pets", tmp_path, local_hub, monkeypatch, **changes)
    [difference] = check.check_set("pets").differences
    assert message in difference
    assert check.main(["--recipe", "pets"]) == 1
    assert "0 of 1 image sets agree with their recipes, 1 differ" in capsys.readouterr().out


def test_check_notes_names_in_another_case_and_a_newer_commit(local_hub, tmp_path, monkeypatch):
    publish_for_check("cars", tmp_path, local_hub, monkeypatch, change_name=str.lower)
    newest = local_hub.repo("mteb/StanfordCars", "dataset").commit({"note.txt": tmp_path / "README.md"})
    report = check.check_set("cars")
    assert (report.differences, report.unseen) == ([], [])
    assert report.notes == [
        f"the newest commit is {newest}",
        "196 class names are spelled otherwise: 'am general hummer suv 2000' is 'AM General Hummer SUV 2000' in the "
        "recipe",
    ]


def test_check_finds_a_missing_repository_commit_or_split(local_hub, tmp_path, monkeypatch):
    [difference] = check.check_set("pets").differences
    assert "dataset_name timm/oxford-iiit-pet: neither a folder nor a data set repository" in difference
    publish_for_check("pets", tmp_path, local_hub, monkeypatch)
    expected = check.read_expected("pets")
    for change, messages in [
        ({"revision": "0" * 40}, ["has no branch, tag or commit '000"]),
        ({"num_images": {"train": 74, "val": 37}}, ["split 'val': not in the Hub", "split 'test': not in sets.yaml"]),
        ({"config_name": "large"}, ["cannot be loaded (BuilderConfig 'large' not found"]),
    ]:
        monkeypatch.setattr(check, "read_expected", lambda name, change=change: replace(expected, **change))
        report = check.check_set("pets")
        assert len(report.differences) == len(messages)
        assert all(message in found for message, found in zip(messages, report.differences))


def test_check_that_cannot_see_is_no_success_and_no_difference(local_hub, tmp_path, monkeypatch, capsys):
    publish_for_check("pets", tmp_path, local_hub, monkeypatch)
    local_hub.inject(Fault("status", path="/api/datasets/timm", status=429))
    [busy] = check.check_set("pets").unseen
    assert "answers with error 429" in busy
    local_hub.repo("timm/oxford-iiit-pet", "dataset").gated = True
    assert "is gated; accept its conditions" in check.check_set("pets").unseen[0]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "200")
    assert check.main([]) == 2
    printed = capsys.readouterr().out
    assert printed.count(f"not seen: all of it, the Hub ({local_hub.url}) cannot be reached") == 10
    assert "0 of 10 image sets agree with their recipes, 0 differ, 10 could not be seen in full." in printed


def test_check_finds_a_card_that_counts_other_images_than_there_are(local_hub, tmp_path, monkeypatch):
    publish_for_check("pets", tmp_path, local_hub, monkeypatch)
    info = {"splits": [{"name": "train"}, {"name": "test", "num_examples": 30}]}
    card = f"---\nlicense: cc-by-sa-4.0\ndataset_info: {json.dumps(info)}\n---\n"
    (tmp_path / "README.md").write_text(card)
    expected = replace(check.read_expected("pets"), revision=upload("pets", tmp_path, local_hub))
    monkeypatch.setattr(check, "read_expected", lambda name: expected)
    assert check.check_set("pets").differences == ["split 'test': 30 images by the card, not 37"]


def test_check_without_a_card_that_lists_features_compares_every_file(local_hub, tmp_path, monkeypatch):
    publish_for_check("pets", tmp_path / "pets", local_hub, monkeypatch)
    save_miniature("pets", tmp_path / "other", lambda name: name.replace("pug", "mops"))
    other = {"data/test-00000.parquet": tmp_path / "other" / "data" / "test-00000.parquet"}
    commit = local_hub.repo("timm/oxford-iiit-pet", "dataset").commit(other)
    expected = replace(check.read_expected("pets"), revision=commit)
    monkeypatch.setattr(check, "read_expected", lambda name: expected)
    [difference] = check.check_set("pets").differences
    assert "test-00000.parquet: recipes/pets/class_names.yaml: its classes" in difference


def test_the_table_of_the_readme_has_the_planned_hours():
    table = (RECIPES / "README.md").read_text()
    for name, facts in SETS.items():
        hours = [f"{make_plan(name, 'resnet18', RATES, number).hours:.0f}" for number in (1000, 3000)]
        row = next(line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
        assert [cell.strip() for cell in row.split("|")][2:4] == [facts["title"], str(facts["num_classes"])]
        assert row.endswith(f"| {facts['num_classes']} | {hours[0]} | {hours[1]} |")


def test_a_plan_counts_images_and_hours():
    plan = make_plan("cars", "resnet18", RATES, 1000)
    assert (plan.num_real, plan.num_synthetic) == (7330, 196_000)
    assert plan.bridge_steps == 5 * 6125
    assert plan.synthetic_hours == pytest.approx(196_000 * 25 / 27.2 / 3600)
    assert plan.bridged_hours == pytest.approx((5 * 196_000 + 30 * 7330) / 3481.78 / 3600)
    control = make_plan("cars", "resnet18", RATES, 1000, control=True)
    assert control.synthetic_hours == pytest.approx(2 * plan.synthetic_hours)
    assert control.comparison_hours > plan.comparison_hours
    larger = make_plan("cars", "resnet18", RATES, 3000)
    assert larger.disk_gib == pytest.approx(3 * plan.disk_gib)
    assert make_plan("flowers", "resnet18", RATES, 1).num_real == 1020  # has a validation part of its own


def test_a_plan_does_not_count_classes_that_are_not_drawn():
    plan = make_plan("caltech101", "resnet18", RATES, 1000)
    assert (plan.num_classes, plan.num_synthetic) == (102, 101_000)
    assert plan.synthetic_hours == pytest.approx(101_000 * 25 / 27.2 / 3600)


@pytest.mark.parametrize("name", SETS)
def test_classes_that_are_not_drawn_are_known_and_allowed_to_miss(name):
    excluded = read_recipe(name, "synthetic")[1].get("exclude_classes", [])
    assert set(excluded) <= set(read_mapping(RECIPES / name / "class_names.yaml", "class names"))
    for step in ("bridged", "compare"):
        assert read_recipe(name, step)[1].get("allow_missing_classes", False) is bool(excluded)
    header, _ = read_recipe(name, "synthetic")
    assert all(class_name in header for class_name in excluded)


def test_compared_images_count_each_shared_stage_once():
    compare = {"methods": ["vanilla", "bridged", "synthetic_only"], "seeds": [0, 1], "search_learning_rate": False}
    assert count_compared_images(compare, 1000, 10) == 2 * 1000 + 2 * 10 + 2 * 10
    searched = compare | {"search_learning_rate": True}  # three rates of stage 1, and of both methods, for one seed
    assert count_compared_images(searched, 1000, 10) == (2 + 2) * 1000 + 2 * (2 + 3) * 10
    assert count_compared_images(compare | {"methods": ["vanilla_matched"]}, 1000, 10) == 2 * 1010
    assert count_compared_images(compare | {"methods": ["bridged", "bridged@plain"]}, 1000, 10) == 4 * 1010


@pytest.mark.parametrize("model", read_models())
@pytest.mark.parametrize("control", [False, True])
def test_the_steps_of_a_reproduction_are_commands_of_the_scripts(model, control):
    steps = list_steps("cars", model, 7, control, Path("out/cars"))
    assert len(steps) == 4 + control
    parsed = [parse_flags(*split_command(step.text)) for step in steps]
    assert parsed[0]["output_dir"] == parsed[1]["learned_embeds"] == "out/cars/style"
    assert parsed[1]["num_images_per_class"] == 7
    assert parsed[-2]["synthetic_dataset"] == parsed[1]["output_dir"]
    assert f"dsi={parsed[1]['output_dir']}" in parsed[-1]["synthetic_dataset"]
    assert ("bridged@plain" in parsed[-1]["methods"]) is control
    assert parsed[-1]["learning_rates"] == [parsed[-2]["learning_rate"]]
    assert parsed[-2]["max_synthetic_samples_per_class"] == 7
    assert parsed[-1]["volumes"] == [7]
    if control:
        assert (parsed[1]["use_style_token"], parsed[2]["use_style_token"]) == (True, False)
        assert f"plain={parsed[2]['output_dir']}" in parsed[-1]["synthetic_dataset"]
        assert parsed[2]["output_dir"] != parsed[1]["output_dir"]


def test_a_set_that_has_more_images_stays_and_training_takes_fewer(tmp_path):
    write_record(tmp_path / "synthetic" / "generation_config.json", {"num_images_per_class": 9})
    parsed = [parse_flags(*split_command(step.text)) for step in list_steps("cars", "resnet18", 7, False, tmp_path)]
    assert parsed[1]["num_images_per_class"] == 9
    assert parsed[2]["max_synthetic_samples_per_class"] == 7


def test_rates_that_lack_one_are_named(tmp_path):
    (tmp_path / "rates.yaml").write_text("gpu: ours\n")
    with pytest.raises(UserError, match="has no bytes_per_image, dsi_images_per_second, sampling_"):
        main(["--dry_run", "--rates", str(tmp_path / "rates.yaml")])


def test_the_table_of_a_reproduction_has_the_papers_figures_where_there_are_some():
    summary = [
        {"method": "vanilla", "mean": 80.0, "std": 1.25},
        {"method": "bridged", "mean": 90.04, "std": None},
        {"method": "bridged@plain", "mean": 85.0, "std": 0.5},
        {"method": "mix", "mean": 70.0, "std": 0.5},
    ]
    lines = beside_the_paper(summary, {"vanilla": 83.8, "bridged_dsi": 92.0}, "Cars").splitlines()
    assert lines[2:] == [
        "| vanilla | 80.0 ± 1.2 | 83.8 |",
        "| bridged | 90.0 | 92.0 |",
        "| bridged@plain | 85.0 ± 0.5 | ? |",
        "| mix | 70.0 ± 0.5 |  |",
    ]


def test_a_dry_run_prints_every_set_and_runs_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    main(["--dry_run", "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert all(facts["title"] in printed for facts in SETS.values())
    assert re.search(r"In all \d+ GPU-hours", printed)
    assert not (tmp_path / "out").exists()


def test_a_reproduction_without_a_recipe_names_them(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "--recipe is missing: one of aircraft" in capsys.readouterr().err


def test_steps_that_are_finished_are_not_run_again_and_a_failed_one_is(tmp_path):
    script = tmp_path / "step.py"
    script.write_text(
        "import pathlib, sys; print(sys.argv[1:]); pathlib.Path(sys.argv[1]).touch(); sys.exit(len(sys.argv) > 2)"
    )
    step = Step("a step", "to see", tmp_path / "done", (str(script), str(tmp_path / "done")), is_launched=False)
    runner = StepRunner(tmp_path, tmp_path / "runs")
    runner.run(step)
    log = tmp_path / "runs" / "logs" / "a-step.log"
    assert "done" in log.read_text()
    log.unlink()
    StepRunner(tmp_path, tmp_path / "runs").run(step)
    assert not log.exists()
    (tmp_path / "done").unlink()
    runner.run(step)  # what it made is gone
    assert log.exists()
    log.unlink()
    runner.run(replace(step, command=(str(script), str(tmp_path / "other")), finished=tmp_path / "done"))
    assert "other" in log.read_text()  # another command of that name
    failing = Step("another", "to see", tmp_path / "done", (*step.command, "fail"), is_launched=False)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="another failed, see .*another.log"):
            runner.run(failing)
    assert "another" not in runner.costs
