"""The recipes: their scripts' flags, class names without warnings, and a miniature of each dataset in all steps."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value
from PIL import Image as PILImage

from recipes import check, plan
from recipes.plan import count_compared_images, make_plan, read_class_names, read_models, read_recipe, read_sets
from recipes.reproduce import compare_with_paper, flags_from_config, list_steps, main
from tests.command_lines import SCRIPTS, parse_flags, split_command
from tests.conftest import blank_figures
from tests.local_hub.faults import Fault
from utils.cli.errors import UserError
from utils.cli.parsing import read_mapping
from utils.cli.records import write_record
from utils.data.class_names import prompt_nouns
from utils.data.name_doctor import diagnose
from utils.style import monitor

pytest_plugins = ["tests.transfer.fixtures", "tests.local_hub.fixtures"]
ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
SETS = read_sets()
RATES = read_mapping(RECIPES / "rates.yaml", "rates")
# further columns, as in the published datasets
OTHER_COLUMNS = {
    "aircraft": {"family": Value("string"), "manufacturer": Value("string")},
    "pets": {"image_id": Value("string"), "label_cat_dog": ClassLabel(names=["cat", "dog"])},
    "cub200": {"bbox": Sequence(Value("int64"))},
}
OTHER_VALUES = {"label_cat_dog": 0, "bbox": [0, 0, 4, 4]}


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    """Run from the repository root, to which the recipes' paths are relative."""
    monkeypatch.chdir(ROOT)


def parse_steps(*arguments, **keywords) -> list[dict]:
    """Return the options of each step of a reproduction, as its script parses them."""
    return [parse_flags(*split_command(step.text)) for step in list_steps(*arguments, **keywords)]


@pytest.mark.parametrize("recipe", [*(f"{name}/dsi" for name in SETS), "synthetic", "bridged", "compare"])
def test_the_command_in_a_recipe_parses_and_gives_the_values_of_the_recipe(recipe):
    lines = (RECIPES / f"{recipe}.yaml").read_text().splitlines()
    script, flags = split_command(next(line for line in lines if ".py " in line).removeprefix("#"))
    assert flags[0] == f"recipes/{recipe}.yaml"
    parsed, values = parse_flags(script, flags), read_recipe(recipe)
    for key, value in values.items():
        assert parsed[key] in (value, [value]), "a flag of several values may have a single one in a recipe"


@pytest.mark.parametrize("name", SETS)
def test_the_header_of_a_recipe_describes_its_dataset(name):
    lines = (RECIPES / name / "dsi.yaml").read_text().splitlines()
    header = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    facts, dsi = SETS[name], read_recipe(f"{name}/dsi")
    said = [
        f"{facts['num_classes']} classes",
        *(f"{number:,} {split}" for split, number in facts["num_images"].items()),
        f"{dsi['dataset_name']}, commit {dsi.get('dataset_revision', 'not known')},",
        f"columns {dsi['image_column_name']} and {dsi['label_column_name']}",
        *(str(figure) for figure in facts["paper"].values()),
        f"Hardware and time: {make_plan(name, 'resnet18', RATES, 1000).dsi_hours:.1f} h",
        *facts.get("exclude_classes", []),
    ]
    assert [text for text in said if text not in header] == []


@pytest.mark.parametrize("name", SETS)
def test_the_class_names_pass_the_doctor(name):
    corrections = read_class_names(name)
    assert len(corrections) == SETS[name]["num_classes"]
    assert set(SETS[name].get("exclude_classes", [])) <= set(corrections)
    nouns = prompt_nouns(list(corrections), corrections)
    assert diagnose(nouns, nouns) == []  # as if nobody had chosen the nouns


def save_miniature(name: str, folder: Path, change_name=str, num_test: int = 1, without: str | None = None) -> None:
    """Write a dataset with the columns, class names and splits of `name`: two tiny training images per class.

    `change_name` changes class names, `num_test` is the number of other images per class, `without` omits a column.
    """
    label_column, others = read_recipe(f"{name}/dsi")["label_column_name"], OTHER_COLUMNS.get(name, {})
    class_names = [change_name(class_name) for class_name in read_class_names(name)]
    columns = {"image": Image(), label_column: ClassLabel(names=class_names), **others}
    features = Features({column: feature for column, feature in columns.items() if column != without})
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    images = [PILImage.fromarray(image) for image in pixels]
    for split in SETS[name]["num_images"]:
        labels = list(range(SETS[name]["num_classes"])) * (2 if split == "train" else num_test)
        rows = {"image": [images[label % 4] for label in labels], label_column: labels}
        rows |= {column: [OTHER_VALUES.get(column, "x")] * len(labels) for column in others}
        rows.pop(without, None)
        Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{split}-00000.parquet")


def upload(name: str, folder: Path, local_hub) -> str:
    """Publish a miniature under the recipe's dataset id, and return its commit."""
    dataset_name = read_recipe(f"{name}/dsi")["dataset_name"]
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    if ("dataset", dataset_name) not in local_hub.repositories:
        local_hub.create_repo(dataset_name, "dataset")
    return local_hub.repo(dataset_name, "dataset").commit(files)


SLOW = ("aircraft", "cub200", "dogs", "dtd", "flowers", "sun397")  # many classes


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.soak] * (name in SLOW)) for name in SETS])
def test_a_miniature_of_each_set_goes_through_all_three_steps(
    name, local_hub, tiny_pipeline_dir, classifiers, tmp_path, caplog, monkeypatch
):
    """With the flags of `make reproduce`; the last of repeated flags wins."""
    # the copy of Stanford Cars on the Hub probably has its class names in lower case
    change_name = str.lower if name == "cars" else str
    save_miniature(name, tmp_path / "set", change_name)
    commit = upload(name, tmp_path / "set", local_hub)
    small = {
        "train_dsi.py": f"--dataset_revision main --pretrained_model_name_or_path {tiny_pipeline_dir} "
        "--max_train_steps 1 --num_validation_images 0",
        "generate_synthetic.py": "--num_inference_steps 1 --batch_size 50 --strict_class_names",
        "train_bridged.py": f"--model_name_or_path {classifiers['timm']} --bridge_max_steps 1 --max_steps 1",
    }
    monkeypatch.setattr(monitor, "NUM_TIMESTEPS", 1)  # measuring takes longer than training a tiny model
    results = []
    with blank_figures():
        for step in list_steps(name, "resnet18", 1, False, tmp_path)[:3]:
            script, flags = split_command(step.text)
            results.append(SCRIPTS[script].main(flags + small[script].split()))
    num_classes, names = SETS[name]["num_classes"], read_class_names(name)
    assert results[-1]["num_test_images"] == num_classes
    record = json.loads((tmp_path / "resnet18-1" / "bridged" / "bridged_config.json").read_text())
    assert record["class_names"] == list(map(change_name, names))
    assert record["real_images"]["dataset_revision"] == commit
    generated = json.loads((tmp_path / "synthetic" / "generation_config.json").read_text())
    assert generated["settings"]["prompt_nouns"] == list(names.values())
    assert generated["num_images"] == num_classes - len(SETS[name].get("exclude_classes", []))
    if name == "cars":
        assert "196 class names matched ignoring case" in caplog.text
        assert "'AM General Hummer SUV 2000' is 'am general hummer suv 2000'" in caplog.text


@pytest.fixture
def expect(monkeypatch):
    """Change what a dataset's recipe expects."""

    def expect(name: str, **changes) -> None:
        others = check.read_expected
        expected = replace(others(name), **changes)
        monkeypatch.setattr(check, "read_expected", lambda asked: expected if asked == name else others(asked))

    return expect


@pytest.fixture
def publish(local_hub, tmp_path, expect):
    """Publish a miniature with a card, make the recipe expect its commit and counts, and return the commit."""

    def publish(name: str = "pets", license: str | None = None, **changes) -> str:
        folder, license = tmp_path / name, license or SETS[name].get("card_license")
        save_miniature(name, folder, **changes)
        (folder / "README.md").write_text(f"---\npretty_name: x\n{f'license: {license}' if license else ''}\n---\n")
        commit, num_classes = upload(name, folder, local_hub), SETS[name]["num_classes"]
        num_images = {split: num_classes * (2 if split == "train" else 1) for split in SETS[name]["num_images"]}
        expect(name, revision=check.read_expected(name).revision and commit, num_images=num_images)
        return commit

    return publish


def test_check_finds_that_all_miniatures_agree_and_reads_no_image(publish, monkeypatch, capsys):
    commits = [publish(name) for name in SETS]
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(Image, "decode_example", lambda *_, **__: pytest.fail("decoded an image"))
    assert check.main([]) == 0
    printed = capsys.readouterr().out
    assert "10 of 10 datasets agree with their recipes, 0 differ, 0 could not be checked in full." in printed
    assert all(commit in printed for commit in commits)
    assert printed.count("the recipe names no commit") == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_test": 2}, "split 'test': 74 images, not 37"),
        ({"change_name": lambda name: name.replace("pug", "pugs")}, "renamed: 'pugs' is 'pug' in the recipe."),
        ({"change_name": lambda name: name.replace("pug", "mops")}, "missing: mops; extra: pug."),
        ({"without": "label"}, "no column 'label'; columns are image, image_id, label_cat_dog"),
        ({"license": "mit"}, "the card's license is 'mit', not 'cc-by-sa-4.0'"),
    ],
)
def test_check_finds_what_differs(changes, message, publish, capsys):
    publish(**changes)
    [difference] = check.check_set("pets").differences
    assert message in difference
    assert check.main(["--recipe", "pets"]) == 1
    assert "0 of 1 datasets agree with their recipes, 1 differ" in capsys.readouterr().out


def test_check_notes_names_in_another_case_and_a_newer_commit(local_hub, publish, tmp_path):
    publish("cars", change_name=str.lower)
    newest = local_hub.repo("mteb/StanfordCars", "dataset").commit({"note.txt": tmp_path / "cars" / "README.md"})
    report = check.check_set("cars")
    assert (report.differences, report.unseen) == ([], [])
    assert report.notes == [
        f"the newest commit is {newest}",
        "196 class names have another spelling: 'am general hummer suv 2000' is 'AM General Hummer SUV 2000' in the "
        "recipe",
    ]


def test_check_finds_a_missing_repository_commit_or_split(local_hub, publish, expect):
    [difference] = check.check_set("pets").differences
    assert "dataset_name timm/oxford-iiit-pet: neither a folder nor a public dataset repository" in difference
    agreeing = {"revision": publish(), "num_images": {"train": 74, "test": 37}}
    for change, messages in [
        ({"revision": "0" * 40}, ["has no branch, tag or commit '000"]),
        ({"num_images": {"train": 74, "val": 37}}, ["split 'val': not in the Hub", "split 'test': not in sets.yaml"]),
        ({"config_name": "large"}, ["cannot be loaded (BuilderConfig 'large' not found"]),
    ]:
        expect("pets", **agreeing | change)
        differences = check.check_set("pets").differences
        assert len(differences) == len(messages)
        assert all(message in found for message, found in zip(messages, differences))


def test_check_without_access_is_neither_success_nor_difference(local_hub, publish, monkeypatch, capsys):
    publish()
    local_hub.inject(Fault("status", path="/api/datasets/timm", status=429))
    [busy] = check.check_set("pets").unseen
    assert "returned error 429" in busy
    local_hub.repo("timm/oxford-iiit-pet", "dataset").gated = True
    assert "is gated; accept its conditions" in check.check_set("pets").unseen[0]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "200")
    assert check.main([]) == 2
    printed = capsys.readouterr().out
    assert printed.count(f"not seen: everything, as the Hub ({local_hub.url}) cannot be reached") == 10
    assert "0 of 10 datasets agree with their recipes, 0 differ, 10 could not be checked in full." in printed


def test_check_finds_a_card_that_counts_other_images_than_there_are(local_hub, publish, expect, tmp_path):
    publish()
    info = {"splits": [{"name": "train"}, {"name": "test", "num_examples": 30}]}
    card = f"---\nlicense: cc-by-sa-4.0\ndataset_info: {json.dumps(info)}\n---\n"
    (tmp_path / "pets" / "README.md").write_text(card)
    expect("pets", revision=upload("pets", tmp_path / "pets", local_hub))
    assert check.check_set("pets").differences == ["split 'test': 30 images by the card, not 37"]


def test_check_without_a_card_that_lists_features_compares_every_file(local_hub, publish, expect, tmp_path):
    publish()
    save_miniature("pets", tmp_path / "other", lambda name: name.replace("pug", "mops"))
    other = {"data/test-00000.parquet": tmp_path / "other" / "data" / "test-00000.parquet"}
    expect("pets", revision=local_hub.repo("timm/oxford-iiit-pet", "dataset").commit(other))
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
    latents = 7330 * 2 * 2 * 2 * 4 * 64 * 64  # two copies, mean and deviation, float16
    assert plan.disk_gib * 2**30 == pytest.approx(2 * 196_000 * 108_000 + latents)  # the images and their Arrow copy
    assert larger.disk_gib * 2**30 == pytest.approx(3 * 2 * 196_000 * 108_000 + latents)
    assert make_plan("flowers", "resnet18", RATES, 1).num_real == 1020  # it has its own validation split
    fewer = make_plan("caltech101", "resnet18", RATES, 1000)  # no images of one class
    assert (fewer.num_classes, fewer.num_synthetic) == (102, 101_000)
    assert fewer.synthetic_hours == pytest.approx(101_000 * 25 / 27.2 / 3600)


def test_compared_images_count_each_shared_stage_once():
    compare = {"methods": ["vanilla", "bridged", "synthetic_only"], "seeds": [0, 1], "search_learning_rate": False}
    assert count_compared_images(compare, 1000, 10) == 2 * 1000 + 2 * 10 + 2 * 10
    searched = compare | {"search_learning_rate": True}  # three rates of stage 1, and of both methods, for one seed
    assert count_compared_images(searched, 1000, 10) == (2 + 2) * 1000 + 2 * (2 + 3) * 10
    assert count_compared_images(compare | {"methods": ["vanilla_matched"]}, 1000, 10) == 2 * 1010
    assert count_compared_images(compare | {"methods": ["bridged", "bridged@plain"]}, 1000, 10) == 4 * 1010


@pytest.mark.parametrize(
    ("name", "model", "control"),
    [*(("cars", model, False) for model in read_models()), *((name, "resnet18", True) for name in SETS)],
)
def test_the_steps_of_a_reproduction_are_commands_of_the_scripts(name, model, control):
    style, synthetic, *plain, bridged, compared = parse_steps(name, model, 7, control, Path("out"))
    assert style["output_dir"] == synthetic["learned_embeds"] == "out/style"
    assert synthetic["num_images_per_class"] == bridged["max_synthetic_samples_per_class"] == 7
    assert bridged["synthetic_dataset"] == synthetic["output_dir"]
    assert f"dsi={synthetic['output_dir']}" in compared["synthetic_dataset"]
    assert compared["learning_rates"] == [bridged["learning_rate"]] and compared["volumes"] == [7]
    assert ("bridged@plain" in compared["methods"]) is bool(plain) is control
    for drawn in plain:
        assert (synthetic["use_style_token"], drawn["use_style_token"]) == (True, False)
        assert f"plain={drawn['output_dir']}" in compared["synthetic_dataset"]
        assert drawn["output_dir"] != synthetic["output_dir"]
    excluded = SETS[name].get("exclude_classes")
    assert all(drawn["exclude_classes"] == excluded for drawn in (synthetic, *plain))
    assert bridged["allow_missing_classes"] is compared["allow_missing_classes"] is bool(excluded)


def test_a_set_that_has_more_images_stays_and_training_takes_fewer(tmp_path):
    write_record(tmp_path / "synthetic" / "generation_config.json", {"num_images_per_class": 9})
    _, synthetic, bridged, _ = parse_steps("cars", "resnet18", 7, False, tmp_path)
    assert (synthetic["num_images_per_class"], bridged["max_synthetic_samples_per_class"]) == (9, 7)


def test_two_files_and_an_entry_make_a_new_dataset(tmp_path, monkeypatch, capsys):
    copy = tmp_path / "recipes"
    shutil.copytree(RECIPES, copy)
    (copy / "birds").mkdir()
    changes = {"dataset_name": "user/birds", "class_names_file": "recipes/birds/class_names.yaml"}
    (copy / "birds" / "dsi.yaml").write_text(yaml.safe_dump(read_recipe("pets/dsi") | changes))
    (copy / "birds" / "class_names.yaml").write_text("a1: red robin\na2: tawny owl\n")
    row = SETS["pets"] | {"title": "Our birds", "num_classes": 2, "exclude_classes": ["a2"]}
    with (copy / "sets.yaml").open("a") as sets:
        sets.write(yaml.safe_dump({"birds": row}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(plan, "RECIPES", copy)
    main(["--recipe", "birds", "--dry_run"])
    assert "Our birds" in capsys.readouterr().out
    style, synthetic, bridged, compared = parse_steps("birds", "vit_b16", 7, False, Path("out"))
    assert (style["dataset_name"], style["class_names_file"]) == ("user/birds", "recipes/birds/class_names.yaml")
    assert synthetic["exclude_classes"] == ["a2"] and bridged["allow_missing_classes"]
    assert compared["synthetic_dataset"] == ["dsi=out/synthetic"]
    assert check.read_expected("birds").class_names == ["a1", "a2"]


def test_the_comparison_takes_precision_and_workers_of_a_configuration():
    for config, flags in {
        "one_gpu": "--num_workers 1 --bf16", "eight_gpus": "--num_workers 8 --bf16",
        "two_machines": "--num_workers 8 --bf16", "two_cpu_processes": "--num_workers 2",
    }.items():  # fmt: skip
        config_flags = flags_from_config(read_mapping(RECIPES / "accelerate" / f"{config}.yaml", "configuration"))
        assert " ".join(config_flags) == flags
        assert list_steps("cars", "resnet18", 7, False, Path("out"), config_flags)[-1].text.endswith(f" {flags}")


def test_a_configuration_hands_its_gpus_to_every_step_and_one_of_another_precision_is_refused(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr("subprocess.run", lambda argv, env, **_: runs.append((argv, env)) or pytest.fail("ran"))
    config = tmp_path / "config.yaml"
    argv = ["--recipe", "cars", "--output_dir", str(tmp_path / "out"), "--config_file", str(config)]
    with pytest.raises(UserError, match="config.yaml: configuration of accelerate cannot be read"):
        main(argv)
    config.write_text("mixed_precision: fp8\n")
    with pytest.raises(UserError, match="mixed_precision fp8: must be one of no, bf16, fp16"):
        main(argv)
    config.write_text("mixed_precision: no\ngpu_ids: 2,3\n")
    with pytest.raises(pytest.fail.Exception):
        main(argv)
    [(command, environment)] = runs
    assert command[1:5] == ["launch", "--config_file", str(config), "train_dsi.py"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_missing_rates_are_named(tmp_path):
    (tmp_path / "rates.yaml").write_text("gpu: ours\n")
    with pytest.raises(UserError, match="has no bytes_per_image, dsi_images_per_second, sampling_"):
        main(["--dry_run", "--rates", str(tmp_path / "rates.yaml")])


def test_the_table_of_a_reproduction_has_the_papers_figures_if_there_are_any():
    figures = [("vanilla", 80.0, 1.25), ("bridged", 90.04, None), ("bridged@plain", 85.0, 0.5), ("mix", 70.0, 0.5)]
    summary = [{"method": method, "mean": mean, "std": std} for method, mean, std in figures]
    assert compare_with_paper(summary, {"vanilla": 83.8, "bridged_dsi": 92.0}, "Cars").splitlines()[2:] == [
        "| vanilla | 80.0 ± 1.2 | 83.8 |", "| bridged | 90.0 | 92.0 |", "| bridged@plain | 85.0 ± 0.5 | ? |",
        "| mix | 70.0 ± 0.5 |  |",
    ]  # fmt: skip


def test_a_dry_run_prints_every_set_and_runs_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    main(["--dry_run", "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert all(facts["title"] in printed for facts in SETS.values())
    assert re.search(r"Total: \d+ GPU-hours", printed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("columns", ["40", "80", "130", None])
def test_a_dry_run_cuts_no_figure_on_a_narrow_terminal_or_in_a_pipe(columns):
    others = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(
        [sys.executable, "-m", "recipes.reproduce", "--dry_run", "--num_images_per_class", "3000"],
        cwd=ROOT, check=True, capture_output=True, text=True, env=others | ({"COLUMNS": columns} if columns else {}),
    )  # fmt: skip
    assert "…" not in done.stdout
    for name in SETS:
        plan = make_plan(name, "resnet18", RATES, 3000)
        numbers = (plan.num_real, plan.num_synthetic, plan.dsi_steps, plan.bridge_steps, plan.real_steps)
        assert all(re.search(rf"(?<![\d,]){number:,}(?!\d)", done.stdout) for number in numbers)


def test_a_reproduction_without_a_recipe_names_them(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "--recipe is missing: one of aircraft" in capsys.readouterr().err
