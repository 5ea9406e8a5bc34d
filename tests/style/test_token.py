import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from utils.cli.errors import UserError
from utils.style.token import add_placeholder_tokens, splice_style_token, vocabulary_norm_quantile


@pytest.fixture
def encoder_and_tokenizer(tiny_pipeline_dir):
    tokenizer = CLIPTokenizer.from_pretrained(tiny_pipeline_dir, subfolder="tokenizer")
    return CLIPTextModel.from_pretrained(tiny_pipeline_dir, subfolder="text_encoder"), tokenizer


def encode(text_encoder, tokenizer, text):
    return text_encoder(tokenizer(text, return_tensors="pt").input_ids)[0]


def test_a_spliced_token_starts_as_its_initializer_and_changes_no_other_prompt(encoder_and_tokenizer):
    text_encoder, tokenizer = encoder_and_tokenizer
    plain, by_word = encode(text_encoder, tokenizer, "a bag"), encode(text_encoder, tokenizer, "a style")
    initializer_id = add_placeholder_tokens(tokenizer, "<s>", 1, "style")
    splice_style_token(text_encoder, tokenizer, 1, initializer_id)
    assert torch.equal(encode(text_encoder, tokenizer, "a bag"), plain)
    # the last position is the end token: the placeholder's own id does not leak into it
    assert torch.equal(encode(text_encoder, tokenizer, "a <s>"), by_word)


def test_training_moves_the_tokens_rows_and_nothing_else(encoder_and_tokenizer):
    text_encoder, tokenizer = encoder_and_tokenizer
    initializer_id = add_placeholder_tokens(tokenizer, "<s>", 2, "style")
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
    initializer_id = add_placeholder_tokens(tokenizer, "<s>", 1, "style")
    embedding = splice_style_token(text_encoder, tokenizer, 1, initializer_id)
    assert embedding.rows.dtype == torch.float32
    assert embedding(torch.tensor([[0, len(tokenizer) - 1]])).dtype == torch.bfloat16


def test_norm_quantile_of_a_token_larger_than_all_words_is_one(encoder_and_tokenizer):
    text_encoder, tokenizer = encoder_and_tokenizer
    initializer_id = add_placeholder_tokens(tokenizer, "<s>", 1, "style")
    embedding = splice_style_token(text_encoder, tokenizer, 1, initializer_id)
    embedding.rows.data.fill_(2.0)
    norm, quantile = vocabulary_norm_quantile(embedding)
    assert norm == pytest.approx(8.0)  # sqrt(16 * 2 ** 2)
    assert quantile == 1.0


@pytest.mark.parametrize(
    ("placeholder", "initializer", "message"),
    [
        ("style</w>", "style", "has style</w> already"),
        ("<s>", "zebra crossing", "must be one"),
        ("<s>", "", "is 0 tokens"),
    ],
)
def test_a_taken_placeholder_or_a_long_initializer_is_an_error(
    encoder_and_tokenizer, placeholder, initializer, message
):
    with pytest.raises(UserError, match=message):
        add_placeholder_tokens(encoder_and_tokenizer[1], placeholder, 1, initializer)
