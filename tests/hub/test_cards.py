"""The three cards: metadata that the Hub takes, licences of the sources, the command, pictures, and a person's text."""

import dataclasses
import re
import shutil

import pytest
import torch
import yaml
from datasets import ClassLabel, Features, Image, load_dataset
from huggingface_hub import DatasetCard, ModelCard
from PIL import Image as PILImage
from transformers.image_utils import load_image

import generate_synthetic
import train_bridged
import train_dsi
from tests.conftest import CLASS_NAMES
from utils.cli.errors import UserError
from utils.data.images import to_rgb
from utils.hub.licenses import License, common_license, hub_ids, read_license
from utils.hub.merged_card import BEGIN, END
from utils.style.base_models import BaseModel
from utils.style.card import write_token_card
from utils.synthesis.finishing import write_dataset_card
from utils.transfer.adapters import LoraSettings, add_adapter, save_merged
from utils.transfer.card import write_model_card
from utils.transfer.classifiers import load_classifier, load_image_processor
from utils.transfer.methods import HEAD_INITS, METHODS, StageSettings, plan_stages
from utils.transfer.report import add_totals

pytest_plugins = ["tests.transfer.fixtures"]

MIT, UNKNOWN = License("mit"), License()
SECRET = "hf_secretsecretsecret"
ACCURACY = {"test_accuracy": 0.123456, "test_accuracy_low": 0.1, "test_accuracy_high": 0.2}


def write_classifier_card(
    folder, base_model="user/resnet", real="user/cars", synthetic="user/cars-syn", config=None, **metrics
):
    """Write the card of a bridged classifier; `config` are changes to its record."""
    config = {
        "method": "bridged", "head_init": "reset", "match_steps": False, "class_names": CLASS_NAMES, "lora": None,
        "test_split": "test", "real_images": {"dataset_name": real, "train_split": "train", "num_shots": 2},
        "synthetic_dataset": {"name": synthetic}, **(config or {}),
    }  # fmt: skip
    stages = plan_stages(
        config["method"],
        StageSettings(20, 0.002, head_learning_rate_factor=None, mixup_alpha=0.2, head_warmup_steps=5),
        StageSettings(10, 0.001, head_learning_rate_factor=None, batch_norm="train", drop_path_rate=0.3),
        config["head_init"],
        config["match_steps"],
    )
    config["stages"] = [dataclasses.asdict(stage) for stage in stages]
    results = {"num_test_images": 3, "leep_pretrained": None, "leep_bridged": None, "leep_num_images": 6, **metrics}
    for stage in stages:
        costs = {"steps": stage.settings.max_steps, "images_seen": 3200, "seconds": 60.04, "gpu_hours": 0.0167}
        results |= {f"{stage.name}_{key}": value for key, value in costs.items()}
    results = add_totals(results, [stage.name for stage in stages])
    licenses = {base_model: MIT, real: License("other", "Cars 1.0", "https://cars"), synthetic: UNKNOWN}
    write_model_card(folder, "user/cars-bridged", base_model, config, results, licenses, "the command")
    return ModelCard.load(folder / "README.md")


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
    write_token_card(folder, record, run, {base_model: MIT, real: UNKNOWN}, "the command")
    return ModelCard.load(folder / "README.md")


def write_set_card(folder, licenses, generator="user/sd", prompts=None, quality="", **changes):
    features = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES)})
    record = {
        "generator": {"id": generator, "revision": None}, "token": None, "settings": {"seed": 0, "batch_size": 2},
        "num_images": 3, "num_images_per_class": 1, "class_names": CLASS_NAMES, "images_at_a_time": 2,
        "real_images": {"dataset_name": "user/cars"}, "num_redraws": dict.fromkeys(CLASS_NAMES, 0), **changes,
    }  # fmt: skip
    prompts = prompts or {name: f"a {name}" for name in CLASS_NAMES}
    write_dataset_card(folder, features, record, prompts, licenses, "the command", quality=quality)
    return DatasetCard.load(folder / "README.md")


def metadata_of(folder) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def write_source(folder, text):
    folder.mkdir()
    (folder / "README.md").write_text(text)
    return str(folder)


def test_token_card_has_metadata_that_the_hub_links(tmp_path):
    card = write_style_card(tmp_path)
    assert metadata_of(tmp_path) == {
        "base_model": "user/sd", "base_model_relation": "adapter", "datasets": ["user/cars"], "license": "mit",
        "library_name": "diffusers", "pipeline_tag": "text-to-image",
        "tags": ["textual_inversion", "dataset-style-inversion", "bridged-transfer"],
    }  # fmt: skip
    assert "- `user/sd`: mit\n- `user/cars`: unknown\n" in card.text


def test_classifier_card_has_metadata_that_the_hub_links(tmp_path):
    card = write_classifier_card(tmp_path, **ACCURACY, test_macro_f1=0.5)
    assert card.data.base_model == "user/resnet"
    assert card.data.base_model_relation == "finetune"
    assert card.data.datasets == ["user/cars", "user/cars-syn"]
    assert card.data.license == "mit"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-classification")
    assert card.data.model_name == "user/cars-bridged"
    found = [(result.metric_type, result.metric_value, result.dataset_type) for result in card.data.eval_results]
    assert found == [("accuracy", 0.1235, "user/cars"), ("macro_f1", 0.5, "user/cars")]
    assert "- `user/resnet`: mit\n- `user/cars`: [other (Cars 1.0)](https://cars)\n- `user/cars-syn`: unknown\n" in (
        card.text
    )


def test_only_numbers_get_into_the_model_index(tmp_path):
    assert [result.metric_type for result in write_classifier_card(
        tmp_path / "some", **ACCURACY, test_macro_f1=float("nan")
    ).data.eval_results] == ["accuracy"]  # fmt: skip
    assert write_classifier_card(tmp_path / "none").data.eval_results is None
    assert "model-index" not in metadata_of(tmp_path / "none")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lora", [None, {"lora_r": 8, "lora_alpha": 24}])
def test_the_card_of_each_method_says_what_was_done(method, lora, tmp_path):
    synthetic = {} if method != "vanilla" else {"synthetic_dataset": None}
    card = write_classifier_card(tmp_path, config={"method": method, "lora": lora, **synthetic}, **ACCURACY)
    words = {"bridged": "bridged transfer: first", "mix": "mixed transfer", "synthetic_only": "alone (",
             "vanilla": "plain fine-tuning"}  # fmt: skip
    assert [name for name, phrase in words.items() if phrase in card.text] == [method]
    assert ("LoRA, rank 8, alpha 24" in card.text) == ("lora" in card.data.tags) == (lora is not None)
    assert (", adapter and head; learning rate" in card.text) == (lora is not None)
    assert ('"user/cars-bridged", subfolder="adapter"' in card.text) == (lora is not None)
    assert "datasets/user/cars)" in card.text
    assert ("datasets/user/cars-syn)" in card.text) == (method != "vanilla")
    assert card.data.datasets == ["user/cars"] + ["user/cars-syn"] * (method != "vanilla")
    assert not re.search(r"\bnone\b|undefined|\{\{|\n\n\n", card.text, re.IGNORECASE)


@pytest.mark.parametrize("head_init", HEAD_INITS)
def test_the_card_says_how_each_stage_began_what_it_cost_and_its_settings(head_init, tmp_path):
    text = write_classifier_card(tmp_path, config={"head_init": head_init}).text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "| 3,200 |" in line]
    assert [(name, start.split("`")[1] if "`" in start else start) for name, _, start, *_ in rows] == [
        ("stage1_head", "user/resnet"), ("stage1", "stage1_head"), ("stage2", "stage1"),
    ]  # fmt: skip
    assert [row[1] for row in rows] == ["synthetic", "synthetic", "real"]
    assert [row[3:] for row in rows] == [[steps, "3,200", "60.0", "0.017"] for steps in ("5", "20", "10")]
    assert "| total | | | 35 | 9,600 | 180.1 | 0.050 |" in text
    first, second, third = re.findall(r"^- stage.*", text, re.MULTILINE)
    assert "fresh head, head alone; learning rate 0.002 (head x 10.0)" in first
    assert "head kept, all layers; learning rate 0.002, weight decay" in second  # no longer fresh
    assert "Mixup 0.2, label smoothing 0.0, BatchNorm frozen" in second
    assert "no Mixup, label smoothing 0.0, BatchNorm train, drop path 0.3" in third
    told = {"reset": ("thrown away", "fresh head"), "keep": ("kept the head of the first", "head kept"),
            "imprint": ("imprinting", "head from class means")}  # fmt: skip
    assert [name for name, (sentence, _) in told.items() if sentence in text] == [head_init]
    assert third.startswith(f"- stage2: {told[head_init][1]}, all layers")


@pytest.mark.parametrize(
    ("method", "match_steps", "told"),
    [("vanilla", True, 1), ("mix", True, 1), ("mix", False, 0), ("synthetic_only", True, 0)],
)
def test_the_card_says_when_steps_were_matched(method, match_steps, told, tmp_path):
    text = write_classifier_card(tmp_path, config={"method": method, "match_steps": match_steps}).text
    assert text.count("as many optimiser steps as both stages") == told


def part(split: str, is_carved: bool) -> dict:
    return {"split": split, "num_images": 7, "is_carved": is_carved}


@pytest.mark.parametrize(
    ("test", "validation", "note"),
    [
        (part("test", False), part("train", True),
         "They are the split `test`. What was watched during training, 7 images, was carved off `train`."),
        (part("valid", False), part("dev", False),
         "They are the split `valid`. What was watched during training, 7 images, is the split `dev`."),
        (part("train[:80%]", True), part("train[:80%]", True),
         "They were carved off the split `train[:80%]` before training."),
    ],
)  # fmt: skip
def test_the_card_says_which_images_the_test_images_are(test, validation, note, tmp_path):
    config = {"test_split": test["split"], "parts": {"test": test, "validation": validation}}
    card = write_classifier_card(tmp_path, config=config, **ACCURACY)
    assert card.data.eval_results[0].dataset_split == test["split"]
    assert note in card.text


def test_the_card_says_when_some_classes_were_not_tested(tmp_path):
    counts = {"num_test_classes": 1, "num_classes": 2}
    note = "**Only 1 of the 2 classes have test images**: means over classes are over those."
    assert note in write_classifier_card(tmp_path, **ACCURACY, **counts).text
    assert "have test images" not in write_classifier_card(tmp_path, **ACCURACY, **counts | {"num_classes": 1}).text


def test_the_card_has_the_interval_and_flags_leep_on_too_few_images(tmp_path):
    leep = {"leep_pretrained": -1.25, "leep_bridged": -0.5, "leep_num_source_classes": 7}
    text = write_classifier_card(tmp_path / "few", **ACCURACY, **leep).text
    assert "| Accuracy | 0.1235 (95 % interval 0.1000 to 0.2000) |" in text
    assert "LEEP on 6 real training images: -1.250 before, -0.500 after the synthetic images" in text
    assert "fewer images than the base model has classes, 7" in text
    text = write_classifier_card(tmp_path / "enough", **ACCURACY, **leep | {"leep_num_source_classes": 6}).text
    assert "-1.250 before" in text
    assert "fewer images" not in text
    text = write_classifier_card(tmp_path / "headless", **leep | {"leep_pretrained": None}).text
    assert "none before, for the base model has no head of its own, -0.500 after" in text
    assert "LEEP" not in write_classifier_card(tmp_path / "none").text


def test_the_code_in_the_card_loads_the_adapter_and_predicts_as_the_merged_weights(
    classifiers, real_images_dir, tmp_path, monkeypatch
):
    folder = tmp_path / "user/cars-bridged"
    lora = LoraSettings(r=2)
    model = add_adapter(load_classifier(classifiers["vit"], CLASS_NAMES, True, 0), lora, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)  # a fresh adapter changes nothing
    save_merged(model, load_image_processor(classifiers["vit"]), folder)
    text = write_classifier_card(folder, classifiers["vit"], config={"lora": {"lora_r": 2, "lora_alpha": 32}}).text
    assert f"fine-tuned from `{classifiers['vit']}` by" in text  # a folder, no link
    monkeypatch.chdir(tmp_path)
    found = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, found)
    image = load_dataset(str(real_images_dir), split="test")[0]["image"]
    scores = {answer["label"]: answer["score"] for answer in found["classify"](image)}
    pixel_values = found["classify"].image_processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        probabilities = found["model"].eval()(pixel_values=pixel_values).logits.softmax(1)[0]
    assert scores == pytest.approx(dict(zip(CLASS_NAMES, probabilities.tolist())), abs=1e-4)


@pytest.mark.parametrize("write", [write_classifier_card, write_style_card])
def test_folders_are_not_in_the_metadata(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("models/base", "data/cars"):  # these look like repository ids
        (tmp_path / folder).mkdir(parents=True)
    for base, real in ((str(tmp_path / "models/base"), str(tmp_path / "data/cars")), ("models/base", "data/cars")):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        write(tmp_path / "out", base_model=base, real=real)
        metadata = metadata_of(tmp_path / "out")
        assert {"base_model", "base_model_relation"}.isdisjoint(metadata)
        assert set(metadata.get("datasets", [])) <= {"user/cars-syn"}
        assert str(tmp_path) not in str(metadata)
    assert "base_model" not in write_set_card(tmp_path / "set", {"models/base": MIT}, "models/base").data.to_dict()
    assert hub_ids("models/base", "user/a", None, "user/a", "/abs", "user/b") == ["user/a", "user/b"]


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        ([MIT, MIT], {"license": "mit"}),
        ([MIT, License("apache-2.0")], {"license": "unknown"}),
        ([MIT, UNKNOWN], {"license": "unknown"}),
        ([License("other", "Rail", "https://rail")] * 2,
         {"license": "other", "license_name": "Rail", "license_link": "https://rail"}),
        ([License("other", "Rail"), License("other", "Cars")], {"license": "unknown"}),
        ([License("mit, apache-2.0")] * 2, {"license": "unknown"}),
        ([], {"license": "unknown"}),
    ],
)  # fmt: skip
def test_a_set_has_the_licence_of_its_sources_where_they_agree(licenses, expected, tmp_path):
    assert common_license(licenses).to_metadata() == expected
    card = write_set_card(tmp_path, dict(zip(("user/sd", "user/cars"), licenses)))
    assert {key: value for key, value in card.data.to_dict().items() if key.startswith("license")} == expected
    for name, license in zip(("user/sd", "user/cars"), licenses):
        assert f"- `{name}`: {license}\n" in card.text


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n", MIT),
        ("---\nlicense: [mit]\n---\n", MIT),
        ("---\nlicense: [mit, apache-2.0]\n---\n", License("mit, apache-2.0")),
        ("---\nlicense: other\nlicense_name: Rail\nlicense_link: https://rail\n---\n",
         License("other", "Rail", "https://rail")),
        ("---\nlicense: other\nlicense_name: Rail\nlicense_link: LICENSE.md\n---\n", License("other", "Rail")),
        ("---\ntags: [mit]\n---\nlicense: mit", UNKNOWN),
        ("no metadata", UNKNOWN),
        ("---\nlicense: [mit\n---\n", UNKNOWN),
        ("---\nlicense: mit\nno: key\nmodel-index: nonsense\n---\n", MIT),
    ],
)  # fmt: skip
def test_the_licence_of_a_folder_is_what_its_card_names(card, expected, tmp_path):
    assert read_license(write_source(tmp_path / "source", card), "model") == expected


def test_a_licence_that_cannot_be_read_is_unknown(tmp_path):
    assert read_license(str(tmp_path), "model") == UNKNOWN  # no card
    assert read_license("user/out-of-reach", "dataset") == UNKNOWN
    assert read_license("user/out-of-reach", "dataset", "0" * 40, SECRET) == UNKNOWN
    assert read_license("neither folder nor id", "model") == UNKNOWN


def test_the_licence_of_a_repository_is_read_at_the_commit_with_the_token(tmp_path, monkeypatch):
    from utils.hub import repositories

    asked = {}

    def hf_hub_download(repo_id, filename, **where):
        asked.update(repo_id=repo_id, filename=filename, **where)
        return tmp_path / "source" / "README.md"

    write_source(tmp_path / "source", "---\nlicense: mit\n---\n")
    monkeypatch.setattr(repositories, "hf_hub_download", hf_hub_download)
    assert read_license("user/cars", "dataset", "a" * 40, SECRET) == MIT
    wanted = {"repo_id": "user/cars", "repo_type": "dataset", "revision": "a" * 40, "token": SECRET}
    assert asked == {**wanted, "filename": "README.md"}


@pytest.fixture(scope="module")
def licensed(tmp_path_factory, tiny_pipeline_dir, real_images_dir, classifiers):
    """The sources of all three scripts, copied, with cards: the pipeline and the images are mit, the classifier not."""
    folder = tmp_path_factory.mktemp("licensed")
    sources = {"pipeline": tiny_pipeline_dir, "images": real_images_dir, "classifier": classifiers["timm"]}
    for name, source in sources.items():
        shutil.copytree(source, folder / name)
        license = "apache-2.0" if name == "classifier" else "mit"
        (folder / name / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    return folder


@pytest.fixture(scope="module")
def commands(licensed):
    """Three short runs, one after the other: the script and its arguments, with the access token."""
    style, images, out = (str(licensed / name) for name in ("style", "cars-syn", "cars-bridged"))
    return {
        style: (train_dsi, [
            "--pretrained_model_name_or_path", str(licensed / "pipeline"), "--dataset_name", str(licensed / "images"),
            "--max_train_steps", "2", "--train_batch_size", "2", "--output_dir", style, "--hub_token", SECRET,
        ]),
        images: (generate_synthetic, [
            "--learned_embeds", style, "--num_images_per_class", "2", "--num_inference_steps", "1",
            "--output_dir", images, f"--hub_token={SECRET}",
        ]),
        out: (train_bridged, [
            "--synthetic_dataset", images, "--model_name_or_path", str(licensed / "classifier"), "--num_shots", "2",
            "--max_steps", "2", "--bridge_max_steps", "3", "--max_eval_samples", "6", "--use_cpu",
            "--output_dir", out, "--hub-token", SECRET,
        ]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def outputs(licensed, commands):
    from accelerate.state import AcceleratorState

    for script, argv in commands.values():
        script.main(argv)
        AcceleratorState._reset_state(reset_partial_state=True)
    return licensed


def test_each_script_writes_its_licence_its_command_and_no_secret(outputs, commands):
    licenses = {"style": "mit", "cars-syn": "mit", "cars-bridged": "apache-2.0"}
    for name, license in licenses.items():
        folder = outputs / name
        script, argv = commands[str(folder)]
        text = (folder / "README.md").read_text()
        assert metadata_of(folder)["license"] == license
        assert str(outputs) not in str(metadata_of(folder))
        assert text.index(BEGIN) < text.index(f"accelerate launch {script.__name__}.py ") < text.index(END)
        assert f"--output_dir {folder}" in text
        for path in folder.rglob("*"):
            assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    for source, license in (("images", "mit"), ("cars-syn", "mit"), ("classifier", "apache-2.0")):
        assert f"- `{outputs / source}`: {license}\n" in (outputs / "cars-bridged" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "picture"), [("style", "training.png"), ("cars-syn", "preview.png"), ("cars-bridged", "report.png")]
)
def test_each_card_shows_a_picture_that_lies_beside_it(outputs, name, picture):
    assert f"]({picture})\n" in (outputs / name / "README.md").read_text()
    assert (outputs / name / picture).stat().st_size > 100


@pytest.fixture
def edited_set(outputs, tmp_path):
    """A synthetic set whose card a person has edited: text on both sides, a licence, tags."""
    folder = shutil.copytree(outputs / "cars-syn", tmp_path / "edited")
    path = folder / "README.md"
    text = path.read_text().replace("license: mit\n", "license: cc-by-4.0  # ours\nlanguage: no\n")
    text = text.replace("tags:\n", "tags:\n- mine\n").replace(BEGIN, f"My introduction.\n\n{BEGIN}\nNOT KEPT")
    path.write_text(text + "\nMy last words.\n")
    return folder


@pytest.mark.parametrize("flags", [[], ["--overwrite_output_dir", "--seed", "1"]])
def test_a_set_with_an_edited_card_grows_and_loads(edited_set, outputs, commands, flags):
    _, argv = commands[str(outputs / "cars-syn")]
    generate_synthetic.main([*argv, "--output_dir", str(edited_set), "--num_images_per_class", "3", *flags])
    card = DatasetCard.load(edited_set / "README.md")
    assert card.data.dataset_info["splits"][0]["num_examples"] == 9
    assert card.data.configs == [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}]
    assert card.data.tags == ["mine", "synthetic", "bridged-transfer", "diffusers"]
    assert "license: cc-by-4.0  # ours\nlanguage: no\n" in (edited_set / "README.md").read_text()
    assert card.text.strip().startswith("My introduction.")
    assert card.text.strip().endswith("My last words.")
    assert "NOT KEPT" not in card.text
    assert "9 images of 3 classes" in card.text
    images = load_dataset(str(edited_set), split="train")
    assert len(images) == 9
    assert images.features["label"] == ClassLabel(names=CLASS_NAMES)


def test_a_malformed_card_is_an_error_before_a_model_loads(outputs, commands, tmp_path, monkeypatch):
    from diffusers import StableDiffusionPipeline

    def fail(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", fail)
    monkeypatch.setattr(BaseModel, "load_unet", fail)
    monkeypatch.setattr(train_bridged, "load_images", fail)
    for name in ("style", "cars-syn", "cars-bridged"):
        script, argv = commands[str(outputs / name)]
        folder = shutil.copytree(outputs / name, tmp_path / name)
        (folder / "README.md").write_text("---\nlicense: [mit\n---\nMine.\n")
        with pytest.raises(UserError, match=f"{name}/README.md: its metadata are no YAML"):
            script.main([*argv, "--output_dir", str(folder), "--overwrite_output_dir"])
        assert (folder / "README.md").read_text() == "---\nlicense: [mit\n---\nMine.\n"


def test_the_card_says_how_pictures_are_read_and_its_code_reads_transparent_ones_so(tmp_path):
    text = write_classifier_card(tmp_path, **ACCURACY).text
    assert "laid transparent images on white" in text
    found = {}
    exec(next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "on_white" in block), found)
    picture = PILImage.new("RGBA", (2, 1), (255, 0, 0, 51))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    for image in (picture, picture.convert("LA"), picture.convert("RGB")):
        assert load_image(found["on_white"](image)).tobytes() == to_rgb(image).tobytes()
    assert load_image(picture).tobytes() != to_rgb(picture).tobytes()
