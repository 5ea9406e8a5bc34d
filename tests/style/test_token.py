import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from utils.cli.errors import UserError
from utils.style.token import (
    add_placeholder_tokens,
    check_prompt_lengths,
    load_learned_embeds,
    norm_in_vocabulary,
    save_learned_embeds,
    splice_style_token,
)


@pytest.fixture
def encoder_and_tokenizer(tiny_pipeline_dir):
    tokenizer = CLIPTokenizer.from_pretrained(tiny_pipeline_dir, subfolder="tokenizer")
    return CLIPTextModel.from_pretrained(tiny_pipeline_dir, subfolder="text_encoder"), tokenizer


def encode(text_encoder, tokenizer, text):
    return text_encoder(tokenizer(text, return_tensors="pt").input_ids)[0]


def test_a_spliced_token_starts_as_its_initializer_and_changes_no_other_prompt(encoder_and_tokenizer):
    text_encoder, tokenizer = encoder_and_tokenizer
    plain, by_word = encode(text_encoder, tokenizer, "a bag"), encode(text_encoder, tokenizer, "a style")
    [initializer_id] = add_placeholder_tokens([tokenizer], "<s>", 1, "style")
    splice_style_token(text_encoder, tokenizer, 1, initializer_id)
    assert torch.equal(encode(text_encoder, tokenizer, "a bag"), plain)
    # the last position is the end token: the placeholder's own id does not leak into it
    assert torch.equal(encode(text_encoder, tokenizer, "a <s>"), by_word)


def test_training_moves_the_tokens_rows_and_nothing_else(encoder_and_tokenizer):
    text_encoder, tokenizer = encoder_and_tokenizer
    [initializer_id] = add_placeholder_tokens([tokenizer], "<s>", 2, "style")
    embedding = splice_style_token(text_encoder, tokenizer, 2, initializer_id)
    before = {name: value.clone() for name, value in text_encoder.state_dict().items()}
    trainable = [parameter for parameter in text_encoder.parameters() if parameter.requires_grad]
    assert [tuple(parameter.shape) for parameter in trainable] == [(2, 16)]
    optimizer = torch.optim.AdamW(trainable, lr=0.1)
    encode(text_encoder, tokenizer, "a bag in <s> <s>_1").square().sum().backward()
    optimizer.step()
    changed = [name for name, value in text_encoder.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) == 1
    assert changed[0].endswith("token_embedding.rows")
    assert not torch.equal(embedding.rows[0], embedding.rows[1])


def test_the_trained_rows_stay_float32_in_a_half_precision_encoder(encoder_and_tokenizer):
    text_encoder, tokenizer = encoder_and_tokenizer
    text_encoder.to(torch.bfloat16)
    [initializer_id] = add_placeholder_tokens([tokenizer], "<s>", 1, "style")
    embedding = splice_style_token(text_encoder, tokenizer, 1, initializer_id)
    assert embedding.rows.dtype == torch.float32
    assert embedding(torch.tensor([[0, len(tokenizer) - 1]])).dtype == torch.bfloat16


def test_the_norm_is_compared_with_the_vocabularys(encoder_and_tokenizer):
    text_encoder, tokenizer = encoder_and_tokenizer
    [initializer_id] = add_placeholder_tokens([tokenizer], "<s>", 1, "style")
    embedding = splice_style_token(text_encoder, tokenizer, 1, initializer_id)
    embedding.table.weight.data = torch.arange(1.0, 102.0)[:, None] * torch.eye(16)[0]  # norms 1 to 101
    embedding.rows.data.fill_(2.0)
    figures = norm_in_vocabulary(embedding)
    assert figures["norm"] == pytest.approx(8.0)  # sqrt(16 * 2 ** 2)
    assert figures["vocabulary_quantile"] == pytest.approx(7 / 101, abs=1e-4)
    assert figures["vocabulary_5_50_95"] == pytest.approx([6.0, 51.0, 96.0])


def test_learned_embeds_are_read_in_the_order_of_the_encoders(tmp_path):
    one, two = torch.ones(2, 4), torch.zeros(2, 6)
    assert torch.equal(load_learned_embeds(save_learned_embeds(tmp_path, ["<s>"], [one]))[0], one)
    both = load_learned_embeds(save_learned_embeds(tmp_path, ["clip_l", "clip_g"], [one, two]))
    assert [rows.shape for rows in both] == [(2, 4), (2, 6)]


def test_a_prompt_that_would_be_cut_is_an_error_that_shows_what_is_left(encoder_and_tokenizer):
    tokenizer = encoder_and_tokenizer[1]
    check_prompt_lengths([tokenizer], ["x " * 75])
    with pytest.raises(UserError, match="is 78 tokens, the text encoder takes 77 and would see 'x x"):
        check_prompt_lengths([tokenizer], ["x " * 76])


@pytest.mark.parametrize(
    ("placeholder", "initializer", "message"),
    [
        ("style</w>", "style", "has style</w> already"),
        ("<s>", "zebra crossing", "must be one"),
        ("<s>", "", "is 0 tokens"),
        ("my style token", "style", "does not find it in a prompt"),
        ("", "style", "does not find it in a prompt"),
    ],
)
def test_a_taken_placeholder_or_a_long_initializer_is_an_error(
    encoder_and_tokenizer, placeholder, initializer, message
):
    with pytest.raises(UserError, match=message):
        add_placeholder_tokens([encoder_and_tokenizer[1]], placeholder, 1, initializer)
