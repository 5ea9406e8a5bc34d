"""Vision-language models of the real classes at tiny size: their answers are words at random, always the same."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["on", "a", "gravel", "road", "seen", "from", "the", "side", "in", "bright", "light", ",", "square", "circle"]
SPECIAL = ["<pad>", "<unk>", "</s>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %} :"
)
SIZE = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}


def save_vision_language_model(folder: Path, kind: str = "llava") -> Path:
    """Save one of `MODELS` with random weights to a new folder; return the folder."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, ":", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
        additional_special_tokens=SPECIAL[3:],
    )  # fmt: skip
    text = transformers.LlamaConfig(
        **SIZE, vocab_size=len(vocabulary), pad_token_id=0, eos_token_id=2, initializer_range=1.0
    )
    torch.manual_seed(0)
    model, processor = MODELS[kind](text, tokenizer)
    model.generation_config.suppress_tokens = list(range(len(SPECIAL) + 1))  # answers have words
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def llava(text: transformers.LlamaConfig, tokenizer) -> tuple:
    vision = transformers.CLIPVisionConfig(**SIZE, image_size=16, patch_size=8, initializer_range=1.0)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-1, image_seq_length=4
    )
    images = transformers.CLIPImageProcessor(size=16, crop_size=16)
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config), processor


def idefics3(text: transformers.LlamaConfig, tokenizer) -> tuple:
    """Return the classes of SmolVLM, which splits images into tiles unless told not to."""
    vision = SIZE | {"image_size": 16, "patch_size": 4, "initializer_range": 1.0}
    config = transformers.Idefics3Config(
        vision_config=vision, text_config=text.to_dict(), image_token_id=3, scale_factor=2, pad_token_id=0
    )
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=TEMPLATE)
    return transformers.Idefics3ForConditionalGeneration(config), processor


MODELS = {build.__name__: build for build in (llava, idefics3)}
