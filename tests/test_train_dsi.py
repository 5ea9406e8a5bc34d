"""train_dsi.py end to end, in process, on tiny models of the real classes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_dsi
from tests.conftest import save_image_set
from utils.cli.errors import UserError
from utils.cli.records import read_record


@pytest.fixture
def run(tiny_pipeline_dir, real_images_dir, tmp_path):
    """Run the script with a few steps; keywords are flags, the output folder is `tmp_path / 'style'`."""

    def run(**flags):
        options = {
            "pretrained_model_name_or_path": tiny_pipeline_dir, "dataset_name": real_images_dir,
            "output_dir": tmp_path / "style", "max_train_steps": 3, "train_batch_size": 2, **flags,
        }  # fmt: skip
        argv = [part for key, value in options.items() if value is not None for part in (f"--{key}", str(value))]
        return train_dsi.main(argv)

    return run


def test_the_saved_token_loads_in_a_fresh_pipeline_and_changes_the_image(run, tiny_pipeline_dir, tmp_path):
    from diffusers import StableDiffusionPipeline

    run(num_vectors=2, learning_rate=0.5)
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


def test_the_record_holds_what_the_next_step_needs(run, tiny_pipeline_dir, real_images_dir, tmp_path):
    run(num_shots=2, few_shot_seed=1)
    record = read_record(tmp_path / "style" / "dsi_config.json")
    assert record["base_model"] == {"id": str(tiny_pipeline_dir), "revision": None}
    assert record["class_names"] == ["red_square", "green circle", "blue-stripe"]
    assert record["prompt_nouns"] == ["red square", "green circle", "blue-stripe"]
    assert record["resolution"] == 32
    assert record["real_images"]["dataset_name"] == str(real_images_dir)
    assert (record["real_images"]["num_shots"], record["real_images"]["few_shot_seed"]) == (2, 1)
    assert len(record["train_indices"]) == 6
    assert record["health"]["images"] == "training images"
    for name in ("README.md", "training.png", "run_config.json"):
        assert (tmp_path / "style" / name).stat().st_size > 100


def test_the_same_seed_gives_the_same_token_and_another_does_not(run, tmp_path):
    rows = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(output_dir=tmp_path / name, seed=seed, learning_rate=0.1)
        rows.append(load_file(tmp_path / name / "learned_embeds.safetensors")["<dsi-style>"])
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_epsilon_models_train_too(run, tiny_pipeline_dir, tmp_path):
    import shutil

    folder = tmp_path / "epsilon"
    shutil.copytree(tiny_pipeline_dir, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "epsilon"}))
    losses = [run(pretrained_model_name_or_path=model, output_dir=tmp_path / name)["loss_history"]
              for name, model in (("e", folder), ("v", tiny_pipeline_dir))]  # fmt: skip
    assert np.isfinite(losses).all()
    assert not np.allclose(*losses)


def test_a_token_that_cannot_learn_is_said_plainly(run, capsys):
    assert run(learning_rate=1e-12)["token_learned"] is False
    assert "WARNING: the token learned nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dataset_name": None}, "--dataset_name is missing"),
        ({"dataset_name": "./nowhere"}, "--dataset_name ./nowhere: neither an existing folder"),
        ({"pretrained_model_name_or_path": "user/nothing"}, "user/nothing: neither a folder nor a model repository"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "--pretrained_model_name_or_path ./nowhere: neither"),
        ({"label_column_name": "colour"}, "--label_column_name colour: not in"),
        ({"placeholder_token": "style</w>"}, "--placeholder_token style</w>: the tokenizer has"),
        ({"initializer_token": "two words"}, "--initializer_token two words: is .* tokens"),
        ({"prompt_templates": "a {class}"}, "has no {token}"),
        ({"prompt_templates": "a {class} " + "x" * 80 + " {token}"}, "the text encoder takes 77"),
        ({"num_shots": 100}, "--num_shots 100: label 0 has 18 images"),
        ({"learning_rate": 0}, "--learning_rate 0.0: must be above 0"),
        ({"max_train_step": 3}, "no such flag, did you mean --max_train_steps"),
    ],
)
def test_bad_input_is_one_line_before_anything_loads_or_is_written(run, flags, message, tmp_path, monkeypatch):
    def load_components(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(train_dsi, "load_components", load_components)
    with pytest.raises(UserError, match=message):
        run(**flags)
    assert not (tmp_path / "style").exists()


def test_a_pipeline_of_another_kind_is_an_error_that_lists_the_supported(run, tmp_path):
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="is a FluxPipeline; supported: StableDiffusionPipeline"):
        run(pretrained_model_name_or_path=tmp_path / "flux")


def test_a_finished_token_is_not_overwritten_unasked(run, tmp_path):
    health = run()
    before = (tmp_path / "style" / "learned_embeds.safetensors").read_bytes()
    again = run()
    assert again == {name: value for name, value in health.items() if name != "loss_history"}
    with pytest.raises(UserError, match="holds a style token made with other options \\(seed was 0\\)"):
        run(seed=5)
    assert (tmp_path / "style" / "learned_embeds.safetensors").read_bytes() == before
    run(seed=5, learning_rate=0.1, overwrite_output_dir=True)
    assert (tmp_path / "style" / "learned_embeds.safetensors").read_bytes() != before


def test_two_classes_with_one_prompt_noun_are_an_error(run, tmp_path):
    save_image_set(tmp_path / "set", {"train": 5, "test": 1}, ("apple_pie", "apple pie", "bag"))
    with pytest.raises(UserError, match="apple pie"):
        run(dataset_name=tmp_path / "set")
