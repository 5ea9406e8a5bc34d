"""Families of text-to-image pipelines: facts that no config states, in one table. No torch.

A new family is an entry here. If it takes style tokens, `base_models.py` must load its parts for training and
`token.py` must encode prompts as its pipeline does.
"""

from dataclasses import dataclass

LEARNED_EMBEDS = "learned_embeds.safetensors"  # the rows of a style token
CLASS_EMBEDS = "class_embeds.safetensors"  # the rows of the class tokens, by label id
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # as diffusers names it
CLASS_TOKENS = "<dsi-class>"  # the key of the rows in a file of one text encoder
OWN_SCHEDULER = "default"  # the pipeline's own
FAST_SCHEDULER = "DPMSolverMultistepScheduler"


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder that a style token is learned for: its part, its tokenizer and its class.

    `rows` is the key of its rows in a file with several encoders, the same as in other trainers.
    """

    part: str
    tokenizer: str
    class_name: str
    rows: str


@dataclass(frozen=True)
class Family:
    """Pipelines of one class.

    `text_encoders` are those that a style token is learned for; empty if the family takes no tokens.
    `prompt_embeddings` are the results of `encode_prompt`, in order, by the names of the pipeline's arguments; without
    them, prompts are passed as text. `negative_prompts` says whether `guidance_scale` applies to a negative prompt;
    None: the parameters of the call tell. `latents_a_side` is the native size if the denoiser's config has none.
    `default_scheduler` is used for models that are made for many steps and trained with its noise.
    `checkpoint_key` begins the names of some weights in a single-file checkpoint, and in no other family's.
    `scales_model_input` says whether the pipeline uses its scheduler as Stable Diffusion does, and
    `normalizes_latents` whether it uses the mean and deviation of latents in a VAE's config. `draws_from_images` says
    whether its image-to-image pipeline is supported.
    """

    title: str = "other"
    text_encoders: tuple[TextEncoder, ...] = ()
    prompt_embeddings: tuple[str, ...] = ()
    negative_prompts: bool | None = None
    latents_a_side: int | None = None
    default_scheduler: str = OWN_SCHEDULER
    checkpoint_key: str | None = None
    scales_model_input: bool = False
    normalizes_latents: bool = False
    draws_from_images: bool = False

    @property
    def takes_style_tokens(self) -> bool:
        return bool(self.text_encoders)

    def row_names(self, placeholder_token: str) -> list[str]:
        """Return the name of each text encoder's rows in a token's file."""
        several = len(self.text_encoders) > 1
        return [encoder.rows if several else placeholder_token for encoder in self.text_encoders]


CLIP_L = TextEncoder("text_encoder", "tokenizer", "CLIPTextModel", "clip_l")
CLIP_G = TextEncoder("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection", "clip_g")
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds")
POOLED_EMBEDDINGS = (*EMBEDDINGS, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

# by pipeline class
FAMILIES = {
    "StableDiffusionPipeline": Family(
        title="Stable Diffusion 1.x and 2.x", text_encoders=(CLIP_L,), prompt_embeddings=EMBEDDINGS,
        negative_prompts=True, default_scheduler=FAST_SCHEDULER, scales_model_input=True, draws_from_images=True,
        checkpoint_key="cond_stage_model.",
    ),
    "StableDiffusionXLPipeline": Family(
        title="Stable Diffusion XL", text_encoders=(CLIP_L, CLIP_G), prompt_embeddings=POOLED_EMBEDDINGS,
        negative_prompts=True, default_scheduler=FAST_SCHEDULER, scales_model_input=True, normalizes_latents=True,
        draws_from_images=True, checkpoint_key="conditioner.embedders.1.",
    ),
    "StableDiffusion3Pipeline": Family(
        title="Stable Diffusion 3", prompt_embeddings=POOLED_EMBEDDINGS, negative_prompts=True
    ),
    # its denoiser takes the guidance scale as an input, and any size: the pipeline hard-codes 128
    "FluxPipeline": Family(
        title="FLUX", prompt_embeddings=("prompt_embeds", "pooled_prompt_embeds"), negative_prompts=False,
        latents_a_side=128,
    ),
    # the pipeline hard-codes the size
    "QwenImagePipeline": Family(title="Qwen-Image", latents_a_side=128),
}  # fmt: skip
OTHER = Family()
WITH_STYLE_TOKENS = {kind: family for kind, family in FAMILIES.items() if family.takes_style_tokens}
ROW_NAMES = tuple(dict.fromkeys(encoder.rows for family in FAMILIES.values() for encoder in family.text_encoders))
