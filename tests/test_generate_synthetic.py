"""generate_synthetic.py end to end, in process, with a tiny pipeline of the real classes."""

import hashlib
import io
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Image, load_dataset
from huggingface_hub import DatasetCard
from PIL import Image as PILImage
from safetensors.torch import save_file

from generate_synthetic import main
from tests.conftest import CLASS_NAMES
from utils.cli.commands import public_command
from utils.cli.errors import UserError
from utils.cli.records import write_record
from utils.data.prompts import token_text
from utils.synthesis.shards import encode_image

PLACEHOLDER = "<dsi-style>"


def save_token(folder, tiny_pipeline_dir, real_images_dir, num_vectors=1, class_names=CLASS_NAMES):
    """Write what train_dsi.py writes, with a large random token."""
    folder.mkdir()
    rows = torch.randn(num_vectors, 16, generator=torch.Generator().manual_seed(1)) * 3
    save_file({PLACEHOLDER: rows}, folder / "learned_embeds.safetensors")
    record = {
        "base_model": {"id": str(tiny_pipeline_dir), "revision": None},
        "real_images": {"dataset_name": str(real_images_dir), "dataset_revision": None},
        "train_indices": [0, 3, 5],
        "class_names": class_names,
        "prompt_nouns": ["red square", "green circle", "blue-stripe"],
        "prompt_templates": ["A {class} photo in the style of {token}"],
        "placeholder_token": PLACEHOLDER,
        "num_vectors": num_vectors,
        "resolution": 32,
    }
    write_record(folder / "dsi_config.json", record)
    return folder


@pytest.fixture(scope="module")
def token_dir(tmp_path_factory, tiny_pipeline_dir, real_images_dir):
    return save_token(tmp_path_factory.mktemp("token") / "style", tiny_pipeline_dir, real_images_dir)


@pytest.fixture(scope="module")
def options(token_dir):
    """7 images of each of 3 classes in shards of 8, batches of 3: short last shard, padded batches."""
    return [
        "--learned_embeds", str(token_dir), "--num_images_per_class", "7", "--images_per_shard", "8",
        "--batch_size", "3", "--num_inference_steps", "2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished_set(tmp_path_factory, options):
    output_dir = tmp_path_factory.mktemp("sets") / "finished"
    main([*options, "--output_dir", str(output_dir)])
    return output_dir


@pytest.fixture
def copied_set(finished_set, tmp_path):
    import shutil

    return shutil.copytree(finished_set, tmp_path / "copied")


def shard_hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("data/*"))}


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
    for path in finished_set.glob("data/*.parquet"):  # each file by itself, without what the card says
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
    same, other = (PILImage.open(io.BytesIO(encode_image(pixels, "jpeg", 95))) for pixels in images)
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
    assert (finished_set / "preview.png").is_file()
    assert (finished_set / "run_config.json").is_file()


def test_resume_after_lost_and_torn_shards_is_byte_identical(copied_set, options):
    before = shard_hashes(copied_set)
    (copied_set / "data/train-00001.parquet").unlink()
    torn = copied_set / "data/train-00002.parquet"
    torn.write_bytes(torn.read_bytes()[:-20])
    (copied_set / "data/.train-00099.parquet.tmp").write_bytes(b"left over")
    results = main([*options, "--output_dir", str(copied_set)])
    assert results["num_drawn"] == 8 + 5
    assert shard_hashes(copied_set) == before
    assert not list(copied_set.glob("data/.*"))


def test_more_images_later_keep_the_first_ones(copied_set, options):
    before = read_rows(copied_set)
    results = main([*options, "--output_dir", str(copied_set), "--num_images_per_class", "9"])
    assert results["num_drawn"] == 27 - 16
    assert read_rows(copied_set)[:21] == before
    assert len(load_dataset(str(copied_set), split="train")) == 27


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--seed", "1", "seed was 0, now 1"),
        ("--guidance_scale", "2", "guidance_scale was 3.0, now 2.0"),
        ("--num_images_per_class", "6", "can only grow"),
    ],
)
def test_other_settings_are_refused_and_nothing_changes(finished_set, options, flag, value, message):
    before = tree_hashes(finished_set)
    with pytest.raises(UserError, match=re.escape(message)):
        main([*options, "--output_dir", str(finished_set), flag, value])
    assert tree_hashes(finished_set) == before


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
    with pytest.raises(UserError, match="is no synthetic set"):
        main([*options, "--output_dir", str(other), "--overwrite_output_dir"])
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_token_changes_the_images_of_the_same_prompt_and_seed(finished_set, options, tmp_path):
    template = f"A {{class}} photo in the style of {PLACEHOLDER}"
    main([*options, "--use_style_token", "false", "--prompt_template", template, "--num_images_per_class", "1",
          "--output_dir", str(tmp_path / "without")])  # fmt: skip
    with_token, without = read_rows(finished_set)[:3], read_rows(tmp_path / "without")
    assert [row["seed"] for row in with_token] == [row["seed"] for row in without]
    assert [row["prompt"] for row in with_token] == [row["prompt"] for row in without]
    assert all(a["image"]["bytes"] != b["image"]["bytes"] for a, b in zip(with_token, without))
    assert json.loads((tmp_path / "without/generation_config.json").read_text())["token"] is None


def test_several_vectors_all_reach_the_prompt(tmp_path, tiny_pipeline_dir, real_images_dir):
    from diffusers import StableDiffusionPipeline

    folder = save_token(tmp_path / "two", tiny_pipeline_dir, real_images_dir, num_vectors=2)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    pipe.load_textual_inversion(str(folder / "learned_embeds.safetensors"))
    assert pipe.maybe_convert_prompt(f"a {PLACEHOLDER} b", pipe.tokenizer) == f"a {token_text(PLACEHOLDER, 2)} b"


def test_generator_without_token_takes_the_names_of_the_real_set(tiny_pipeline_dir, real_images_dir, tmp_path):
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


def test_pipeline_that_draws_black_ends_in_one_error(tiny_pipeline_dir, real_images_dir, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.zero_()
        pipe.vae.decoder.conv_out.bias.fill_(-1)
    pipe.save_pretrained(tmp_path / "black")
    with pytest.raises(UserError, match="--max_redraws 1: .*green circle.*: black"):
        main(["--pretrained_model_name_or_path", str(tmp_path / "black"), "--dataset_name", str(real_images_dir),
              "--num_images_per_class", "2", "--num_inference_steps", "1", "--max_redraws", "1",
              "--output_dir", str(tmp_path / "set")])  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--learned_embeds is missing"),
        (["--learned_embeds", "no such thing"], "neither an existing folder nor a repository id"),
        (["--learned_embeds", "{real}"], "the folder has no dsi_config.json"),
        (["--learned_embeds", "{token}", "--dataset_name", "beans"], "--dataset_name beans: not together"),
        (["--learned_embeds", "{token}", "--prompt_template", "a {class}"], "has no {token}"),
        (["--learned_embeds", "{token}", "--prompt_template", "{class} {token}" + " a" * 64], "has 78 tokens"),
        (["--learned_embeds", "{token}", "--scheduler", "Nothing"], "--scheduler Nothing"),
        (["--learned_embeds", "{token}", "--batch_size", "0"], "--batch_size 0"),
        (["--learned_embeds", "{token}", "--jpeg_quality", "101"], "--jpeg_quality 101"),
        (["--learned_embeds", "{token}", "--resolution", "30"], "--resolution 30"),
        (["--learned_embeds", "{nameless}"], "has no class names"),
        (["--pretrained_model_name_or_path", "{real}", "--dataset_name", "{real}"], "has no model_index.json"),
    ],
)
def test_bad_input_is_one_error_before_any_model(
    arguments, message, token_dir, tiny_pipeline_dir, real_images_dir, tmp_path, monkeypatch
):
    from diffusers import StableDiffusionPipeline

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    nameless = save_token(tmp_path / "nameless", tiny_pipeline_dir, real_images_dir, class_names=[])
    places = {"{token}": str(token_dir), "{real}": str(real_images_dir), "{nameless}": str(nameless)}
    arguments = [places.get(argument, argument) for argument in arguments]
    with pytest.raises(UserError, match=re.escape(message)):
        main([*arguments, "--output_dir", str(tmp_path / "set")])
    assert not (tmp_path / "set").exists()


def test_command_in_the_card_hides_the_hub_token():
    for flag in ("--hub_token", "--hub-token"):
        for words in ([flag, "hf_secret"], [f"{flag}=hf_secret"]):
            command = public_command("generate_synthetic.py", [*words, "--output_dir", "my set"])
            assert "secret" not in command
            assert command.startswith(f"accelerate launch generate_synthetic.py {flag}")
            assert command.endswith("--output_dir 'my set'")


def test_preview_rows_are_classes(finished_set):
    sheet = np.asarray(PILImage.open(finished_set / "preview.png"))
    assert sheet.shape[0] == 3 * 100
