"""train_dsi.py end to end, in process, on tiny models of the real classes."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_dsi
from tests.conftest import CLASS_NAMES, read_rows, save_image_set
from utils.cli.errors import UserError
from utils.cli.records import read_record
from utils.style.base_models import BaseModel

pytest_plugins = ["tests.style.fixtures"]


@pytest.fixture
def copied_pipeline(tiny_pipeline_dir, tmp_path):
    return shutil.copytree(tiny_pipeline_dir, tmp_path / "copied-pipeline")


@pytest.fixture
def class_folders(tmp_path):
    """Class folders with six images of each of two classes, and what people's folders hold besides."""
    rng = np.random.default_rng(0)
    for name, mode in (("cat", "RGB"), ("dog", "L")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(tmp_path / "photos" / name / f"{number}.jpg")
        (tmp_path / "photos" / name / ".DS_Store").write_bytes(b"x")
    return tmp_path / "photos"


def spy_on_loading(monkeypatch) -> list[str]:
    """Return the names of the `BaseModel.load_*` that are called from now on."""
    called = []
    for name in ("load_vae", "load_unet", "load_text_encoders"):
        original = getattr(BaseModel, name)

        def load(self, *args, name=name, original=original):
            called.append(name)
            return original(self, *args)

        monkeypatch.setattr(BaseModel, name, load)
    return called


def test_the_saved_token_loads_in_a_fresh_pipeline_and_changes_the_image(run_dsi, tiny_pipeline_dir, tmp_path):
    run_dsi(num_vectors=2, learning_rate=0.5)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    embeds = load_file(tmp_path / "style" / "learned_embeds.safetensors")
    assert {name: (rows.dtype, rows.shape) for name, rows in embeds.items()} == {
        "<dsi-style>": (torch.float32, (2, 16))
    }
    pipe.load_textual_inversion(tmp_path / "style")

    def draw(prompt):
        return pipe(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images

    with_token, by_word = draw("a bag in the style of <dsi-style>"), draw("a bag in the style of style")
    assert np.abs(with_token - by_word).max() > 1e-4


def test_only_the_tokens_rows_change_all_other_weights_stay_bit_equal(run_dsi, tiny_xl_pipeline_dir, monkeypatch):
    loaded = []
    for name in ("load_unet", "load_text_encoders", "load_vae"):
        original = getattr(BaseModel, name)

        def load(self, *args, original=original):
            models = original(self, *args)
            for model in models if isinstance(models, list) else [models]:
                loaded.append((model, {key: value.clone() for key, value in model.state_dict().items()}))
            return models

        monkeypatch.setattr(BaseModel, name, load)
    run_dsi(pretrained_model_name_or_path=tiny_xl_pipeline_dir)
    assert len(loaded) >= 4  # both text encoders, U-Net, VAE
    num_rows = 0
    for model, before in loaded:
        for name, value in model.state_dict().items():
            if name.endswith("token_embedding.rows"):
                num_rows += 1
            else:
                assert torch.equal(value, before[name.replace("token_embedding.table", "token_embedding")]), name
    assert num_rows == 2


def test_xl_learns_a_row_for_each_encoder(run_dsi, tiny_xl_pipeline_dir, tmp_path):
    flags = {"pretrained_model_name_or_path": tiny_xl_pipeline_dir, "num_validation_images": 2, "num_vectors": 2}
    health = run_dsi(draws_figures=True, **flags)
    assert [rows.shape for rows in read_rows(tmp_path / "style")] == [(2, 16), (2, 24)]
    assert len(health["embeddings"]) == 2
    record = read_record(tmp_path / "style" / "dsi_config.json")
    assert record["pipeline_class"] == "StableDiffusionXLPipeline"
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


def test_the_same_seed_gives_the_same_token_and_another_does_not(run_dsi, tmp_path):
    rows = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_dsi(output_dir=tmp_path / name, seed=seed)
        rows.append(read_rows(tmp_path / name)[0])
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_the_first_loss_is_what_the_pipelines_own_parts_give(run_dsi, tiny_pipeline_dir, monkeypatch):
    """The untrained token is the word 'style'; the script only says what it drew."""
    batches = []
    original = train_dsi.denoising_loss
    monkeypatch.setattr(train_dsi, "denoising_loss", lambda *args: (batches.append(args[0]), original(*args))[1])
    [loss] = run_dsi(draws_figures=True, max_train_steps=1, train_batch_size=6)["loss_history"]
    [batch] = batches
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    nouns = ["red square", "green circle", "blue-stripe"]
    prompts = [f"A {nouns[label]} photo in the style of style" for label in batch["labels"]]
    alphas = pipe.scheduler.alphas_cumprod[batch["timesteps"]].view(-1, 1, 1, 1)
    latents, noise = batch["latents"] * pipe.vae.config.scaling_factor, batch["noise"]
    with torch.no_grad():
        noisy_latents = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
        prediction = pipe.unet(
            noisy_latents, batch["timesteps"], pipe.encode_prompt(prompts, "cpu", 1, False)[0]
        ).sample
    velocity = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
    assert loss == pytest.approx((prediction - velocity).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize(("random_flip", "copies"), [(True, {1, 2}), (False, {1})])
def test_mirrored_images_are_used_only_where_they_are_wanted(run_dsi, random_flip, copies, tmp_path):
    run_dsi(random_flip=random_flip)  # held-out images have one copy
    folders = (tmp_path / "latents").glob("*/latents.json")
    assert {json.loads(path.read_text())["num_copies"] for path in folders} == copies


def test_workers_and_gradient_checkpointing_change_nothing(run_dsi, monkeypatch, tmp_path):
    run_dsi(output_dir=tmp_path / "plain")
    checkpointed = []
    original = UNet2DConditionModel.enable_gradient_checkpointing
    monkeypatch.setattr(
        UNet2DConditionModel, "enable_gradient_checkpointing", lambda self: (checkpointed.append(self), original(self))
    )
    run_dsi(output_dir=tmp_path / "others", dataloader_num_workers=1, gradient_checkpointing=True)
    assert torch.equal(*(read_rows(tmp_path / name)[0] for name in ("plain", "others")))
    assert len(checkpointed) == 1


def test_accumulated_batches_give_the_same_token_as_one_large(run_dsi, tmp_path):
    whole = run_dsi(output_dir=tmp_path / "whole", train_batch_size=4)["loss_history"]
    parts = run_dsi(output_dir=tmp_path / "parts", train_batch_size=2, gradient_accumulation_steps=2)["loss_history"]
    assert whole == pytest.approx(parts, rel=1e-5)
    rows = [read_rows(tmp_path / name)[0] for name in ("whole", "parts")]
    assert torch.allclose(*rows, atol=1e-4)  # steps of about 0.1


def test_a_compiled_unet_gives_the_same_token(run_dsi, copied_pipeline, monkeypatch, tmp_path):
    small_unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    small_unet.save_pretrained(copied_pipeline / "unet")
    model = {"pretrained_model_name_or_path": copied_pipeline}
    run_dsi(output_dir=tmp_path / "plain", **model)
    backends = []
    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, backend: (backends.append(backend), original(*args, backend=backend))[1]
    )
    run_dsi(output_dir=tmp_path / "compiled", torch_compile=True, torch_compile_backend="aot_eager", **model)
    assert torch.allclose(*(read_rows(tmp_path / name)[0] for name in ("plain", "compiled")), atol=1e-4)
    assert backends == ["aot_eager"]


def test_rows_stay_float32_beside_a_model_in_half_precision(run_dsi, monkeypatch, tmp_path):
    dtypes = []
    original = UNet2DConditionModel.forward

    def forward(self, *args, **kwargs):
        dtypes.append(self.dtype)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    history = run_dsi(mixed_precision="bf16", num_validation_images=1)["loss_history"]
    assert set(dtypes) == {torch.bfloat16}
    assert np.isfinite(history).all()
    rows = read_rows(tmp_path / "style")[0]
    assert rows.dtype == torch.float32
    assert not torch.equal(rows, rows.bfloat16().float())


def test_epsilon_models_train_too(run_dsi, copied_pipeline, tiny_pipeline_dir, tmp_path):
    path = copied_pipeline / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "epsilon"}))
    losses = [run_dsi(pretrained_model_name_or_path=model, output_dir=tmp_path / name)["loss_history"]
              for name, model in (("e", copied_pipeline), ("v", tiny_pipeline_dir))]  # fmt: skip
    assert np.isfinite(losses).all()
    assert not np.allclose(*losses)


def test_a_token_that_cannot_learn_is_said_plainly_also_in_the_card(run_dsi, capsys, tmp_path):
    assert run_dsi(draws_figures=True, learning_rate=1e-12)["token_learned"] is False
    assert "WARNING: the token learned nothing" in capsys.readouterr().out
    assert "This token learned nothing" in (tmp_path / "style" / "README.md").read_text()


def test_a_second_run_never_loads_the_vae_and_gives_the_same_token(run_dsi, monkeypatch, tmp_path):
    run_dsi(output_dir=tmp_path / "first")
    called = spy_on_loading(monkeypatch)
    run_dsi(output_dir=tmp_path / "second")
    assert called == ["load_unet", "load_text_encoders"]
    assert torch.equal(*(read_rows(tmp_path / name)[0] for name in ("first", "second")))
    run_dsi(output_dir=tmp_path / "third", resolution=24)
    assert "load_vae" in called


def test_class_folders_train_and_the_record_names_them(run_dsi, class_folders, tmp_path):
    health = run_dsi(dataset_name=None, train_dir=class_folders)
    record = read_record(tmp_path / "style" / "dsi_config.json")
    assert record["class_names"] == ["cat", "dog"]
    assert record["real_images"]["train_dir"] == str(class_folders)
    assert health["images"] == "validation images"
    assert f"`{class_folders}`" in (tmp_path / "style" / "README.md").read_text()


def test_a_damaged_image_is_an_error_or_left_out_and_counted(run_dsi, class_folders, tmp_path, capsys):
    for path in list(class_folders.glob("*/*.jpg"))[:2]:
        path.write_bytes(path.read_bytes()[:200])
    flags = {"dataset_name": None, "train_dir": class_folders}
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
    prompts = []
    original = train_dsi.prepare_prompts

    def prepare(tokenizers, *args):
        nouns, prompt_ids = original(tokenizers, *args)
        prompts.extend(tokenizers[0].decode(ids[0], skip_special_tokens=True) for ids in prompt_ids.training)
        return nouns, prompt_ids

    monkeypatch.setattr(train_dsi, "prepare_prompts", prepare)
    (tmp_path / "names.yaml").write_text("blue-stripe: band of blue\n")
    (tmp_path / "templates.txt").write_text("# more\n{class} by {token}\n")
    run_dsi(class_names_file=tmp_path / "names.yaml", prompt_templates_file=tmp_path / "templates.txt")
    assert [prompt.replace(" ", "") for prompt in prompts[2::3]] == [
        "abandofbluephotointhestyleof<dsi-style>",
        "bandofblueby<dsi-style>",
    ]
    record = read_record(tmp_path / "style" / "dsi_config.json")
    assert record["prompt_nouns"] == ["red square", "green circle", "band of blue"]
    assert record["prompt_templates"] == ["A {class} photo in the style of {token}", "{class} by {token}"]


def test_plain_textual_inversion_has_no_class_names_and_can_be_generated_with(run_dsi, tmp_path):
    from utils.synthesis.sources import read_token_sources

    run_dsi(include_class_name=False)
    assert read_record(tmp_path / "style" / "dsi_config.json")["prompt_templates"] == [
        "A photo in the style of {token}"
    ]
    [template] = read_token_sources(str(tmp_path / "style")).prompt_templates
    assert template == "A {class} photo in the style of {token}"


def test_the_before_after_picture_has_a_row_each_and_is_drawn_on_the_way(run_dsi, monkeypatch, tmp_path):
    from utils.style import pictures

    drawn = []
    monkeypatch.setattr(pictures, "draw_rows", lambda path, rows, titles: drawn.append((path, rows, titles)))
    run_dsi(max_train_steps=4, validation_steps=2, num_validation_images=2, learning_rate=0.5)
    assert len(drawn) == 2
    path, rows, titles = drawn[1]
    assert path.name == "style.png"
    assert titles == ["red square", "blue-stripe"]
    assert {name: len(images) for name, images in rows.items()} == {"real": 2, "without token": 2, "with token": 2}
    as_arrays = {name: np.stack([np.asarray(image, dtype=int) for image in images]) for name, images in rows.items()}
    assert np.array_equal(as_arrays["without token"], np.stack([np.asarray(i) for i in drawn[0][1]["without token"]]))
    assert np.abs(as_arrays["with token"] - as_arrays["without token"]).max() > 0
    before = np.stack([np.asarray(image, dtype=int) for image in drawn[0][1]["with token"]])
    assert np.abs(as_arrays["with token"] - before).max() > 0  # the token has moved


def test_the_picture_is_what_a_pipeline_draws_from_the_saved_token(run_dsi, tiny_pipeline_dir, monkeypatch, tmp_path):
    from diffusers import DPMSolverMultistepScheduler

    from utils.style import pictures

    drawn = []
    monkeypatch.setattr(pictures, "draw_rows", lambda path, rows, titles: drawn.append(rows))
    run_dsi(num_validation_images=1, learning_rate=0.5)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.load_textual_inversion(tmp_path / "style")
    image = pipe("A red square photo in the style of <dsi-style>", generator=torch.Generator().manual_seed(0),
                 num_inference_steps=25, guidance_scale=3.0, height=32, width=32).images[0]  # fmt: skip
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(drawn[0]["with token"][0])).max() <= 1


def test_tensorboard_gets_losses_learning_rate_and_picture(run_dsi, tmp_path):
    history = run_dsi(report_to="tensorboard", max_train_steps=12, num_validation_images=1)["loss_history"]
    events = EventAccumulator(str(tmp_path / "style" / "logs" / "train_dsi")).Reload()
    logged = events.Scalars("loss")
    assert [event.step for event in logged] == [10, 12]
    assert logged[0].value == pytest.approx(history[9])
    assert events.Scalars("lr")[0].value == pytest.approx(0.1)
    assert "held_out_loss" in events.Tags()["scalars"]
    assert [event.step for event in events.Images("style")] == [12]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dataset_name": None}, "--dataset_name is missing"),
        ({"train_dir": "."}, "--train_dir .: not together with --dataset_name"),
        ({"dataset_name": None, "train_dir": "./nowhere"}, "--train_dir ./nowhere: not a directory"),
        ({"dataset_name": "./nowhere"}, "--dataset_name ./nowhere: neither an existing folder"),
        ({"pretrained_model_name_or_path": "user/nothing"}, "user/nothing: neither a folder nor a model repository"),
        ({"pretrained_model_name_or_path": "runwayml/stable-diffusion-v1-5"}, "its mirror is stable-diffusion-v1-5/"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "--pretrained_model_name_or_path ./nowhere: neither"),
        ({"label_column_name": "colour"}, "--label_column_name colour: not in"),
        ({"placeholder_token": "style</w>"}, "--placeholder_token style</w>: the tokenizer has"),
        ({"initializer_token": "two words"}, "--initializer_token two words: is .* tokens"),
        ({"prompt_templates": "a {class}"}, "--prompt_templates 'a {class}': has no {token}"),
        ({"prompt_templates": "a {token}"}, "--prompt_templates 'a {token}': has no {class}"),
        (
            {"prompt_templates": "a {class} {token}", "include_class_name": False},
            "--include_class_name false: template",
        ),
        ({"prompt_templates": "a {class} " + "x" * 80 + " {token}"}, "the text encoder takes 77"),
        ({"prompt_templates_file": "nowhere.txt"}, "--prompt_templates_file nowhere.txt: cannot be read"),
        ({"class_names_file": "nowhere.txt"}, "--class_names_file nowhere.txt: cannot be read"),
        ({"num_shots": 100}, r"--num_shots 100: class 'red_square' of .* has 1\d training images"),
        ({"learning_rate": 0}, "--learning_rate 0.0: must be above 0"),
        ({"learning_rate": "nan"}, "--learning_rate: must be a finite number of at most 1e.30, got nan"),
        ({"resolution": 30}, "--resolution 30: must be a multiple of 8"),
        ({"seed": -1}, "--seed -1: must be 0 or above"),
        ({"lr_scheduler": "steep"}, "--lr_scheduler.*: invalid choice: 'steep'"),
        ({"lr_warmup_steps": 5}, "--lr_scheduler constant has no warm-up"),
        ({"report_to": "diary"}, "--report_to diary: is not installed"),
        ({"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint nowhere: is no checkpoint"),
        ({"max_train_step": 3}, "no such flag, did you mean --max_train_steps"),
    ],
)
def test_bad_input_is_one_line_before_anything_loads_or_is_written(run_dsi, flags, message, tmp_path, monkeypatch):
    called = spy_on_loading(monkeypatch)
    with pytest.raises(UserError, match=message):
        run_dsi(**flags)
    assert called == []
    assert not (tmp_path / "style").exists()


@pytest.mark.parametrize("max_train_steps", [1, 3])
def test_a_token_that_diverges_is_one_line_and_is_not_written(run_dsi, tmp_path, max_train_steps):
    with pytest.raises(UserError, match=r"^--learning_rate 1e\+30: .* at step \d or shortly before; try a lower one"):
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


def test_a_finished_token_is_not_overwritten_unasked(run_dsi, tmp_path, capsys):
    health = run_dsi()
    before = (tmp_path / "style" / "learned_embeds.safetensors").read_bytes()
    capsys.readouterr()
    again = run_dsi(resume_from_checkpoint="latest")
    assert again == {name: value for name, value in health.items() if name != "loss_history"}
    assert "is finished, nothing is done again" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a style token made with other options \\(seed was 0, now 5\\)"):
        run_dsi(seed=5)
    with pytest.raises(UserError, match="initializer_token was style"):
        run_dsi(initializer_token="s")
    assert (tmp_path / "style" / "learned_embeds.safetensors").read_bytes() == before
    run_dsi(seed=5, overwrite_output_dir=True)
    assert (tmp_path / "style" / "learned_embeds.safetensors").read_bytes() != before


def test_two_classes_with_one_prompt_noun_are_an_error(run_dsi, tmp_path):
    save_image_set(tmp_path / "set", {"train": 5, "test": 1}, ("apple_pie", "apple pie", "bag"))
    with pytest.raises(UserError, match="apple pie"):
        run_dsi(dataset_name=tmp_path / "set")
