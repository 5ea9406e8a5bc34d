"""The classifier's card, and the cards of all three scripts, written one after the other."""

import re
import shutil

import pytest
import torch
from datasets import ClassLabel, load_dataset
from huggingface_hub import DatasetCard, ModelCard, metadata_load
from PIL import Image as PILImage
from transformers.image_utils import load_image

import generate_synthetic
import train_bridged
import train_dsi
from tests.conftest import CLASS_NAMES
from tests.style.test_card import write_style_card
from tests.synthesis.test_card import write_set_card
from utils.cli.errors import UserError
from utils.data.images import to_rgb
from utils.hub.cards import BEGIN, END, License
from utils.style.base_models import BaseModel
from utils.transfer.adapters import LoraSettings, add_adapter, save_merged
from utils.transfer.classifiers import load_classifier, load_image_processor
from utils.transfer.methods import HEAD_INITS, METHODS, StageSettings, plan_stages
from utils.transfer.report import _describe_method, add_totals, write_model_card

pytest_plugins = ["tests.transfer.fixtures"]

MIT = License("mit")
SECRET = "hf_secretsecretsecret"
ACCURACY = {"test_accuracy": 0.123456, "test_accuracy_low": 0.1, "test_accuracy_high": 0.2}


def write_classifier_card(
    folder, base_model="user/resnet", real="user/cars", synthetic="user/cars-syn", config=None, **metrics
):
    """Write the card of a bridged classifier; `config` are changes to its record."""
    config = {"method": "bridged", **(config or {})}
    config = {
        **METHODS[config["method"]].flags, "class_names": CLASS_NAMES, "lora": None,
        "test_split": "test", "real_images": {"dataset_name": real, "train_split": "train", "num_shots": 2},
        "synthetic_dataset": {"name": synthetic}, **config,
    }  # fmt: skip
    stages = plan_stages(
        METHODS[config["method"]].with_flags(
            {name: config[name] for name in ("head_init", "match_steps", "bridge_alignment") if name in config}
        ),
        StageSettings(20, 0.002, head_learning_rate_factor=None, mixup_alpha=0.2, head_warmup_steps=5),
        StageSettings(10, 0.001, head_learning_rate_factor=None, batch_norm="train", drop_path_rate=0.3),
        images_per_class=2,
    )
    config["stages"] = [stage.to_dict() for stage in stages]
    results = {"num_test_images": 3, "leep_pretrained": None, "leep_bridged": None, "leep_num_images": 6, **metrics}
    for stage in stages:
        costs = {"steps": stage.settings.max_steps, "images_seen": 3200, "seconds": 60.04, "gpu_hours": 0.0167}
        costs["seconds_waiting"] = 1.5
        results |= {f"{stage.name}_{key}": value for key, value in costs.items()}
    results = add_totals(results, [stage.name for stage in stages])
    licenses = {base_model: MIT, real: License("other", "Cars 1.0", "https://cars"), synthetic: License()}
    write_model_card(folder, "user/cars-bridged", base_model, config, results, licenses, "the command")
    return ModelCard.load(folder / "README.md")


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_block(block: str) -> dict:
    """Run a block of code by itself, as a reader would copy it, and return its names."""
    names = {}
    exec(block, names)
    return names


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
    assert "- `user/resnet`: mit\n- `user/cars`: [other (Cars 1.0)](https://cars)\n" in card.text
    assert "- `user/cars-syn`: unknown (no license found" in card.text


def test_only_numbers_get_into_the_model_index(tmp_path):
    card = write_classifier_card(tmp_path / "some", **ACCURACY, test_macro_f1=float("nan"))
    assert [result.metric_type for result in card.data.eval_results] == ["accuracy"]
    assert write_classifier_card(tmp_path / "none").data.eval_results is None
    assert "model-index" not in metadata_load(tmp_path / "none" / "README.md")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lora", [None, {"lora_r": 8, "lora_alpha": 24}])
def test_the_card_of_each_method_says_what_was_done(method, lora, tmp_path):
    uses_synthetic = METHODS[method].uses_synthetic
    synthetic = {} if uses_synthetic else {"synthetic_dataset": None}
    card = write_classifier_card(tmp_path, config={"method": method, "lora": lora, **synthetic}, **ACCURACY)
    words = {"bridged": "bridged transfer: first", "mix": "mixed transfer", "synthetic_only": "alone (",
             "vanilla": "plain fine-tuning", "linear_probe": "a linear probe: the network is not"}  # fmt: skip
    of_kind = {"wise_ft": "bridged", "lp_ft": "vanilla", "ema": "vanilla"}.get(method, method)
    assert [name for name, phrase in words.items() if phrase in card.text] == [
        next(name for name in words if of_kind.startswith(name))
    ]
    told = {
        "wise_ft": "Its weights are an average: 50 % stage2, the rest stage1 (WiSE-FT",
        "lp_ft": "Training started from the head of a logistic regression on the pretrained network's features (LP-FT",
        "ema": "BatchNorm train, drop path 0.3, exponential moving average of the weights with decay 0.999, lower in",
        "linear_probe": "- probe: head from logistic regression, no optimiser step",
    }
    assert [name for name, phrase in told.items() if phrase in card.text] == [name for name in told if name == method]
    assert f"`{method}`: {METHODS[method].description}." in card.text
    replayed = "then on real images, with 75 % synthetic ones among them ("
    assert (replayed in card.text) == ("replayed" in METHODS[method].kinds)
    assert ("used without labels (" in card.text) == (METHODS[method].alignment is not None)
    assert ("LoRA, rank 8, alpha 24" in card.text) == ("lora" in card.data.tags) == (lora is not None)
    trains_adapter = lora is not None and METHODS[method].takes_steps
    assert (", adapter and head; learning rate" in card.text) == trains_adapter
    assert ('"user/cars-bridged", subfolder="adapter"' in card.text) == (lora is not None)
    assert "datasets/user/cars)" in card.text
    assert ("datasets/user/cars-syn)" in card.text) == uses_synthetic
    assert card.data.datasets == ["user/cars"] + ["user/cars-syn"] * uses_synthetic
    assert not re.search(r"\bnone\b|undefined|\{\{|\n\n\n", card.text, re.IGNORECASE)


@pytest.mark.parametrize(("method", "alignment"), [("bridged_coral", "none"), ("bridged_keep", "coral")])
def test_the_card_says_that_a_flag_changed_the_alignment_of_a_row(method, alignment, tmp_path):
    text = write_classifier_card(tmp_path, config={"method": method, "bridge_alignment": alignment}).text
    assert f"`{method}`: changed by flags" in text
    assert ("(covariances, Sun and Saenko 2016, weight 1.0)" in text) == (alignment == "coral")


def test_changes_by_a_guard_are_not_attributed_to_flags():
    method, settings = METHODS["bridged_domain_norm"], (StageSettings(20, 0.002), StageSettings(10, 0.001))
    config = {"method": "bridged_domain_norm", **method.flags}
    for weight in (1.0, 0.5, 0.0):
        config["stages"] = [stage.to_dict() for stage in plan_stages(method, *settings, 2, weight)]
        assert _describe_method(config) == method.description
    config["stages"][-1]["settings"]["mixup_alpha"] = 0.4
    assert _describe_method(config) == "changed by flags, as told here"


@pytest.mark.parametrize("head_init", HEAD_INITS)
def test_the_card_shows_the_start_costs_and_settings_of_each_stage(head_init, tmp_path):
    text = write_classifier_card(tmp_path, config={"head_init": head_init}).text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "| 3,200 |" in line]
    assert [(name, start.split("`")[1] if "`" in start else start) for name, _, start, *_ in rows] == [
        ("stage1_head", "user/resnet"), ("stage1", "stage1_head"), ("stage2", "stage1"),
    ]  # fmt: skip
    assert [row[1] for row in rows] == ["synthetic", "synthetic", "real"]
    assert [row[3:] for row in rows] == [[steps, "3,200", "60.0", "0.017"] for steps in ("5", "20", "10")]
    assert "| total | | | 35 | 9,600 | 180.1 | 0.050 |" in text
    first, second, third = re.findall(r"^- stage.*", text, re.MULTILINE)
    assert "fresh head, head alone; learning rate 0.002 (head x 10)" in first
    assert "head kept, all layers; learning rate 0.002, weight decay" in second  # no longer fresh
    assert "Mixup 0.2, label smoothing 0.0, BatchNorm frozen" in second
    assert "no Mixup, label smoothing 0.0, BatchNorm train, drop path 0.3" in third
    told = {"reset": ("started with a fresh head", "fresh head"), "keep": ("kept the head of the first", "head kept"),
            "imprint": ("imprinting", "head from class means"),
            "probe": ("the head was set by logistic regression", "head from logistic regression")}  # fmt: skip
    assert [name for name, (sentence, _) in told.items() if sentence in text] == [head_init]
    assert third.startswith(f"- stage2: {told[head_init][1]}, all layers")


def parts(test: tuple[str, bool], validation: tuple[str, bool]) -> dict:
    """Return the changes to a record of 7 images from a split, each given as its name and whether it was split off."""
    of = {"test": test, "validation": validation}
    described = {name: {"split": split, "num_images": 7, "is_carved": carved} for name, (split, carved) in of.items()}
    return {"test_split": test[0], "parts": described}


LEEP = {"leep_pretrained": -1.25, "leep_bridged": -0.5, "leep_num_source_classes": 7}
MATCHED, FEW_IMAGES = "as many optimiser steps as both stages", "fewer images than the base model has classes (7)"
FEW_CLASSES = "**Only 1 of the 2 classes have test images**: means over classes cover only these."


@pytest.mark.parametrize(
    ("config", "metrics", "told", "not_told"),
    [
        ({"method": "vanilla", "match_steps": True}, {}, MATCHED, "LEEP"),
        ({"method": "mix", "match_steps": True}, {}, MATCHED, "have test images"),
        ({"method": "mix", "match_steps": False}, {}, "The method is `mix`: changed by flags, as told here.", MATCHED),
        ({"method": "bridged_keep", "head_init": "reset"}, {}, "`bridged_keep`: changed by flags", "with the head of"),
        ({"method": "synthetic_only", "match_steps": True}, {}, "", MATCHED),
        ({}, {"num_test_classes": 1, "num_classes": 2}, FEW_CLASSES, MATCHED),
        ({}, {"num_test_classes": 1, "num_classes": 1}, "", "have test images"),
        ({}, {}, "| Accuracy | 0.1235 (95 % interval 0.1000 to 0.2000) |", "LEEP"),
        ({}, LEEP, "LEEP on 6 real training images (0 is best): -1.250 before training, -0.500 after tr", "no score"),
        ({}, LEEP, FEW_IMAGES, "no score"),
        ({}, LEEP | {"leep_num_source_classes": 6}, "-1.250 before", "fewer images"),
        ({}, LEEP | {"leep_pretrained": None},
         "no score before training, as the base model has no head, -0.500 after", "-1.250"),
        (parts(("test", False), ("train", True)), {},
         "They are the split `test`. The 7 validation images are split off from `train`.", "LEEP"),
        (parts(("valid", False), ("dev", False)), {},
         "They are the split `valid`. The 7 validation images are the split `dev`.", "LEEP"),
        (parts(("train[:80%]", True), ("train[:80%]", True)), {},
         "They were split off from `train[:80%]` before training.", "LEEP"),
    ],
)  # fmt: skip
def test_the_card_says_only_what_is_true_for_its_run(config, metrics, told, not_told, tmp_path):
    card = write_classifier_card(tmp_path, config=config, **ACCURACY, **metrics)
    assert told in card.text
    assert not_told not in card.text
    assert card.data.eval_results[0].dataset_split == config.get("test_split", "test")


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
    assert f"fine-tuned from `{classifiers['vit']}` by" in text  # a folder, so not a link
    monkeypatch.chdir(tmp_path)
    found = {}
    for names in map(run_block, python_blocks(text)):
        found |= names
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
        metadata = metadata_load(tmp_path / "out" / "README.md")
        assert {"base_model", "base_model_relation"}.isdisjoint(metadata)
        assert set(metadata.get("datasets", [])) <= {"user/cars-syn"}
        assert str(tmp_path) not in str(metadata)
    assert "base_model" not in write_set_card(tmp_path / "set", {"models/base": MIT}, "models/base").data.to_dict()


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


def test_each_card_has_its_license_its_command_its_picture_and_no_secret(outputs, commands):
    expected = (("style", "mit", "training.png"), ("cars-syn", "mit", "preview.png"),
                ("cars-bridged", "apache-2.0", "report.png"))  # fmt: skip
    for name, license, picture in expected:
        folder = outputs / name
        script, argv = commands[str(folder)]
        text, metadata = (folder / "README.md").read_text(), metadata_load(folder / "README.md")
        assert metadata["license"] == license
        assert str(outputs) not in str(metadata)
        assert text.index(BEGIN) < text.index(f"accelerate launch {script.__name__}.py ") < text.index(END)
        assert f"--output_dir {folder}" in text
        assert f"]({picture})\n" in text and (folder / picture).stat().st_size > 100
        for path in folder.rglob("*"):
            assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    for source, license in (("images", "mit"), ("cars-syn", "mit"), ("classifier", "apache-2.0")):
        assert f"- `{outputs / source}`: {license}\n" in (outputs / "cars-bridged" / "README.md").read_text()


def test_every_code_block_of_a_written_card_runs_by_itself(outputs, monkeypatch):
    text = (outputs / "cars-bridged" / "README.md").read_text()
    monkeypatch.chdir(outputs)  # as the comment in the first block says
    classifying, converting = map(run_block, python_blocks(text))
    assert "# a local folder: run this next to it" in text
    picture = converting["on_white"](PILImage.new("LA", (40, 30), (7, 90)))
    assert {answer["label"] for answer in classifying["classify"](picture)} == set(CLASS_NAMES)


def test_unknown_licenses_come_with_what_to_do_about_them(tmp_path, outputs):
    advice = "look it up or ask its owner before you share this"
    assert advice in write_classifier_card(tmp_path).text
    assert advice not in (outputs / "cars-bridged" / "README.md").read_text()


@pytest.fixture
def edited_set(outputs, tmp_path):
    """A synthetic set whose card a person has edited: text on both sides, a license, tags."""
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
        with pytest.raises(UserError, match=f"{name}/README.md: its metadata is not valid YAML"):
            script.main([*argv, "--output_dir", str(folder), "--overwrite_output_dir"])
        assert (folder / "README.md").read_text() == "---\nlicense: [mit\n---\nMine.\n"


def test_the_card_says_how_images_are_read_and_its_code_does_the_same_for_transparent_ones(tmp_path):
    text = write_classifier_card(tmp_path, **ACCURACY).text
    assert "transparent images were placed on white" in text
    found = run_block(next(block for block in python_blocks(text) if "on_white" in block))
    picture = PILImage.new("RGBA", (2, 1), (255, 0, 0, 51))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    for image in (picture, picture.convert("LA"), picture.convert("RGB")):
        assert load_image(found["on_white"](image)).tobytes() == to_rgb(image).tobytes()
    assert load_image(picture).tobytes() != to_rgb(picture).tobytes()
