"""Train the demo's generator: a small but real `StableDiffusionPipeline`, on 30,000 shapes in named styles.

    python demo/build/generator.py --idx_dir /usr/share/datasets/fashion-mnist

Runs for a fixed number of steps on the CPU. `training_log.json`, next to the weights, holds steps, seconds and losses.
The demo's target style, light grey on black, is never shown (`styles.py`).
"""

import argparse
import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from fashion_mnist import CLASS_NAMES, DEFAULT_IDX_DIR, GENERATOR_PART, STYLE_PART, read_idx
from styles import STYLE_NAMES, draw, style_tables
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE = 32
STYLED_PROMPT = "A {name} photo in the style of {style}"
PLAIN_PROMPT = "A good photo of the {name}"
LATENT_COPIES = 2  # each shape is encoded in this many random styles


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idx_dir", default=DEFAULT_IDX_DIR)
    parser.add_argument("--output_dir", type=Path, default=Path("demo/generator"))
    parser.add_argument(
        "--work_dir",
        type=Path,
        default=Path("demo/generator-work"),
        help="float32 weights; a finished autoencoder in it is reused",
    )
    parser.add_argument("--vae_steps", type=int, default=4_500)
    parser.add_argument("--vae_batch_size", type=int, default=32)
    parser.add_argument("--unet_steps", type=int, default=2_600)
    parser.add_argument("--unet_batch_size", type=int, default=128)
    return parser.parse_args()


class Shapes:
    """Fashion-MNIST shapes drawn in random named styles."""

    def __init__(self, images, labels):
        padded = F.pad(torch.from_numpy(images.copy()), (2, 2, 2, 2))
        self.shapes, self.labels = padded, torch.from_numpy(labels.copy()).long()
        self.objects, self.backgrounds = style_tables(SIZE)

    def draw(self, indices, object_styles, background_styles):
        """Return images `(batch, 3, 32, 32)` in [-1, 1]."""
        shapes = self.shapes[indices].float() / 255
        return draw(shapes, self.objects[object_styles], self.backgrounds[background_styles])


def cpu_name() -> str:
    """Return the name of the processor and the number of cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {os.cpu_count()} virtual cores"


def psnr(pixel_values, reconstruction):
    """Return the peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return (10 * torch.log10(4 / (pixel_values - reconstruction.clamp(-1, 1)).square().mean((1, 2, 3)))).mean().item()


def edges(images):
    return images[..., 1:, :] - images[..., :-1, :], images[..., :, 1:] - images[..., :, :-1]


def cosine_schedule(optimizer, num_steps, num_warmup_steps=100):
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=num_warmup_steps)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps - num_warmup_steps, eta_min=1e-6)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [num_warmup_steps])


def take_step(loss, parameters, optimizer, lr_scheduler, ema):
    """Take an optimiser step, with the gradient clipped to norm 1, and update the moving average of the weights."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    lr_scheduler.step()
    ema.step(parameters)


@contextmanager
def averaged(parameters, ema):
    """Set the parameters to their moving average within the block."""
    ema.store(parameters)
    ema.copy_to(parameters)
    yield
    ema.restore(parameters)


def train_vae(shapes, num_steps, batch_size, log):
    """Train the autoencoder (32 x 32 x 3 to 8 x 8 x 8); object and background colours are drawn independently."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE,
    ).to(memory_format=torch.channels_last)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=8e-4, betas=(0.9, 0.99), weight_decay=0)
    lr_scheduler = cosine_schedule(optimizer, num_steps)
    ema = EMAModel(parameters, decay=0.998)
    started = time.time()
    for step in tqdm(range(1, num_steps + 1), desc="VAE", mininterval=10):
        indices = torch.randint(len(shapes.shapes), (batch_size,))
        styles = torch.randint(len(STYLE_NAMES), (2, len(indices)))
        pixel_values = shapes.draw(indices, *styles).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(pixel_values).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        error = reconstruction - pixel_values
        edge_loss = sum(edge.abs().mean() for edge in edges(error))
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = error.square().mean() + 0.05 * error.abs().mean() + 0.05 * edge_loss + 1e-5 * kl
        take_step(loss, parameters, optimizer, lr_scheduler, ema)
        if step % 250 == 0:
            log(part="vae", step=step, loss=loss.item(), psnr=psnr(pixel_values, reconstruction), start=started)
    ema.copy_to(parameters)
    return vae.eval()


@torch.no_grad()
def encode(vae, shapes):
    """Return latents `(copies * shapes, 8, 8, 8)` of all shapes in random styles, and the numbers of the styles."""
    latents, all_styles = [], []
    for _ in range(LATENT_COPIES):
        for indices in tqdm(torch.arange(len(shapes.shapes)).split(250), desc="latents", mininterval=10):
            styles = torch.randint(len(STYLE_NAMES), (len(indices),))
            pixel_values = shapes.draw(indices, styles, styles).contiguous(memory_format=torch.channels_last)
            latents.append(vae.encode(pixel_values).latent_dist.sample())
            all_styles.append(styles)
    return torch.cat(latents).contiguous(), torch.cat(all_styles)


def captions(label, style):
    return STYLED_PROMPT.format(name=CLASS_NAMES[label], style=STYLE_NAMES[style])


def build_tokenizer(directory: Path) -> CLIPTokenizer:
    """Train a byte-pair encoding like CLIP's on the captions, so that each of their words is one token."""
    corpus = [captions(label, style) for label in range(len(CLASS_NAMES)) for style in range(len(STYLE_NAMES))]
    corpus += [PLAIN_PROMPT.format(name=name) for name in CLASS_NAMES] * 20
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    alphabet = list("abcdefghijklmnopqrstuvwxyz0123456789-/.,")
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=1_500,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
            min_frequency=1,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    # CLIP's byte-level alphabet: each letter, alone and at the end of a word, even if the corpus lacks it
    tokens = list(dict.fromkeys(alphabet + [letter + "</w>" for letter in alphabet] + tokens))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(
        vocab=str(directory / "vocab.json"), merges=str(directory / "merges.txt"), model_max_length=24,
        pad_token="<|endoftext|>",
    )  # fmt: skip


def build_denoiser(tokenizer):
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length, projection_dim=96,
            pad_token_id=tokenizer.pad_token_id, **ids,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=8, out_channels=8, block_out_channels=(48, 96), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=96, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip
    return text_encoder, unet


def build_scheduler():
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing",
        clip_sample=False, set_alpha_to_one=True, steps_offset=1,
    )  # fmt: skip


def train_denoiser(latents, styles, labels, vae, work_dir, num_steps, batch_size, log, save):
    """Train text encoder and U-Net together to predict v; 10 % of the captions are empty, 15 % name no style."""
    tokenizer = build_tokenizer(work_dir / "tokenizer")
    text_encoder, unet = build_denoiser(tokenizer)
    noise_scheduler = build_scheduler()

    def tokenize(texts):
        return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    pairs = [(label, style) for label in range(len(CLASS_NAMES)) for style in range(len(STYLE_NAMES))]
    styled_ids = tokenize([captions(*pair) for pair in pairs]).view(len(CLASS_NAMES), len(STYLE_NAMES), -1)
    plain_ids = tokenize([PLAIN_PROMPT.format(name=name) for name in CLASS_NAMES])
    empty_ids = tokenize([""])[0]

    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.2e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    lr_scheduler = cosine_schedule(optimizer, num_steps)
    ema = EMAModel(parameters, decay=0.998)
    running, started = None, time.time()
    for step in tqdm(range(1, num_steps + 1), desc="U-Net", mininterval=10):
        indices = torch.randint(len(latents), (batch_size,))
        batch_labels = labels[indices % len(labels)]
        input_ids = styled_ids[batch_labels, styles[indices]]
        draw_kind = torch.rand(batch_size, 1)
        input_ids = torch.where(draw_kind < 0.25, plain_ids[batch_labels], input_ids)
        input_ids = torch.where(draw_kind < 0.10, empty_ids, input_ids)
        clean = latents[indices] * vae.config.scaling_factor
        noise = torch.randn_like(clean)
        # stratified over the batch: less noise in the gradient than independent draws
        timesteps = ((torch.arange(batch_size) + torch.rand(batch_size)) * 1000 / batch_size).long()
        model_pred = unet(
            noise_scheduler.add_noise(clean, noise, timesteps), timesteps, text_encoder(input_ids).last_hidden_state
        ).sample
        loss = F.mse_loss(model_pred, noise_scheduler.get_velocity(clean, noise, timesteps))
        take_step(loss, parameters, optimizer, lr_scheduler, ema)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0:
            log(part="unet", step=step, loss=running, start=started)
        if step % 500 == 0 or step == num_steps:
            with averaged(parameters, ema):
                save(vae, text_encoder, tokenizer, unet, noise_scheduler)


def main():
    args = parse_args()
    torch.manual_seed(0)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    records = []
    settings = {"vae_steps": args.vae_steps, "vae_batch_size": args.vae_batch_size, "unet_steps": args.unet_steps,
                "unet_batch_size": args.unet_batch_size, "latent_copies": LATENT_COPIES,
                "styles": len(STYLE_NAMES), "threads": torch.get_num_threads(), "machine": cpu_name(),
                "torch": torch.__version__}  # fmt: skip

    def log(start=None, **record):
        if start is not None:
            record["seconds"] = round(time.time() - start, 1)
        records.append({key: round(value, 5) if isinstance(value, float) else value for key, value in record.items()})
        text = json.dumps({"settings": settings, "log": records}, indent=1)
        (args.output_dir / "training_log.json").write_text(text)

    images, labels = read_idx(args.idx_dir, "train")
    shapes = Shapes(images[GENERATOR_PART], labels[GENERATOR_PART])
    vae_dir = args.work_dir / "vae"
    if (vae_dir / "config.json").exists():
        vae = AutoencoderKL.from_pretrained(vae_dir).to(memory_format=torch.channels_last).eval()
        records.extend(json.loads((vae_dir / "log.json").read_text()))
    else:
        vae = train_vae(shapes, args.vae_steps, args.vae_batch_size, log)
        vae.save_pretrained(vae_dir)
        with torch.no_grad():
            target = F.pad(torch.from_numpy(images[STYLE_PART][:500].copy()), (2, 2, 2, 2)).float() / 127.5 - 1
            target = target.unsqueeze(1).expand(-1, 3, -1, -1)
            log(part="vae", target_psnr=psnr(target, vae(target).sample))
        (vae_dir / "log.json").write_text(json.dumps(records))

    latents, styles = encode(vae, shapes)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))

    def save(vae, text_encoder, tokenizer, unet, scheduler):
        pipe = StableDiffusionPipeline(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipe.save_pretrained(args.work_dir / "float32")
        half = StableDiffusionPipeline.from_pretrained(args.work_dir / "float32", dtype=torch.float16)
        half.save_pretrained(args.output_dir)
        # transformers would load the text encoder in the dtype of its config, diffusers the U-Net in float32
        config = args.output_dir / "text_encoder/config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")

    train_denoiser(latents, styles, shapes.labels, vae, args.work_dir, args.unet_steps, args.unet_batch_size, log, save)


if __name__ == "__main__":
    main()
