import pytest

from utils.cli.errors import UserError
from utils.data.prompts import (
    AS_WRITTEN,
    AUTO,
    CLASS_TOKEN,
    CLASSLESS_TEMPLATE,
    DSI_TEMPLATE,
    PLAIN_TEMPLATE,
    check_template,
    read_templates_file,
    render_prompt,
    token_text,
    with_others,
)


def test_render_prompt_writes_every_vector_of_the_token():
    prompt = render_prompt(DSI_TEMPLATE, "bag", token_text("<s>", 3))
    assert prompt == "A bag photo in the style of <s> <s>_1 <s>_2"


@pytest.mark.parametrize(("template", "noun", "expected"), [
    (DSI_TEMPLATE, "Ankle boot", "An Ankle boot photo in the style of <s>"),
    (DSI_TEMPLATE, "bag", "A bag photo in the style of <s>"),
    ("an {class} on a {class} in a {token}", "egg", "an egg on an egg in a <s>"),
    ("an {class}, a {token}", "unicorn", "a unicorn, a <s>"),
    ("(a  {class})", "hour", "(an  hour)"),
    ("vitamin-a {class}, the {class}, {token} {class}", "egg", "vitamin-a egg, the egg, <s> egg"),
    ("a {class}", "umbrella", "an umbrella"),
    ("a {class}", "uninhabited house", "an uninhabited house"),
    ("a {class}", "European car", "a European car"),
    ("a {class}", "SUV", "a SUV"),  # as the docstring says
])  # fmt: skip
def test_the_article_before_the_class_follows_the_noun(template, noun, expected):
    assert render_prompt(template, noun, "<s>", AUTO) == expected
    as_written = template.replace("{class}", noun).replace("{token}", "<s>")
    assert render_prompt(template, noun, "<s>", AS_WRITTEN) == as_written


def test_further_placeholders_are_filled_once():
    template = with_others(DSI_TEMPLATE, [CLASS_TOKEN])
    check_template(template, needs_token=True, others={CLASS_TOKEN: True})
    prompt = render_prompt(template, "{token}", "<s>", class_token="<c-3>")
    assert prompt == "A <c-3> {token} photo in the style of <s>"
    assert with_others(DSI_TEMPLATE, []) == DSI_TEMPLATE


def test_check_template_accepts_the_default_templates():
    check_template(DSI_TEMPLATE, needs_token=True)
    check_template(PLAIN_TEMPLATE, needs_token=False)
    check_template(CLASSLESS_TEMPLATE, needs_token=True, needs_class=False)


@pytest.mark.parametrize(
    ("template", "needs", "message"),
    [
        ("a photo in {token}", {}, "--prompt_template 'a photo in {token}': has no {class}; .* '" + DSI_TEMPLATE),
        ("a {class}", {}, "has no {token}; try '" + DSI_TEMPLATE),
        ("a {class} in {token}", {"needs_token": False}, "has {token}, but there is no style token"),
        ("a photo", {"needs_token": False}, "has no {class}; try '" + PLAIN_TEMPLATE),
        ("a {class_token} {class} in {token}", {}, "has {class_token}, but there are no class tokens .train_dsi"),
        (
            "a {class} in {token}",
            {"others": {CLASS_TOKEN: True}},
            "has no {class_token}; try 'A {class_token} {class} photo in the style of {token}'",
        ),
        ("a {klass} in {token}", {}, "has {klass}, which nothing fills"),
        ("a {class} in {token} {}", {}, "has {}, which nothing fills"),
        ("a {class} in {token}", {"needs_class": False}, "--include_class_name false: template .* has {class}"),
        ("a photo", {"needs_class": False}, "has no {token}; try '" + CLASSLESS_TEMPLATE),
        ("a {class}", {"flag": "--prompt_templates"}, "--prompt_templates 'a {class}': has no {token}"),
    ],
)
def test_check_template_names_the_problem(template, needs, message):
    with pytest.raises(UserError, match=message):
        check_template(template, **{"needs_token": True, **needs})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.txt", "# ours\na {class} in {token}\n\n  {token}: a {class}\n"),
        ("t.json", '["a {class} in {token}", "{token}: a {class}"]'),
        ("t.yaml", "- a {class} in {token}\n- '{token}: a {class}'\n"),
    ],
)
def test_read_templates_file_gives_the_templates_in_order(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_templates_file(str(tmp_path / name)) == ["a {class} in {token}", "{token}: a {class}"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.txt", "# nothing\n\n", "has no templates"),
        ("t.yaml", "a: b", "must be a list of templates"),
        ("t.yaml", "- a photo\n- {class}\n", r"template 2 \({'class': None}\): must be text, in quotes in YAML"),
        ("t.json", '["a", " "]', r"template 2 \(' '\): must be text"),
        ("t.json", "[", "is malformed"),
        ("t.yaml", "- {class} in {token}", "is malformed"),
    ],
)
def test_read_templates_file_error_names_file_and_entry(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"--prompt_templates_file {tmp_path}/{name}: {message}"):
        read_templates_file(str(tmp_path / name))
    with pytest.raises(UserError, match="--prompt_templates_file no.txt: cannot be read"):
        read_templates_file("no.txt")
