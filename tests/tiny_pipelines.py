"""Pipelines of the real classes at tiny size: 32 pixels, with random weights that are always the same."""

import json
from pathlib import Path

import diffusers
import torch
import transformers
from transformers import CLIPTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789-_<>.,/"


def save_pipeline(kind: str, folder: Path) -> Path:
    """Save one of `PIPELINES` to a new folder; return the folder."""
    tokenizer = save_tokenizer(folder)
    torch.manual_seed(0)
    PIPELINES[kind](tokenizer).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return a tokenizer with the alphabet and one word, 'style', made from files in a new `folder`."""
    folder.mkdir()
    merges = [("s", "t"), ("st", "y"), ("sty", "l"), ("styl", "e</w>")]
    vocabulary = [*LETTERS, *(letter + "</w>" for letter in LETTERS), *("".join(pair) for pair in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77)


def text_config(tokenizer: CLIPTokenizer, **settings) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        **{
            "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "projection_dim": 16, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **settings,
        }
    )  # fmt: skip


def t5() -> tuple[transformers.T5Tokenizer, transformers.T5EncoderModel]:
    """Return a tokenizer of single letters and an encoder, 32 numbers wide."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *LETTERS]
    tokenizer = transformers.T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=32, d_ff=32, d_kv=16, num_heads=2, num_layers=1,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return tokenizer, transformers.T5EncoderModel(config)


def vae(**settings) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, layers_per_block=1, sample_size=32, **settings,
    )  # fmt: skip


def unet(**settings) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **settings,
    )  # fmt: skip


def stable_diffusion(tokenizer: CLIPTokenizer) -> diffusers.StableDiffusionPipeline:
    """Return one that predicts v."""
    return diffusers.StableDiffusionPipeline(
        text_encoder=transformers.CLIPTextModel(text_config(tokenizer)), tokenizer=tokenizer, vae=vae(),
        unet=unet(cross_attention_dim=16),
        scheduler=diffusers.DDIMScheduler(
            prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1, clip_sample=False
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(tokenizer: CLIPTokenizer) -> diffusers.StableDiffusionXLPipeline:
    """Return one that predicts noise.

    Its second text encoder pools at the largest token id (`eos_token_id` 2), as that of the published model does.
    """
    second = {"hidden_size": 24, "projection_dim": 8, "eos_token_id": 2}
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=transformers.CLIPTextModel(text_config(tokenizer, num_hidden_layers=2)),
        text_encoder_2=transformers.CLIPTextModelWithProjection(text_config(tokenizer, num_hidden_layers=2, **second)),
        tokenizer=tokenizer, tokenizer_2=tokenizer,
        unet=unet(
            cross_attention_dim=40, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=8 + 6 * 4,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(),
    )  # fmt: skip


def stable_diffusion_3(tokenizer: CLIPTokenizer) -> diffusers.StableDiffusion3Pipeline:
    """Return one with T5."""
    t5_tokenizer, t5_encoder = t5()
    config = text_config(tokenizer, num_hidden_layers=2)
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=16, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=transformers.CLIPTextModelWithProjection(config),
        text_encoder_2=transformers.CLIPTextModelWithProjection(config),
        text_encoder_3=t5_encoder, tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=t5_tokenizer,
    )  # fmt: skip


def flux(tokenizer: CLIPTokenizer) -> diffusers.FluxPipeline:
    """Return one with its guidance embedded, as in FLUX.1-dev."""
    t5_tokenizer, t5_encoder = t5()
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=transformers.CLIPTextModel(text_config(tokenizer)), text_encoder_2=t5_encoder,
        tokenizer=tokenizer, tokenizer_2=t5_tokenizer,
    )  # fmt: skip


def qwen_image(tokenizer: CLIPTokenizer) -> diffusers.QwenImagePipeline:
    """Return one whose guidance is `true_cfg_scale`, with a negative prompt; its tokenizer is that of CLIP."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 512,
            "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config), tokenizer=tokenizer,
    )  # fmt: skip


PIPELINES = {
    build.__name__: build for build in (stable_diffusion, stable_diffusion_xl, stable_diffusion_3, flux, qwen_image)
}
