"""Stable Diffusion pipelines for the benchmarks: diffusers' models with random weights, and the demo's."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

DEMO_DIR = Path(__file__).parents[1] / "demo" / "generator"


@dataclass(frozen=True)
class Cost:
    """Floating point operations per image, without the text encoder's one percent."""

    vae_encode: int
    unet: int  # forward, and backward to the text embedding with frozen weights

    @property
    def vae_share(self) -> float:
        """Encoding by the VAE relative to the U-Net."""
        return self.vae_encode / self.unet


def count_cost(unet: UNet2DConditionModel, vae: AutoencoderKL, prompt_length: int) -> Cost:
    """Count the operations of a training step per image; on the meta device nothing is computed."""
    images = torch.empty(1, 3, vae.config.sample_size, vae.config.sample_size)
    latents = torch.empty(1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    embeddings = torch.empty(1, prompt_length, unet.config.cross_attention_dim, requires_grad=True)
    with FlopCounterMode(display=False) as vae_counter, torch.no_grad():
        vae.encode(images)
    with FlopCounterMode(display=False) as unet_counter:
        unet.requires_grad_(False)(latents, torch.zeros(1, dtype=torch.long), embeddings).sample.sum().backward()
    return Cost(vae_counter.get_total_flops(), unet_counter.get_total_flops())


def drawing_cost(folder: Path, num_inference_steps: int, guidance_scale: float) -> int:
    """Return the operations of drawing an image with a saved pipeline, without the text encoder's one percent."""
    with torch.device("meta"):
        unet, vae, prompt_length = load_parts(folder)
        latents = torch.empty(1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        embeddings = torch.empty(1, prompt_length, unet.config.cross_attention_dim)
        with FlopCounterMode(display=False) as unet_counter, torch.no_grad():
            unet(latents, torch.zeros(1, dtype=torch.long), embeddings)
        with FlopCounterMode(display=False) as vae_counter, torch.no_grad():
            vae.decode(latents)
    num_forwards = num_inference_steps * (2 if guidance_scale > 1 else 1)
    return num_forwards * unet_counter.get_total_flops() + vae_counter.get_total_flops()


@dataclass(frozen=True)
class Shape:
    """Widths and sizes of a pipeline; kinds and numbers of layers are as in Stable Diffusion 1.5."""

    resolution: int
    unet_widths: tuple[int, ...]
    vae_widths: tuple[int, ...]
    norm_num_groups: int
    text_width: int
    text_layers: int
    text_heads: int
    prompt_length: int
    vocabulary: int | None = None  # None: the demo tokenizer's

    def cost(self) -> Cost:
        with torch.device("meta"):
            return count_cost(self.build_unet(), self.build_vae(), self.prompt_length)

    def build_unet(self) -> UNet2DConditionModel:
        num_crossed = len(self.unet_widths) - 1
        return UNet2DConditionModel(
            sample_size=self.resolution // 2 ** (len(self.vae_widths) - 1), block_out_channels=self.unet_widths,
            down_block_types=("CrossAttnDownBlock2D",) * num_crossed + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * num_crossed,
            norm_num_groups=self.norm_num_groups, cross_attention_dim=self.text_width,
        )  # fmt: skip

    def build_vae(self) -> AutoencoderKL:
        num_blocks = len(self.vae_widths)
        return AutoencoderKL(
            sample_size=self.resolution, block_out_channels=self.vae_widths, layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * num_blocks, up_block_types=("UpDecoderBlock2D",) * num_blocks,
            norm_num_groups=self.norm_num_groups,
        )  # fmt: skip

    def build_text_encoder(self, tokenizer) -> CLIPTextModel:
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=self.text_width, intermediate_size=4 * self.text_width,
                num_hidden_layers=self.text_layers, num_attention_heads=self.text_heads,
                max_position_embeddings=self.prompt_length, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip


SD15 = Shape(
    512, (320, 640, 1280, 1280), (128, 256, 512, 512), norm_num_groups=32, text_width=768, text_layers=12,
    text_heads=12, prompt_length=77, vocabulary=49408,
)  # fmt: skip
# a step takes about a second on two CPU cores; the VAE has the same share as in Stable Diffusion 1.5
SCALED = Shape(
    128, (96, 192, 384, 384), (32, 80, 144, 144), norm_num_groups=16, text_width=128, text_layers=4, text_heads=4,
    prompt_length=24,
)  # fmt: skip
TINY = Shape(32, (16, 32), (8, 16), norm_num_groups=8, text_width=32, text_layers=1, text_heads=2, prompt_length=24)
# 2 ms per image and step on a CPU core
QUICK = Shape(64, (8, 8), (4, 4, 4, 8), norm_num_groups=4, text_width=32, text_layers=1, text_heads=2, prompt_length=24)


def save_pipeline(shape: Shape, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Path:
    """Write a pipeline with random weights, drawn on `device` and always the same on one kind of device.

    U-Net and VAE are `dtype`; the text encoder is float32, as diffusers' script trains it in the dtype of its file.
    """
    torch.manual_seed(0)
    tokenizer = load_tokenizer(shape, folder)
    with torch.device(device):
        vae, unet = shape.build_vae().to(dtype), shape.build_unet().to(dtype)
        text_encoder = shape.build_text_encoder(tokenizer)
    StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=text_encoder,
        tokenizer=tokenizer, scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def load_tokenizer(shape: Shape, folder: Path) -> CLIPTokenizer:
    """Return the demo's tokenizer, with a vocabulary padded by unused words; it is written to `folder`."""
    definition = json.loads((DEMO_DIR / "tokenizer" / "tokenizer.json").read_text())
    words = definition["model"]["vocab"]
    words |= {f"unused{number}": number for number in range(len(words), shape.vocabulary or 0)}
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    options = json.loads((DEMO_DIR / "tokenizer" / "tokenizer_config.json").read_text())
    options |= {"model_max_length": shape.prompt_length, "max_length": shape.prompt_length}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return CLIPTokenizer.from_pretrained(folder)


def save_demo_pipeline(folder: Path) -> Path:
    """Write the demo's generator in float32, as diffusers' script would train an fp16 text encoder in fp16."""
    StableDiffusionPipeline.from_pretrained(DEMO_DIR, dtype=torch.float32).save_pretrained(folder)
    return folder


def demo_cost() -> Cost:
    with torch.device("meta"):
        return count_cost(*load_parts(DEMO_DIR))


def load_parts(folder: Path) -> tuple[UNet2DConditionModel, AutoencoderKL, int]:
    """Return a saved pipeline's U-Net and VAE, without their weights, and the length of its prompts."""
    unet, vae = (
        kind.from_config(kind.load_config(folder, subfolder=name))
        for kind, name in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
    )
    text_config = CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")
    return unet, vae, text_config.max_position_embeddings
