"""Image-to-image from the real training images: diffusers' own images, shares, records, one-line errors."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, StableDiffusionImg2ImgPipeline
from PIL import Image as PILImage

from generate_synthetic import main
from tests.conftest import CLASS_NAMES, save_class_folders
from tests.style.pipelines import change_config
from tests.synthesis.test_plan import all_images, make_plan
from tests.synthesis.test_sampling import assert_same, make_sampler
from tests.synthesis.tokens import open_folder, save_token, shard_hashes
from utils.cli.errors import UserError
from utils.data.image_set import RealImagesRecord
from utils.data.images import centre_square
from utils.data.real_images import load_real_images
from utils.synthesis.init_images import open_init_images
from utils.synthesis.sampling import load_pipeline

pytest_plugins = ["tests.synthesis.fixtures"]
PROMPTS, SEEDS = ["a red square", "a green circle", "a red square"], [3, 4, 5]


@pytest.fixture(scope="module")
def real(real_images_dir):
    return load_real_images(RealImagesRecord(dataset_name=str(real_images_dir), num_shots=2))


@pytest.fixture(scope="module")
def token_of_shots(tmp_path_factory, tiny_pipeline_dir, real_images_dir, real):
    """A style token of two shots per class."""
    shots = {"dataset_name": str(real_images_dir), "dataset_revision": None, "num_shots": 2}
    folder = tmp_path_factory.mktemp("tokens") / "style"
    return save_token(
        folder, tiny_pipeline_dir, real_images_dir, real_images=shots, train_indices=real.train_indices.tolist()
    )


@pytest.fixture(scope="module")
def flags(token_of_shots):
    return [
        "--learned_embeds", str(token_of_shots), "--init_images", "real", "--strength", "0.5", "1",
        "--num_images_per_class", "5", "--images_per_shard", "8", "--batch_size", "2", "--num_inference_steps", "2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, flags):
    folder = tmp_path_factory.mktemp("sets") / "from-real"
    main([*flags, "--output_dir", str(folder)])
    return folder


@pytest.fixture(scope="session")
def demo_dir():
    """The demo's generator, whose latents have eight channels."""
    return Path(__file__).parents[2] / "demo" / "generator"


@pytest.mark.parametrize("kind", ["tiny_pipeline_dir", "tiny_xl_pipeline_dir", "demo_dir"])
def test_images_are_those_of_the_image_to_image_pipeline_of_diffusers(kind, request, real, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "pipeline")
    if kind == "tiny_xl_pipeline_dir":  # as in XL models of others
        change_config(folder / "vae" / "config.json", latents_mean=[0.1, 0.2, -0.3, 0.0], latents_std=[0.5, 1, 2, 1.5])
    pipe = DiffusionPipeline.from_pretrained(folder)
    images = open_init_images(real, [0, 1, 2], [0.5])
    rows = [images.rows[label][number] for label, number in ((0, 0), (1, 1), (2, 0))]
    sampler = make_sampler(pipe, init_images=images)
    users = AutoPipelineForImage2Image.from_pipe(DiffusionPipeline.from_pretrained(folder))
    for strength in (0.5, 1.0):
        pixels, problems = sampler.draw(PROMPTS, SEEDS, 4.0, strength, rows)
        assert problems == [None] * 3
        for prompt, seed, row, drawn in zip(PROMPTS, SEEDS, rows, pixels):
            photo = real.train[images.places[row]]["image"]
            levels = users(
                prompt, image=centre_square(photo, 32), strength=strength, num_inference_steps=2, guidance_scale=4.0,
                generator=torch.Generator().manual_seed(seed), output_type="np",
            ).images[0]  # fmt: skip
            assert_same(drawn, np.rint(levels * 255))
    alone = make_sampler(pipe, num_at_a_time=1, init_images=images).draw(PROMPTS, SEEDS, 4.0, 1.0, rows)[0]
    for one, drawn in zip(alone, pixels):
        assert_same(one, drawn)
    assert np.abs(sampler.draw(PROMPTS[:1], SEEDS[:1], 4.0, 0.5, rows[1:2])[0][0].astype(int) - pixels[0]).mean() > 1


@pytest.mark.parametrize("kind", ["tiny_pipeline_dir", "tiny_xl_pipeline_dir"])
def test_half_precision_draws_about_the_same(kind, request, real):
    images, drawn = open_init_images(real, [0], [0.5]), []
    generator = open_folder(request.getfixturevalue(kind))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        pipe = load_pipeline(generator, None, "DDIMScheduler", dtype, torch.device("cpu"))
        sampler = make_sampler(pipe, 1, init_images=images)
        rows = list(images.rows[0][:1])
        # a second time, as parts must keep their precision
        drawn += [sampler.draw(PROMPTS[:1], SEEDS[:1], 4.0, 0.5, rows)[0].astype(int) for _ in range(2)]
    assert all(np.array_equal(*pair) for pair in zip(drawn[::2], drawn[1::2]))
    assert all(np.abs(levels - drawn[0]).mean() < 8 for levels in drawn)  # random weights amplify rounding


def test_guidance_is_limited_to_an_interval_of_all_steps(tiny_pipeline_dir, real):
    pipe, images = DiffusionPipeline.from_pretrained(tiny_pipeline_dir), open_init_images(real, [0], [0.5])
    row, drawn = images.rows[0][:1], []
    # of two steps, image-to-image with strength 0.5 takes the second
    for interval in (None, (0.5, 1.0), (0.0, 0.5)):
        sampler = make_sampler(pipe, 1, init_images=images, guidance_interval=interval)
        drawn.append(sampler.draw(PROMPTS[:1], SEEDS[:1], 8.0, 0.5, list(row))[0].astype(int))
    assert_same(drawn[1], drawn[0])
    assert np.abs(drawn[2] - drawn[0]).max() > 1


def test_strengths_and_scales_have_equal_shares_and_real_images_equal_turns():
    rows = {0: (4, 9), 1: (0,), 2: (1, 2, 3, 5, 8)}
    plan = make_plan(
        guidance_scales=(2.0, 4.0), strengths=(0.3, 0.6, 0.9), init_rows=rows, num_images_per_class=30, batch_size=4
    )
    images = all_images(plan)
    for label in plan.labels:
        own = [image for image in images if image.label == label]
        assert set(Counter(image.kind for image in own).values()) == {5}
        turns = Counter(image.init_image for image in own)
        assert set(turns) == set(rows[label]) and len(set(turns.values())) == 1
        first = own[: len(rows[label])]
        assert {image.init_image for image in first} == set(rows[label])
    for number in range(plan.num_shards):
        assert all(len({image.kind for image in batch}) == 1 for batch in plan.batches(number))
    again = plan.image(images[7].index, redraw=1)
    assert (again.init_image, again.kind) == (images[7].init_image, images[7].kind) and again.seed != images[7].seed
    assert plan.to_dict(["a", "b", "c"])["init_image_rows"] == [0, 1, 2, 3, 4, 5, 8, 9]


def test_a_set_names_strength_and_real_image_of_each_image(finished, real, token_of_shots):
    images = load_dataset(str(finished), split="train")
    record = json.loads((finished / "generation_config.json").read_text())
    assert record["init_image_rows"] == sorted(real.train_indices.tolist())
    assert (record["settings"]["init_images"], record["settings"]["strength"]) == ("real", [0.5, 1.0])
    labels = dict(zip(real.train_indices.tolist(), real.train["label"]))
    assert all(labels[row["init_image"]] == row["label"] for row in images.remove_columns("image"))
    assert set(images["strength"]) == {0.5, 1.0}
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(record["generator"]["id"], safety_checker=None)
    from diffusers import DPMSolverMultistepScheduler

    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.load_textual_inversion(str(token_of_shots / "learned_embeds.safetensors"))
    row = images[0]  # drawn again as the card says
    photo = real.train[real.train_indices.tolist().index(row["init_image"])]["image"]
    levels = pipe(
        row["prompt"], image=centre_square(photo, 32), strength=row["strength"], num_inference_steps=2,
        guidance_scale=3.0, generator=torch.Generator().manual_seed(row["seed"]), output_type="np",
    ).images[0]  # fmt: skip
    encoded = io.BytesIO()
    PILImage.fromarray(np.rint(levels * 255).astype(np.uint8)).save(encoded, format="jpeg", quality=95)
    assert np.abs(np.asarray(PILImage.open(encoded), dtype=int) - np.asarray(row["image"])).mean() < 1
    card = (finished / "README.md").read_text()
    assert "`init_image`" in card and "Each strength was used for an equal share" in card


def test_the_set_grows_and_other_images_or_strengths_are_refused(finished, flags, tmp_path):
    grown = shutil.copytree(finished, tmp_path / "grown")
    before = pq.read_table(grown / "data" / "train-00000.parquet")
    main([*flags, "--num_images_per_class", "8", "--output_dir", str(grown)])
    assert pq.read_table(grown / "data" / "train-00000.parquet") == before
    whole = tmp_path / "whole"
    main([*flags, "--num_images_per_class", "8", "--output_dir", str(whole)])
    assert shard_hashes(grown) == shard_hashes(whole)
    for others, message in (
        (["--strength", "0.5"], r"strength was \[0.5, 1.0\], now \[0.5\]"),
        (["--num_images_per_class", "balance:8"], r"balance was None, now \[0, 0, 0\]"),
    ):
        with pytest.raises(UserError, match=message):
            main([*flags, *others, "--output_dir", str(whole)])
    without = [flag for flag in flags if flag not in ("--init_images", "real", "--strength", "0.5", "1")]
    with pytest.raises(UserError, match="init_images was real, now None"):
        main([*without, "--output_dir", str(whole)])


def test_rare_classes_get_more_images_and_the_set_grows(tiny_pipeline_dir, tmp_path):
    counts = dict(zip(CLASS_NAMES, (6, 2, 4)))
    folder = save_class_folders(tmp_path / "photos", counts)
    flags = [
        "--pretrained_model_name_or_path", str(tiny_pipeline_dir), "--train_dir", str(folder), "--batch_size", "4",
        "--validation_dir", str(folder), "--train_val_split", "0.01", "--num_inference_steps", "1",
        "--images_per_shard", "8", "--resolution", "32",
    ]  # fmt: skip
    small, whole = tmp_path / "small", tmp_path / "whole"
    main([*flags, "--num_images_per_class", "balance:2", "--output_dir", str(small)])
    record = json.loads((small / "generation_config.json").read_text())
    names = record["class_names"]
    per_class = record["num_images_of_class"]
    images = load_dataset(str(small), split="train")
    assert dict(Counter(names[label] for label in images["label"])) == per_class
    real = load_real_images(RealImagesRecord(**record["real_images"]))
    trained = Counter(names[label] for label in real.train["label"])
    assert {trained[name] + per_class[name] for name in names} == {max(trained.values()) + 2}
    assert record["num_images_per_class"] == 2 == min(per_class.values())
    assert f"| {per_class['green circle']} | 0 |" in (small / "README.md").read_text()
    main([*flags, "--num_images_per_class", "balance:4", "--output_dir", str(small)])
    main([*flags, "--num_images_per_class", "balance:4", "--output_dir", str(whole)])
    assert shard_hashes(small) == shard_hashes(whole)
    with pytest.raises(UserError, match="balance:3: .* already has at least 4 per class"):
        main([*flags, "--num_images_per_class", "balance:3", "--output_dir", str(whole)])
    with pytest.raises(UserError, match="balance was .*, now None"):
        main([*flags, "--num_images_per_class", "9", "--output_dir", str(whole)])


def test_bad_input_is_one_line_before_a_model_loads(
    flags, token_of_shots, tiny_sd3_pipeline_dir, tiny_pipeline_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr("utils.synthesis.runner.load_sampler", None)
    names = tmp_path / "names.yaml"
    names.write_text("a: dog\nb: cat\n")
    record = json.loads((token_of_shots / "dsi_config.json").read_text())
    lacking = shutil.copytree(token_of_shots, tmp_path / "lacking")
    (lacking / "dsi_config.json").write_text(json.dumps(record | {"train_indices": [0, 3]}))
    from_names = ["--class_names_file", str(names), "--resolution", "32"]
    sd = ["--pretrained_model_name_or_path", str(tiny_pipeline_dir), *from_names]
    sd3 = ["--pretrained_model_name_or_path", str(tiny_sd3_pipeline_dir), *from_names]
    token = ["--learned_embeds", str(token_of_shots)]
    for argv, message in (
        ([*sd, "--init_images", "real"], "--init_images real: needs the real images; add --dataset_name or"),
        ([*sd, "--num_images_per_class", "balance:9"], "balance:9: needs the real images; add --dataset_name or"),
        ([*sd3, "--init_images", "real"], "--init_images real: not supported by .* a StableDiffusion3Pipeline"),
        ([*flags, "--strength", "0"], "--strength 0.0: must be above 0 and at most 1"),
        ([*flags, "--strength", "1.5"], "--strength 1.5: must be above 0 and at most 1"),
        ([*flags, "--strength", "0.4"], "--strength 0.4: less than one of --num_inference_steps 2; must be at least"),
        ([*token, "--strength", "0.4"], "--strength 0.4: does nothing with --init_images none"),
        ([*flags, "--learned_embeds", str(lacking)], "no training images of .*green circle.* --exclude_classes"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            main([*argv, "--output_dir", str(tmp_path / "set")])
    assert not (tmp_path / "set").exists()


def test_a_dry_run_draws_from_real_images_and_writes_nothing(flags, tmp_path, capsys):
    results = main([*flags, "--dry_run", "--output_dir", str(tmp_path / "set")])
    assert results["alternatives"] == {} and results["images_per_second"] > 0
    assert not (tmp_path / "set").exists()
