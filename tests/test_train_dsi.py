"""train_dsi.py end to end, in process, on tiny models of the real classes."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_dsi
from tests.conftest import CLASS_NAMES, read_rows, save_class_folders
from tests.style.pipelines import change_config, change_scheduler
from utils.cli.errors import UserError
from utils.cli.records import read_record
from utils.data.image_set import RealImagesRecord
from utils.data.real_images import load_for_folds
from utils.style import monitor, token
from utils.style.base_models import BaseModel

pytest_plugins = ["tests.style.fixtures", "tests.synthesis.fixtures"]


def spy_on_loading(monkeypatch) -> list[tuple]:
    """Return a list of the method, the model and its loaded weights for each model that `BaseModel` will load."""
    loaded = []
    for name in ("load_vae", "load_unet", "load_text_encoders"):
        original = getattr(BaseModel, name)

        def load(self, *args, name=name, original=original):
            models = original(self, *args)
            for model in models if isinstance(models, list) else [models]:
                loaded.append((name, model, {key: value.clone() for key, value in model.state_dict().items()}))
            return models

        monkeypatch.setattr(BaseModel, name, load)
    return loaded


def test_xl_learns_a_row_per_encoder_and_all_other_weights_stay_bit_equal(
    run_dsi, tiny_xl_pipeline_dir, monkeypatch, tmp_path
):
    loaded = spy_on_loading(monkeypatch)
    flags = {"pretrained_model_name_or_path": tiny_xl_pipeline_dir, "num_validation_images": 2, "num_vectors": 2}
    health = run_dsi(draws_figures=True, **flags)
    assert len(loaded) >= 4  # both text encoders, U-Net, VAE
    changed = []
    for _, model, before in loaded:
        for name, value in model.state_dict().items():
            if name.endswith("token_embedding.rows"):
                changed.append(value)
            else:
                assert torch.equal(value, before[name.replace("token_embedding.table", "token_embedding")]), name
    saved = read_rows(tmp_path / "style")
    assert [rows.shape for rows in saved] == [(2, 16), (2, 24)]
    assert all(torch.equal(*rows) and not torch.equal(*rows[0]) for rows in zip(saved, changed, strict=True))
    assert len(health["embeddings"]) == 2
    assert read_record(tmp_path / "style" / "dsi_config.json")["pipeline_class"] == "StableDiffusionXLPipeline"
    card = (tmp_path / "style" / "README.md").read_text()
    for number, key in (("", "clip_l"), ("_2", "clip_g")):
        line = f'pipe.load_textual_inversion(embeds["{key}"], token, text_encoder=pipe.text_encoder{number}, '
        assert line + f"tokenizer=pipe.tokenizer{number})" in card
    assert (tmp_path / "style" / "style.png").stat().st_size > 1000


def test_the_record_holds_what_the_next_step_needs(run_dsi, tiny_pipeline_dir, real_images_dir, tmp_path):
    run_dsi(draws_figures=True, num_shots=2, few_shot_seed=1)
    record = read_record(tmp_path / "style" / "dsi_config.json")
    assert record["base_model"] == {"id": str(tiny_pipeline_dir), "revision": None}
    assert record["class_names"] == CLASS_NAMES
    assert record["prompt_nouns"] == ["red square", "green circle", "blue-stripe"]
    assert record["resolution"] == 32
    assert record["real_images"]["dataset_name"] == str(real_images_dir)
    assert (record["real_images"]["num_shots"], record["real_images"]["few_shot_seed"]) == (2, 1)
    assert len(record["train_indices"]) == 6
    assert record["health"]["images"] == "training images"
    assert record["held_out_losses"] == {"3": record["health"]["loss_trained_token"]}
    for name in ("README.md", "training.png", "run_config.json"):
        assert (tmp_path / "style" / name).stat().st_size > 100
    assert "style.png" not in (tmp_path / "style" / "README.md").read_text()


def test_a_token_of_a_fold_has_not_seen_its_test_images_and_records_the_fold(run_dsi, real_images_dir, tmp_path):
    run_dsi(fold="2/4", fold_seed=1)
    record = read_record(tmp_path / "style" / "dsi_config.json")
    assert (record["real_images"]["fold"], record["real_images"]["fold_seed"]) == ("2/4", 1)
    folds = load_for_folds(RealImagesRecord(str(real_images_dir)), 4)
    trained, tested = folds.split("2/4", 1)
    assert set(record["train_indices"]) <= set(trained) and not set(record["train_indices"]) & set(tested)


MEAN, STD, SCALE = [-0.4, 0.3, 0.2, -0.1], [0.8, 1.2, 0.5, 2.0], 0.5


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
def test_the_first_loss_equals_that_of_the_pipelines_own_parts(run_dsi, copy_pipeline, monkeypatch, prediction_type):
    """The untrained token is the word 'style'; only the random draws come from the script.

    A model of the image is Stable Diffusion XL whose VAE has statistics: its loss is that of the noise.
    """
    original, batches = train_dsi.denoising_loss, []
    monkeypatch.setattr(train_dsi, "denoising_loss", lambda *args: (batches.append(args[0]), original(*args))[1])
    if prediction_type == "sample":
        statistics = {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": SCALE}
        folder = copy_pipeline("tiny_xl_pipeline_dir", vae=statistics)
        noise = {"beta_start": 0.01, "beta_end": 0.1}
        change_scheduler(folder, "DDIMScheduler", {"prediction_type": "sample", **noise})
        mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (MEAN, STD))
    else:
        change_config((folder := copy_pipeline()) / "scheduler/scheduler_config.json", prediction_type=prediction_type)
        mean, std = 0, 1
    flags = {"pretrained_model_name_or_path": folder, "max_train_steps": 1, "train_batch_size": 6}
    [loss] = run_dsi(**flags)["loss_history"]
    [batch] = batches
    pipe = DiffusionPipeline.from_pretrained(folder)
    nouns = ["red square", "green circle", "blue-stripe"]
    prompts = [f"A {nouns[label]} photo in the style of style" for label in batch["labels"]]
    encoded = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    conditions = {}
    if prediction_type == "sample":
        conditions = {"text_embeds": encoded[2], "time_ids": torch.tensor([[32, 32, 0, 0, 32, 32]] * 6)}
    alphas = pipe.scheduler.alphas_cumprod[batch["timesteps"]].view(-1, 1, 1, 1)
    latents, noise = (batch["latents"] - mean) / std * pipe.vae.config.scaling_factor, batch["noise"]
    noisy_latents = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    with torch.no_grad():
        prediction = pipe.unet(noisy_latents, batch["timesteps"], encoded[0], added_cond_kwargs=conditions).sample
    target = noise
    if prediction_type == "v_prediction":
        target = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
    elif prediction_type == "sample":
        prediction = (noisy_latents - alphas.sqrt() * prediction) / (1 - alphas).sqrt()
    assert loss == pytest.approx((prediction - target).square().mean().item(), rel=1e-3)


def test_a_model_with_other_noise_is_one_line_before_images_are_read(run_dsi, copy_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.style.style_images.load_style_images", lambda *_: pytest.fail("images were read"))
    config = {"sigma_data": 0.5, "prediction_type": "epsilon"}
    change_scheduler(folder := copy_pipeline("tiny_xl_pipeline_dir"), "EDMDPMSolverMultistepScheduler", config)
    with pytest.raises(UserError, match="^--pretrained_model_name_or_path .*copied: its scheduler .*EDM's noise"):
        run_dsi(pretrained_model_name_or_path=folder)
    assert not (tmp_path / "style").exists()


@pytest.mark.parametrize(("random_flip", "copies"), [(True, {1, 2}), (False, {1})])
def test_mirrored_images_are_used_only_with_random_flip(run_dsi, random_flip, copies, tmp_path):
    run_dsi(random_flip=random_flip)  # held-out images have one copy
    folders = (tmp_path / "latents").glob("*/latents.json")
    assert {json.loads(path.read_text())["num_copies"] for path in folders} == copies


def test_the_token_depends_on_the_seed_and_not_on_how_its_steps_are_computed(run_dsi, monkeypatch, tmp_path):
    def run(**flags):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        losses = run_dsi(output_dir=folder, **{"train_batch_size": 4} | flags)["loss_history"]
        return read_rows(folder)[0], losses

    rows, losses = run()
    loaded = spy_on_loading(monkeypatch)
    checkpointed = []
    original = UNet2DConditionModel.enable_gradient_checkpointing
    monkeypatch.setattr(
        UNet2DConditionModel, "enable_gradient_checkpointing", lambda self: (checkpointed.append(self), original(self))
    )
    assert torch.equal(run(dataloader_num_workers=1, gradient_checkpointing=True)[0], rows)
    assert len(checkpointed) == 1
    assert [name for name, *_ in loaded] == ["load_unet", "load_text_encoders"]  # the latents are there
    accumulated, accumulated_losses = run(train_batch_size=2, gradient_accumulation_steps=2)
    assert accumulated_losses == pytest.approx(losses, rel=1e-5)
    assert torch.allclose(accumulated, rows, atol=1e-4)  # steps of about 0.1
    assert not torch.equal(run(seed=1)[0], rows)
    assert "load_vae" not in [name for name, *_ in loaded]
    run(resolution=24)
    assert "load_vae" in [name for name, *_ in loaded]


def test_a_compiled_unet_gives_the_same_token(run_dsi, tiny_pipeline_dir, monkeypatch, tmp_path):
    model = shutil.copytree(tiny_pipeline_dir, tmp_path / "small-unet")
    UNet2DConditionModel(
        sample_size=16, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    ).save_pretrained(model / "unet")  # fmt: skip
    run_dsi(output_dir=tmp_path / "plain", pretrained_model_name_or_path=model)
    backends = []
    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, backend: (backends.append(backend), original(*args, backend=backend))[1]
    )
    flags = {"torch_compile": True, "torch_compile_backend": "aot_eager", "pretrained_model_name_or_path": model}
    run_dsi(output_dir=tmp_path / "compiled", **flags)
    assert torch.allclose(*(read_rows(tmp_path / name)[0] for name in ("plain", "compiled")), atol=1e-4)
    assert backends == ["aot_eager"]


def test_rows_stay_float32_with_a_model_in_half_precision(run_dsi, tiny_xl_pipeline_dir, monkeypatch, tmp_path):
    loaded = spy_on_loading(monkeypatch)
    flags = {"pretrained_model_name_or_path": tiny_xl_pipeline_dir, "num_validation_images": 1}
    history = run_dsi(mixed_precision="bf16", **flags)["loss_history"]
    weights = [weight for name, model, _ in loaded if name != "load_vae" for weight in model.named_parameters()]
    assert {weight.dtype for name, weight in weights if not name.endswith(".rows")} == {torch.bfloat16}
    assert {model.dtype for name, model, _ in loaded if name == "load_vae"} == {torch.float32}
    assert np.isfinite(history).all()
    for rows in read_rows(tmp_path / "style"):
        assert rows.dtype == torch.float32
        assert not torch.equal(rows, rows.bfloat16().float())


def test_a_token_that_learned_nothing_is_reported_and_noted_in_the_card(run_dsi, capsys, tmp_path):
    assert run_dsi(draws_figures=True, learning_rate=1e-12)["token_learned"] is False
    assert "WARNING: the token learned nothing" in capsys.readouterr().out
    assert "This token learned nothing" in (tmp_path / "style" / "README.md").read_text()


def test_the_token_starts_from_the_best_word_and_from_the_next_one_if_it_learns_nothing(
    run_dsi, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(token, "INITIALIZER_WORDS", ("style", "s", "z"))
    alone = {word: run_dsi(output_dir=tmp_path / f"of-{word}", initializer_token=word) for word in ("style", "s", "z")}
    losses = {word: health["loss_untrained_token"] for word, health in alone.items()}
    best, second, last = sorted(losses, key=losses.get)
    capsys.readouterr()
    run_dsi()
    assert f"The token starts from '{best}' (losses: {best} {losses[best]:.4f}, {second} " in capsys.readouterr().out
    record = read_record(tmp_path / "style" / "dsi_config.json")
    assert (record["initializer_token"], record["num_restarts"]) == (best, 0)
    assert record["initializer_losses"] == {word: losses[word] for word in (best, second, last)}
    assert all(map(torch.equal, read_rows(tmp_path / "style"), read_rows(tmp_path / f"of-{best}")))

    flags = {"max_train_steps": 25, "learning_rate": 1e-12, "checkpointing_steps": 5, "output_dir": tmp_path / "again"}
    health = run_dsi(**flags)
    printed = capsys.readouterr().out
    assert f"The token learned nothing from '{best}' in 20 steps; it starts again from '{second}'." in printed
    assert f"nothing from '{second}' in 20 steps; it starts again from '{last}'" in printed
    assert printed.count("starts again") == 2
    record = read_record(tmp_path / "again" / "dsi_config.json")
    assert (record["initializer_token"], record["num_restarts"]) == (last, 2)
    assert record["num_train_steps"] == len(health["loss_history"]) == 25
    assert health["loss_untrained_token"] == losses[last]
    run_dsi(**flags | {"output_dir": tmp_path / "alone", "initializer_token": last})
    assert all(map(torch.equal, read_rows(tmp_path / "again"), read_rows(tmp_path / "alone")))
    traces = sorted(path.name for path in (tmp_path / "again").glob("checkpoint-*"))
    assert traces == [f"checkpoint-{step}" for step in (10, 15, 20, 5)]


def test_training_ends_early_if_the_loss_has_plateaued_unless_told_otherwise(run_dsi, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(monitor, "is_clear_gain", lambda gain: True)
    monkeypatch.setattr(monitor, "has_plateaued", lambda looks: len(looks) > 2)
    health = run_dsi(max_train_steps=40)
    assert len(health["loss_history"]) == 20
    assert "Training ends at step 20 of 40: the loss on " in capsys.readouterr().out
    record = read_record(tmp_path / "style" / "dsi_config.json")
    assert (record["num_train_steps"], record["max_train_steps"]) == (20, 40)
    assert list(record["held_out_losses"]) == ["10", "20"]
    assert "in 20 steps of at most 40, after which" in (tmp_path / "style" / "README.md").read_text()
    health = run_dsi(max_train_steps=40, early_stopping=False, output_dir=tmp_path / "whole")
    assert len(health["loss_history"]) == 40


def test_class_folders_train_and_a_damaged_image_is_an_error_or_left_out_and_counted(run_dsi, tmp_path, capsys):
    class_folders = save_class_folders(tmp_path / "photos", {"cat": 6, "dog": 6})
    flags = {"dataset_name": None, "train_dir": class_folders, "output_dir": tmp_path / "whole"}
    assert run_dsi(**flags)["images"] == "validation images"
    record = read_record(tmp_path / "whole" / "dsi_config.json")
    assert record["class_names"] == ["cat", "dog"]
    assert record["real_images"]["train_dir"] == str(class_folders)
    assert f"`{class_folders}`" in (tmp_path / "whole" / "README.md").read_text()

    paths = sorted(class_folders.glob("*/*.png"))
    for row in record["train_indices"][:2]:
        paths[row].write_bytes(paths[row].read_bytes()[:200])
    flags["output_dir"] = tmp_path / "style"
    with pytest.raises(UserError, match="row .*, column 'image': damaged .*--skip_bad_images"):
        run_dsi(**flags)
    assert not (tmp_path / "style").exists()
    assert run_dsi(**flags, skip_bad_images=True)["num_skipped_images"] == 2
    assert "2 damaged images were left out" in capsys.readouterr().out
    flags |= {"num_shots": 4, "skip_bad_images": True, "output_dir": tmp_path / "few"}
    few = run_dsi(**flags)
    seen = read_record(tmp_path / "few" / "dsi_config.json")["train_indices"]
    assert few["num_images"] == len(seen) == 8 - few["num_skipped_images"]


def test_prompts_come_from_files_and_class_names_are_corrected(run_dsi, monkeypatch, tmp_path):
    prompts, check = [], token.check_prompt_lengths
    monkeypatch.setattr(token, "check_prompt_lengths", lambda *args: (prompts.extend(args[1]), check(*args)))
    (tmp_path / "names.yaml").write_text("blue-stripe: band of blue\n")
    (tmp_path / "templates.txt").write_text("# more\n{class} by {token}\n")
    run_dsi(class_names_file=tmp_path / "names.yaml", prompt_templates_file=tmp_path / "templates.txt")
    assert prompts[2::3] == ["A band of blue photo in the style of <dsi-style>", "band of blue by <dsi-style>"]
    record = read_record(tmp_path / "style" / "dsi_config.json")
    assert record["prompt_nouns"] == ["red square", "green circle", "band of blue"]
    assert record["prompt_templates"] == ["A {class} photo in the style of {token}", "{class} by {token}"]


def test_plain_textual_inversion_has_no_class_names_and_can_be_generated_with(run_dsi, tmp_path):
    from utils.synthesis.sources import read_token_sources

    run_dsi(include_class_name=False)
    record = read_record(tmp_path / "style" / "dsi_config.json")
    assert record["prompt_templates"] == ["A photo in the style of {token}"]
    [template] = read_token_sources(str(tmp_path / "style")).prompt_templates
    assert template == "A {class} photo in the style of {token}"


def test_the_picture_is_drawn_on_the_way_and_is_what_a_pipeline_draws_from_the_saved_token(
    run_dsi, tiny_pipeline_dir, monkeypatch, tmp_path
):
    drawn = []
    monkeypatch.setattr(monitor, "draw_rows", lambda path, rows, titles: drawn.append((path, rows, titles)))
    flags = {"max_train_steps": 4, "validation_steps": 2, "num_validation_images": 2}
    run_dsi(**flags, num_vectors=2, learning_rate=0.5)
    assert [(path.name, titles) for path, _, titles in drawn] == [("style.png", ["red square", "blue-stripe"])] * 2
    first, last = ({name: np.stack(images).astype(int) for name, images in rows.items()} for _, rows, _ in drawn)
    assert {name: len(images) for name, images in last.items()} == {"real": 2, "without token": 2, "with token": 2}
    assert np.array_equal(first["without token"], last["without token"])
    assert np.abs(last["with token"] - last["without token"]).max() > 0
    assert np.abs(last["with token"] - first["with token"]).max() > 0  # the token has moved

    embeds = load_file(tmp_path / "style" / "learned_embeds.safetensors")
    kinds = {name: (rows.dtype, rows.shape) for name, rows in embeds.items()}
    assert kinds == {"<dsi-style>": (torch.float32, (2, 16))}
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.load_textual_inversion(tmp_path / "style")
    image = pipe("A red square photo in the style of <dsi-style>", generator=torch.Generator().manual_seed(0),
                 num_inference_steps=25, guidance_scale=3.0, height=32, width=32).images[0]  # fmt: skip
    assert np.abs(np.asarray(image, dtype=int) - last["with token"][0]).max() <= 1


def test_tensorboard_gets_losses_learning_rate_and_picture(run_dsi, tmp_path):
    history = run_dsi(report_to="tensorboard", max_train_steps=12, num_validation_images=1)["loss_history"]
    events = EventAccumulator(str(tmp_path / "style" / "logs" / "train_dsi")).Reload()
    logged = events.Scalars("loss")
    assert [event.step for event in logged] == [10, 12]
    assert logged[0].value == pytest.approx(history[9])
    assert events.Scalars("lr")[0].value == pytest.approx(0.1)
    assert "held_out_loss" in events.Tags()["scalars"]
    assert [event.step for event in events.Images("style")] == [12]


@pytest.mark.parametrize(("flags", "message"), [
    ({"dataset_name": None}, "--dataset_name is missing"),
    ({"dataset_name": "./nowhere"}, "--dataset_name ./nowhere: neither an existing folder"),
    ({"pretrained_model_name_or_path": "user/nothing"}, "user/nothing: neither a folder nor a public model"),
    ({"label_column_name": "colour"}, "--label_column_name colour: not in"),
    ({"placeholder_token": "style</w>"}, "--placeholder_token style</w>: style</w> is already in"),
    ({"placeholder_token": "my style token"}, "not found by the tokenizer in a prompt"),
    ({"placeholder_token": ""}, "not found by the tokenizer in a prompt"),
    ({"initializer_token": "two words"}, "--initializer_token two words: must be one token, got"),
    ({"initializer_token": ""}, "must be one token, got 0"),
    ({"prompt_templates": "a {class}"}, "--prompt_templates 'a {class}': has no {token}"),
    ({"prompt_templates": "a {token}"}, "--prompt_templates 'a {token}': has no {class}"),
    ({"prompt_templates": "a {class} {token}", "include_class_name": False}, "--include_class_name false: templ"),
    ({"prompt_templates": "a {class} " + "x" * 80 + " {token}"}, "the text encoder takes 77"),
    ({"prompt_templates_file": "nowhere.txt"}, "--prompt_templates_file nowhere.txt: cannot be read"),
    ({"class_names_file": "nowhere.txt"}, "--class_names_file nowhere.txt: cannot be read"),
    ({"num_shots": 100}, r"--num_shots 100: class 'red_square' of .* has 1\d training images"),
    ({"resolution": 30}, "--resolution 30: must be a multiple of 8"),
    ({"seed": -1}, "--seed -1: must be 0 or above"),
    ({"lr_scheduler": "steep"}, "--lr_scheduler.*: invalid choice: 'steep'"),
    ({"lr_warmup_steps": 5}, "does nothing with --lr_scheduler constant; give another --lr_scheduler .constant_with_"),
    ({"report_to": "diary"}, "--report_to diary: not installed"),
    ({"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint nowhere: not a checkpoint"),
    ({"max_train_step": 3}, "unknown flag, did you mean --max_train_steps"),
])  # fmt: skip
def test_bad_input_is_one_line_before_anything_loads_or_is_written(run_dsi, flags, message, tmp_path, monkeypatch):
    loaded = spy_on_loading(monkeypatch)
    with pytest.raises(UserError, match=message):
        run_dsi(**flags)
    assert loaded == []
    assert not (tmp_path / "style").exists()


@pytest.mark.parametrize("max_train_steps", [1, 3])
def test_a_token_that_diverges_is_one_line_and_is_not_written(run_dsi, tmp_path, max_train_steps):
    with pytest.raises(UserError, match=r"^--learning_rate 1e\+30: .* at step \d or shortly before; try a lower rate"):
        run_dsi(learning_rate=1e30, max_train_steps=max_train_steps, checkpointing_steps=1)
    left = {path.name for path in (tmp_path / "style").iterdir()}
    assert not left & {"learned_embeds.safetensors", "dsi_config.json"}


def test_the_checkpoint_before_a_nan_is_kept_and_resumed_from(run_dsi, tmp_path, monkeypatch):
    flags = {"checkpointing_steps": 1, "checkpoints_total_limit": 1}
    run_dsi(output_dir=tmp_path / "whole", **flags)
    denoising_loss, calls = train_dsi.denoising_loss, []

    def spoiled(*args):
        calls.append(None)
        return denoising_loss(*args) * (float("nan") if len(calls) == 2 else 1)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="the loss is nan at step 2 or shortly"):
        patch.setattr(train_dsi, "denoising_loss", spoiled)
        run_dsi(**flags)
    assert (tmp_path / "style" / "checkpoint-1").is_dir() and not (tmp_path / "style" / "checkpoint-2").exists()
    run_dsi(**flags, resume_from_checkpoint="latest")
    for whole, resumed in zip(read_rows(tmp_path / "whole"), read_rows(tmp_path / "style"), strict=True):
        assert torch.equal(whole, resumed)


def test_a_finished_token_is_not_overwritten_without_the_flag(run_dsi, tmp_path, capsys):
    health = run_dsi()
    before = (tmp_path / "style" / "learned_embeds.safetensors").read_bytes()
    capsys.readouterr()
    again = run_dsi(resume_from_checkpoint="latest")
    assert again == {name: value for name, value in health.items() if name != "loss_history"}
    assert "is already finished, nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a style token made with other options \\(seed was 0, now 5\\)"):
        run_dsi(seed=5)
    with pytest.raises(UserError, match="initializer_token was auto"):
        run_dsi(initializer_token="s")
    assert (tmp_path / "style" / "learned_embeds.safetensors").read_bytes() == before
    (tmp_path / "style" / "style.png").touch()
    run_dsi(seed=5, overwrite_output_dir=True)
    assert not (tmp_path / "style" / "style.png").exists()  # of the token that was replaced
    assert (tmp_path / "style" / "learned_embeds.safetensors").read_bytes() != before


def test_a_dry_run_prints_what_is_needed_and_writes_nothing(run_dsi, tmp_path, capsys):
    needs = run_dsi(dry_run=True, train_batch_size=3, max_train_steps=50)
    printed = capsys.readouterr().out
    assert not (tmp_path / "style").exists() and not (tmp_path / "latents").exists()
    assert re.search(r"Memory: needs about [\d.]+ GiB at batch 3, [\d.]+ with --gradient_checkpointing; [\d.]+ are "
                     r"free on this machine\.", printed)  # fmt: skip
    assert "150 images in 50 steps" in printed and "latent cache" in printed
    assert needs["hours"] > 0 and needs["images_per_second"] > 0
