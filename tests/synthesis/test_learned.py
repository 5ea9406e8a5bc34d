"""What was learned with a style token, a LoRA and class tokens, is drawn with as diffusers does."""

import hashlib
import json

import numpy as np
import pytest
import torch
from datasets import load_dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from generate_synthetic import main
from tests.conftest import CLASS_NAMES
from tests.synthesis.test_sampling import assert_same, draw_alone
from tests.synthesis.tokens import PLACEHOLDER, save_token, shard_hashes
from utils.cli.errors import UserError
from utils.cli.processes import warn_once

pytest_plugins = ["tests.synthesis.fixtures"]
LORA, CLASS_EMBEDS = "pytorch_lora_weights.safetensors", "class_embeds.safetensors"
NAMES = [f"<dsi-class-{label}>" for label in range(len(CLASS_NAMES))]
TEMPLATE = "A {class_token} {class} photo in the style of {token}"
DIMS = {"tiny_pipeline_dir": (16,), "tiny_xl_pipeline_dir": (16, 24)}


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_learned_lora(pipeline_dir, folder) -> None:
    """Write a large random adapter of the U-Net and all text encoders, of scale alpha / r = 2."""
    pipe, layers = DiffusionPipeline.from_pretrained(pipeline_dir), {}
    torch.manual_seed(0)
    for name in ("unet", "text_encoder", "text_encoder_2"):
        if (part := pipe.components.get(name)) is None:
            continue
        names = ["to_q", "to_v"] if name == "unet" else ["q_proj", "v_proj"]
        part.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=names))
        for parameter in (value for key, value in part.named_parameters() if "lora" in key):
            torch.nn.init.normal_(parameter)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(part)
        layers[f"{name}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
    type(pipe).save_lora_weights(folder, **layers)


def save_learned(folder, pipeline_dir, real_images_dir, dims, with_lora=True, with_class_tokens=True):
    """Write the folder of a style token with a LoRA and class tokens, as train_dsi.py does."""
    entries = {"prompt_templates": [TEMPLATE]} if with_class_tokens else {}
    save_token(folder, pipeline_dir, real_images_dir, dims, num_vectors=2)
    if with_lora:
        save_learned_lora(pipeline_dir, folder)
        entries["lora"] = {"filename": LORA, "sha256": sha256(folder / LORA), "r": 2, "alpha": 4}
    if with_class_tokens:
        keys = ["<dsi-class>"] if len(dims) == 1 else ["clip_l", "clip_g"]
        generator = torch.Generator().manual_seed(2)
        rows = {key: torch.randn(3, dim, generator=generator) * 3 for key, dim in zip(keys, dims)}
        save_file(rows, folder / CLASS_EMBEDS)
        digest = sha256(folder / CLASS_EMBEDS)
        entries["class_tokens"] = {"filename": CLASS_EMBEDS, "sha256": digest, "names": NAMES}
    record = json.loads((folder / "dsi_config.json").read_text())
    (folder / "dsi_config.json").write_text(json.dumps(record | entries))
    return folder


@pytest.fixture
def learned(tmp_path, tiny_pipeline_dir, real_images_dir):
    return save_learned(tmp_path / "style", tiny_pipeline_dir, real_images_dir, (16,))


def draw(token, folder, *flags) -> np.ndarray:
    """Draw an image of each class with generate_synthetic.py; return them, `(3, 32, 32, 3)`."""
    main(["--learned_embeds", str(token), "--num_images_per_class", "1", "--num_inference_steps", "2", "--batch_size",
          "3", "--scheduler", "default", "--image_format", "png", "--output_dir", str(folder), *flags])  # fmt: skip
    return np.stack([np.asarray(image, dtype=int) for image in load_dataset(str(folder), split="train")["image"]])


def settings_of(folder) -> dict:
    return json.loads((folder / "generation_config.json").read_text())["settings"]


@pytest.mark.parametrize("kind", DIMS)
def test_images_are_those_of_diffusers_with_token_lora_and_class_tokens(kind, request, real_images_dir, tmp_path):
    pipeline_dir = request.getfixturevalue(kind)
    token = save_learned(tmp_path / "style", pipeline_dir, real_images_dir, DIMS[kind])
    drawn = draw(token, tmp_path / "set")
    rows = load_dataset(str(tmp_path / "set"), split="train")
    assert rows["prompt"][1] == f"A {NAMES[1]} green circle photo in the style of {PLACEHOLDER}"
    pipe = DiffusionPipeline.from_pretrained(pipeline_dir)
    pipe.load_lora_weights(token)
    pipe.fuse_lora(components=[name for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, name)])
    styles, classes = load_file(token / "learned_embeds.safetensors"), load_file(token / CLASS_EMBEDS)
    for suffix, style, of_classes in zip(("", "_2"), ("clip_l", "clip_g"), ("clip_l", "clip_g")):
        if not hasattr(pipe, f"text_encoder{suffix}"):
            continue
        parts = {
            "tokenizer": getattr(pipe, f"tokenizer{suffix}"),
            "text_encoder": getattr(pipe, f"text_encoder{suffix}"),
        }
        pipe.load_textual_inversion(styles.get(style, styles.get(PLACEHOLDER)), token=PLACEHOLDER, **parts)
        for name, row in zip(NAMES, classes.get(of_classes, classes.get("<dsi-class>"))):
            pipe.load_textual_inversion(row[None], token=name, **parts)
    expected = draw_alone(pipe, rows["prompt"][1], rows["seed"][1], guidance_scale=3.0)
    assert_same(drawn[1], expected)
    # each part changes the image
    others = [draw(token, tmp_path / "no-lora", "--use_learned_lora", "false"),
              draw(token, tmp_path / "no-class", "--prompt_templates", "A {class} photo in the style of {token}"),
              draw(token, tmp_path / "plain", "--use_style_token", "false")]  # fmt: skip
    assert all(np.abs(other[1] - expected).max() > 5 for other in others)


def test_what_was_learned_is_in_settings_and_card_and_cannot_change_within_a_set(learned, tmp_path, caplog):
    folder = tmp_path / "set"
    warn_once.cache_clear()
    draw(learned, folder)
    hashes = {"learned_lora_sha256": sha256(learned / LORA), "class_embeds_sha256": sha256(learned / CLASS_EMBEDS)}
    assert settings_of(folder) == settings_of(folder) | hashes
    assert "`, its LoRA and a token for each class, learned from" in (folder / "README.md").read_text()
    before = shard_hashes(folder)
    (folder / "data/train-00000.parquet").unlink()
    draw(learned, folder)
    assert shard_hashes(folder) == before and not caplog.messages
    plain = ["--prompt_templates", "A {class} photo in the style of {token}"]
    for flags, name in (["--use_learned_lora", "false"], "learned_lora"), (plain, "class_embeds"):
        with pytest.raises(UserError, match=f"{name}_sha256 was [0-9a-f]+, now None"):
            draw(learned, folder, *flags)
    assert caplog.messages == ["--prompt_templates: no prompt has {class_token}, so the class tokens have no effect."]
    draw(learned, tmp_path / "plain", *plain, "--use_learned_lora", "false")
    assert not hashes.keys() & settings_of(tmp_path / "plain").keys()
    assert "`, learned from" in (tmp_path / "plain/README.md").read_text()


def test_class_tokens_fill_captions_and_diverse_templates(learned, tmp_path, capsys):
    lines = [{"label": name, "prompt": f"{{class_token}} {name}, {{token}}"} for name in CLASS_NAMES]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--learned_embeds", str(learned), "--output_dir", str(tmp_path / "set"), "--dry_run", "--batch_size", "1",
             "--num_inference_steps", "1"]  # fmt: skip
    main([*flags, "--prompts_file", str(tmp_path / "captions.jsonl")])
    main([*flags, "--prompt_set", "diverse", "--prompt_templates", "{class_token} {class} {token}"])
    printed = capsys.readouterr().out
    # start, end and two vectors of the token; letters and digits are one token each
    assert f"'{NAMES[1]} green circle, {PLACEHOLDER}' ({1 + 1 + len('greencircle,') + 2 + 1} tokens)" in printed
    assert f"'{NAMES[0]} red square {PLACEHOLDER}, from" in printed


def test_class_tokens_and_contexts_are_in_the_same_prompts(learned, tmp_path):
    contexts = [{"image_sha256": f"{n}", "label": CLASS_NAMES[n], "context": f"place {n}"} for n in range(2)]
    (tmp_path / "contexts.jsonl").write_text("\n".join(map(json.dumps, contexts)))
    draw(learned, tmp_path / "set", "--contexts_file", str(tmp_path / "contexts.jsonl"))
    prompts = load_dataset(str(tmp_path / "set"), split="train")["prompt"]
    assert {name for name in NAMES if any(name in prompt for prompt in prompts)} == set(NAMES)
    assert all(", place " in prompt and PLACEHOLDER in prompt for prompt in prompts)


def damage(folder, name: str, change) -> None:
    """Change the tensors of a file, and its hash in the record as well."""
    save_file({key: change(value) for key, value in load_file(folder / name).items()}, folder / name)
    path = folder / "dsi_config.json"
    record = json.loads(path.read_text())
    record["lora" if name == LORA else "class_tokens"]["sha256"] = sha256(folder / name)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / LORA).unlink(), "the folder has no pytorch_lora_weights.safetensors"),
        (lambda folder: (folder / CLASS_EMBEDS).unlink(), "the folder has no class_embeds.safetensors"),
        (
            lambda folder: save_file({"a": torch.zeros(1)}, folder / LORA),
            "its pytorch_lora_weights.safetensors is not the file that its dsi_config.json names .sha256",
        ),
        (
            lambda folder: damage(folder, LORA, lambda value: value * torch.nan),
            "has NaN or infinite weights .*: the file is damaged",
        ),
        (lambda folder: damage(folder, CLASS_EMBEDS, lambda value: value / 0), "has NaN or infinite embeddings"),
        (
            lambda folder: damage(folder, CLASS_EMBEDS, lambda value: value[:2, :8].clone()),
            r"has 3 class tokens with embeddings of shape \[\(2, 8\)\]; 3 classes .* need \[\(3, 16\)\]",
        ),
    ],
)
def test_damaged_or_foreign_files_are_one_line_before_a_model_loads(change, message, learned, tmp_path, monkeypatch):
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))
    change(learned)
    with pytest.raises(UserError, match=f"^--learned_embeds .*{message}"):
        draw(learned, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_flags_and_placeholders_without_effect_are_refused(token_dir, learned, tmp_path):
    for token, flags, message in (
        (token_dir, ["--use_learned_lora", "false"], "--use_learned_lora false: .* has no LoRA; leave"),
        (learned, ["--use_learned_lora", "false", "--use_style_token", "false"], "does nothing with --use_style_token"),
        (token_dir, ["--prompt_templates", TEMPLATE], r"has \{class_token\}, but there are no class tokens"),
        (learned, ["--prompt_templates", TEMPLATE, "--use_style_token", "false"], "there are no class tokens"),
        (learned, ["--lora", str(learned)], "^--lora .* is the LoRA of --learned_embeds .*, which is fused already"),
        (learned, ["--init_images", "real", "--strength", "0.5", "0.5"], "^--strength 0.5 0.5: duplicate values"),
        (
            token_dir,
            ["--num_inference_steps", "7", "--init_images", "real", "--strength", "0.1"],
            "^--strength 0.1: less than one of --num_inference_steps 7; must be at least 0.15.",
        ),
    ):
        with pytest.raises(UserError, match=message):
            draw(token, tmp_path / "set", *flags)
