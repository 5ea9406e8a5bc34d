"""Prompts, and the part of them that text encoders read."""

import json
import subprocess
import sys
from collections import Counter
from itertools import product

import pytest

from tests.synthesis.tokens import PLACEHOLDER, open_folder
from utils.cli.errors import UserError
from utils.data.prompts import DSI_TEMPLATE, PLAIN_TEMPLATE, check_template
from utils.synthesis.prompts import (
    PROMPT_SETS,
    TemplatePrompts,
    build_templates,
    check_prompts_fit,
    count_prompt_tokens,
    example_prompts,
    read_prompts_file,
)

pytest_plugins = ["tests.synthesis.fixtures"]
NOUNS = ("dog", "house cat", "suv")


def make_prompts(num_templates: int = 5, nouns=NOUNS) -> TemplatePrompts:
    templates = tuple(f"{number}: a {{class}} in the style of {{token}}" for number in range(num_templates))
    return TemplatePrompts(templates, nouns, "<style>")


def read(folder, *lines, labels=(0, 1, 2), placeholder="<style>", nouns=NOUNS):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "p.jsonl").write_text(text, encoding="utf-8")
    names = ["dog", "house_cat", "suv"]
    return read_prompts_file(str(folder / "p.jsonl"), names, list(nouns), list(labels), placeholder)


def entry(label: str, prompt: str) -> dict:
    return {"label": label, "prompt": prompt}


@pytest.mark.parametrize(("template", "beginning", "ending"), [
    (DSI_TEMPLATE, "A {class} photo, from ", ", in the style of {token}"),
    ("A {class}, in the style of {token}. ", "A {class}, from ", ", in the style of {token}."),
    (PLAIN_TEMPLATE, "A good photo of the {class}, from ", ""),
    ("A {class}.", "A {class}, from ", "."),
    ("{token}: a {class}", "{token}: a {class}, from ", ""),
    ("in the style of {token}, a {class}", "in the style of {token}, a {class}, from ", ""),
])  # fmt: skip
def test_diverse_varies_between_sentence_and_style(template, beginning, ending):
    templates = build_templates("diverse", template)
    assert 100 <= len(set(templates)) == len(templates) <= 300
    assert templates[0].startswith(beginning)
    assert all(variant.endswith(ending) for variant in templates)
    for variant in templates:
        check_template(variant, needs_token="{token}" in template)
        assert variant.count("in the style of") == template.count("in the style of")
        assert ",," not in variant and "  " not in variant and variant == variant.strip()


def test_prompt_sets_vary_viewpoint_background_and_light_and_leave_room_in_77_tokens():
    assert build_templates("single", DSI_TEMPLATE) == [DSI_TEMPLATE]
    parts = [template.split(", ")[1:4] for template in build_templates("diverse", DSI_TEMPLATE)]
    values = [{part[position] for part in parts} for position in range(3)]
    assert [len(value) for value in values] == [8, 6, 4]
    for prompt_set, template in product(PROMPT_SETS, (DSI_TEMPLATE, PLAIN_TEMPLATE)):
        for variant in build_templates(prompt_set, template):
            prompt = variant.format(**{"class": "one two three four five six", "token": "<style>"})
            # common words and commas are one token each; begin and end are two
            assert len(prompt.replace(",", " ,").split()) + 2 <= 40


def test_prompt_is_pinned_and_filled_with_noun_and_token():
    prompts = make_prompts(5)
    assert [prompts.prompt(0, number)[0] for number in range(12)] == list("412034120334")
    assert [prompts.prompt(1, number)[0] for number in range(5)] == list("03412")
    assert make_prompts(1).prompt(1, 7) == "0: a house cat in the style of <style>"
    assert TemplatePrompts(("a {class}",), NOUNS).prompt(2, 0) == "a suv"


def test_prompt_does_not_depend_on_other_classes_or_the_order_of_templates():
    among = make_prompts()
    alone, turned = make_prompts(nouns=("suv",)), TemplatePrompts(among.templates[::-1], NOUNS, "<style>")
    for number in range(20):
        assert alone.prompt(0, number) == among.prompt(2, number) == turned.prompt(2, number)


def test_prompts_give_each_template_an_equal_share_of_all_alternating_settings():
    prompts = make_prompts(5)
    for label, rounds in product(range(3), range(4)):
        drawn = Counter(prompts.prompt(label, number) for number in range(5 * rounds, 5 * rounds + 5))
        assert set(drawn.values()) == {1} and len(drawn) == 5
    prompts = make_prompts(2)
    assert len({(prompts.prompt(0, number), number % 2) for number in range(40)}) == 4
    # classes start at different templates, and the first ones of diverse differ in every part
    prompts = make_prompts(50, tuple(f"thing {number}" for number in range(40)))
    assert len({prompts.prompt(label, 0)[:2] for label in range(40)}) > 15
    prompts = TemplatePrompts(tuple(build_templates("diverse", DSI_TEMPLATE)), NOUNS, "<style>")
    parts = [prompts.prompt(0, number).split(", ")[1:4] for number in range(24)]
    assert all(len({part[position] for part in parts}) >= minimum for position, minimum in enumerate((5, 5, 4)))


def test_examples_are_the_first_different_prompts():
    prompts = make_prompts(5)
    assert example_prompts(prompts, 1) == [prompts.prompt(1, number) for number in range(3)]
    assert len(set(example_prompts(prompts, 1))) == 3
    assert example_prompts(make_prompts(1), 0) == ["0: a dog in the style of <style>"]


def test_longest_has_each_template_and_each_noun_at_its_longest():
    more, words = ", and more" * 9, "and more words behind it"
    templates = ("a {class}, {token}" + more, "{token} of a very big {class} " + words, "{token}: {class}")
    prompts = TemplatePrompts(templates, nouns := ("suv", "house cat", "dog"), "<s>")
    assert list(prompts.longest()) == [
        ("a house cat, <s>" + more, len("a house cat, <s>")),
        (f"<s> of a very big house cat {words}", len("<s> of a very big house cat")),
        ("<s>: house cat", len("<s>: house cat")),
        *((f"<s> of a very big {noun} {words}", len(f"<s> of a very big {noun}")) for noun in nouns),
    ]


def test_longest_is_not_a_product_and_ends_at_the_first_placeholder_of_two():
    prompts = make_prompts(200, tuple(f"thing {number}" for number in range(1000)))
    assert sum(1 for _ in prompts.longest()) == 1200
    prompts = TemplatePrompts(("a {class}, {token}, {class}, {token}",), ("dog",), "<s>")
    assert list(prompts.longest())[0] == ("a dog, <s>, dog, <s>", len("a dog, <s>"))


def test_sha256_changes_with_everything_that_decides_the_captions(tmp_path):
    def digest(label="dog", prompt="a dog {token}", **options):
        return read(tmp_path, entry(label, prompt), **({"labels": [0]} | options)).sha256

    others = [
        digest(prompt="one dog {token}"), digest("suv", labels=[2]), digest(placeholder="<other>"),
        digest(nouns=("hound", "cat", "suv")),
    ]  # fmt: skip
    assert len({digest(), *others}) == 5
    assert digest() == digest()


def test_read_prompts_file_gives_each_class_its_captions_in_turn(tmp_path):
    prompts = read(
        tmp_path,
        entry("dog", "a {class} asleep, {token}"),
        entry("suv", "a suv in\u2028the   rain, {token}"),
        "",
        entry("dog", "one dog, {token}"),
        '{"label": "house_cat", "prompt": "a {class}\u2028 {token}"}',
    )
    assert [prompts.prompt(0, number) for number in range(3)] == [
        "a dog asleep, <style>", "one dog, <style>", "a dog asleep, <style>",
    ]  # fmt: skip
    assert prompts.prompt(1, 5) == "a house cat <style>"
    assert prompts.prompt(2, 5) == "a suv in the rain, <style>"
    assert example_prompts(prompts, 0) == ["a dog asleep, <style>", "one dog, <style>"]
    captions = [entry("dog", f"dog {word}, {{token}}") for word in ("a", "a", "b", "c", "d")]
    assert example_prompts(read(tmp_path, *captions, labels=[0]), 0) == [f"dog {word}, <style>" for word in "abc"]


def test_read_prompts_file_leaves_out_other_classes_and_ignores_case(tmp_path, caplog):
    both = read(tmp_path, entry("dog", "a dog, {token}"), entry("suv", "a suv, {token}"), labels=[2])
    assert both == read(tmp_path, entry("suv", "a suv, {token}"), labels=[2])
    assert both.prompt(2, 0) == "a suv, <style>"
    other_case = read(tmp_path, entry("DOG", "a dog, {token}"), entry("dog", "a pup, {token}"), labels=[0])
    assert caplog.messages == [
        f"--prompts_file {tmp_path}/p.jsonl: 1 class name matched ignoring case, spaces and Unicode form: 'DOG' is "
        "'dog'."
    ]
    assert other_case == read(tmp_path, entry("dog", "a dog, {token}"), entry("dog", "a pup, {token}"), labels=[0])


def test_longest_of_captions_ends_behind_noun_and_token(tmp_path):
    needed = {
        "{token}: a {class}| at home": "<dog-style>: a dog",
        "a bulldog, dogma, {token}: a Dog| at home": "a bulldog, dogma, <dog-style>: a Dog",
        "a hound, {token}, at home": "a hound, <dog-style>, at home",  # the class can be anywhere in it
        "many {class}s, {token}|, at home": "many dogs, <dog-style>",
    }
    captions = [entry("dog", caption.replace("|", "")) for caption in needed]
    prompts = read(tmp_path, *captions, labels=[0], placeholder="<dog-style>")
    assert [prompt[:end] for prompt, end in prompts.longest()] == list(needed.values())
    assert [prompt for prompt, _ in prompts.longest()][0] == "<dog-style>: a dog at home"
    # the token's placeholder is not a class of that name
    prompts = read(tmp_path, entry("dog", "{token} of a coin"), labels=[0], nouns=("token", "cat", "suv"))
    assert list(prompts.longest()) == [("<style> of a coin", len("<style> of a coin"))]


@pytest.mark.parametrize(("line", "message"), [
    ("{", "must be JSON, such as {"),
    ("a suv in the rain", "must be JSON"),
    ('["dog", "a dog"]', "must be an object with 'label' and 'prompt', such as {"),
    ('"dog"', "must be an object"),
    ({"label": "dog"}, "must be an object with 'label' and 'prompt'"),
    ({"prompt": "a dog {token}"}, "must be an object with 'label' and 'prompt'"),
    (entry("dog", "a {token}") | {"negative_prompt": "x"}, "must be an object with 'label' and 'prompt'"),
    (entry("hose_cat", "a {token}"), "label 'hose_cat': no such class, did you mean house_cat"),
    ({"label": 1, "prompt": "a {token}"}, "label 1: must be text"),
    ({"label": ["dog"], "prompt": "a {token}"}, r"label \['dog'\]: must be text"),
    (entry("dog", " "), "prompt ' ': must be text"),
    ({"label": "dog", "prompt": None}, "prompt None: must be text"),
    (entry("dog", "a dog"), "'a dog': has no {token}"),
    (entry("dog", "a {clas}, {token}"), "'a {clas}, {token}': has {clas}, which nothing fills"),
])  # fmt: skip
def test_read_prompts_file_names_file_and_line(tmp_path, line, message):
    with pytest.raises(UserError, match=f"--prompts_file {tmp_path}/p.jsonl: line 3: {message}"):
        read(tmp_path, entry("dog", "a dog, {token}"), "", line)


def test_read_prompts_file_refuses_a_missing_token_and_a_class_without_captions(tmp_path):
    assert read(tmp_path, entry("dog", "a dog"), labels=[0], placeholder=None).prompt(0, 3) == "a dog"
    with pytest.raises(UserError, match="line 1: 'a dog, {token}': has {token}, but there is no style token"):
        read(tmp_path, entry("dog", "a dog, {token}"), labels=[0], placeholder=None)
    with pytest.raises(UserError, match="p.jsonl: has no prompt for 'house_cat', 'suv'; each class needs at least"):
        read(tmp_path, entry("dog", "a dog, {token}"))
    with pytest.raises(UserError, match="has no prompt for 'dog'"):
        read(tmp_path, "", labels=[0])
    with pytest.raises(UserError, match="--prompts_file no.jsonl: cannot be read"):
        read_prompts_file("no.jsonl", ["dog"], ["dog"], [0], None)


def test_names_and_prompts_import_no_torch():
    code = "import sys, utils.data.name_doctor, utils.synthesis.prompts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def letters(count: int) -> str:
    """Return words of single letters: each is one token of CLIP, and two of the tiny T5."""
    return " ".join("abcdefgh"[i % 8] for i in range(count))


def test_tokens_are_counted_with_start_end_and_every_vector(generator):
    prompts = [letters(3), f"{letters(3)} {PLACEHOLDER}", "a style"]
    assert count_prompt_tokens(generator, prompts, PLACEHOLDER, 4) == [5, 9, 4]


def test_prompt_fits_up_to_the_last_token(generator):
    fits, longer = letters(75), letters(76)
    check_prompts_fit(generator, [(fits, len(fits))], None, 1)
    with pytest.raises(UserError, match=f"^--x: '{longer}' has 78 tokens, .* takes 77 and would only see '{fits}'"):
        check_prompts_fit(generator, [("a", 1)] * 2500 + [(longer, len(longer))], None, 1, "--x")


def test_vectors_of_the_style_token_take_their_place(generator, caplog):
    prompt = f"{letters(70)} {PLACEHOLDER}"
    check_prompts_fit(generator, [(prompt, len(prompt))], PLACEHOLDER, 5)
    with pytest.raises(UserError, match="has 78 tokens.*<dsi-style>_4', which lacks"):
        check_prompts_fit(generator, [(prompt, len(prompt))], PLACEHOLDER, 6)
    assert not caplog.messages


def test_prompts_truncated_after_the_essential_part_are_counted_in_one_warning(generator, caplog):
    prompts = [(f"{PLACEHOLDER} {letters(80)}", len(PLACEHOLDER)), (letters(10), 19), (letters(90), 75 * 2 - 1)]
    check_prompts_fit(generator, iter(prompts), PLACEHOLDER, 3)
    (message,) = caplog.messages
    assert "2 prompts are longer than 77 tokens" in message and f"_2 {letters(72)}'" in message
    with pytest.raises(UserError):
        check_prompts_fit(generator, [(letters(90), 75 * 2 + 1)], None, 1)


@pytest.mark.parametrize(("kind", "limit"), [("tiny_sd3_pipeline_dir", 256), ("tiny_flux_pipeline_dir", 512)])
def test_the_encoder_that_reads_furthest_decides(kind, limit, request):
    generator = open_folder(request.getfixturevalue(kind))
    assert count_prompt_tokens(generator, [letters(100)], None, 1) == [201]  # T5 has an end token, but no start token
    fitting, longer = letters(limit // 2 - 1), letters(limit // 2)
    check_prompts_fit(generator, [(fitting, len(fitting))], None, 1)
    with pytest.raises(UserError, match=f"has {limit + 1} tokens, the text encoder takes {limit}"):
        check_prompts_fit(generator, [(longer, len(longer))], None, 1)


@pytest.mark.parametrize("missing", [["text_encoder_3", "tokenizer_3"], ["text_encoder_3"]])
def test_without_t5_clip_decides(missing, copy_pipeline):
    generator = open_folder(copy_pipeline("tiny_sd3_pipeline_dir", index=dict.fromkeys(missing, [None, None])))
    assert count_prompt_tokens(generator, [letters(100)], None, 1) == [102]
    with pytest.raises(UserError, match="takes 77"):
        check_prompts_fit(generator, [(letters(100), 199)], None, 1)
