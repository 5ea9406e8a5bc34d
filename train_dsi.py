"""Dataset style inversion (DSI): learn the style of a whole labelled image set as one token.

    accelerate launch train_dsi.py --dataset_name user/cars --output_dir cars-style --push_to_hub
    accelerate launch train_dsi.py --dataset_name user/cars --num_shots 16 --few_shot_seed 0 --max_train_steps 5000
    accelerate launch train_dsi.py recipe.yaml --output_dir cars-style

The diffusion model stays frozen; only the token's rows are trained, over the images of all classes, with the class name
in every prompt (bridged transfer, arXiv 2403.19866).
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from utils.cli.arguments import HubArguments, RealDataArguments
from utils.cli.commands import public_command
from utils.cli.errors import UserError, run_script
from utils.cli.parsing import ScriptArgumentParser, require_positive
from utils.cli.records import (
    DSI_CONFIG,
    RUN_CONFIG,
    read_record,
    resolve_options,
    was_finished,
    write_record,
    write_run_config,
)
from utils.data.prompts import DSI_TEMPLATE, PLAIN_TEMPLATE, check_template, prompt_nouns, render_prompt, token_text
from utils.hub.merged_card import check_card
from utils.hub.publishing import publish_finished, publish_folder
from utils.hub.repositories import Source, open_source
from utils.hub.targets import open_target

SUPPORTED_PIPELINES = ("StableDiffusionPipeline",)
NUM_HEALTH_IMAGES = 64
PUBLISHED_FILES = ("learned_embeds.safetensors", "training.png", DSI_CONFIG, RUN_CONFIG, "README.md")


@dataclass
class ModelArguments:
    _argument_group_name = "base model"

    pretrained_model_name_or_path: str = field(
        default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        metadata={"help": "Stable Diffusion 1.x or 2.x pipeline: a repository id or a folder."},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base model."})


@dataclass
class TokenArguments:
    _argument_group_name = "style token"

    placeholder_token: str = field(default="<dsi-style>", metadata={"help": "The token's name, new to the tokenizer."})
    num_vectors: int = field(default=1, metadata={"help": "Embedding rows of the token, 1 or more."})
    initializer_token: str = field(default="style", metadata={"help": "Word (one token) whose embedding is the start."})
    prompt_templates: list[str] = field(
        default_factory=lambda: [DSI_TEMPLATE],
        metadata={"help": "Prompts with {class} and {token}; with several, each step draws one per image."},
    )


@dataclass
class TrainingArguments:
    """Named as in `transformers.TrainingArguments` where the meaning is the same."""

    _argument_group_name = "training"

    output_dir: str = field(default="dsi-style", metadata={"help": "Folder for the token, its record and its card."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a token that is there already."})
    resolution: int | None = field(
        default=None, metadata={"help": "Pixels a side, a multiple of 8; the base model's own when not given."}
    )
    random_flip: bool = field(default=True, metadata={"help": "Show mirrored images too; off where left is not right."})
    train_batch_size: int = field(default=8, metadata={"help": "Images per process and step."})
    max_train_steps: int = field(default=20_000, metadata={"help": "Optimiser steps; the default is the paper's."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of AdamW, above 0."})
    lr_scheduler: str = field(default="constant", metadata={"help": "Schedule, named as in diffusers.get_scheduler."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps of linear warm-up, 0 or more."})
    seed: int = field(default=0, metadata={"help": "Seed of everything that is drawn."})


@dataclass
class PublishingArguments(HubArguments):
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository of the token; the output folder's name under you when not given."}
    )


def check_arguments(token_args: TokenArguments, training_args: TrainingArguments, data_args: RealDataArguments) -> None:
    """Check what can be checked without a model or an image."""
    if data_args.dataset_name is None:
        raise UserError("--dataset_name is missing: a data set id on the Hub, or a local folder.")
    require_positive(
        num_vectors=token_args.num_vectors, num_shots=data_args.num_shots, resolution=training_args.resolution,
        train_batch_size=training_args.train_batch_size, max_train_steps=training_args.max_train_steps,
        learning_rate=training_args.learning_rate,
    )  # fmt: skip
    for template in token_args.prompt_templates:
        check_template(template, needs_token=True)


def open_base_model(model_args: ModelArguments, token: str | None) -> Source:
    """Return the base model's source, after a look at its `model_index.json`."""
    source = open_source(
        model_args.pretrained_model_name_or_path, "--pretrained_model_name_or_path", "model", model_args.revision, token
    )
    path = source.file("model_index.json", "a pipeline of diffusers")
    pipeline_class = json.loads(path.read_text(encoding="utf-8")).get("_class_name")
    if pipeline_class not in SUPPORTED_PIPELINES:
        raise UserError(
            f"--pretrained_model_name_or_path {source.name}: is a {pipeline_class}; supported: "
            f"{', '.join(SUPPORTED_PIPELINES)} (Stable Diffusion 1.x and 2.x)."
        )
    return source


def check_prompt_lengths(tokenizer, prompts: list[str]) -> None:
    """Check that no prompt is cut: the style token is at its end."""
    for prompt in prompts:
        length = len(tokenizer(prompt).input_ids)
        if length > tokenizer.model_max_length:
            kept = tokenizer.decode(tokenizer(prompt, truncation=True).input_ids, skip_special_tokens=True)
            raise UserError(
                f"--prompt_templates: '{prompt}' is {length} tokens, the text encoder takes "
                f"{tokenizer.model_max_length} and would see '{kept}' only; shorten the template or the class name."
            )


def load_components(source: Source, weight_dtype):
    """Return the frozen parts of a Stable Diffusion pipeline: text encoder, VAE, U-Net, noise scheduler."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    options = source.load_options()
    with source.reading("does not load as a Stable Diffusion pipeline"):
        text_encoder = CLIPTextModel.from_pretrained(
            source.name, subfolder="text_encoder", dtype=torch.float32, **options
        )
        vae = AutoencoderKL.from_pretrained(source.name, subfolder="vae", torch_dtype=torch.float32, **options)
        unet = UNet2DConditionModel.from_pretrained(source.name, subfolder="unet", torch_dtype=weight_dtype, **options)
        noise_scheduler = DDPMScheduler.from_pretrained(source.name, subfolder="scheduler", **options)
    return text_encoder, vae.requires_grad_(False), unet.requires_grad_(False), noise_scheduler


def describe_token(source: Source, real_images, nouns: list[str], token_args, training_args) -> dict:
    """Return what the next step needs to know of a token: base model, images, class names, prompts."""
    return {
        "base_model": {"id": source.name, "revision": source.revision},
        "real_images": real_images.record.to_dict(),
        "train_indices": real_images.train_indices.tolist(),
        "class_names": real_images.class_names,
        "prompt_nouns": nouns,
        "prompt_templates": token_args.prompt_templates,
        "placeholder_token": token_args.placeholder_token,
        "num_vectors": token_args.num_vectors,
        "initializer_token": token_args.initializer_token,
        "max_train_steps": training_args.max_train_steps,
    }


def write_records(
    output_dir: Path, record: dict, options: dict, started: float, command: str, hub_id: str | None, token: str | None
) -> None:
    """Write `run_config.json`, the card, and last `dsi_config.json`: its presence says that the token is finished."""
    from utils.hub.licenses import read_licenses
    from utils.hub.token_card import write_token_card

    base_model, real = record["base_model"], record["real_images"]
    sources = [
        (base_model["id"], "model", base_model["revision"]),
        (real["dataset_name"], "dataset", real["dataset_revision"]),
    ]
    run = write_run_config(output_dir, options, started)
    write_token_card(output_dir, record, run, read_licenses(sources, token), command, hub_id)
    write_record(output_dir / DSI_CONFIG, record)


def print_summary(output_dir: Path, health: dict, seconds: float) -> None:
    """Print what the token learned, where it lies, and the next command."""
    print(f"Denoising loss on {health['num_images']} {health['images']}, with fixed noise:")
    for arm in ("no_token", "untrained_token", "trained_token"):
        print(f"  {arm.replace('_', ' '):16s} {health[f'loss_{arm}']:.4f}")
    if not health["token_learned"]:
        print(
            "WARNING: the token learned nothing: the loss with it is not clearly below that with the untrained token. "
            "Try more steps, a higher --learning_rate, or another --initializer_token."
        )
    print(f"Style token in {output_dir}, {seconds:.0f} s. Next:")
    print(f"  accelerate launch generate_synthetic.py --learned_embeds {output_dir}")


def main(argv=None) -> dict:
    started = time.time()
    model_args, data_args, token_args, training_args, hub_args = groups = ScriptArgumentParser(
        (ModelArguments, RealDataArguments, TokenArguments, TrainingArguments, PublishingArguments),
        description=__doc__,
    ).parse(argv)
    check_arguments(token_args, training_args, data_args)
    options, output_dir = resolve_options(groups), Path(training_args.output_dir)
    finished = was_finished(output_dir, DSI_CONFIG, "a style token", options, training_args.overwrite_output_dir)
    hub_target = None
    if hub_args.push_to_hub:
        hub_target = open_target(
            output_dir, hub_args.hub_model_id, "model", hub_args.hub_private_repo, hub_args.hub_revision,
            hub_args.hub_token,
        )  # fmt: skip
    if finished:
        publish_finished(output_dir, hub_target, PUBLISHED_FILES)
        return read_record(output_dir / DSI_CONFIG)["health"]
    check_card(output_dir / "README.md")
    source = open_base_model(model_args, hub_args.hub_token)

    # these take seconds to import: only once the arguments are known to be good
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from diffusers.optimization import get_scheduler
    from torch.nn import functional as F
    from transformers import CLIPTokenizer

    from utils.data.real_images import RealImagesRecord, check_images, load_real_images
    from utils.style.draws import draw_step
    from utils.style.health import fixed_noise_losses, judge, prediction_target
    from utils.style.latents import encode_latents
    from utils.style.pictures import plot_training
    from utils.style.token import (
        add_placeholder_tokens,
        save_learned_embeds,
        splice_style_token,
        vocabulary_norm_quantile,
    )

    # Tokenizer, images and prompts: everything that can be wrong, before a model loads
    with source.reading("has no usable tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(source.name, subfolder="tokenizer", **source.load_options())
    initializer_id = add_placeholder_tokens(
        tokenizer, token_args.placeholder_token, token_args.num_vectors, token_args.initializer_token
    )
    real_images = load_real_images(RealImagesRecord.from_arguments(data_args), hub_args.hub_token)
    nouns = prompt_nouns(real_images.class_names)
    token_words = token_text(token_args.placeholder_token, token_args.num_vectors)
    prompts = [render_prompt(template, noun, token_words) for template in token_args.prompt_templates for noun in nouns]
    check_prompt_lengths(tokenizer, prompts)
    check_images(real_images.train, f"'{data_args.dataset_name}'")

    accelerator = Accelerator()
    set_seed(training_args.seed)
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    text_encoder, vae, unet, noise_scheduler = load_components(source, weight_dtype)
    resolution = training_args.resolution or unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)

    def tokenize(texts: list[str]) -> torch.Tensor:
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return tokenizer(texts, **options).input_ids.to(accelerator.device)

    # Latents are encoded once; the VAE then leaves the device
    vae.to(accelerator.device)
    held_out = real_images.train if data_args.num_shots else real_images.validation
    health_images = held_out.shuffle(seed=0).select(range(min(NUM_HEALTH_IMAGES, len(held_out))))
    latents = encode_latents(
        vae,
        real_images.train,
        resolution,
        random_flip=training_args.random_flip,
        show_progress=accelerator.is_local_main_process,
    )
    health_latents = encode_latents(vae, health_images, resolution, random_flip=False, show_progress=False).mean[0]
    health_latents = (health_latents * vae.config.scaling_factor).to(accelerator.device)
    vae.to("cpu")

    # The only parameters: the token's rows
    style_token = splice_style_token(text_encoder, tokenizer, token_args.num_vectors, initializer_id)
    unet.to(accelerator.device)
    optimizer = torch.optim.AdamW([style_token.rows], lr=training_args.learning_rate, weight_decay=0.0)
    lr_scheduler = get_scheduler(
        training_args.lr_scheduler,
        optimizer,
        num_warmup_steps=training_args.lr_warmup_steps,
        num_training_steps=training_args.max_train_steps,
    )
    text_encoder, optimizer = accelerator.prepare(text_encoder, optimizer)

    def measure(template: str) -> torch.Tensor:
        health_prompts = [render_prompt(template, nouns[label], token_words) for label in health_images["label"]]
        return fixed_noise_losses(unet, noise_scheduler, health_latents, text_encoder(tokenize(health_prompts))[0])

    template = token_args.prompt_templates[0]
    losses = {"no_token": measure(PLAIN_TEMPLATE), "untrained_token": measure(template)}

    prompt_ids = tokenize(prompts).view(len(token_args.prompt_templates), len(nouns), -1)
    labels = torch.tensor(real_images.train["label"])
    batch_size = training_args.train_batch_size * accelerator.num_processes
    loss_history = []
    progress = tqdm(
        range(training_args.max_train_steps), desc="style token", disable=not accelerator.is_local_main_process
    )
    for step in progress:
        draws = draw_step(
            training_args.seed, step, batch_size, len(labels), latents.num_copies, len(prompt_ids),
            noise_scheduler.config.num_train_timesteps, latents.mean.shape[2:],
        ).part(accelerator.process_index, accelerator.num_processes)  # fmt: skip
        clean = latents.sample(draws.indices, draws.copies, draws.posterior_noise) * vae.config.scaling_factor
        clean, noise = clean.to(accelerator.device), draws.noise.to(accelerator.device)
        timesteps = draws.timesteps.to(accelerator.device)
        noisy_latents = noise_scheduler.add_noise(clean, noise, timesteps)

        encoder_hidden_states = text_encoder(prompt_ids[draws.templates, labels[draws.indices]])[0]
        model_pred = unet(noisy_latents.to(weight_dtype), timesteps, encoder_hidden_states.to(weight_dtype)).sample
        target = prediction_target(noise_scheduler, clean, noise, timesteps)
        loss = F.mse_loss(model_pred.float(), target.float())

        accelerator.backward(loss)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        loss_history.append(loss.item())
        progress.set_postfix(loss=f"{sum(loss_history[-50:]) / len(loss_history[-50:]):.4f}", refresh=False)
    losses["trained_token"] = measure(template)

    norm, norm_quantile = vocabulary_norm_quantile(style_token)
    health = {
        **judge(losses),
        "images": "training images" if data_args.num_shots else "validation images",
        "num_images": len(health_images),
        "embedding_norm": round(norm, 4),
        "vocabulary_norm_quantile": round(norm_quantile, 4),
    }
    record = describe_token(source, real_images, nouns, token_args, training_args)
    record |= {"resolution": resolution, "health": health}
    if accelerator.is_main_process:
        hub_id = hub_target.repo_id if hub_target else None
        command = public_command("train_dsi.py", argv)
        output_dir.mkdir(parents=True, exist_ok=True)
        save_learned_embeds(output_dir, token_args.placeholder_token, style_token.rows)
        plot_training(output_dir / "training.png", loss_history, health)
        write_records(output_dir, record, options, started, command, hub_id, hub_args.hub_token)
        print_summary(output_dir, health, time.time() - started)
        if hub_target is not None:
            publish_folder(output_dir, hub_target, PUBLISHED_FILES)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return {**health, "loss_history": loss_history}


if __name__ == "__main__":
    run_script(main)
