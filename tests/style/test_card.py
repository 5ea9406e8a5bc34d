"""The token's card: metadata that the Hub takes, and the licences of the sources."""

from huggingface_hub import ModelCard, metadata_load

from utils.hub.cards import License
from utils.style.card import write_token_card


def write_style_card(folder, base_model="user/sd", real="user/cars"):
    health = {"num_images": 1, "images": "validation images", "token_learned": True}
    record = {
        "base_model": {"id": base_model, "revision": None}, "real_images": {"dataset_name": real}, "num_vectors": 1,
        "placeholder_token": "<style>", "max_train_steps": 3, "train_indices": [0], "prompt_nouns": ["car"],
        "prompt_templates": ["a {class} in {token}"],
        "health": {
            **health, "loss_no_token": 1, "loss_untrained_token": 1, "loss_trained_token": 0.5, "embeddings": [],
        },
    }  # fmt: skip
    run = {"seconds": 1.0, "hardware": {"device": "cpu"}}
    write_token_card(folder, record, run, {base_model: License("mit"), real: License()}, "the command")
    return ModelCard.load(folder / "README.md")


def test_token_card_has_metadata_that_the_hub_links(tmp_path):
    card = write_style_card(tmp_path)
    assert metadata_load(tmp_path / "README.md") == {
        "base_model": "user/sd", "base_model_relation": "adapter", "datasets": ["user/cars"], "license": "mit",
        "library_name": "diffusers", "pipeline_tag": "text-to-image",
        "tags": ["textual_inversion", "dataset-style-inversion", "bridged-transfer"],
    }  # fmt: skip
    assert "- `user/sd`: mit\n- `user/cars`: unknown (no license found" in card.text
