import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from utils.style.base_models import open_base_model
from utils.style.prompt_encoder import PromptEncoder, PromptIds, encode_distinct, unet_arguments
from utils.style.token import add_placeholder_tokens, save_learned_embeds

PROMPT = "a bag in <s> of red"


def spliced(folder, num_vectors=1):
    """Return a prompt encoder with random rows, and the tokenizers."""
    base_model = open_base_model(str(folder), "--model")
    tokenizers = base_model.load_tokenizers()
    initializer_ids = add_placeholder_tokens(tokenizers, "<s>", num_vectors, "style")
    encoder = PromptEncoder(base_model.load_text_encoders(torch.float32), tokenizers, num_vectors, initializer_ids)
    torch.manual_seed(1)
    for rows in encoder.rows:
        rows.data.normal_()
    return encoder, tokenizers


def prompt_ids(tokenizers, *prompts):
    return PromptIds.tokenize(tokenizers, list(prompts), ["a", "b"], "cpu")


@pytest.mark.parametrize("num_vectors", [1, 3])
def test_prompts_are_encoded_as_by_the_pipeline_that_loads_the_token(tiny_pipeline_dir, tmp_path, num_vectors):
    encoder, tokenizers = spliced(tiny_pipeline_dir, num_vectors)
    save_learned_embeds(tmp_path, ["<s>"], encoder.rows)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    pipe.load_textual_inversion(tmp_path)
    words = " ".join(["<s>", "<s>_1", "<s>_2"][:num_vectors])
    ours = encoder(prompt_ids(tokenizers, PROMPT.replace("<s>", words)).training)
    theirs, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
    assert torch.equal(ours["encoder_hidden_states"], theirs)


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_xl_prompts_are_encoded_as_by_the_pipeline_that_loads_both_tokens(tiny_xl_pipeline_dir, tmp_path, num_vectors):
    encoder, tokenizers = spliced(tiny_xl_pipeline_dir, num_vectors)
    embeds = load_file(save_learned_embeds(tmp_path, ["clip_l", "clip_g"], encoder.rows))
    assert {name: tuple(rows.shape) for name, rows in embeds.items()} == {
        "clip_l": (num_vectors, 16),
        "clip_g": (num_vectors, 24),
    }
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_xl_pipeline_dir)
    # the two lines of the card
    pipe.load_textual_inversion(embeds["clip_l"], "<s>", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    pipe.load_textual_inversion(embeds["clip_g"], "<s>", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)
    words = " ".join(["<s>", "<s>_1"][:num_vectors])
    ours = encoder(prompt_ids(tokenizers, PROMPT.replace("<s>", words)).training)
    theirs, _, pooled, _ = pipe.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=False)
    assert torch.equal(ours["encoder_hidden_states"], theirs)
    assert torch.equal(ours["text_embeds"], pooled)


def test_distinct_prompts_are_encoded_once_and_come_back_in_order(tiny_xl_pipeline_dir):
    encoder, tokenizers = spliced(tiny_xl_pipeline_dir)
    ids = prompt_ids(tokenizers, "a <s>", "b <s>", "<s> a", "<s> b")  # two templates of two classes
    sizes = []
    encoder.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    templates, labels = torch.tensor([1, 0, 1, 0]), torch.tensor([1, 0, 1, 0])
    conditioning = encode_distinct(encoder, ids, templates, labels)
    assert sizes == [2]
    expected = encoder(ids.training[[3, 0, 3, 0]])
    for name, value in conditioning.items():
        assert torch.allclose(value, expected[name], atol=1e-6)


def test_prompts_of_a_class_are_those_of_its_template(tiny_pipeline_dir):
    _, tokenizers = spliced(tiny_pipeline_dir)
    ids = prompt_ids(tokenizers, "a <s>", "b <s>", "<s> a", "<s> b")
    assert torch.equal(ids.of_classes([1, 0]), ids.training[[1, 0]])
    assert torch.equal(ids.of_classes([1], template=1), ids.training[[3]])


def test_the_xl_unet_is_told_the_size_as_by_its_pipeline(tiny_xl_pipeline_dir):
    encoder, tokenizers = spliced(tiny_xl_pipeline_dir)
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_xl_pipeline_dir)
    arguments = unet_arguments(encoder(prompt_ids(tokenizers, "a", "b").training), 32, torch.bfloat16)
    theirs = pipe._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.bfloat16, text_encoder_projection_dim=8)
    assert torch.equal(arguments["added_cond_kwargs"]["time_ids"], theirs.expand(2, -1))
    assert {value.dtype for value in arguments["added_cond_kwargs"].values()} == {torch.bfloat16}
    assert arguments["encoder_hidden_states"].dtype == torch.bfloat16
