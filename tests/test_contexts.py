"""Contexts of images: described by a tiny vision-language model, then in the prompts of training and of generation."""

import json
import logging
import re
from collections import Counter

import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from transformers import CLIPTokenizer

import describe_images
import generate_synthetic
import train_dsi
from tests.conftest import CLASS_NAMES, read_rows, save_class_folders
from tests.processes import start_script
from tests.synthesis.tokens import NOUNS, PLACEHOLDER, save_token
from tests.vision_language import MODELS, save_vision_language_model
from utils.cli.errors import UserError
from utils.cli.processes import warn_once
from utils.cli.records import read_record
from utils.data.contexts import Contexts, ImageContext, read_contexts, write_contexts
from utils.data.vision_language import AnswerCache, Question, VisionLanguageModel
from utils.hub.repositories import Source
from utils.synthesis.contexts import ContextPrompts
from utils.synthesis.prompts import TemplatePrompts

pytest_plugins = ["tests.style.fixtures", "tests.synthesis.fixtures"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_vision_language_model(tmp_path_factory.mktemp("models") / "vlm")


@pytest.fixture
def describe(model_dir, real_images_dir, tmp_path):
    """Run the script on two images per class; keywords are flags, the file is `tmp_path / 'contexts.jsonl'`."""

    def run(*switches: str, **flags) -> dict:
        options = {
            "dataset_name": real_images_dir, "num_shots": 2, "model": model_dir, "max_new_tokens": 8,
            "output_file": tmp_path / "contexts.jsonl", "answer_cache_dir": tmp_path / "answers", **flags,
        }  # fmt: skip
        argv = [part for key, value in options.items() if value is not None for part in (f"--{key}", str(value))]
        return describe_images.main([*argv, *switches])

    return run


@pytest.fixture
def count_questions(monkeypatch):
    """The images that the model is asked about."""
    asked, ask = [], VisionLanguageModel.ask
    monkeypatch.setattr(
        VisionLanguageModel, "ask", lambda self, images, texts: (asked.extend(images), ask(self, images, texts))[1]
    )
    return asked


def test_each_image_of_the_few_shot_subset_gets_a_context_and_is_asked_about_once(describe, count_questions, tmp_path):
    assert describe()["num_asked"] == len(count_questions) == 6
    written = (tmp_path / "contexts.jsonl").read_text()
    contexts = read_contexts(tmp_path / "contexts.jsonl")
    assert Counter(image.label for image in contexts.images) == dict.fromkeys(CLASS_NAMES, 2)
    assert all(image.context for image in contexts.images)
    assert not any("square" in image.context for image in contexts.images if image.label == "red_square")
    assert contexts.about["model"]["id"].endswith("vlm") and "{class}" in contexts.about["question"]
    assert describe()["num_asked"] == 0  # the file is there
    (tmp_path / "contexts.jsonl").unlink()
    assert describe()["num_asked"] == 0  # the answers are
    assert (tmp_path / "contexts.jsonl").read_text() == written
    with pytest.raises(UserError, match="is of other images; choose another file or give --overwrite_output_file"):
        describe(num_shots=3)
    assert describe("--overwrite_output_file", num_shots=3)["num_asked"] == 3  # a larger choice has the smaller one
    assert len(count_questions) == 9


def test_a_run_that_was_killed_in_a_line_continues_with_the_same_result(describe, count_questions, tmp_path):
    describe()
    written, [cache] = (tmp_path / "contexts.jsonl").read_text(), (tmp_path / "answers").glob("*/0.jsonl")
    lines = cache.read_text().split("\n")
    cache.write_text("\n".join(lines[:7])[:-9])  # lines are separated by blank ones
    (tmp_path / "contexts.jsonl").unlink()
    number = describe()["num_asked"]
    assert 0 < number < 6 and len(count_questions) == 6 + number
    assert (tmp_path / "contexts.jsonl").read_text() == written


@pytest.mark.parametrize("kind", MODELS)
def test_answers_do_not_depend_on_the_batch(kind, real_images_dir, tmp_path):
    images = load_dataset(str(real_images_dir), split="test")["image"][:3]
    images.append(images[0].resize((60, 20)))
    source = Source(str(save_vision_language_model(tmp_path / kind, kind)), "--model")
    model = VisionLanguageModel(source, torch.device("cpu"), 32, 6)
    texts = ["a road", "on a gravel road seen from the side", "a circle", "in light"]
    together = model.ask(images, texts)
    assert together == [model.ask([image], [text])[0] for image, text in zip(images, texts)]
    assert len(set(together)) > 1


def test_copies_are_asked_about_once_and_count(describe, count_questions, tmp_path):
    folder = save_class_folders(tmp_path / "photos", dict.fromkeys(CLASS_NAMES, 4))
    for path in folder.glob("red_square/*.png"):
        path.write_bytes((folder / "red_square" / "0.png").read_bytes())
    result = describe(dataset_name=None, train_dir=folder, num_shots=2)
    assert result["num_images"] == result["num_asked"] == len(count_questions) == 5
    assert result["num_duplicates"] == 1


@pytest.mark.soak
def test_two_processes_write_the_file_of_one(describe, model_dir, real_images_dir, tmp_path):
    describe(num_shots=4)
    written = (tmp_path / "contexts.jsonl").read_text()
    argv = ["--dataset_name", real_images_dir, "--num_shots", 4, "--model", model_dir, "--max_new_tokens", 8,
            "--output_file", tmp_path / "two.jsonl", "--answer_cache_dir", tmp_path / "others"]  # fmt: skip
    program = "import describe_images\ndescribe_images.run_script(describe_images.main)"
    output, errors = (child := start_script(program, argv, tmp_path, num_processes=2)).communicate()
    assert child.returncode == 0, errors[-2000:]
    assert "MULTI_CPU 2 processes" in output and output.count("12 contexts in") == 1
    assert (tmp_path / "two.jsonl").read_text() == written
    assert {path.name for path in (tmp_path / "others").glob("*/*")} == {"0.jsonl", "1.jsonl"}


def test_no_answer_is_lost_after_an_incomplete_line(tmp_path):
    cache = AnswerCache(tmp_path, {})
    cache.add([Question("a", "?", 0)], ["road"], 0)
    path = cache.folder / "0.jsonl"
    path.write_text(path.read_text()[:-12])
    cache.add([Question("b", "?", 1)], ["street"], 0)
    assert cache.read() == {("b", "?"): "street"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "clip"}, "its model type is clip; try HuggingFaceTB"),
        ({"model_type": "own", "auto_map": {}}, "its model type is own that comes with code of its own"),
        ({"model_type": "llava"}, "has no model.safetensors; only safetensors weights are loaded"),
    ],
)
def test_another_kind_of_model_is_one_line_before_images_are_read(describe, monkeypatch, tmp_path, config, message):
    monkeypatch.setattr("utils.data.real_images.load_real_images", lambda *_: pytest.fail("images were read"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        describe(model=tmp_path / "model")


def read_prompts(tiny_pipeline_dir, ids) -> list[str]:
    """Return the prompts of token ids, up to the end token; the style token is unknown to the pipeline's tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(tiny_pipeline_dir / "tokenizer")
    tokenizer.add_tokens("<dsi-style>")
    return [tokenizer.decode(row[0], skip_special_tokens=True) for row in ids]


def test_training_prompts_have_the_contexts_of_their_images(
    describe, run_dsi, tiny_pipeline_dir, monkeypatch, tmp_path
):
    describe()
    contexts = read_contexts(tmp_path / "contexts.jsonl")
    seen, original = [], train_dsi.denoising_loss

    def spy(batch, denoiser):
        rows = batch["templates"] * len(denoiser.prompt_ids.plain) + batch["labels"]
        seen.extend(read_prompts(tiny_pipeline_dir, denoiser.prompt_ids.training[rows]))
        return original(batch, denoiser)

    monkeypatch.setattr(train_dsi, "denoising_loss", spy)
    run_dsi(num_shots=2, train_batch_size=6, max_train_steps=1, contexts_file=tmp_path / "contexts.jsonl")
    nouns = dict(zip(CLASS_NAMES, ["red square", "green circle", "blue-stripe"]))
    expected = [f"a {nouns[one.label]} photo, {one.context}, in the style of <dsi-style>" for one in contexts.images]
    squeeze = ["".join(text.split()) for text in seen]
    assert sorted(squeeze) == sorted("".join(text.split()) for text in expected)
    record = read_record(tmp_path / "style" / "dsi_config.json")
    assert record["contexts"] == {"sha256": contexts.sha256, "num_images": 6}
    assert record["prompt_templates"] == ["A {class} photo, {context}, in the style of {token}"]
    card = (tmp_path / "style" / "README.md").read_text()
    assert "prompts of 6 images also described" in card and "{context}" not in card.split("## How")[0]


def test_a_killed_run_with_contexts_is_resumed_exactly_and_not_with_other_contexts(
    run_dsi, describe, tiny_xl_pipeline_dir, monkeypatch, tmp_path
):
    describe()
    flags = {
        "num_shots": 2, "max_train_steps": 3, "checkpointing_steps": 1, "early_stopping": False,
        "pretrained_model_name_or_path": tiny_xl_pipeline_dir, "contexts_file": tmp_path / "contexts.jsonl",
    }  # fmt: skip
    run_dsi(output_dir=tmp_path / "left-alone", **flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        losses, original = [], train_dsi.denoising_loss

        def die(*args):
            losses.append(None)
            if len(losses) == 3:
                raise KeyboardInterrupt
            return original(*args)

        patch.setattr(train_dsi, "denoising_loss", die)
        run_dsi(**flags)
    assert (tmp_path / "style" / "checkpoint-2").is_dir()
    run_dsi(resume_from_checkpoint="latest", **flags)
    for alone, resumed in zip(read_rows(tmp_path / "left-alone"), read_rows(tmp_path / "style"), strict=True):
        assert torch.equal(alone, resumed)
    contexts = read_contexts(tmp_path / "contexts.jsonl")
    write_contexts(tmp_path / "contexts.jsonl", Contexts(contexts.images, {}))
    with pytest.raises(UserError, match="made from other inputs .*contexts_file"):
        run_dsi(**flags)


def test_long_contexts_are_shortened_and_class_and_token_stay(run_dsi, describe, monkeypatch, tmp_path, caplog):
    describe()
    contexts = read_contexts(tmp_path / "contexts.jsonl")
    # the tiny tokenizer has a token for each letter
    images = [ImageContext(one.key, one.label, "on a long gravel road " * 3) for one in contexts.images[1:]]
    images.append(ImageContext(contexts.images[0].key, contexts.images[0].label, ""))
    write_contexts(tmp_path / "contexts.jsonl", Contexts(tuple(images), contexts.about))
    lengths = []
    monkeypatch.setattr(train_dsi, "denoising_loss", lambda batch, denoiser: lengths.append(denoiser) or pytest.fail())
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING), pytest.raises(pytest.fail.Exception):
        run_dsi(num_shots=2, contexts_file=tmp_path / "contexts.jsonl")
    assert "1 of 6 training images have no context" in caplog.text and "5 of 6 contexts are shortened" in caplog.text
    ids, vocabulary = lengths[0].prompt_ids.training[:, 0], len(lengths[0].encoder.style_tokens[0].table.weight)
    assert ids.shape == (6, 77) and (ids == vocabulary).sum(1).tolist() == [1] * 6  # the style token's id


def test_a_file_of_other_images_is_one_line_before_a_model_loads(run_dsi, monkeypatch, tmp_path):
    monkeypatch.setattr("utils.style.base_models.BaseModel.load_vae", lambda *_: pytest.fail("a model was loaded"))
    other = Contexts((ImageContext("0" * 64, "red_square", "on a road"),), {})
    write_contexts(tmp_path / "contexts.jsonl", other)
    with pytest.raises(UserError, match=r"has no context for 6 of the 6 training images, so it is of other images"):
        run_dsi(num_shots=2, contexts_file=tmp_path / "contexts.jsonl")
    with pytest.raises(UserError, match=r"has \{context\}, but there are no contexts .--contexts_file"):
        run_dsi(prompt_templates="A {class}, {context}, in the style of {token}")
    with pytest.raises(UserError, match=r"has no \{context\}; try 'A \{class\} photo, \{context\}, in the style"):
        run_dsi(contexts_file=tmp_path / "contexts.jsonl", prompt_templates="A {class} in the style of {token}")


TEMPLATE = "A {class} photo, {context}, in the style of {token}"
CONTEXTS = ("on a road", "in bright light", "seen from the side", "on gravel", "indoors", "", "from above")


@pytest.fixture
def draw(token_dir, tmp_path):
    """Draw a set of 6 images per class with contexts; keywords are flags, the set is `tmp_path / 'set'`."""
    labels = [*CLASS_NAMES, *CLASS_NAMES[:2], CLASS_NAMES[2], CLASS_NAMES[0]]
    images = [ImageContext(str(i), label, text) for i, (label, text) in enumerate(zip(labels, CONTEXTS))]
    write_contexts(tmp_path / "contexts.jsonl", Contexts(tuple(images), {}))

    def run(*switches: str, **flags) -> dict:
        options = {
            "learned_embeds": token_dir, "num_images_per_class": 6, "batch_size": 6, "num_inference_steps": 1,
            "output_dir": tmp_path / "set", "contexts_file": tmp_path / "contexts.jsonl", **flags,
        }  # fmt: skip
        argv = [part for key, value in options.items() if value is not None for part in (f"--{key}", str(value))]
        return generate_synthetic.main([*argv, *switches])

    return run


def contexts_drawn(folder) -> dict[str, Counter]:
    """Return how often each class of a set has each context."""
    table, drawn = pq.read_table(folder / "data"), {}
    for label, prompt in zip(table["label"].to_pylist(), table["prompt"].to_pylist()):
        noun, context = re.fullmatch(r"A (.+?) photo, (.+), in the style of <dsi-style>", prompt).groups()
        assert noun == NOUNS[label]
        drawn.setdefault(CLASS_NAMES[label], Counter())[context] += 1
    return drawn


def test_each_class_is_drawn_in_the_contexts_of_all_classes_equally_often(draw, tmp_path):
    draw()
    everything = Counter(filter(None, CONTEXTS))
    assert contexts_drawn(tmp_path / "set") == dict.fromkeys(CLASS_NAMES, everything)
    settings = read_record(tmp_path / "set" / "generation_config.json")["settings"]
    assert settings["contexts_sha256"] == read_contexts(tmp_path / "contexts.jsonl").sha256
    assert (settings["contexts_of"], settings["prompt_templates"]) == ("all", [TEMPLATE])
    assert "of any class, so that class and context are independent" in (tmp_path / "set" / "README.md").read_text()
    with pytest.raises(UserError, match="was made with other settings .*contexts_of was all, now own"):
        draw(contexts_of="own")


def test_own_contexts_are_those_of_the_class(draw, capsys):
    draw("--dry_run", contexts_of="own")
    shown = capsys.readouterr().out
    for noun, contexts in zip(NOUNS, (("on a road", "on gravel", "from above"), ("in bright light", "indoors"), ())):
        found = set(re.findall(rf"'A {noun} photo, ([^']+), in the style", shown))
        assert found == set(contexts or ["seen from the side"])


@pytest.mark.parametrize(("num_images", "num_contexts", "num_classes"), [(3, 7, 4), (5, 40, 8), (9, 4, 3)])
def test_contexts_have_equal_shares_and_are_a_function_of_class_and_number(num_images, num_contexts, num_classes):
    templates = TemplatePrompts(("{class} {context}",), tuple(f"class{n}" for n in range(num_classes)))
    texts = tuple(f"context{n}" for n in range(num_contexts))
    starts = {label: label * num_contexts // num_classes for label in range(num_classes)}
    prompts = ContextPrompts(templates, dict.fromkeys(range(num_classes), texts), starts)
    drawn = [prompts.prompt(label, index) for label in range(num_classes) for index in range(num_images)]
    counts = Counter(prompt.split()[1] for prompt in drawn)
    counts = [counts[text] for text in texts]
    assert max(counts) - min(counts) <= 1 + num_images * num_classes / num_contexts % 1


def test_a_token_trained_with_contexts_draws_without_them_too(tiny_pipeline_dir, real_images_dir, draw, tmp_path):
    token = save_token(tmp_path / "style", tiny_pipeline_dir, real_images_dir, prompt_templates=[TEMPLATE])
    draw(learned_embeds=token, contexts_file=None, num_images_per_class=1)
    assert (
        pq.read_table(tmp_path / "set" / "data")["prompt"][0].as_py()
        == f"A {NOUNS[0]} photo in the style of {PLACEHOLDER}"
    )
    settings = read_record(tmp_path / "set" / "generation_config.json")["settings"]
    assert not [name for name in settings if "context" in name]


def test_contexts_are_shortened_for_the_longest_class_name(draw, tmp_path, capsys, caplog):
    images = tuple(ImageContext(str(i), label, "on a long gravel road " * 3) for i, label in enumerate(CLASS_NAMES))
    write_contexts(tmp_path / "contexts.jsonl", Contexts(images, {"model": {}, "real_images": {"num_shots": 4}}))
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        draw(
            "--dry_run",
            num_images_per_class=1,
            prompt_templates="A {class}, {context}, in the manner of a {token}, yes",
        )
    assert "3 of 3 contexts are shortened: the text encoder takes 77 tokens" in caplog.text
    assert "describes other images than those of the other settings (" in caplog.text
    shown = capsys.readouterr().out
    contexts = set(re.findall(r", (on.*), in the manner", shown))
    assert len(contexts) == 1 and len(contexts.pop()) > 2
    assert max(map(int, re.findall(r"\((\d+) tokens\)", shown))) <= 77


def test_a_wrong_contexts_file_is_one_line(draw, tmp_path):
    path = tmp_path / "contexts.jsonl"
    with pytest.raises(UserError, match="does nothing with --prompt_set diverse"):
        draw(prompt_set="diverse")
    for image, message in (
        (
            ImageContext("1", "red_sqare", "on a road"),
            "is of other images: label 'red_sqare': .*did you mean red_square",
        ),
        (ImageContext("1", "red_square", ""), "all contexts are empty"),
        (ImageContext("1", "red_square", "on a road"), "has no contexts of 'green circle', 'blue-stripe'; try all"),
    ):
        write_contexts(path, Contexts((image,), {}))
        with pytest.raises(UserError, match=message):
            draw(contexts_of="own")
    for text, message in (
        ("[1]", "line 1: must have texts 'image_sha256'"),
        ("{", "line 1: must be JSON"),
        ("", "has no"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            draw()
