"""train_dsi.py with a LoRA adapter and class tokens, in process, on tiny models of the real classes."""

import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

import train_dsi
from tests.card_code import run_python
from tests.conftest import read_rows
from tests.short_memory import limit_memory
from tests.test_resume_dsi import Killed, kill, read_learned
from utils.cli.errors import UserError
from utils.cli.records import read_record
from utils.style import monitor, token
from utils.style.base_models import BaseModel, open_base_model
from utils.style.families import CLASS_EMBEDS, LORA_WEIGHTS
from utils.style.forecast import DsiRun, count_training
from utils.style.lora import LoraSettings

pytest_plugins = ["tests.style.fixtures"]
__all__ = ["kill"]  # a fixture
LORA = {"use_peft": True, "lora_r": 4, "lora_learning_rate": 0.02}
ALL = LORA | {"lora_alpha": 10, "lora_text_encoder": True, "class_tokens": True}


@pytest.fixture
def denoisers(monkeypatch) -> list:
    """The denoiser of each run, with what it learned."""
    found, original = [], train_dsi.open_monitor
    monkeypatch.setattr(train_dsi, "open_monitor", lambda *args: (found.append(args[3]), original(*args))[1])
    return found


def assert_same(first, second) -> None:
    first, second = read_learned(first), read_learned(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("kind", "keys", "num_parameters"), [
    ("tiny_pipeline_dir", {"<dsi-class>": (3, 16)}, 3264),  # predicts the velocity
    ("tiny_xl_pipeline_dir", {"clip_l": (3, 16), "clip_g": (3, 24)}, 6080),
])  # fmt: skip
def test_a_pipeline_that_loads_the_files_as_in_the_card_predicts_as_the_trained_models(
    run_dsi, denoisers, kind, keys, num_parameters, request, monkeypatch, tmp_path, capsys
):
    health = run_dsi(pretrained_model_name_or_path=request.getfixturevalue(kind), num_vectors=2, **ALL)
    style = tmp_path / "style"
    assert {name: tuple(rows.shape) for name, rows in load_file(style / CLASS_EMBEDS).items()} == keys
    record = read_record(style / "dsi_config.json")
    assert record["prompt_templates"] == ["A {class_token} {class} photo in the style of {token}"]
    assert record["class_tokens"]["names"] == ["<dsi-class-0>", "<dsi-class-1>", "<dsi-class-2>"]
    assert record["lora"]["num_parameters"] == num_parameters
    assert f"rank 4 (alpha 10, {num_parameters:,} parameters)" in (card := (style / "README.md").read_text())
    assert "- lora\n---" in card
    assert "token with LoRA" in capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    pipe = run_python(card)["pipe"]
    prompt = "A <dsi-class-1> green circle photo in the style of <dsi-style>"
    assert f'pipe("{prompt.replace("1> green circle", "0> red square")}")' in card
    encoded = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    [denoiser] = denoisers
    with torch.no_grad():
        conditioning = denoiser.encode_distinct(torch.tensor([0]), torch.tensor([1]))
        arguments = token.unet_arguments(conditioning, 32, torch.float32)
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        theirs = pipe.unet(latents, 7, **arguments | {"encoder_hidden_states": encoded[0]}).sample
        ours = denoiser.unet(latents, 7, **arguments).sample
        with denoiser.lora.turned_off():
            without = denoiser.unet(latents, 7, **arguments).sample
    assert torch.equal(encoded[0], conditioning["encoder_hidden_states"])
    if "text_embeds" in conditioning:
        assert torch.equal(encoded[2], conditioning["text_embeds"])
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert (ours - without).abs().max() > 1e-3
    assert health["loss_trained_token"] != health["loss_token_without_lora"]


def test_only_what_is_asked_for_is_trained_and_class_rows_start_from_their_noun(run_dsi, denoisers, tmp_path):
    """If the noun is a single token; else they start from the style token's word."""
    (tmp_path / "names.yaml").write_text("red_square: s\ngreen circle: z\nblue-stripe: two words\n")
    flags = {"class_names_file": tmp_path / "names.yaml", "learning_rate": 1e-12, "max_train_steps": 1}
    run_dsi(class_tokens=True, **flags)
    [encoder] = [denoiser.encoder for denoiser in denoisers]
    vocabulary = open_base_model(str(denoisers[0].base_model.source.name), "--model").load_tokenizers()[0].get_vocab()
    table = encoder.style_tokens[0].table.weight
    start = torch.stack([table[vocabulary[word]] for word in ("s</w>", "z</w>", "style</w>")])
    assert torch.allclose(load_file(tmp_path / "style" / CLASS_EMBEDS)["<dsi-class>"], start, atol=1e-6)
    assert not (tmp_path / "style" / LORA_WEIGHTS).exists()
    assert "lora" not in read_record(tmp_path / "style" / "dsi_config.json")

    run_dsi(use_peft=True, lora_target_modules="attn2.to_k", output_dir=tmp_path / "lora")
    names = set(load_file(tmp_path / "lora" / LORA_WEIGHTS))
    assert names and all(re.search(r"^unet\..*attn2\.to_k\.lora", name) for name in names)
    assert not (tmp_path / "lora" / CLASS_EMBEDS).exists()
    trained = {name for name, value in denoisers[1].unet.named_parameters() if value.requires_grad}
    assert trained and all("attn2.to_k.lora_" in name for name in trained)


def test_a_killed_run_that_is_resumed_equals_one_that_was_left_alone_and_keeps_its_best_weights(
    run_dsi, kill, monkeypatch, tmp_path, capsys
):
    """The loss rises after the first steps; the best weights are from before the kill."""
    monkeypatch.setattr(monitor, "MIN_STEPS_BETWEEN_LOOKS", 2)
    monkeypatch.setattr(monitor, "NUM_LOOKS", 100)
    flags = {"max_train_steps": 9, "checkpointing_steps": 3, "early_stopping": False, "train_batch_size": 4}
    flags |= ALL | {
        "lora_learning_rate": 1.0,
        "lr_scheduler": "linear",
        "lr_warmup_steps": 9,
    }
    whole = run_dsi(output_dir=tmp_path / "whole", **flags)
    record = read_record(tmp_path / "whole" / "dsi_config.json")
    assert record["overfitted"]["last_step"] == 9, record["held_out_losses"]
    best = record["overfitted"]["best_step"]
    losses = record["held_out_losses"]
    assert min(losses, key=losses.get) == str(best) and best < 6
    assert record["health"]["loss_trained_token"] == pytest.approx(losses[str(best)], abs=1e-5)
    assert f"(overfitted): the weights of step {best} are kept." in capsys.readouterr().out
    assert f"**The weights are those of step {best}**" in (tmp_path / "whole" / "README.md").read_text()

    kill(train_dsi, "denoising_loss", 8)
    with pytest.raises(Killed):
        run_dsi(**flags)
    assert run_dsi(resume_from_checkpoint="latest", **flags) == whole
    assert_same(tmp_path / "whole", tmp_path / "style")
    assert_same(tmp_path / "whole" / "checkpoint-6", tmp_path / "style" / "checkpoint-6")
    resumed = read_record(tmp_path / "style" / "dsi_config.json")
    assert resumed == record


def test_a_token_that_learns_nothing_beside_its_adapter_starts_from_another_word_with_a_fresh_one(
    run_dsi, monkeypatch, tmp_path
):
    monkeypatch.setattr(monitor, "MIN_STEPS_BETWEEN_LOOKS", 2)
    monkeypatch.setattr(monitor, "NUM_LOOKS", 100)
    monkeypatch.setattr(token, "INITIALIZER_WORDS", ("style", "s"))
    flags = LORA | {"max_train_steps": 5, "early_stopping": False, "learning_rate": 1e-12, "train_batch_size": 4}
    assert run_dsi(**flags)["token_learned"]  # with the adapter
    record = read_record(tmp_path / "style" / "dsi_config.json")
    assert record["num_restarts"] == 1
    run_dsi(**flags, initializer_token=record["initializer_token"], output_dir=tmp_path / "alone")
    assert_same(tmp_path / "alone", tmp_path / "style")


@pytest.mark.soak  # without an adapter: test_dsi_memory.py
def test_a_step_is_the_same_in_smaller_parts_and_with_gradient_checkpointing(run_dsi, tmp_path):
    flags = LORA | {"train_batch_size": 4, "max_train_steps": 2}
    run_dsi(**flags, output_dir=tmp_path / "whole")
    with limit_memory(UNet2DConditionModel, 0.5) as sizes:
        run_dsi(**flags)
    assert sizes[:3] == [4, 2, 1]  # at last with gradient checkpointing
    first, second = read_learned(tmp_path / "whole"), read_learned(tmp_path / "style")
    assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in first)


def test_the_adapter_is_float32_with_a_model_in_half_precision(run_dsi, denoisers, tmp_path):
    run_dsi(**ALL, mixed_precision="bf16", max_train_steps=1, num_validation_images=1)
    kinds = {".lora_" in name: value.dtype for name, value in denoisers[-1].unet.named_parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    assert {value.dtype for value in read_learned(tmp_path / "style").values()} == {torch.float32}


def test_a_run_without_the_flags_records_nothing_of_them_and_is_not_taken_for_one_with_them(run_dsi, tmp_path):
    run_dsi(max_train_steps=1)
    options = read_record(tmp_path / "style" / "run_config.json")["options"]
    assert not [name for name in options if "lora" in name or name in ("use_peft", "class_tokens")]
    assert [rows.shape for rows in read_rows(tmp_path / "style")] == [(1, 16)]
    with pytest.raises(UserError, match="other options .use_peft was None, now True"):
        run_dsi(max_train_steps=1, use_peft=True)
    run_dsi(max_train_steps=1, use_peft=True, overwrite_output_dir=True)
    with pytest.raises(UserError, match="other options .use_peft was True, now None"):
        run_dsi(max_train_steps=1)


@pytest.mark.parametrize(("flags", "message"), [
    ({"lora_r": 8}, "--lora_r 8: does nothing without --use_peft"),
    ({"use_peft": True, "lora_r": 0}, "--lora_r 0: must be above 0"),
    ({"use_peft": True, "lora_target_modules": "to_z"}, "--lora_target_modules 'to_z': no such layer in the U-Net; "
     "layers that can: conv_in, linear_1, linear_2, .*to_q, to_k, to_v, to_out.0,"),
    ({"use_peft": True, "lora_r": 100_000}, "^--lora_r 100000: above the rank of every layer to adapt .at most "),
    ({"use_peft": True, "lora_target_modules": "attn1"}, "'attn1': .*attn1 cannot take an adapter; layers that"),
    ({"class_tokens": True, "prompt_templates": "{class} {token}"}, "has no {class_token}; try 'A {class_token} "),
    ({"prompt_templates": "{class_token} {class} {token}"}, "has {class_token}, but there are no class tokens"),
    ({"class_tokens": True, "placeholder_token": "<dsi-class-1>"}, "--class_tokens: the tokenizer has tokens named as"),
    ({"class_tokens": True, "include_class_name": False}, "--class_tokens: does nothing without --include_class_name"),
])  # fmt: skip
def test_bad_input_is_one_line_before_a_model_loads(run_dsi, flags, message, monkeypatch, tmp_path):
    monkeypatch.setattr(BaseModel, "_load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=message):
        run_dsi(**flags)
    assert not (tmp_path / "style").exists()


def test_memory_is_counted_with_what_is_trained(tiny_xl_pipeline_dir):
    base_model = open_base_model(str(tiny_xl_pipeline_dir), "--pretrained_model_name_or_path")

    def count(**settings):
        return count_training(base_model, DsiRun(32, 2, torch.bfloat16, **settings), False, train_dsi.denoising_loss)

    plain, adapted = count(), count(num_classes=5, lora=LoraSettings(r=4, text_encoder=True))
    number = 6080 + 5 * (16 + 24)  # of the adapter and of the class tokens, see above
    assert adapted.weights - plain.weights == adapted.optimizer // 2 - plain.optimizer // 2 == 4 * number
    unused = 4 * 4 * 2 * 4 * 16  # the last layer of the first text encoder, which XL does not use
    assert adapted.gradients - plain.gradients == 4 * number - unused
    assert adapted.activations > plain.activations
