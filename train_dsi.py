"""Dataset style inversion (DSI): learn the style of a whole labelled image set as one token.

    accelerate launch train_dsi.py --dataset_name user/cars --output_dir cars-style --push_to_hub
    accelerate launch train_dsi.py --train_dir photos --num_shots 16 --few_shot_seed 0 --max_train_steps 5000
    accelerate launch train_dsi.py --dataset_name user/cars --resume_from_checkpoint latest
    accelerate launch train_dsi.py --dataset_name user/cars --resolution 1024 --mixed_precision bf16 \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --gradient_checkpointing
    accelerate launch train_dsi.py recipe.yaml --output_dir cars-style

The diffusion model stays frozen; only the token's rows are trained, over the images of all classes, with the class name
in every prompt (bridged transfer, arXiv 2403.19866).
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from tqdm.auto import tqdm

from utils.cli.errors import UserError, run_script
from utils.cli.options import free_options, resolve_options, without_effect
from utils.cli.parsing import ScriptArgumentParser
from utils.cli.processes import public_command
from utils.cli.records import DSI_CONFIG, read_record
from utils.cli.run_folder import RunFolder
from utils.data.arguments import RealDataArguments
from utils.data.class_folders import check_output_outside, check_real_images_given
from utils.data.class_names import prompt_nouns, read_class_names_file
from utils.data.prompts import (
    CLASSLESS_TEMPLATE,
    DSI_TEMPLATE,
    PLAIN_TEMPLATE,
    check_template,
    read_templates_file,
    render_prompt,
    token_text,
)
from utils.hub.arguments import HubArguments
from utils.hub.merged_card import check_card
from utils.hub.publishing import publish_finished, publish_folder
from utils.hub.targets import open_target
from utils.style.base_models import open_base_model
from utils.style.token_folder import (
    PUBLISHED_FILES,
    STYLE_PICTURE,
    TRAINING_PICTURE,
    describe_token,
    print_summary,
    start_token_folder,
    write_records,
)

LOGGING_STEPS = 10
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


@dataclass
class ModelArguments:
    _argument_group_name = "base model"

    pretrained_model_name_or_path: str = field(
        default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        metadata={"help": "Stable Diffusion 1.x, 2.x or XL pipeline: a repository id or a folder."},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base model."})


@dataclass
class TokenArguments:
    _argument_group_name = "style token and prompts"

    placeholder_token: str = field(default="<dsi-style>", metadata={"help": "The token's name, new to the tokenizer."})
    num_vectors: int = field(default=1, metadata={"help": "Embedding rows of the token, 1 or more."})
    initializer_token: str = field(default="style", metadata={"help": "Word (one token) whose embedding is the start."})
    prompt_templates: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Prompts with {{class}} and {{token}}; each image of a step draws one. '{DSI_TEMPLATE}' when not "
            "given."
        },
    )
    prompt_templates_file: str | None = field(
        default=None, metadata={"help": "More prompts, one a line (or a JSON or YAML list)."}
    )
    include_class_name: bool = field(
        default=True, metadata={"help": "When false, prompts have no {class}: plain textual inversion, to compare."}
    )
    class_names_file: str | None = field(
        default=None,
        metadata={"help": "How class names are written in prompts: JSON or YAML mapping of name to noun, or a list."},
    )


@dataclass
class ImageArguments:
    _argument_group_name = "images for the token"

    resolution: int | None = field(
        default=None, metadata={"help": "Pixels a side, a multiple of 8; the base model's own when not given."}
    )
    latent_cache_dir: str | None = field(
        default=None,
        metadata=without_effect("Where encoded images are kept; in the Hugging Face cache when not given."),
    )


@dataclass
class TrainingArguments:
    """Named as in `transformers.TrainingArguments` and the examples of diffusers where the meaning is the same."""

    _argument_group_name = "training"

    output_dir: str = field(
        default="dsi-style", metadata=without_effect("Folder for the token, its record and its card.")
    )
    overwrite_output_dir: bool = field(
        default=False, metadata=without_effect("Start from scratch where there is a token.")
    )
    train_batch_size: int = field(default=8, metadata={"help": "Images per process and forward pass."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Forward passes per optimiser step, 1 or more."}
    )
    max_train_steps: int = field(default=20_000, metadata={"help": "Optimiser steps; the default is the paper's."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of AdamW, above 0."})
    lr_scheduler: str = field(default="constant", metadata={"help": "Schedule.", "choices": LR_SCHEDULERS})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps of linear warm-up, 0 or more."})
    mixed_precision: str | None = field(
        default=None,
        metadata={
            "help": "Of the frozen model; the token is float32. What `accelerate launch` says when not given.",
            "choices": ("no", "fp16", "bf16"),
        },
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Less memory, about a third slower."})
    torch_compile: bool = field(default=False, metadata={"help": "Compile the U-Net: minutes first, then faster."})
    torch_compile_backend: str = field(default="inductor", metadata={"help": "Backend of torch.compile."})
    dataloader_num_workers: int = field(
        default=0, metadata=without_effect("Processes that prepare steps ahead, 0 or more.")
    )
    seed: int = field(default=0, metadata={"help": "Seed of everything that is drawn, 0 or more."})


@dataclass
class MonitoringArguments:
    _argument_group_name = "checkpoints and monitoring"

    checkpointing_steps: int = field(default=1000, metadata=without_effect("Save a checkpoint every so many steps."))
    checkpoints_total_limit: int | None = field(
        default=None, metadata=without_effect("Keep so many checkpoints, the latest; all when not given.")
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata=without_effect("Go on from a checkpoint's folder, or from the 'latest' in --output_dir.")
    )
    validation_steps: int = field(
        default=2000,
        metadata=without_effect("Measure and draw the before/after picture every so many steps, and at the end."),
    )
    num_validation_images: int = field(
        default=8, metadata={"help": "Columns of the before/after picture, a class each; 0 for no picture."}
    )
    report_to: str = field(default="none", metadata=without_effect("Tracker: tensorboard, wandb, trackio or none."))


@dataclass
class PublishingArguments(HubArguments):
    hub_model_id: str | None = field(
        default=None,
        metadata=without_effect("Repository of the token; the output folder's name under you when not given."),
    )


def parse_arguments(argv: Sequence[str] | None) -> tuple:
    """Return the argument groups and the prompt templates; check what can be checked without a model or an image."""
    groups = ScriptArgumentParser(
        (ModelArguments, RealDataArguments, TokenArguments, ImageArguments, TrainingArguments, MonitoringArguments,
         PublishingArguments),
        description=__doc__,
    ).parse(argv)  # fmt: skip
    _, data_args, token_args, image_args, training_args, monitoring_args, _ = groups
    if image_args.resolution is not None and image_args.resolution % 8:
        raise UserError(f"--resolution {image_args.resolution}: must be a multiple of 8.")
    if training_args.lr_warmup_steps and training_args.lr_scheduler == "constant":
        raise UserError(
            f"--lr_warmup_steps {training_args.lr_warmup_steps}: --lr_scheduler constant has no warm-up; right is "
            "constant_with_warmup."
        )
    check_real_images_given(data_args)
    # part of the options of a run: a checkpoint is not gone on from in another precision
    training_args.mixed_precision = training_args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return (*groups, read_templates(token_args))


def read_templates(token_args: TokenArguments) -> list[str]:
    """Return the prompt templates, those of the flag before those of the file."""
    with_class, path = token_args.include_class_name, token_args.prompt_templates_file
    given = token_args.prompt_templates or [DSI_TEMPLATE if with_class else CLASSLESS_TEMPLATE]
    more = read_templates_file(path) if path else []
    for flag, templates in (("--prompt_templates", given), ("--prompt_templates_file", more)):
        for template in templates:
            check_template(template, flag=flag, needs_token=True, needs_class=with_class)
    return [*given, *more]


def start_accelerator(training_args: TrainingArguments, monitoring_args: MonitoringArguments):
    """Return the `Accelerator`, with a tracker if one is asked for."""
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    tracker, folder = monitoring_args.report_to, training_args.output_dir
    available = [str(name) for name in get_available_trackers()]
    if tracker != "none" and tracker not in available:
        raise UserError(
            f"--report_to {tracker}: is not installed, or no tracker that accelerate knows; installed are "
            f"{', '.join(available) or 'none'}."
        )
    try:
        return Accelerator(
            mixed_precision=training_args.mixed_precision,
            gradient_accumulation_steps=training_args.gradient_accumulation_steps,
            log_with=None if tracker == "none" else tracker,
            project_config=ProjectConfiguration(folder, logging_dir=str(Path(folder) / "logs")),
            # processes wait for each other while images are encoded and pictures drawn
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
        )
    except ValueError as error:  # fp16 without a GPU, bf16 on one that has none
        raise UserError(f"--mixed_precision {training_args.mixed_precision}: {error}") from None


def prepare_prompts(tokenizers: list, class_names: list[str], templates: list[str], token_args, device) -> tuple:
    """Return how classes are called in prompts, and the token ids of all prompts, none of which is cut."""
    from utils.style.prompt_encoder import PromptIds
    from utils.style.token import check_prompt_lengths

    corrections = read_class_names_file(token_args.class_names_file, class_names) if token_args.class_names_file else {}
    nouns = prompt_nouns(class_names, corrections)
    words = token_text(token_args.placeholder_token, token_args.num_vectors)
    prompts = [render_prompt(template, noun, words) for template in templates for noun in nouns]
    check_prompt_lengths(tokenizers, prompts)
    plain_prompts = [render_prompt(PLAIN_TEMPLATE, noun) for noun in nouns]
    return nouns, PromptIds.tokenize(tokenizers, prompts, plain_prompts, device)


def prepare_optimizer(rows: list, training_args: TrainingArguments) -> tuple:
    """Return AdamW for the token's rows, and its learning rate schedule over the optimiser's steps."""
    import torch
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.AdamW(rows, lr=training_args.learning_rate, weight_decay=0.0)
    lr_scheduler = get_scheduler(
        training_args.lr_scheduler,
        optimizer,
        num_warmup_steps=training_args.lr_warmup_steps,
        num_training_steps=training_args.max_train_steps,
    )
    return optimizer, lr_scheduler


def prepare_unet(unet, training_args: TrainingArguments):
    """Return the U-Net as training calls it; `unet` itself stays what measuring and drawing call."""
    import torch

    if training_args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if unet.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
    return torch.compile(unet, backend=training_args.torch_compile_backend) if training_args.torch_compile else unet


def denoising_loss(batch: dict, unet, dtype, noise_scheduler, prompt_encoder, prompt_ids, scale_latents, resolution):
    """Return the loss of textual inversion (Gal et al. 2022) with prompts that name class and style token.

    `dtype` is the U-Net's: to ask it, as for its device, takes milliseconds.
    """
    from torch.nn import functional as F

    from utils.style.health import prediction_scale, prediction_target
    from utils.style.prompt_encoder import encode_distinct, unet_arguments

    device = prompt_ids.training.device
    latents, noise, timesteps = (
        batch[name].to(device, non_blocking=True) for name in ("latents", "noise", "timesteps")
    )
    latents = scale_latents(latents)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    conditioning = encode_distinct(prompt_encoder, prompt_ids, batch["templates"], batch["labels"])
    arguments = unet_arguments(conditioning, resolution, dtype)
    model_pred = unet(noisy_latents.to(dtype), timesteps, **arguments).sample
    target = prediction_target(noise_scheduler, latents, noise, timesteps)
    scale = prediction_scale(noise_scheduler, timesteps)
    return F.mse_loss(model_pred.float() * scale, target.float() * scale)


def log_picture(accelerator, path: Path, step: int) -> None:
    """Show a picture in the trackers that take one."""
    import numpy as np
    from PIL import Image

    options = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}
    for tracker in accelerator.trackers:
        if tracker.name in options:
            pixels = np.asarray(Image.open(path).convert("RGB"))[None]
            tracker.log_images({"style": pixels}, step, **options[tracker.name])


def main(argv: Sequence[str] | None = None) -> dict:
    started = time.time()
    *groups, templates = parse_arguments(argv)
    model_args, data_args, token_args, image_args, training_args, monitoring_args, hub_args = groups
    options, output_dir = resolve_options(groups), Path(training_args.output_dir)
    check_output_outside(output_dir, data_args)
    overwrite = training_args.overwrite_output_dir
    free = free_options(groups)
    is_finished = RunFolder(
        output_dir, "a style token", options, DSI_CONFIG, free=free, overwrite=overwrite
    ).is_finished
    hub_target = None
    if hub_args.push_to_hub:
        hub_target = open_target(
            output_dir, hub_args.hub_model_id, "model", hub_args.hub_private_repo, hub_args.hub_revision,
            hub_args.hub_token,
        )  # fmt: skip
    if is_finished:
        publish_finished(output_dir, hub_target, PUBLISHED_FILES)
        return read_record(output_dir / DSI_CONFIG)["health"]
    check_card(output_dir / "README.md")
    base_model = open_base_model(
        model_args.pretrained_model_name_or_path, "--pretrained_model_name_or_path", model_args.revision,
        hub_args.hub_token,
    )  # fmt: skip

    # these take seconds to import: only once the arguments are known to be good
    import torch
    from accelerate.utils import set_seed

    from utils.data.image_set import RealImagesRecord
    from utils.style.checkpoints import TrainingProgress, find_checkpoint, load_checkpoint, save_checkpoint
    from utils.style.health import HealthCheck, check_finite
    from utils.style.pictures import BeforeAfter, plot_training
    from utils.style.prompt_encoder import PromptEncoder
    from utils.style.steps import TrainingSteps, micro_batches, step_loader
    from utils.style.style_images import load_latents, load_style_images
    from utils.style.token import add_placeholder_tokens, save_learned_embeds

    # Tokenizers, images and prompts: everything that can be wrong, before a model loads
    checkpoint = find_checkpoint(output_dir, monitoring_args.resume_from_checkpoint, options, overwrite, free)
    accelerator = start_accelerator(training_args, monitoring_args)
    set_seed(training_args.seed)
    noise_scheduler = base_model.load_noise_scheduler()
    tokenizers = base_model.load_tokenizers()
    initializer_ids = add_placeholder_tokens(
        tokenizers, token_args.placeholder_token, token_args.num_vectors, token_args.initializer_token
    )
    record = RealImagesRecord.from_arguments(data_args)
    images = load_style_images(record, hub_args.hub_token)
    accelerator.print("\n".join(images.real.remarks))
    nouns, prompt_ids = prepare_prompts(tokenizers, images.real.class_names, templates, token_args, accelerator.device)

    # Latents are encoded once, into files that are mapped into memory; the VAE is not needed after that
    resolution = image_args.resolution or base_model.native_resolution
    place = {"cache_dir": image_args.latent_cache_dir, "device": accelerator.device}
    num_copies = 2 if data_args.random_flip else 1
    latents, key = load_latents(base_model, images.real.train, images.digests, resolution, num_copies, **place)
    held_out_latents, _ = load_latents(base_model, images.held_out, images.held_out_digests, resolution, 1, **place)

    # The only parameters: the token's rows
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    unet = base_model.load_unet(weight_dtype).to(accelerator.device)
    text_encoders = base_model.load_text_encoders(weight_dtype)
    encoder = PromptEncoder(text_encoders, tokenizers, token_args.num_vectors, initializer_ids)
    optimizer, lr_scheduler = prepare_optimizer(encoder.rows, training_args)
    prompt_encoder, optimizer = accelerator.prepare(encoder, optimizer)
    trained_unet = prepare_unet(unet, training_args)

    # What is measured and shown on the way: always the same images, noise and classes
    health_check = HealthCheck(
        unet, noise_scheduler, encoder, prompt_ids,
        base_model.scale_latents(held_out_latents.mean(torch.arange(len(images.held_out)))), images.held_out["label"],
        images.held_out_name, resolution, training_args.train_batch_size,
    )  # fmt: skip
    before_after = None
    if monitoring_args.num_validation_images and accelerator.is_main_process:
        before_after = BeforeAfter(
            base_model, unet, encoder, prompt_ids, images.real.train, nouns, resolution,
            monitoring_args.num_validation_images,
        )  # fmt: skip

    # Training: step n is a function of the seed and n, so a checkpoint needs the rows and the optimiser only
    accumulation = training_args.gradient_accumulation_steps
    steps = TrainingSteps(
        latents, images.real.train["label"], training_args.seed,
        training_args.train_batch_size * accumulation * accelerator.num_processes, len(templates),
        noise_scheduler.config.num_train_timesteps, accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    progress = TrainingProgress(options, prompt_ids.key(key), steps.images_per_step)
    if checkpoint is not None:
        progress = load_checkpoint(checkpoint, progress, encoder.rows, optimizer, lr_scheduler, accelerator.scaler)
    if accelerator.is_main_process:
        start_token_folder(output_dir, keep_checkpoints=checkpoint is not None)
    accelerator.init_trackers("train_dsi", {name: str(value) for name, value in options.items()})
    loader = step_loader(
        steps, progress.step, training_args.max_train_steps, training_args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip
    bar = tqdm(
        loader, total=training_args.max_train_steps, initial=progress.step, desc="style token", unit="step",
        disable=not accelerator.is_local_main_process,
    )  # fmt: skip
    losses = []
    for batch in bar:
        for part in micro_batches(batch, accumulation):
            with accelerator.accumulate(prompt_encoder):
                loss = denoising_loss(
                    part, trained_unet, weight_dtype, noise_scheduler, prompt_encoder, prompt_ids,
                    base_model.scale_latents, resolution,
                )  # fmt: skip
                accelerator.backward(loss)
                optimizer.step()
                if accelerator.sync_gradients:
                    lr_scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        progress.step += 1
        is_last = progress.step == training_args.max_train_steps
        validates = is_last or progress.step % monitoring_args.validation_steps == 0
        saves = not is_last and progress.step % monitoring_args.checkpointing_steps == 0
        if validates or saves or progress.step % LOGGING_STEPS == 0:  # each time the CPU waits for a GPU
            per_step = torch.stack(losses).view(-1, accumulation).mean(1)
            progress.loss_history += accelerator.reduce(per_step, "mean").tolist()
            new_losses = progress.loss_history[-len(per_step) :]
            check_finite(progress.step, new_losses, encoder.rows, training_args.learning_rate)
            losses.clear()
            recent = progress.loss_history[-50:]
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
            accelerator.log({"loss": progress.loss_history[-1], "lr": lr_scheduler.get_last_lr()[0]}, progress.step)
        if validates:
            health = health_check.measure()
            progress.held_out_losses[str(progress.step)] = health["loss_trained_token"]
            held_out_loss = [health["loss_trained_token"]]
            check_finite(progress.step, held_out_loss, encoder.rows, training_args.learning_rate)
            accelerator.log({"held_out_loss": health["loss_trained_token"]}, progress.step)
            if before_after is not None:
                before_after.write(output_dir / STYLE_PICTURE)
                log_picture(accelerator, output_dir / STYLE_PICTURE, progress.step)
        if saves and accelerator.is_main_process:
            save_checkpoint(
                output_dir, progress, token_args.placeholder_token, encoder.rows, optimizer, lr_scheduler,
                accelerator.scaler, monitoring_args.checkpoints_total_limit,
            )  # fmt: skip

    health |= {"num_skipped_images": images.num_skipped}
    if accelerator.is_main_process:
        record = describe_token(
            base_model, images.real, nouns, templates, placeholder_token=token_args.placeholder_token,
            num_vectors=token_args.num_vectors, initializer_token=token_args.initializer_token, resolution=resolution,
            max_train_steps=training_args.max_train_steps, health=health, held_out_losses=progress.held_out_losses,
        )  # fmt: skip
        hub_id = hub_target.repo_id if hub_target else None
        save_learned_embeds(output_dir, token_args.placeholder_token, encoder.rows)
        plot_training(output_dir / TRAINING_PICTURE, progress.loss_history, progress.held_out_losses, health)
        command = public_command("train_dsi.py", argv)
        write_records(output_dir, record, options, started, command, hub_id, hub_args.hub_token)
        print_summary(output_dir, health, time.time() - started)
        if hub_target is not None:
            publish_folder(output_dir, hub_target, PUBLISHED_FILES)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return {**health, "loss_history": progress.loss_history}


if __name__ == "__main__":
    run_script(main)
