"""The token's card: metadata for the Hub, licenses of the sources, and code that runs."""

import json

import pytest
from huggingface_hub import ModelCard, metadata_load
from PIL import Image

from tests.card_code import run_python
from tests.style.pipelines import publish
from tests.synthesis.tokens import save_token
from utils.cli.records import read_record
from utils.hub.cards import License
from utils.style.card import write_token_card

pytest_plugins = ["tests.local_hub.fixtures"]


def write_style_card(folder, base_model="user/sd", real="user/cars", hub_id=None, **changes):
    health = {"num_images": 1, "images": "validation images", "token_learned": True}
    record = {
        "base_model": {"id": base_model, "revision": None}, "real_images": {"dataset_name": real}, "num_vectors": 1,
        "placeholder_token": "<style>", "max_train_steps": 3, "train_indices": [0], "prompt_nouns": ["car"],
        "prompt_templates": ["a {class} in {token}"],
        "health": {
            **health, "loss_no_token": 1, "loss_untrained_token": 1, "loss_trained_token": 0.5, "embeddings": [],
        },
        **changes,
    }  # fmt: skip
    run = {"seconds": 1.0, "hardware": {"device": "cpu"}}
    write_token_card(folder, record, run, {base_model: License("mit"), real: License()}, "the command", hub_id)
    return ModelCard.load(folder / "README.md")


def test_token_card_has_metadata_that_the_hub_links(tmp_path):
    card = write_style_card(tmp_path)
    assert metadata_load(tmp_path / "README.md") == {
        "base_model": "user/sd", "base_model_relation": "adapter", "datasets": ["user/cars"], "license": "mit",
        "library_name": "diffusers", "pipeline_tag": "text-to-image",
        "tags": ["textual_inversion", "dataset-style-inversion", "bridged-transfer"],
    }  # fmt: skip
    assert "- `user/sd`: mit\n- `user/cars`: unknown (no license found in its card; look it up" in card.text
    assert "None" not in card.text


@pytest.mark.parametrize(("kind", "dims", "hub_id"), [
    ("tiny_pipeline_dir", (16,), None),
    ("tiny_xl_pipeline_dir", (16, 24), None),
    ("tiny_xl_pipeline_dir", (16, 24), "user/style"),
])  # fmt: skip
def test_python_code_of_a_token_card_draws_an_image(
    kind, dims, hub_id, real_images_dir, local_hub, tmp_path, request, monkeypatch
):
    pipeline_dir = request.getfixturevalue(kind)
    folder = save_token(tmp_path / "style", pipeline_dir, real_images_dir, dims)
    record = read_record(folder / "dsi_config.json")
    pipeline_class = json.loads((pipeline_dir / "model_index.json").read_text())["_class_name"]
    changes = {
        "placeholder_token": record["placeholder_token"], "pipeline_class": pipeline_class,
        "prompt_templates": ["A {class} in {token}"], "prompt_nouns": ["orange"], "article": "auto",
    }  # fmt: skip
    card = write_style_card(folder, str(pipeline_dir), hub_id=hub_id, **changes)
    if hub_id:
        publish(local_hub, hub_id, folder)
    monkeypatch.chdir(tmp_path)
    pipe = run_python(card.text)["pipe"]
    assert len(pipe.tokenizer("<dsi-style>").input_ids) == 3  # begin, token, end
    assert Image.open("image.png").size == (32, 32)
    assert 'pipe("An orange in <dsi-style>")' in card.text
