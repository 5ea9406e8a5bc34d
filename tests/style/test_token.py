import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from utils.cli.errors import UserError
from utils.style import token
from utils.style.base_models import open_base_model
from utils.style.token import (
    Denoiser,
    PromptEncoder,
    PromptIds,
    add_placeholder_tokens,
    check_prompt_lengths,
    find_initializers,
    norm_in_vocabulary,
    save_learned_embeds,
    unet_arguments,
)

PROMPT = "a bag in <s> of red"
WORDS = ("<s>", "<s>_1", "<s>_2")


def spliced(folder, num_vectors=1):
    """Return a prompt encoder with untrained rows, and the tokenizers."""
    base_model = open_base_model(str(folder), "--model")
    tokenizers = base_model.load_tokenizers()
    initializer_ids = find_initializers(tokenizers, "style")["style"]
    add_placeholder_tokens(tokenizers, "<s>", num_vectors)
    return PromptEncoder(
        base_model.load_text_encoders(torch.float32), tokenizers, num_vectors, initializer_ids
    ), tokenizers


def with_random_rows(encoder):
    torch.manual_seed(1)
    for rows in encoder.rows:
        rows.data.normal_()
    return encoder


def prompt_ids(tokenizers, *prompts):
    return PromptIds.tokenize(tokenizers, list(prompts), ["a", "b"], "cpu")


def test_words_for_auto_are_single_tokens(tiny_xl_pipeline_dir, monkeypatch):
    tokenizers = open_base_model(str(tiny_xl_pipeline_dir), "--model").load_tokenizers()
    assert list(find_initializers(tokenizers, "auto")) == ["style"]  # the only word of the tiny tokenizer
    assert [len(ids) for ids in find_initializers(tokenizers, "s").values()] == [2]
    monkeypatch.setattr(token, "INITIALIZER_WORDS", ("photo", "image"))
    with pytest.raises(UserError, match="^--initializer_token auto: none of photo, image is a single token of this"):
        find_initializers(tokenizers, "auto")


def test_a_spliced_token_starts_as_its_initializer_and_changes_no_other_prompt(tiny_pipeline_dir):
    encoder, tokenizers = spliced(tiny_pipeline_dir)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    for prompt, same in (("a bag", "a bag"), ("a <s>", "a style")):
        ours = encoder(prompt_ids(tokenizers, prompt).training)["encoder_hidden_states"]
        assert torch.equal(ours, pipe.encode_prompt(same, "cpu", 1, False)[0])


@pytest.mark.parametrize("num_vectors", [1, 3])
def test_prompts_are_encoded_as_by_the_pipeline_that_loads_the_token(tiny_pipeline_dir, tmp_path, num_vectors):
    encoder, tokenizers = spliced(tiny_pipeline_dir, num_vectors)
    save_learned_embeds(tmp_path, ["<s>"], with_random_rows(encoder).rows)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    pipe.load_textual_inversion(tmp_path)
    ours = encoder(prompt_ids(tokenizers, PROMPT.replace("<s>", " ".join(WORDS[:num_vectors]))).training)
    theirs, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
    assert torch.equal(ours["encoder_hidden_states"], theirs)


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_xl_prompts_and_size_are_as_in_the_pipeline_that_loads_both_tokens(tiny_xl_pipeline_dir, tmp_path, num_vectors):
    encoder, tokenizers = spliced(tiny_xl_pipeline_dir, num_vectors)
    embeds = load_file(save_learned_embeds(tmp_path, ["clip_l", "clip_g"], with_random_rows(encoder).rows))
    shapes = {name: tuple(rows.shape) for name, rows in embeds.items()}
    assert shapes == {"clip_l": (num_vectors, 16), "clip_g": (num_vectors, 24)}
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_xl_pipeline_dir)
    # the two lines of the card
    pipe.load_textual_inversion(embeds["clip_l"], "<s>", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    pipe.load_textual_inversion(embeds["clip_g"], "<s>", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)
    ours = encoder(prompt_ids(tokenizers, PROMPT.replace("<s>", " ".join(WORDS[:num_vectors]))).training)
    theirs, _, pooled, _ = pipe.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=False)
    assert torch.equal(ours["encoder_hidden_states"], theirs)
    assert torch.equal(ours["text_embeds"], pooled)
    size = pipe._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.bfloat16, text_encoder_projection_dim=8)
    assert torch.equal(unet_arguments(ours, 32, torch.bfloat16)["added_cond_kwargs"]["time_ids"], size)


def test_distinct_prompts_are_encoded_once_and_come_back_in_order(tiny_xl_pipeline_dir):
    encoder, tokenizers = spliced(tiny_xl_pipeline_dir)
    ids = prompt_ids(tokenizers, "a <s>", "b <s>", "<s> a", "<s> b")  # two templates and two classes
    sizes = []
    encoder.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    denoiser = Denoiser(None, None, None, encoder, ids, 32, torch.float32)
    conditioning = denoiser.encode_distinct(torch.tensor([1, 0, 1, 0]), torch.tensor([1, 0, 1, 0]))
    assert sizes == [2]
    expected = encoder(ids.training[[3, 0, 3, 0]])
    for name, value in conditioning.items():
        assert torch.allclose(value, expected[name], atol=1e-6)


def test_the_norm_is_compared_with_the_vocabularys(tiny_pipeline_dir):
    [embedding] = spliced(tiny_pipeline_dir)[0].style_tokens
    embedding.table.weight.data = torch.arange(1.0, 102.0)[:, None] * torch.eye(16)[0]  # norms 1 to 101
    embedding.rows.data.fill_(2.0)
    figures = norm_in_vocabulary(embedding)
    assert figures["norm"] == pytest.approx(8.0)  # sqrt(16 * 2 ** 2)
    assert figures["vocabulary_quantile"] == pytest.approx(7 / 101, abs=1e-4)
    assert figures["vocabulary_5_50_95"] == pytest.approx([6.0, 51.0, 96.0])


def test_a_prompt_that_would_be_cut_is_an_error_that_shows_what_is_left(tiny_pipeline_dir):
    tokenizers = open_base_model(str(tiny_pipeline_dir), "--model").load_tokenizers()
    check_prompt_lengths(tokenizers, ["x " * 75])
    with pytest.raises(UserError, match="has 78 tokens, the text encoder takes 77 and would only see 'x x"):
        check_prompt_lengths(tokenizers, ["x " * 76])
