import pytest

from utils.cli.errors import UserError
from utils.data.prompts import DSI_TEMPLATE, check_template, prompt_nouns, render_prompt, token_text


def test_prompt_nouns_lose_underscores_and_double_spaces():
    assert prompt_nouns(["ankle_boot", "T-shirt/top", "red  fox"]) == ["ankle boot", "T-shirt/top", "red fox"]


def test_prompt_nouns_that_collide_are_an_error():
    with pytest.raises(UserError, match="apple pie"):
        prompt_nouns(["apple_pie", "apple pie"])


def test_render_prompt_writes_every_vector_of_the_token():
    prompt = render_prompt(DSI_TEMPLATE, "bag", token_text("<s>", 3))
    assert prompt == "A bag photo in the style of <s> <s>_1 <s>_2"


@pytest.mark.parametrize(
    ("template", "needs_token", "message"),
    [
        ("a photo in {token}", True, "no {class}"),
        ("a {class}", True, "no {token}"),
        ("a {class} in {token}", False, "there is no style token"),
    ],
)
def test_check_template_names_what_is_missing(template, needs_token, message):
    with pytest.raises(UserError, match=message):
        check_template(template, needs_token)
