"""generate_synthetic.py end to end, in process, with a tiny pipeline of the real classes."""

import functools
import hashlib
import io
import json
import os
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Image, load_dataset
from huggingface_hub import DatasetCard
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file

import generate_synthetic
from generate_synthetic import main
from tests.card_code import run_python
from tests.conftest import CLASS_NAMES
from tests.local_hub.faults import Fault
from tests.style.pipelines import change_config
from tests.synthesis.tokens import PLACEHOLDER, save_token, shard_hashes
from utils.cli.errors import UserError
from utils.cli.processes import public_command, warn_once
from utils.data.prompts import token_text
from utils.hub import growing, targets
from utils.synthesis import runner
from utils.synthesis.runner import Runner, SharedProgress, encode_image
from utils.synthesis.sources import find_labels

TOKEN = "hf_user_secret"
pytest_plugins = ["tests.synthesis.fixtures", "tests.local_hub.fixtures", "tests.transfer.fixtures"]


@pytest.fixture(scope="module")
def finished_set(tmp_path_factory, options):
    output_dir = tmp_path_factory.mktemp("sets") / "finished"
    main([*options, "--output_dir", str(output_dir)])
    return output_dir


@pytest.fixture
def copied_set(finished_set, tmp_path):
    return shutil.copytree(finished_set, tmp_path / "copied")


def tree_hashes(folder):
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def read_rows(folder):
    return [row for path in sorted(folder.glob("data/*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_load_dataset_gives_images_and_the_real_names(finished_set):
    images = load_dataset(str(finished_set), split="train")
    assert len(images) == 21
    assert isinstance(images.features["image"], Image)
    assert images.features["label"] == ClassLabel(names=CLASS_NAMES)
    assert images[0]["image"].size == (32, 32)
    assert images["label"][:4] == [0, 1, 2, 0]
    assert images["class_index"][:4] == [0, 0, 0, 1]
    assert images[1]["prompt"] == f"A green circle photo in the style of {PLACEHOLDER}"
    assert images[0]["guidance_scale"] == 3.0
    assert len(set(images["seed"])) == 21
    for path in finished_set.glob("data/*.parquet"):  # each file by itself, without the card
        assert load_dataset("parquet", data_files=str(path), split="train").features == images.features


def test_an_image_is_what_the_pipeline_draws_with_its_prompt_and_seed(finished_set, token_dir, tiny_pipeline_dir):
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.load_textual_inversion(str(token_dir / "learned_embeds.safetensors"))
    row = load_dataset(str(finished_set), split="train")[4]
    images = [
        pipe(row["prompt"], generator=torch.Generator().manual_seed(seed), guidance_scale=3.0, num_inference_steps=2,
             height=32, width=32, output_type="np").images[0]
        for seed in (row["seed"], row["seed"] + 1)
    ]  # fmt: skip
    levels = (np.rint(pixels * 255).astype(np.uint8) for pixels in images)
    same, other = (PILImage.open(io.BytesIO(encode_image(pixels, "jpeg", 95))) for pixels in levels)
    drawn = np.asarray(row["image"], dtype=int)
    assert np.abs(np.asarray(same) - drawn).mean() < 1 < 10 < np.abs(np.asarray(other) - drawn).mean()


def test_records_and_card_name_sources_and_counts(finished_set, token_dir, real_images_dir):
    record = json.loads((finished_set / "generation_config.json").read_text())
    assert record["real_images"]["dataset_name"] == str(real_images_dir)
    assert record["class_names"] == CLASS_NAMES
    assert record["train_indices"] == [0, 3, 5]
    embeds = (token_dir / "learned_embeds.safetensors").read_bytes()
    assert record["token"]["sha256"] == hashlib.sha256(embeds).hexdigest()
    card = DatasetCard.load(finished_set / "README.md")
    assert {"synthetic", "bridged-transfer"} <= set(card.data.tags)
    assert card.data.license == "unknown"
    assert card.data.dataset_info["splits"][0]["num_examples"] == 21
    assert f"--learned_embeds {token_dir}" in card.text
    assert "num_drawn" not in json.loads((finished_set / "run_config.json").read_text()), "it drew all of them"
    assert "None" not in card.text and "| guidance_scale | `3.0` |" in card.text
    assert np.asarray(PILImage.open(finished_set / "preview.png")).shape[0] == 3 * 100  # rows are classes


def test_python_code_of_a_set_card_loads_it(finished_set, monkeypatch):
    monkeypatch.chdir(finished_set.parent)
    assert len(run_python((finished_set / "README.md").read_text())["images"]) == 21


def test_a_set_begun_before_there_was_an_article_keeps_its_prompts(
    tiny_pipeline_dir, real_images_dir, tmp_path, monkeypatch
):
    def draw(num_images, *flags):
        main([
            "--learned_embeds", str(tmp_path / "style"), "--output_dir", str(tmp_path / "set"), "--batch_size", "1",
            "--num_inference_steps", "1", "--classes", "red_square", "--num_images_per_class", str(num_images), *flags,
        ])  # fmt: skip
        settings = json.loads((tmp_path / "set/generation_config.json").read_text())["settings"]
        rows = load_dataset(str(tmp_path / "set"), split="train")
        return {row["prompt"] for row in rows}, settings.get("article")

    nouns = ["orange", "green circle", "blue-stripe"]
    save_token(tmp_path / "style", tiny_pipeline_dir, real_images_dir, article="auto", prompt_nouns=nouns)
    old, new = (f"{article} orange photo in the style of {PLACEHOLDER}" for article in ("A", "An"))
    with monkeypatch.context() as patch:
        patch.setattr(generate_synthetic, "lacks_setting", lambda *_: True)
        assert draw(1) == ({old}, None)
    assert draw(2) == ({old}, None)
    assert draw(3, "--article", "as_written") == ({old}, None)
    with pytest.raises(UserError, match="article was None, now auto"):
        draw(3, "--article", "auto")
    assert draw(1, "--overwrite_output_dir") == ({new}, "auto")
    with pytest.raises(UserError, match="article was auto, now as_written"):
        draw(1, "--article", "as_written")


def test_resume_after_lost_and_torn_shards_is_byte_identical(copied_set, options, monkeypatch, capsys):
    from diffusers import AutoPipelineForText2Image

    before = shard_hashes(copied_set)
    (copied_set / "data/train-00001.parquet").unlink()
    torn = copied_set / "data/train-00002.parquet"
    torn.write_bytes(torn.read_bytes()[:-20])
    (copied_set / "data/.train-00099.parquet.tmp").write_bytes(b"left over")
    results = main([*options, "--output_dir", str(copied_set)])
    assert results["num_drawn"] == 8 + 5
    assert json.loads((copied_set / "run_config.json").read_text())["num_drawn"] == 8 + 5
    assert shard_hashes(copied_set) == before
    assert not list(copied_set.glob("data/.*"))
    monkeypatch.setattr(AutoPipelineForText2Image, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))
    assert main([*options, "--output_dir", str(copied_set)])["num_drawn"] == 0
    assert "0 drawn now" in capsys.readouterr().out


def test_more_images_later_keep_the_first_ones(copied_set, options):
    before = read_rows(copied_set)
    results = main([*options, "--output_dir", str(copied_set), "--num_images_per_class", "9"])
    assert results["num_drawn"] == 27 - 16
    assert read_rows(copied_set)[:21] == before
    assert len(load_dataset(str(copied_set), split="train")) == 27


def test_other_settings_and_foreign_files_are_refused_and_nothing_changes(copied_set, options):
    def refuses(message, *flags):
        before = tree_hashes(copied_set)
        with pytest.raises(UserError, match=re.escape(message)):
            main([*options, "--output_dir", str(copied_set), *flags])
        assert tree_hashes(copied_set) == before

    refuses("seed was 0, now 1", "--seed", "1")
    refuses("guidance_scale was [3.0], now [2.0]", "--guidance_scale", "2")
    refuses("can only grow", "--num_images_per_class", "6")
    for name in ("train-00003.parquet", "train-of-thought.parquet"):  # load_dataset would add it to the set
        shutil.copy(copied_set / "data/train-00000.parquet", copied_set / "data" / name)
        refuses(f"{name} is not a shard of this set")
        (copied_set / "data" / name).unlink()


def test_overwrite_replaces_a_set_but_no_other_folder(copied_set, options, tmp_path):
    before = shard_hashes(copied_set)
    (copied_set / "notes.txt").write_text("mine")
    main([*options, "--output_dir", str(copied_set), "--num_images_per_class", "1", "--seed", "1",
          "--overwrite_output_dir"])  # fmt: skip
    assert (copied_set / "notes.txt").read_text() == "mine"
    assert len(read_rows(copied_set)) == 3
    assert shard_hashes(copied_set)["train-00000.parquet"] != before["train-00000.parquet"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a synthetic set"):
        main([*options, "--output_dir", str(other), "--overwrite_output_dir"])
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(("kind", "dims"), [("tiny_pipeline_dir", (16,)), ("tiny_xl_pipeline_dir", (16, 24))])
def test_a_token_changes_the_images_of_the_same_prompts_and_seeds(kind, dims, request, real_images_dir, tmp_path):
    folder = save_token(tmp_path / "style", request.getfixturevalue(kind), real_images_dir, dims, num_vectors=2)
    flags = ["--learned_embeds", str(folder), "--num_images_per_class", "1", "--num_inference_steps", "2"]
    main([*flags, "--output_dir", str(tmp_path / "with")])
    # the same prompt without the token in the vocabulary
    template = f"A {{class}} photo in the style of {token_text(PLACEHOLDER, 2)}"
    main([*flags, "--use_style_token", "false", "--prompt_template", template, "--output_dir",
          str(tmp_path / "without")])  # fmt: skip
    with_token, without = read_rows(tmp_path / "with"), read_rows(tmp_path / "without")
    assert [row["seed"] for row in with_token] == [row["seed"] for row in without]
    assert all(a["image"]["bytes"] != b["image"]["bytes"] for a, b in zip(with_token, without, strict=True))
    assert json.loads((tmp_path / "without/generation_config.json").read_text())["token"] is None


def test_generator_without_token_uses_the_names_of_the_real_set(tiny_pipeline_dir, real_images_dir, tmp_path):
    main(["--pretrained_model_name_or_path", str(tiny_pipeline_dir), "--dataset_name", str(real_images_dir),
          "--num_images_per_class", "1", "--num_inference_steps", "2", "--scheduler", "default", "--batch_size", "3",
          "--image_format", "png", "--output_dir", str(tmp_path / "plain")])  # fmt: skip
    images = load_dataset(str(tmp_path / "plain"), split="train")
    assert images.features["label"].names == CLASS_NAMES
    assert images["prompt"][0] == "A good photo of the red square"
    assert images[0]["image"].format == "PNG"
    record = json.loads((tmp_path / "plain/generation_config.json").read_text())
    assert record["real_images"]["image_column_name"] == "image"


def test_dry_run_writes_nothing(options, tmp_path, capsys):
    estimate = main([*options, "--output_dir", str(tmp_path / "none"), "--dry_run"])
    assert estimate["images_per_second"] > 0
    assert not (tmp_path / "none").exists()
    printed = capsys.readouterr().out
    assert "red_square" in printed
    assert f"style of {PLACEHOLDER}' (" in printed


@pytest.mark.parametrize("kind", ["xl", "sd3", "flux"])
def test_other_generators_draw_for_a_list_of_class_names(kind, request, tmp_path):
    """Stable Diffusion XL, 3 and FLUX, at a size other than a power of two, as WebP."""
    pipeline_dir = request.getfixturevalue(f"tiny_{kind}_pipeline_dir")
    (tmp_path / "names.txt").write_text("apple_pie\nCraneFly\n")
    flags = ["--pretrained_model_name_or_path", str(pipeline_dir), "--class_names_file", str(tmp_path / "names.txt"),
             "--num_images_per_class", "3", "--num_inference_steps", "2", "--batch_size", "2", "--resolution", "48",
             "--image_format", "webp", "--prompt_templates", "A photo of a {class}", "--output_dir",
             str(tmp_path / "set")]  # fmt: skip
    main(flags)
    images = load_dataset(str(tmp_path / "set"), split="train")
    assert images.features["label"].names == ["apple_pie", "CraneFly"]
    assert images["prompt"][:2] == ["A photo of an apple pie", "A photo of a crane fly"]
    assert {(image.size, image.format) for image in images["image"]} == {((48, 48), "WEBP")}
    card = (tmp_path / "set/README.md").read_text()
    assert "from a list of class names" in card
    assert "--synthetic_dataset set --dataset_name" in card
    assert main(flags)["num_drawn"] == 0


def test_excluded_classes_are_not_drawn_and_the_others_keep_labels_and_seeds(finished_set, options, tmp_path, capsys):
    main([*options, "--exclude_classes", "Green  Circle", "--output_dir", str(tmp_path / "set")])
    images = load_dataset(str(tmp_path / "set"), split="train")
    assert images.features["label"].names == CLASS_NAMES
    assert images["label"][:4] == [0, 2, 0, 2]
    seeds = {(row["label"], row["class_index"]): row["seed"] for row in read_rows(finished_set)}
    assert all(seeds[row["label"], row["class_index"]] == row["seed"] for row in images)
    card = (tmp_path / "set/README.md").read_text()
    assert "The labels also name 1 class without images." in card
    assert "--synthetic_dataset set --allow_missing_classes\n" in card
    record = json.loads((tmp_path / "set" / "generation_config.json").read_text())
    assert record["settings"]["classes"] == CLASS_NAMES[::2]
    printed = capsys.readouterr().out
    assert "No images are drawn of 'green circle' (--exclude_classes); the labels keep their numbers." in printed
    assert f"train_bridged.py --synthetic_dataset {tmp_path / 'set'} --allow_missing_classes\n" in printed


def test_labels_are_those_of_classes_without_excluded_ones_in_any_case():
    assert find_labels(None, None, CLASS_NAMES) == (0, 1, 2)
    assert find_labels(["BLUE-STRIPE", "red_square", "Red_Square"], None, CLASS_NAMES) == (0, 2)
    assert find_labels(None, ["Green  Circle"], CLASS_NAMES) == (0, 2)
    assert find_labels(["red_square"], ["green circle"], CLASS_NAMES) == (0,)
    for classes, excluded, message in [
        (["red square"], None, "--classes red square: no such class, did you mean red_square?"),
        (None, ["red_sqare"], "--exclude_classes red_sqare: no such class, did you mean red_square?"),
        (["Green circle"], ["green circle"], "--classes green circle: also in --exclude_classes"),
        (None, CLASS_NAMES, "--exclude_classes red_square green circle blue-stripe: no class is left to draw"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            find_labels(classes, excluded, CLASS_NAMES)
    with pytest.raises(UserError, match="--classes 'JAY': ambiguous.* 'JAY', 'Jay', 'jay' differ"):
        find_labels(["JAY"], None, ["Jay", "jay"])


def test_guidance_scale_zero_means_one(finished_set, options, tmp_path):
    main([*options, "--guidance_scale", "0", "--output_dir", str(tmp_path / "set")])
    rows = read_rows(tmp_path / "set")
    assert {row["guidance_scale"] for row in rows} == {1.0}
    assert main([*options, "--guidance_scale", "1", "--output_dir", str(tmp_path / "set")])["num_drawn"] == 0


def test_an_interval_of_guidance_is_recorded_and_draws_other_images(finished_set, options, tmp_path):
    flags = [*options, "--output_dir", str(tmp_path / "set")]
    main([*flags, "--guidance_interval", "0", "0.5"])
    assert json.loads((finished_set / "generation_config.json").read_text())["settings"]["guidance_interval"] is None
    settings = json.loads((tmp_path / "set/generation_config.json").read_text())["settings"]
    assert settings["guidance_interval"] == [0.0, 0.5]
    assert "| `0.0`, `0.5` |" in (tmp_path / "set/README.md").read_text()
    assert all(
        mine["image"]["bytes"] != theirs["image"]["bytes"]
        for mine, theirs in zip(read_rows(tmp_path / "set"), read_rows(finished_set))
    )
    with pytest.raises(UserError, match=re.escape("guidance_interval was [0.0, 0.5], now None")):
        main(flags)


def test_a_generator_with_embedded_guidance_takes_no_interval(tiny_flux_pipeline_dir, tmp_path):
    (tmp_path / "names.txt").write_text("apple_pie\n")
    flags = ["--pretrained_model_name_or_path", str(tiny_flux_pipeline_dir), "--class_names_file",
             str(tmp_path / "names.txt"), "--resolution", "48", "--output_dir", str(tmp_path / "set")]  # fmt: skip
    with pytest.raises(
        UserError, match="--guidance_interval 0.2 0.8: not supported by .* choose Stable Diffusion 1.x and 2"
    ):
        main([*flags, "--guidance_interval", "0.2", "0.8"])
    assert not (tmp_path / "set").exists()


def test_several_guidance_scales_are_recorded_and_used(finished_set, options, tmp_path):
    main([*options, "--guidance_scale", "3", "7", "--output_dir", str(tmp_path / "set")])
    rows, of_one_scale = read_rows(tmp_path / "set"), read_rows(finished_set)
    assert {row["guidance_scale"] for row in rows} == {3.0, 7.0}
    same = [row["image"]["bytes"] == other["image"]["bytes"] for row, other in zip(rows, of_one_scale)]
    assert same == [row["guidance_scale"] == 3.0 for row in rows]


def shares_of(folder) -> dict[str, list[int]]:
    """Return how many images each class has of each guidance scale, the lowest first."""
    rows = read_rows(folder)
    scales = sorted({row["guidance_scale"] for row in rows})
    counts = Counter((row["label"], row["guidance_scale"]) for row in rows)
    return {name: [counts[label, scale] for scale in scales] for label, name in enumerate(CLASS_NAMES)}


def test_guidance_scales_have_equal_shares_of_each_class_also_when_the_set_grows(finished_set, options, tmp_path):
    flags = [*options, "--guidance_scale", "2", "4", "--batch_size", "8", "--images_per_shard", "10", "--output_dir",
             str(tmp_path / "set")]  # fmt: skip
    main([*flags, "--num_images_per_class", "6"])
    assert shares_of(tmp_path / "set") == dict.fromkeys(CLASS_NAMES, [3, 3])
    before = read_rows(tmp_path / "set")
    main([*flags, "--num_images_per_class", "10"])
    assert shares_of(tmp_path / "set") == dict.fromkeys(CLASS_NAMES, [5, 5])
    assert read_rows(tmp_path / "set")[:18] == before
    assert "share of each class's images, to within one; the column" in (tmp_path / "set/README.md").read_text()
    settings = json.loads((tmp_path / "set/generation_config.json").read_text())["settings"]
    assert settings["guidance_shares"] == "per class"
    for folder in (finished_set, tmp_path / "set"):  # with one scale, settings are as in earlier versions
        settings = json.loads((folder / "generation_config.json").read_text())["settings"]
        assert ("guidance_shares" in settings) == (folder != finished_set)
    assert "share of" not in (finished_set / "README.md").read_text()
    with pytest.raises(UserError, match=re.escape("settings (guidance_scale was [2.0, 4.0], now [3.0]);")):
        main([*flags, "--guidance_scale", "3"])


def test_a_set_begun_with_guidance_scales_by_batch_keeps_them_until_it_is_replaced(options, tmp_path, monkeypatch):
    folder = tmp_path / "set"
    flags = [*options, "--guidance_scale", "2", "4", "--batch_size", "8", "--images_per_shard", "10"]
    with monkeypatch.context() as patch:
        patch.setattr(generate_synthetic, "lacks_setting", lambda *_: True)
        main([*flags, "--num_images_per_class", "6", "--output_dir", str(folder)])
        main([*flags, "--num_images_per_class", "10", "--output_dir", str(tmp_path / "whole")])
    assert sum(of_two for of_two, _ in shares_of(folder).values()) == 16
    assert "guidance_shares" not in json.loads((folder / "generation_config.json").read_text())["settings"]
    main([*flags, "--num_images_per_class", "10", "--output_dir", str(folder)])
    assert shard_hashes(folder) == shard_hashes(tmp_path / "whole")
    assert "share of the batches, so not of each class's images; the" in (folder / "README.md").read_text()
    with pytest.raises(UserError, match=re.escape("settings (guidance_scale was [2.0, 4.0], now [2.0, 5.0]);")):
        main([*flags, "--guidance_scale", "2", "5", "--output_dir", str(folder)])
    main([*flags, "--num_images_per_class", "6", "--output_dir", str(folder), "--overwrite_output_dir"])
    assert shares_of(folder) == dict.fromkeys(CLASS_NAMES, [3, 3])


def test_diverse_prompts_and_captions_of_a_file(options, tmp_path):
    main([*options, "--prompt_set", "diverse", "--prompt_templates", "{class} {token}", "--output_dir",
          str(tmp_path / "diverse")])  # fmt: skip
    rows = read_rows(tmp_path / "diverse")
    assert len({row["prompt"] for row in rows}) == 21
    assert all(row["prompt"].startswith(f"green circle {PLACEHOLDER}, ") for row in rows if row["label"] == 1)
    lines = [{"label": name, "prompt": f"{{class}} {n}, {{token}}"} for name in CLASS_NAMES for n in range(2)]
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    main([*options, "--prompts_file", str(captions), "--output_dir", str(tmp_path / "captions")])
    prompts = [row["prompt"] for row in read_rows(tmp_path / "captions") if row["label"] == 1]
    assert prompts[:3] == [f"green circle {n}, {PLACEHOLDER}" for n in (0, 1, 0)]
    captions.write_text(captions.read_text().replace("0,", "2,"))
    with pytest.raises(UserError, match="prompts_file_sha256 was"):
        main([*options, "--prompts_file", str(captions), "--output_dir", str(tmp_path / "captions")])


def test_a_negative_prompt_changes_the_images(finished_set, options, tmp_path):
    main([*options, "--negative_prompt", "style", "--output_dir", str(tmp_path / "set")])
    pairs = list(zip(read_rows(finished_set), read_rows(tmp_path / "set")))
    assert all(a["seed"] == b["seed"] and a["image"]["bytes"] != b["image"]["bytes"] for a, b in pairs)


def test_the_class_names_file_is_written_edited_and_read_again(tiny_pipeline_dir, real_images_dir, tmp_path, capsys):
    folder = save_token(tmp_path / "crane", tiny_pipeline_dir, real_images_dir, class_names=["crane", "n02123045"],
                        prompt_nouns=["crane", "n02123045"])  # fmt: skip
    names, output_dir = tmp_path / "names.yaml", tmp_path / "set"
    flags = ["--learned_embeds", str(folder), "--num_images_per_class", "1", "--num_inference_steps", "1",
             "--output_dir", str(output_dir)]  # fmt: skip
    with pytest.raises(UserError, match="--strict_class_names .*crane.*n02123045"):
        main([*flags, "--strict_class_names"])
    main([*flags, "--dry_run", "--write_class_names", str(names)])
    assert "crane" in capsys.readouterr().out
    assert not output_dir.exists()
    text = names.read_text().replace("crane: crane", "crane: crane bird").replace(": n02123045", ": tabby cat")
    names.write_text(text)
    main([*flags, "--strict_class_names", "--class_names_file", str(names)])
    assert [row["prompt"].split(" photo")[0] for row in read_rows(output_dir)] == ["A crane bird", "A tabby cat"]


def test_bad_images_are_drawn_again(finished_set, options, tmp_path, monkeypatch):
    from diffusers import StableDiffusionPipeline

    bad = dict(zip((row["seed"] for row in read_rows(finished_set)[1:20:9]), (0.0, torch.nan, 0.0)))
    draw = StableDiffusionPipeline.__call__

    @functools.wraps(draw)
    def draw_some_badly(pipe, *args, generator, **kwargs):
        output = draw(pipe, *args, generator=generator, **kwargs)
        for image, one in zip(output.images, generator):
            if one.initial_seed() in bad:
                image.fill_(bad[one.initial_seed()])
        return output

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", draw_some_badly)
    results = main([*options, "--output_dir", str(tmp_path / "set")])
    assert results["num_redraws"] == {"red_square": 0, "green circle": 3, "blue-stripe": 0}
    for row, clean in zip(read_rows(tmp_path / "set"), read_rows(finished_set)):
        assert (row == clean) == (clean["seed"] not in bad)
    with pytest.raises(UserError, match="--max_redraws 0: .*green circle .*: black; .*green circle .*: not a number"):
        main([*options, "--output_dir", str(tmp_path / "capped"), "--max_redraws", "0", "--images_per_shard", "21"])
    row = "| green circle | A green circle photo in the style of &lt;dsi-style&gt; | 7 | 3 |"
    assert row in (tmp_path / "set/README.md").read_text()


def test_a_full_disk_is_one_line_and_the_finished_shards_stay(options, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full_at_the_third(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            os.write(os.open("/dev/full", os.O_WRONLY), b"no room")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_the_third)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); 2 of 3 shards are fini"):
        main([*options, "--output_dir", str(tmp_path / "set")])
    assert sorted(path.name for path in (tmp_path / "set/data").iterdir()) == ["train-00000.parquet",
                                                                               "train-00001.parquet"]  # fmt: skip
    monkeypatch.undo()
    assert main([*options, "--output_dir", str(tmp_path / "set")])["num_drawn"] == 5


@pytest.mark.parametrize("removed", ["", "data", ".shards"])
def test_a_folder_removed_while_images_are_drawn_is_one_line_and_is_not_recreated(
    removed, finished_set, options, tmp_path, monkeypatch
):
    draw_shard, folder = Runner._draw_shard, tmp_path / "set"

    def draw_and_remove(runner, number):
        if number == 2:
            (folder / removed).rename(tmp_path / "gone")  # at once, while the previous shard may still be written
        return draw_shard(runner, number)

    monkeypatch.setattr(Runner, "_draw_shard", draw_and_remove)
    with pytest.raises(
        UserError, match=r"--output_dir .*set: all or part of it was removed .* run the same command again"
    ):
        main([*options, "--output_dir", str(folder)])
    assert not (folder / removed).exists()
    monkeypatch.undo()
    main([*options, "--output_dir", str(folder)])
    assert shard_hashes(folder) == shard_hashes(finished_set)


def test_a_folder_removed_after_the_last_image_is_one_line_and_is_not_recreated(options, tmp_path, monkeypatch):
    finish = SharedProgress.finish

    def finish_and_remove(progress):
        finish(progress)
        shutil.rmtree(tmp_path / "set")

    monkeypatch.setattr(SharedProgress, "finish", finish_and_remove)
    with pytest.raises(
        UserError, match=r"--output_dir .*set: all or part of it was removed .* run the same command again"
    ):
        main([*options, "--output_dir", str(tmp_path / "set")])
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("has_notes", [True, False])
def test_shards_without_a_record_are_kept_if_their_settings_are_the_same(
    has_notes, copied_set, options, monkeypatch, caplog
):
    from diffusers import AutoPipelineForText2Image

    def record() -> dict:
        return json.loads((copied_set / "generation_config.json").read_text())

    def lose_record():
        names = ["generation_config.json"] if has_notes else ["generation_config.json", "SHA256SUMS"]
        for name in names:
            (copied_set / name).unlink()
        if not has_notes:
            shutil.rmtree(copied_set / ".shards")

    flags, before, recorded = [*options, "--output_dir", str(copied_set)], shard_hashes(copied_set), record()
    lose_record()
    there = tree_hashes(copied_set)
    for change, message in [
        (["--seed", "1"], "is not empty and has no generation_config.json"),
        (["--overwrite_output_dir"], "is not empty and has no generation_config.json"),
        (["--num_images_per_class", "6"], "already has 7 per class, and a set can only grow"),
    ]:
        with pytest.raises(UserError, match=message):
            main([*flags, *change])
    assert tree_hashes(copied_set) == there
    with monkeypatch.context() as patch:
        patch.setattr(AutoPipelineForText2Image, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))
        assert main(flags)["num_drawn"] == 0
    assert (shard_hashes(copied_set), record()) == (before, recorded)
    message = "3 shard(s) without a checksum are intact and are kept."
    assert (message in caplog.messages) == (not has_notes)

    lose_record()
    (copied_set / "data/train-00002.parquet").unlink()
    torn = bytearray((copied_set / "data/train-00001.parquet").read_bytes())
    torn[300:2000] = bytes(1700)
    (copied_set / "data/train-00001.parquet").write_bytes(torn)
    assert main(flags)["num_drawn"] == 8 + 5
    assert (shard_hashes(copied_set), record()) == (before, recorded)


def test_shards_are_published_while_later_ones_are_drawn_whatever_the_hub_does(
    options, local_hub, run_with_hub, tmp_path, monkeypatch
):
    local_hub.add_user("user", TOKEN)
    monkeypatch.setattr(growing, "GrowingUpload", functools.partial(growing.GrowingUpload, pause=0.05))
    monkeypatch.setattr(targets, "FIRST_PAUSE", 0.01)
    draw_shard = Runner._draw_shard

    def draw_when_published(runner, number):
        """Draw a shard once the one before the last is published; for the later ones, any four commits will do."""
        deadline = time.monotonic() + 300
        while number > 1 and sum(len(repo.commits()) for repo in local_hub.repos()) < min(number, 4):
            assert time.monotonic() < deadline, "no commit in time"
            time.sleep(0.01)
        return draw_shard(runner, number)

    monkeypatch.setattr(Runner, "_draw_shard", draw_when_published)
    for fault in (Fault("status", path="/commit/"), Fault("lost_answer", path="/commit/", skip=2),
                  Fault("drop", path="/objects/batch", skip=1)):  # fmt: skip
        local_hub.inject(fault)
    main([*options, "--images_per_shard", "3", "--output_dir", str(tmp_path / "cars-syn"), "--push_to_hub",
          "--hub_token", TOKEN, "--hub_private_repo"])  # fmt: skip
    repo = local_hub.repo("user/cars-syn", "dataset")
    assert repo.private
    assert len(local_hub.faults_fired) == 3
    commits = [commit.title for commit in repo.commits()]
    assert len(commits) > 3, commits  # the first, some shards, more shards, ..., the other files
    files = repo.files()
    assert {name: files[f"data/{name}"] for name in shard_hashes(tmp_path / "cars-syn")} == {
        path.name: path.read_bytes() for path in (tmp_path / "cars-syn/data").iterdir()
    }
    assert {"SHA256SUMS", "preview.png", "generation_config.json", "README.md"} <= set(files)
    assert not [name for name in files if name.startswith(".shards")]
    read = (
        "from datasets import load_dataset\n"
        "for streaming in (False, True):\n"
        "    images = load_dataset('user/cars-syn', split='train', streaming=streaming)\n"
        "    print(images.features['label'].names, sum(row['image'].size == (32, 32) for row in images))"
    )
    done = run_with_hub(read, TOKEN, check=True)
    assert done.stdout.splitlines() == [f"{CLASS_NAMES} 21"] * 2


def test_the_quality_report_is_part_of_the_card_until_the_set_grows(copied_set, options, classifiers, capsys):
    flags = [*options, "--output_dir", str(copied_set)]
    main([*flags, "--quality_report", "--quality_model", classifiers["vit"]])
    record = json.loads((copied_set / "quality.json").read_text())
    assert record["num_images"]["synthetic"] == {"used": 21, "all": 21}
    assert "Frechet" in capsys.readouterr().out
    assert (copied_set / "README.md").read_text().count("## Quality") == 1
    assert "](quality.png)" in (copied_set / "README.md").read_text()
    main(flags)
    assert "## Quality" in (copied_set / "README.md").read_text()
    main([*flags, "--num_images_per_class", "8"])
    assert "## Quality" not in (copied_set / "README.md").read_text()


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "--learned_embeds is missing"),
    (["--learned_embeds", "no such thing"], "neither an existing folder nor a repository id"),
    (["--learned_embeds", "{real}"], "the folder has no dsi_config.json"),
    (["--learned_embeds", "{token}", "--dataset_name", "beans"], "--dataset_name beans: not together"),
    (["--learned_embeds", "{token}", "--prompt_template", "a {class}"], "has no {token}"),
    (["--learned_embeds", "{token}", "--prompt_template", "a " * 64 + "{class} {token}"], "has 78 tokens"),
    (["--learned_embeds", "{token}", "--scheduler", "Nothing"], "--scheduler Nothing"),
    (["--learned_embeds", "{token}", "--batch_size", "0"], "--batch_size 0"),
    (["--learned_embeds", "{token}", "--jpeg_quality", "101"], "--image_quality 101: must be from 1 to 100"),
    (["--learned_embeds", "{nameless}"], "has no class names"),
    (["--learned_embeds", "{token}", "--resolution", "44"], "--resolution 44: must be a multiple of 8"),
    (["--learned_embeds", "{token}", "--max_redraws", "64"], "--max_redraws 64: must be at most 63"),
    (["--learned_embeds", "{token}", "--guidance_scale", "-1"], "--guidance_scale -1.0: must be 0 or above"),
    (["--learned_embeds", "{token}", "--guidance_interval", "0.8", "0.2"], "must be two fractions of the steps,"),
    (["--learned_embeds", "{token}", "--guidance_interval", "0", "0.2", "1"], "must be two fractions of the steps,"),
    (["--learned_embeds", "{token}", "--guidance_interval", "0", "1.5"], "guidance_interval 1.5: must be from 0 to 1"),
    (["--learned_embeds", "{token}", "--guidance_interval", "0", "0.5", "--guidance_scale", "0"], "turns guidance off"),
    (["--learned_embeds", "{token}", "--num_images_per_class", "20000000"], "at most 11,184,810 for 3 classes"),
    (["--learned_embeds", "{token}", "--classes", "red_sqare"], "no such class, did you mean red_square?"),
    (["--learned_embeds", "{token}", "--prompts_file", "x", "--prompt_set", "diverse"], "does nothing with --prompts_"),
    (["--learned_embeds", "{token}", "--prompt_set", "many"], "invalid choice: 'many'"),
    (["--learned_embeds", "{token}", "--quality_report", "--quality_model", "{real}"], "--quality_model"),
    (["--learned_embeds", "{token}", "--class_names_file", "none.yaml"], "none.yaml: cannot be read"),
    (["--pretrained_model_name_or_path", "{real}", "--dataset_name", "{real}"], "has no model_index.json"),
])  # fmt: skip
def test_bad_input_is_one_error_before_any_model(
    arguments, message, token_dir, tiny_pipeline_dir, real_images_dir, tmp_path, monkeypatch
):
    from diffusers import AutoPipelineForText2Image

    monkeypatch.setattr(AutoPipelineForText2Image, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))
    nameless = save_token(tmp_path / "nameless", tiny_pipeline_dir, real_images_dir, class_names=[])
    places = {"{token}": str(token_dir), "{real}": str(real_images_dir), "{nameless}": str(nameless)}
    arguments = [places.get(argument, argument) for argument in arguments]
    with pytest.raises(UserError, match=re.escape(message)):
        main([*arguments, "--output_dir", str(tmp_path / "set")])
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("words", [["--hub_token", "hf_secret"], ["--hub-token=hf_secret"]])
def test_command_in_the_card_hides_the_hub_token(words):
    command = public_command("generate_synthetic.py", [*words, "--output_dir", "my set"])
    assert "secret" not in command
    assert command.startswith(f"accelerate launch generate_synthetic.py {words[0].partition('=')[0]}")
    assert command.endswith("--output_dir 'my set'")


def replace_weights(path: Path) -> None:
    save_file({name: value + 0.01 for name, value in load_file(path).items()}, path, {"format": "pt"})


@pytest.fixture
def own_token(copy_pipeline, real_images_dir, tmp_path):
    """A copied token, and a copy of the generator in its record."""
    return save_token(tmp_path / "style", copy_pipeline(), real_images_dir), tmp_path / "copied"


@pytest.mark.parametrize("what", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "token"])
def test_a_set_does_not_grow_from_another_generator_or_token_of_the_same_name(own_token, options, tmp_path, what):
    token, generator = own_token
    flags = [*options, "--learned_embeds", str(token), "--output_dir", str(tmp_path / "set")]
    main([*flags, "--num_images_per_class", "3"])
    assert main([*flags, "--num_images_per_class", "3"])["num_drawn"] == 0
    if what.endswith(".json"):
        change_config(generator / what, scaling_factor=0.2)
    else:
        replace_weights(token / "learned_embeds.safetensors" if what == "token" else generator / what)
    named = "learned_embeds_sha256" if what == "token" else "generator_contents"
    with pytest.raises(UserError, match=rf"made with other settings \({named} was .*, now .*\); choose another folder"):
        main(flags)
    assert main([*flags, "--overwrite_output_dir"])["num_drawn"] == 21


@pytest.mark.parametrize("what", ["generator_contents", "learned_embeds_sha256"])
def test_shards_are_not_written_after_the_generator_was_replaced(own_token, options, tmp_path, monkeypatch, what):
    token, generator = own_token
    load_sampler = runner.load_sampler

    def replace_and_load(*args):  # after its identity was recorded
        weights = token / "learned_embeds.safetensors"
        replace_weights(
            weights if what.startswith("learned") else generator / "unet/diffusion_pytorch_model.safetensors"
        )
        return load_sampler(*args)

    monkeypatch.setattr(runner, "load_sampler", replace_and_load)
    with pytest.raises(UserError, match=f"{what} was .*: replaced while images were drawn; the finished shards are"):
        main([*options, "--learned_embeds", str(token), "--output_dir", str(tmp_path / "set")])
    assert not list((tmp_path / "set" / "data").glob("*.parquet"))


def test_a_set_of_an_earlier_version_without_recorded_contents_grows(own_token, options, tmp_path, monkeypatch):
    flags = [*options, "--learned_embeds", str(own_token[0]), "--output_dir", str(tmp_path / "set")]
    with monkeypatch.context() as patch:
        patch.setattr(generate_synthetic, "lacks_setting", lambda *_: True)
        main([*flags, "--num_images_per_class", "3"])
    assert main(flags)["num_drawn"] > 0
    assert "generator_contents" not in json.loads((tmp_path / "set" / "generation_config.json").read_text())["settings"]


def test_a_folder_without_images_accepts_other_settings(options, tmp_path, monkeypatch, caplog):
    flags = [*options, "--output_dir", str(tmp_path / "set")]
    with monkeypatch.context() as patch, pytest.raises(UserError, match="out of paint"):
        patch.setattr(Runner, "_draw_batch", lambda *_: (_ for _ in ()).throw(UserError("out of paint")))
        main(flags)
    assert (tmp_path / "set" / "generation_config.json").exists()
    warn_once.cache_clear()
    # also for fewer images than planned
    results = main([*flags, "--seed", "1", "--guidance_scale", "1", "--num_images_per_class", "1"])
    [line] = [message for message in caplog.messages if "no image" in message]
    assert line.startswith(f"--output_dir {tmp_path / 'set'}: has no images yet; its settings change ")
    assert line.endswith("settings change (guidance_scale was [3.0], now [1.0]; seed was 0, now 1).")
    assert results["num_drawn"] == len(load_dataset(str(tmp_path / "set"), split="train")) == 3
    record = json.loads((tmp_path / "set" / "generation_config.json").read_text())
    assert record["settings"]["seed"] == 1 and record["num_images"] == 3
    with pytest.raises(UserError, match="was made with other settings"):
        main([*flags, "--num_images_per_class", "1"])


def test_a_finished_set_whose_shards_were_moved_keeps_its_folder(copied_set, options):
    shutil.rmtree(copied_set / "data")
    with pytest.raises(UserError, match="was made with other settings"):
        main([*options, "--output_dir", str(copied_set), "--seed", "1"])
