"""Distil the demo's generator to three steps per image, as a LoRA: `--lora demo/few_steps`.

    python demo/build/few_steps.py --idx_dir /usr/share/datasets/fashion-mnist

One round of progressive distillation (Salimans and Ho, 2022) of the guided generator (Meng et al., 2023): one DDIM step
of the student without guidance learns to land where four guided steps of the teacher do. Twelve steps of two passes
become three of one. Runs for a fixed number of steps on the CPU. `training_log.json`, next to the weights, holds steps,
seconds and losses; `sampling.json` the defaults that generate_synthetic.py takes.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from fashion_mnist import CLASS_NAMES, DEFAULT_IDX_DIR, GENERATOR_PART, read_idx
from generator import PLAIN_PROMPT, Shapes, averaged, captions, cosine_schedule, cpu_name, encode, take_step
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from styles import STYLE_NAMES
from torch.nn import functional as F
from tqdm import tqdm

PLAIN_SHARE = 0.15  # of the captions without a style, as in the generator's own training


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idx_dir", default=DEFAULT_IDX_DIR)
    parser.add_argument("--generator", default="demo/generator")
    parser.add_argument("--output_dir", type=Path, default=Path("demo/few_steps"))
    parser.add_argument("--num_inference_steps", type=int, default=3, help="steps of the student")
    parser.add_argument("--teacher_steps", type=int, default=4, help="steps of the teacher for each of the student's")
    parser.add_argument("--guidance_scale", type=float, default=1.2, help="guidance of the teacher")
    parser.add_argument("--lora_r", type=int, default=32)
    parser.add_argument("--max_train_steps", type=int, default=1_000)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    return parser.parse_args()


class Trajectory:
    """DDIM's path from noise to image in `num_steps` steps; its points are numbered from 0, the image."""

    def __init__(self, noise_scheduler, num_steps: int):
        num_train_steps = len(noise_scheduler.alphas_cumprod)
        # as DDIMScheduler spaces them with `timestep_spacing="trailing"`
        self.timesteps = (torch.arange(num_steps + 1) * num_train_steps / num_steps).round().long() - 1
        alphas_cumprod = torch.cat([torch.ones(1), noise_scheduler.alphas_cumprod[self.timesteps[1:]]])
        self.alphas, self.sigmas = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def at(self, points):
        """Return the factors of signal and of noise at points `(batch,)`, shaped to be multiplied with latents."""
        return self.alphas[points].view(-1, 1, 1, 1), self.sigmas[points].view(-1, 1, 1, 1)

    def step(self, latents, velocity, start, end):
        """Return the latents after a step from points `start` to `end` along the predicted `velocity`."""
        (alpha, sigma), (end_alpha, end_sigma) = self.at(start), self.at(end)
        clean, noise = alpha * latents - sigma * velocity, alpha * velocity + sigma * latents
        return end_alpha * clean + end_sigma * noise

    def velocity_between(self, latents, target, start, end):
        """Return the velocity with which one step from `latents` lands at `target`: `step` solved for it."""
        (alpha, sigma), (end_alpha, end_sigma) = self.at(start), self.at(end)
        kept, moved = end_alpha * alpha + end_sigma * sigma, end_sigma * alpha - end_alpha * sigma
        return (target - kept * latents) / moved


@torch.no_grad()
def encode_captions(pipe):
    """Return embeddings: of all captions `(classes, styles, tokens, width)`, of plain ones, and of the empty one."""

    def embed(texts):
        ids = pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return pipe.text_encoder(ids).last_hidden_state

    styled = [embed([captions(label, s) for s in range(len(STYLE_NAMES))]) for label in range(len(CLASS_NAMES))]
    return torch.stack(styled), embed([PLAIN_PROMPT.format(name=name) for name in CLASS_NAMES]), embed([""])


def add_lora(unet: UNet2DConditionModel, rank: int) -> None:
    """Add an adapter to each layer with a weight matrix; only the adapters are trained."""
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    names = [name for name, module in unet.named_modules() if isinstance(module, layers)]
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=names))


@torch.no_grad()
def predict_guided(unet, latents, timesteps, embeddings, empty, guidance_scale):
    """Return the velocity that the generator predicts with guidance, without the adapter."""
    unet.disable_adapters()
    both = torch.cat([empty.expand_as(embeddings), embeddings])
    unguided, guided = unet(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), both).sample.chunk(2)
    unet.enable_adapters()
    return unguided + guidance_scale * (guided - unguided)


def distil(pipe, latents, styles, labels, args, log, save):
    """Train the adapter to land, from the student's points, where the teacher's steps lead."""
    unet, per_step, batch_size = pipe.unet, args.teacher_steps, args.train_batch_size
    way = Trajectory(pipe.scheduler, args.num_inference_steps * per_step)
    styled, plain, empty = encode_captions(pipe)
    add_lora(unet, args.lora_r)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0)
    lr_scheduler = cosine_schedule(optimizer, args.max_train_steps)
    ema = EMAModel(parameters, decay=0.995)
    running, started = None, time.time()
    for step in tqdm(range(1, args.max_train_steps + 1), desc="LoRA", mininterval=10):
        indices = torch.randint(len(latents), (batch_size,))
        batch_labels = labels[indices % len(labels)]
        is_plain = (torch.rand(batch_size) < PLAIN_SHARE).view(-1, 1, 1)
        embeddings = torch.where(is_plain, plain[batch_labels], styled[batch_labels, styles[indices]])
        # each step of the student equally often in a batch
        start = per_step * (1 + torch.arange(batch_size) * args.num_inference_steps // batch_size)
        (alpha, sigma), clean = way.at(start), latents[indices] * pipe.vae.config.scaling_factor
        noisy = alpha * clean + sigma * torch.randn_like(clean)
        target = noisy
        for point in (start - number for number in range(per_step)):
            timesteps = way.timesteps[point]
            velocity = predict_guided(unet, target, timesteps, embeddings, empty, args.guidance_scale)
            target = way.step(target, velocity, point, point - 1)
        model_pred = unet(noisy, way.timesteps[start], embeddings).sample
        loss = F.mse_loss(model_pred, way.velocity_between(noisy, target, start, start - per_step))
        take_step(loss, parameters, optimizer, lr_scheduler, ema)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0 or step == args.max_train_steps:
            log(step=step, loss=round(running, 6), seconds=round(time.time() - started, 1))
            with averaged(parameters, ema):
                save(unet)


def main():
    args = parse_args()
    torch.manual_seed(0)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipe = StableDiffusionPipeline.from_pretrained(args.generator, dtype=torch.float32)
    images, labels = read_idx(args.idx_dir, "train")
    shapes = Shapes(images[GENERATOR_PART], labels[GENERATOR_PART])
    latents, styles = encode(pipe.vae.to(memory_format=torch.channels_last), shapes)
    sampling = {"num_inference_steps": args.num_inference_steps, "guidance_scale": 1.0}
    (args.output_dir / "sampling.json").write_text(json.dumps(sampling, indent=1) + "\n")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    settings |= {"threads": torch.get_num_threads(), "machine": cpu_name(), "torch": torch.__version__}
    records = []

    def log(**record):
        records.append(record)
        (args.output_dir / "training_log.json").write_text(json.dumps({"settings": settings, "log": records}, indent=1))

    def save(unet):
        half = {name: tensor.half() for name, tensor in get_peft_model_state_dict(unet).items()}
        StableDiffusionPipeline.save_lora_weights(args.output_dir, unet_lora_layers=half)

    distil(pipe, latents, styles, shapes.labels, args, log, save)


if __name__ == "__main__":
    main()
