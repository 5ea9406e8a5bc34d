"""The weights that are loaded for a pipeline's parts."""

import logging
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from utils.cli.errors import UserError
from utils.hub.repositories import Source
from utils.style.saved_pipelines import find_variants, open_pipeline, read_config

pytest_plugins = ["tests.local_hub.fixtures"]
PARTS = ("text_encoder", "vae", "unet")
PLAIN = ["text_encoder/model.safetensors"] + [f"{part}/diffusion_pytorch_model.safetensors" for part in PARTS[1:]]


def with_variant(name: str, variant: str) -> str:
    return name.replace(".safetensors", f".{variant}.safetensors")


@pytest.fixture
def make_source(tmp_path):
    def make(names) -> Source:
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return Source(str(tmp_path), "--model")

    return make


UNET, VAE = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"
HALF = [with_variant(name, "fp16") for name in PLAIN]


@pytest.mark.parametrize(("names", "variants"), [
    (PLAIN, [None, None, None]),
    ([*PLAIN, *HALF], [None, None, None]),
    (HALF, ["fp16", "fp16", "fp16"]),
    ([*PLAIN[:2], HALF[2]], [None, None, "fp16"]),
    ([*PLAIN[:2], HALF[2], with_variant(PLAIN[2], "non_ema")], [None, None, "fp16"]),
    ([*PLAIN, f"{UNET}.bin", f"{VAE}.fp16.bin"], [None, None, None]),
    ([*PLAIN[:2], *(f"{UNET}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2))], [None, None, "fp16"]),
    ([*PLAIN[:2], f"{UNET}-00001-of-00001.safetensors"], [None, None, None]),
])  # fmt: skip
def test_half_precision_is_loaded_only_if_there_is_nothing_else(names, variants, make_source, caplog):
    source = make_source(names)
    with caplog.at_level(logging.WARNING):
        assert find_variants(source, PARTS) == dict(zip(PARTS, variants))
    only = [part for part, variant in zip(PARTS, variants) if variant]
    warned = f"--model {source.name}: has weights of {', '.join(only)} only in half precision; variant 'fp16' "
    assert [message.startswith(warned) for message in caplog.messages] == [True] * bool(only)


@pytest.mark.parametrize(("names", "parts"), [
    (["text_encoder/pytorch_model.bin", f"{VAE}.bin", f"{UNET}.bin"], "text_encoder, vae, unet"),
    ([*PLAIN[:2], f"{UNET}.fp16.bin"], "unet"),
    ([*PLAIN[1:], "text_encoder/pytorch_model-00001-of-00002.bin"], "text_encoder"),
    ([*PLAIN[:2], f"{UNET}.bin", "unet/pytorch_lora_weights.safetensors"], "unet"),
])  # fmt: skip
def test_pickled_weights_are_an_error_that_names_the_parts_and_says_how_to_convert(names, parts, make_source):
    with pytest.raises(UserError) as error:
        find_variants(make_source(names), PARTS)
    message = str(error.value)
    assert f": has no safetensors weights for {parts}, only pickled ones (.bin)" in message
    assert "use_safetensors=False).save_pretrained('FOLDER')" in message and "\n" not in message


def test_weights_only_of_other_variants_are_an_error(make_source):
    source = make_source([*PLAIN[:2], with_variant(PLAIN[2], "ema"), with_variant(PLAIN[2], "bf16")])
    with pytest.raises(UserError, match="its unet has only safetensors weights of variant bf16, ema; must be without"):
        find_variants(source, PARTS)


def test_a_part_without_weights_is_left_out(make_source):
    assert find_variants(make_source([*PLAIN[:2], "unet/flax_model.msgpack"]), PARTS) == dict.fromkeys(PARTS[:2])


@pytest.mark.parametrize(
    ("text", "problem"), [("{", "its index.json is not JSON"), ("[]", "its index.json is not a JSON mapping")]
)
def test_a_config_that_is_not_a_mapping_is_an_error(text, problem, tmp_path):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match=problem):
        read_config(Source(str(tmp_path), "--model"), "index.json")


def test_a_repositorys_files_are_known_on_line_and_from_the_cache(local_hub, monkeypatch):
    from huggingface_hub import constants, hf_hub_download

    revision = str(local_hub.create_repo("ann/half", "model").commit(dict.fromkeys([*HALF, "README.md"], b"x")))
    source = Source("ann/half", "--model", revision=revision)
    assert find_variants(source, PARTS) == dict.fromkeys(PARTS, "fp16")
    hf_hub_download("ann/half", HALF[0], revision=revision)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_variants(source, PARTS) == {"text_encoder": "fp16"}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("conditioner.embedders.1.model.x", "single file; .* StableDiffusionXLPipeline.from_single_file.'{}'."),
        ("cond_stage_model.transformer.x", "single file; .* StableDiffusionPipeline.from_single_file.'{}'."),
        ("model.diffusion_model.x", "is a file, but no checkpoint of Stable Diffusion 1.x and 2.x or Stable Diffusion"),
        (None, "cannot be read as safetensors"),
    ],
)
def test_a_single_file_is_one_line_that_says_how_to_convert_it(key, message, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({key: np.zeros(1)}, path) if key else path.write_bytes(b"x")
    with pytest.raises(UserError, match=f"^--model {path}: .*{message.format(re.escape(str(path)))}"):
        open_pipeline(str(path), "--model", None, None)
    if key:  # the folder of such a file
        with pytest.raises(
            UserError, match=f"^--model {tmp_path}: has no model_index.json; its model.safetensors is a"
        ):
            open_pipeline(str(tmp_path), "--model", None, None)


def test_a_denoiser_alone_is_one_line_whose_command_makes_a_pipeline(tiny_pipeline_dir, tmp_path, local_hub):
    shutil.copytree(tiny_pipeline_dir / "unet", tmp_path / "unet")
    for folder in (tmp_path, tmp_path / "unet"):
        with pytest.raises(UserError, match=f"^--model {folder}: is a UNet2DConditionModel alone; put it") as error:
            open_pipeline(str(folder), "--model", None, None)
        code = str(error.value).split('"')[1].replace("BASE_MODEL", str(tiny_pipeline_dir))
        exec(code.replace("FOLDER", str(tmp_path / "made")))
        assert open_pipeline(str(tmp_path / "made"), "--model", None, None)[1] == "StableDiffusionPipeline"
        shutil.rmtree(tmp_path / "made")
    local_hub.create_repo("ann/photo", "model").commit({"photo.ckpt": b"x", "README.md": b"x"})
    url = "https://huggingface.co/ann/photo/blob/[0-9a-f]{40}/photo.ckpt"
    with pytest.raises(UserError, match=f"its photo.ckpt is a checkpoint .*PIPELINE.from_single_file.'{url}'.*XLPipe"):
        open_pipeline("ann/photo", "--model", None, None)
