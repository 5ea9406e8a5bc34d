"""Prompts against what text encoders read of them."""

import pytest

from tests.synthesis.tokens import PLACEHOLDER, open_folder
from utils.cli.errors import UserError
from utils.synthesis.prompts import check_prompts_fit, count_prompt_tokens

pytest_plugins = ["tests.synthesis.fixtures"]


def letters(count: int) -> str:
    """Return words of single letters: each is one token of CLIP, and two of the tiny T5."""
    return " ".join("abcdefgh"[i % 8] for i in range(count))


def test_tokens_are_counted_with_start_end_and_every_vector(generator):
    prompts = [letters(3), f"{letters(3)} {PLACEHOLDER}", "a style"]
    assert count_prompt_tokens(generator, prompts, PLACEHOLDER, 4) == [5, 9, 4]
    assert count_prompt_tokens(generator, prompts[:1] * 2500, None, 1) == [5] * 2500


@pytest.mark.parametrize(("num_letters", "fits"), [(75, True), (76, False)])
def test_prompt_fits_up_to_the_last_token(num_letters, fits, generator):
    prompt = letters(num_letters)
    if fits:
        check_prompts_fit(generator, [(prompt, len(prompt))], None, 1)
        return
    with pytest.raises(
        UserError, match=f"^--x: '{prompt}' has 78 tokens, .* takes 77 and would see '{letters(75)}' only"
    ):
        check_prompts_fit(generator, [("a", 1), (prompt, len(prompt))], None, 1, "--x")


def test_vectors_of_the_style_token_take_their_place(generator, caplog):
    prompt = f"{letters(70)} {PLACEHOLDER}"
    check_prompts_fit(generator, [(prompt, len(prompt))], PLACEHOLDER, 5)
    with pytest.raises(UserError, match="has 78 tokens.*<dsi-style>_4' only"):
        check_prompts_fit(generator, [(prompt, len(prompt))], PLACEHOLDER, 6)
    assert not caplog.messages


def test_prompts_that_are_cut_behind_what_matters_are_counted_in_one_warning(generator, caplog):
    prompts = [(f"{PLACEHOLDER} {letters(80)}", len(PLACEHOLDER)), (letters(10), 19), (letters(90), 75 * 2 - 1)]
    check_prompts_fit(generator, iter(prompts), PLACEHOLDER, 3)
    (message,) = caplog.messages
    assert "longer than 77 tokens" in message and ": 2, for" in message and f"_2 {letters(72)}'" in message
    with pytest.raises(UserError):
        check_prompts_fit(generator, [(letters(90), 75 * 2 + 1)], None, 1)


@pytest.mark.parametrize(("kind", "limit"), [("tiny_sd3_pipeline_dir", 256), ("tiny_flux_pipeline_dir", 512)])
def test_the_encoder_that_reads_furthest_decides(kind, limit, request):
    generator = open_folder(request.getfixturevalue(kind))
    assert count_prompt_tokens(generator, [letters(100)], None, 1) == [201]  # T5 has an end and no start
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
