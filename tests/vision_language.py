"""A vision-language model of the real classes at tiny size: its answers are words at random, always the same."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = ["on", "a", "gravel", "road", "seen", "from", "the", "side", "in", "bright", "light", ",", "square", "circle"]
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %} :"
)


def save_vision_language_model(folder: Path) -> Path:
    """Save a LLaVA with random weights to a new folder; return the folder."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "</s>", "<image>", ":", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    size = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = LlamaConfig(**size, vocab_size=len(vocabulary), pad_token_id=0, eos_token_id=2, initializer_range=1.0)
    vision = CLIPVisionConfig(**size, image_size=16, patch_size=8, initializer_range=1.0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-1, image_seq_length=4
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size=16, crop_size=16), tokenizer, patch_size=8, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder
