"""Dataset style inversion (DSI): learn the style of a whole labeled image set as one token.

    accelerate launch train_dsi.py --dataset_name user/cars --output_dir cars-style --push_to_hub
    accelerate launch train_dsi.py --train_dir photos --num_shots 16 --few_shot_seed 0 --max_train_steps 5000
    accelerate launch train_dsi.py --dataset_name user/cars --dry_run
    accelerate launch train_dsi.py --dataset_name user/cars --resume_from_checkpoint latest
    accelerate launch train_dsi.py --dataset_name user/cars --resolution 1024 --mixed_precision bf16 \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --gradient_checkpointing
    accelerate launch train_dsi.py --dataset_name user/cars --num_shots 16 --use_peft --class_tokens
    accelerate launch train_dsi.py recipe.yaml --output_dir cars-style

The diffusion model stays frozen; only the token's embedding is trained, on the images of all classes, with the class
name in every prompt (bridged transfer, arXiv 2403.19866). --use_peft trains a LoRA adapter with it, and --class_tokens
one more token per class.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from utils.cli.contents import describe_files
from utils.cli.errors import UserError, run_script
from utils.cli.options import free_options, option, resolve_options, with_flag, with_value
from utils.cli.parsing import ScriptArgumentParser
from utils.cli.precision import allow_tf32, choose_precision, precision_from_options
from utils.cli.processes import check_processes_joined, public_command, warn_once
from utils.cli.records import DSI_CONFIG, RUN_CONFIG, read_record
from utils.cli.run_folder import CHECKPOINTS, RunFolder
from utils.cli.threads import report_threads
from utils.data.arguments import RealDataArguments, check_output_outside, check_real_images_given
from utils.data.class_names import prompt_nouns, read_class_names_file
from utils.data.contexts import read_contexts
from utils.data.prompts import (
    ARTICLE_HELP,
    ARTICLES,
    AS_WRITTEN,
    AUTO,
    CLASS_TOKEN,
    CLASSLESS_TEMPLATE,
    CONTEXT,
    DSI_TEMPLATE,
    PLAIN_TEMPLATE,
    add_context,
    check_template,
    fill_context,
    read_templates_file,
    render_prompt,
    token_text,
    with_others,
)
from utils.hub.cards import check_card
from utils.hub.publishing import publish_finished, publish_folder
from utils.hub.targets import WITH_PUSH_TO_HUB, HubArguments, open_target
from utils.style.base_models import open_base_model
from utils.style.card import OUTPUTS, PUBLISHED_FILES, describe_token, write_records

LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


@dataclass
class ModelArguments:
    _argument_group_name = "base model"

    pretrained_model_name_or_path: str = option(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "Stable Diffusion 1.x, 2.x or XL pipeline: a repository id or a folder.",
    )
    revision: str | None = option(None, "Branch, tag or commit of the base model.")


@dataclass
class TokenArguments:
    _argument_group_name = "style token and prompts"

    placeholder_token: str = option("<dsi-style>", "Name of the token; must be new to the tokenizer.")
    num_vectors: int = option(1, "Number of embedding vectors of the token, 1 or more.")
    initializer_token: str = option(
        "auto", "Word (a single token) whose embedding the token starts from; auto tries a few words and starts from "
        "the one with the lowest loss; if the token learns nothing in a tenth of the steps, from the next one.",
    )  # fmt: skip
    prompt_templates: list[str] | None = option(
        None, f"Prompts with {{class}} and {{token}}; each image draws one at random (default: '{DSI_TEMPLATE}')."
    )
    prompt_templates_file: str | None = option(None, "File with more prompts: one per line, or a JSON or YAML list.")
    article: str | None = option(AUTO, ARTICLE_HELP, choices=ARTICLES, needs=[with_flag("include_class_name")])
    contexts_file: str | None = option(
        None, "File of describe_images.py: each image's own context fills {context} in its prompts, such as its "
        "background (default of templates: '" + add_context(DSI_TEMPLATE) + "').",
    )  # fmt: skip
    include_class_name: bool = option(
        True, "Whether prompts name the class; false is plain textual inversion, for comparison."
    )
    class_names_file: str | None = option(
        None, "Nouns for the classes in prompts: a JSON or YAML mapping of class names to nouns, or a list."
    )
    class_tokens: bool = option(
        False, "Learn one more token for each class, {class_token} in prompts (default: "
        f"'{with_others(DSI_TEMPLATE, [CLASS_TOKEN])}').", needs=[with_flag("include_class_name")],
    )  # fmt: skip


@dataclass
class LoraArguments:
    """Named as in train_bridged.py."""

    _argument_group_name = "LoRA"

    use_peft: bool = option(False, "Train a LoRA adapter of the U-Net together with the token.")
    lora_r: int = option(16, "Rank, above 0.", needs=[with_flag("use_peft")])
    lora_alpha: int = option(16, "Scale: the adapter is multiplied by alpha / rank.", needs=[with_flag("use_peft")])
    lora_target_modules: list[str] | None = option(
        None, "Endings of the names of the U-Net's layers to adapt (default: the attention projections to_q, to_k, "
        "to_v and to_out.0).", needs=[with_flag("use_peft")],
    )  # fmt: skip
    lora_learning_rate: float = option(
        1e-4, "Peak learning rate of the adapter, above 0.", needs=[with_flag("use_peft")]
    )
    lora_text_encoder: bool = option(
        False, "Adapt the attention of the text encoders too.", needs=[with_flag("use_peft")]
    )


@dataclass
class ImageArguments:
    _argument_group_name = "images for the token"

    resolution: int | None = option(
        None, "Side of the images in pixels, a multiple of 8 (default: the base model's own)."
    )
    latent_cache_dir: str | None = option(
        None, "Folder for encoded images (default: in the Hugging Face cache).", affects_result=False
    )


@dataclass
class TrainingArguments:
    """Named as in `transformers.TrainingArguments` and the examples of diffusers where the meaning is the same."""

    _argument_group_name = "training"

    output_dir: str = option("dsi-style", "Folder for the token, its record and its card.", affects_result=False)
    dry_run: bool = option(
        False, "Print the memory, time and disk that the run needs, estimated from two steps with random weights; "
        "train nothing.",
        affects_result=False,
    )  # fmt: skip
    overwrite_output_dir: bool = option(
        False, "Replace the token that is already in --output_dir.", affects_result=False
    )
    train_batch_size: int = option(8, "Images per process and forward pass; split up if memory runs out.")
    gradient_accumulation_steps: int = option(1, "Forward passes per optimizer step, 1 or more.")
    max_train_steps: int = option(20_000, "Maximum number of optimizer steps; the default is the paper's.")
    early_stopping: bool = option(
        True, "Stop once the loss on held-out images, at fixed noise, has not improved beyond its standard error for "
        "15%% of --max_train_steps.",
    )  # fmt: skip
    learning_rate: float = option(5e-4, "Peak learning rate of AdamW, above 0.")
    lr_scheduler: str = option("constant", "Learning rate schedule.", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = option(
        0, "Steps of linear warm-up, 0 or more.", needs=[with_value("lr_scheduler", *LR_SCHEDULERS[1:])]
    )
    mixed_precision: str | None = option(
        None, "Precision of the frozen model; no is float32, as the token always is (default: that of `accelerate "
        "launch`, else bf16 on GPUs that support it, fp16 on others, no on a CPU).",
        choices=("no", "fp16", "bf16"),
    )  # fmt: skip
    gradient_checkpointing: bool = option(
        False, "Use less memory, about a third slower; turned on automatically if a single image does not fit."
    )
    torch_compile: bool = option(False, "Compile the U-Net: takes minutes at the start, then trains faster.")
    torch_compile_backend: str = option("inductor", "Backend of torch.compile.", needs=[with_flag("torch_compile")])
    dataloader_num_workers: int = option(
        0, "Processes that prepare batches in advance, 0 or more.", affects_result=False
    )
    seed: int = option(0, "Random seed, 0 or more.")


@dataclass
class MonitoringArguments:
    _argument_group_name = "checkpoints and monitoring"

    checkpointing_steps: int = option(1000, "Steps between checkpoints.", affects_result=False)
    checkpoints_total_limit: int | None = option(
        None, "Number of checkpoints to keep, the latest ones (default: all).", affects_result=False
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Folder of a checkpoint to resume from, or 'latest' for the latest one in --output_dir.",
        affects_result=False,
    )
    validation_steps: int = option(
        2000,
        "Steps between measurements with a before/after picture; one more follows at the end.",
        affects_result=False,
    )
    num_validation_images: int = option(8, "Columns of the before/after picture, one class each; 0 for no picture.")
    report_to: str = option("none", "Tracker: tensorboard, wandb, trackio or none.", affects_result=False)


@dataclass
class PublishingArguments(HubArguments):
    hub_model_id: str | None = option(
        None, "Repository of the token (default: the output folder's name, in your account).", affects_result=False,
        needs=WITH_PUSH_TO_HUB,
    )  # fmt: skip


def parse_arguments(argv: Sequence[str] | None) -> tuple:
    """Return the argument groups, after every check that needs no model and no image."""
    parser = ScriptArgumentParser(
        (ModelArguments, RealDataArguments, TokenArguments, LoraArguments, ImageArguments, TrainingArguments,
         MonitoringArguments, PublishingArguments),
        description=__doc__,
    )  # fmt: skip
    groups = parser.parse(argv)
    _, data_args, token_args, _, image_args, training_args, monitoring_args, _ = groups
    if image_args.resolution is not None and image_args.resolution % 8:
        raise UserError(f"--resolution {image_args.resolution}: must be a multiple of 8.")
    check_real_images_given(data_args)
    read_templates(token_args)
    if token_args.contexts_file is not None:
        read_contexts(token_args.contexts_file)
    keep_choices(token_args, training_args, monitoring_args, parser.given)
    return groups


def keep_choices(
    token_args: TokenArguments, training_args: TrainingArguments, monitoring_args: MonitoringArguments, given: set[str]
) -> None:
    """Set precision and article to those of the run to resume, unless the flags are `given`.

    A checkpoint can only be resumed with its own options. The article is None for a run of an earlier version, which
    had no such option.

    Raises:
        UserError: the output folder or the checkpoint holds a malformed record.
    """
    folder, options = find_begun_options(training_args, monitoring_args)
    recorded = precision_from_options(options) if options is not None else None
    training_args.mixed_precision, line = choose_precision(training_args.mixed_precision, recorded, folder)
    if line:
        warn_once(line)
    is_asked = "article" in given and token_args.article != AS_WRITTEN
    if options is not None and "article" not in options and not is_asked:
        token_args.article = None


def find_begun_options(
    training_args: TrainingArguments, monitoring_args: MonitoringArguments
) -> tuple[Path, dict | None]:
    """Return the folder of the run to resume and the options that it recorded, None where there is no such run."""
    folder, resume = Path(training_args.output_dir), monitoring_args.resume_from_checkpoint
    if resume not in (None, "latest"):
        folder, checkpoints = Path(resume), [Path(resume)]
    elif training_args.overwrite_output_dir:
        return folder, None
    elif (path := folder / RUN_CONFIG).is_file():
        return folder, read_record(path).get("options", {})
    else:  # earlier versions wrote that record at the end
        checkpoints = [path for pattern in CHECKPOINTS for path in sorted(folder.glob(pattern))]
    if checkpoints:
        from utils.style.checkpoints import STATE_RECORD  # takes seconds

        if (path := checkpoints[-1] / STATE_RECORD).is_file():
            return folder, read_record(path)["progress"]["options"]
    return folder, None


def read_templates(token_args: TokenArguments) -> list[str]:
    """Return the prompt templates of the flag, then those of the file."""
    with_class, path = token_args.include_class_name, token_args.prompt_templates_file
    with_context = token_args.contexts_file is not None
    others = ({CLASS_TOKEN: True} if token_args.class_tokens else {}) | ({CONTEXT: True} if with_context else {})
    usual = with_others(DSI_TEMPLATE if with_class else CLASSLESS_TEMPLATE, others)
    given = token_args.prompt_templates or [usual]
    more = read_templates_file(path) if path else []
    for flag, templates in (("--prompt_templates", given), ("--prompt_templates_file", more)):
        for template in templates:
            check_template(template, flag=flag, needs_token=True, needs_class=with_class, others=others)
    return [*given, *more]


def identify_inputs(groups: list, base_model, real_images) -> tuple:
    """Return the real images' record, pinned to a commit, and the identity of each input's contents.

    Raises:
        UserError: the real images are not in a readable folder or repository.
    """
    from utils.data.image_set import RealImagesRecord
    from utils.data.real_images import identify_real_images

    _, _, token_args, *_, hub_args = groups
    real_images, inputs = identify_real_images(RealImagesRecord.from_arguments(real_images), hub_args.hub_token)
    inputs["pretrained_model_name_or_path"] = base_model.identity
    for name in ("prompt_templates_file", "class_names_file", "contexts_file"):
        path = getattr(token_args, name)
        if path is not None and Path(path).is_file():  # otherwise reading it raises the error
            inputs[name] = describe_files(Path(path).parent, [Path(path).name])
    return real_images, inputs


def open_inputs(groups: list) -> tuple:
    """Return the base model, the real images' record, the prompt templates, and the identity of each input.

    Inputs are identified before they are read, so that a change in between cannot go unnoticed.

    Raises:
        UserError: from `open_base_model` and `identify_inputs`.
    """
    model_args, data_args, token_args, *_, hub_args = groups
    open_model = partial(
        open_base_model, model_args.pretrained_model_name_or_path, "--pretrained_model_name_or_path",
        model_args.revision, hub_args.hub_token,
    )  # fmt: skip
    real_images, inputs = identify_inputs(groups, open_model(), data_args)
    return open_model(), real_images, read_templates(token_args), inputs


def read_lora(lora_args: LoraArguments, base_model):
    """Return the settings of the adapter, which fit the base model; None without one.

    Raises:
        UserError: from `LoraSettings.check`.
    """
    from utils.style.lora import UNET_TARGETS, LoraSettings

    if not lora_args.use_peft:
        return None
    settings = LoraSettings(
        lora_args.lora_r, lora_args.lora_alpha, tuple(lora_args.lora_target_modules or UNET_TARGETS),
        lora_args.lora_learning_rate, lora_args.lora_text_encoder,
    )  # fmt: skip
    settings.check(base_model)
    return settings


def record_options(groups: list) -> dict:
    """Return the options that the run records: class tokens and LoRA only if used, as earlier versions had neither."""
    _, _, token_args, lora_args, *_ = groups
    options = resolve_options(groups)
    unused = [] if lora_args.use_peft else [field.name for field in dataclasses.fields(LoraArguments)]
    unused += [] if token_args.class_tokens else ["class_tokens"]
    unused += [] if token_args.article else ["article"]  # a run of an earlier version
    return {name: value for name, value in options.items() if name not in unused}


def open_folder(groups: list, inputs: dict[str, str]) -> tuple:
    """Return the output folder, whether its token is finished, and the Hub repository to publish to, if any."""
    _, data_args, *_, training_args, _, hub_args = groups
    check_output_outside(training_args.output_dir, data_args)
    folder = RunFolder(
        Path(training_args.output_dir), "a style token", record_options(groups), DSI_CONFIG, traces=CHECKPOINTS,
        free=free_options(groups), overwrite=training_args.overwrite_output_dir, inputs=inputs, outputs=OUTPUTS,
    )  # fmt: skip
    is_finished, hub_target = folder.is_finished, None
    if hub_args.push_to_hub:
        hub_target = open_target(
            folder.path, hub_args.hub_model_id, "model", hub_args.hub_private_repo, hub_args.hub_revision,
            hub_args.hub_token,
        )  # fmt: skip
    if not is_finished:
        folder.check_writable()
        check_card(folder.path / "README.md")
    return folder, is_finished, hub_target


def start_accelerator(training_args: TrainingArguments, monitoring_args: MonitoringArguments):
    """Return the `Accelerator`, with a tracker if requested; seed what is drawn outside the steps."""
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed

    tracker, folder = monitoring_args.report_to, training_args.output_dir
    available = [str(name) for name in get_available_trackers()]
    if tracker != "none" and tracker not in available:
        raise UserError(
            f"--report_to {tracker}: not installed, or not a tracker of accelerate; installed: "
            f"{', '.join(available) or 'none'}."
        )
    try:
        accelerator = Accelerator(
            mixed_precision=training_args.mixed_precision,
            log_with=None if tracker == "none" else tracker,
            project_config=ProjectConfiguration(folder, logging_dir=str(Path(folder) / "logs")),
            # processes wait for each other while images are encoded and pictures drawn
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
        )
    except ValueError as error:  # fp16 without a GPU, bf16 on a GPU without it
        raise UserError(f"--mixed_precision {training_args.mixed_precision}: {error}") from None
    check_processes_joined(accelerator.num_processes)
    report_threads(accelerator.device.type)
    accelerator.gradient_accumulation_steps = 1  # the loop accumulates, whatever `accelerate launch` says
    allow_tf32(accelerator.device)
    set_seed(training_args.seed)
    return accelerator


def prepare_prompts(tokenizers: list, class_names: list[str], templates: list[str], token_args, device) -> tuple:
    """Return the nouns of the classes, their prompts from all templates, and the token ids of all prompts, after a
    check that none is truncated.

    `{context}` stays in the prompts; the ids are without contexts.
    """
    from utils.style.token import PromptIds, add_class_tokens, check_prompt_lengths

    corrections = read_class_names_file(token_args.class_names_file, class_names) if token_args.class_names_file else {}
    nouns = prompt_nouns(class_names, corrections)
    words = token_text(token_args.placeholder_token, token_args.num_vectors)
    article = token_args.article or AS_WRITTEN
    own = add_class_tokens(tokenizers, len(nouns)) if token_args.class_tokens else [""] * len(nouns)
    prompts = [
        render_prompt(template, noun, words, article, class_token=name)
        for template in templates
        for noun, name in zip(nouns, own)
    ]
    without_contexts = [fill_context(prompt, "") for prompt in prompts]
    check_prompt_lengths(tokenizers, without_contexts)
    plain_prompts = [render_prompt(PLAIN_TEMPLATE, noun) for noun in nouns]
    return nouns, prompts, PromptIds.tokenize(tokenizers, without_contexts, plain_prompts, device)


def prepare_all_prompts(tokenizers: list, images, templates: list[str], token_args, device) -> tuple:
    """Return the nouns of the classes, the token ids of their prompts, and the prompts of the training images.

    An image has the prompts of its class. With --contexts_file, it has its own, which also have its context.

    Raises:
        UserError: the file lacks an image; or from `prepare_prompts`.
    """
    from utils.style.token import ImagePrompts, tokenize_image_prompts

    labels, path = images.real.train["label"][:], token_args.contexts_file
    nouns, prompts, prompt_ids = prepare_prompts(tokenizers, images.real.class_names, templates, token_args, device)
    if path is None:
        return nouns, prompt_ids, ImagePrompts(prompt_ids, labels, {})
    contexts = read_contexts(path)
    of_images = contexts.of_images(images.digests, f"--contexts_file {path}:")
    ids, line = tokenize_image_prompts(tokenizers, prompts, labels, of_images, prompt_ids)
    if line:
        warn_once(f"--contexts_file {path}: {line}")
    record = {"contexts": {"sha256": contexts.sha256, "num_images": len(labels)}}
    return nouns, prompt_ids, ImagePrompts(ids, list(range(len(labels))), record)


def prepare_optimizer(weights, training_args: TrainingArguments) -> tuple:
    """Return AdamW for the token's rows and the adapter, if any, and its learning rate schedule."""
    import torch
    from diffusers.optimization import get_scheduler

    rate = training_args.learning_rate
    optimizer = torch.optim.AdamW(weights.optimizer_groups(rate), lr=rate, weight_decay=0.0)
    steps = {"num_warmup_steps": training_args.lr_warmup_steps, "num_training_steps": training_args.max_train_steps}
    return optimizer, get_scheduler(training_args.lr_scheduler, optimizer, **steps)


def prepare_unet(unet, training_args: TrainingArguments):
    """Return the U-Net for training, compiled if requested; evaluation and pictures use `unet` itself."""
    import torch

    if training_args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if unet.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
    return torch.compile(unet, backend=training_args.torch_compile_backend) if training_args.torch_compile else unet


def denoising_loss(batch: dict, denoiser):
    """Return the loss of textual inversion (Gal et al. 2022), with prompts that name the class and the style token."""
    from torch.nn import functional as F

    latents, noise, timesteps = (
        batch[name].to(denoiser.device, non_blocking=True) for name in ("latents", "noise", "timesteps")
    )
    conditioning = denoiser.encode_distinct(batch["templates"], batch["labels"])
    latents = denoiser.base_model.scale_latents(latents)
    model_pred, target = denoiser.predict(latents, noise, timesteps, conditioning)
    return F.mse_loss(model_pred, target)


def prepare_steps(latents, labels, num_templates: int, noise_scheduler, accelerator, training_args: TrainingArguments):
    """Return this process's share of each training step; `labels` are the numbers of the images' prompts."""
    import torch

    from utils.style.style_images import TrainingSteps

    images_per_process = training_args.train_batch_size * training_args.gradient_accumulation_steps
    return TrainingSteps(
        latents=latents, labels=torch.tensor(labels), seed=training_args.seed,
        images_per_step=images_per_process * accelerator.num_processes, num_templates=num_templates,
        num_train_timesteps=noise_scheduler.config.num_train_timesteps, rank=accelerator.process_index,
        num_parts=accelerator.num_processes,
    )  # fmt: skip


def divide_steps(unet, training_args: TrainingArguments):
    """Return what decides how many images pass the U-Net at once: `--train_batch_size`, fewer if memory runs out."""
    from utils.cli.memory import MicroBatching

    enable = None if training_args.gradient_checkpointing else unet.enable_gradient_checkpointing
    advice = "lower --resolution, choose a smaller base model, or take a GPU with more memory."
    return MicroBatching(
        training_args.train_batch_size, f"--train_batch_size {training_args.train_batch_size}", advice, enable
    )


def accumulate_gradients(batch: dict, denoiser, micro_batching, accelerator):
    """Accumulate the gradients of this process's share of a step over micro-batches; return its loss."""
    import torch

    from utils.style.style_images import micro_batches

    num_images, losses = len(batch["labels"]), []
    parts = micro_batches(batch, micro_batching.num_parts(num_images))
    for part in parts:
        loss, size = denoising_loss(part, denoiser), len(part["labels"])
        accelerator.backward(loss / (num_images / size))
        losses.append(loss.detach() * (size * len(parts) / num_images))  # parts can differ in size by one image
    return torch.stack(losses).mean()


def train(steps, denoiser, state, monitor, accelerator, training_args: TrainingArguments) -> None:
    """Train the weights of `state` from its current step to the last one; report everything to the monitor."""
    from torch.utils.data import DataLoader

    from utils.style.learned import average_gradients

    micro_batching, optimizer = state.micro_batching, state.optimizer
    while not monitor.is_over:  # again from step 0 if the token learned nothing from its first word
        loader = DataLoader(
            steps, sampler=range(state.step, training_args.max_train_steps), batch_size=None,
            num_workers=training_args.dataloader_num_workers, pin_memory=accelerator.device.type == "cuda",
        )  # fmt: skip
        for batch in monitor.watch(loader):
            attempt = partial(accumulate_gradients, batch, denoiser, micro_batching, accelerator)
            loss = micro_batching.run(attempt, undo=optimizer.zero_grad)
            if accelerator.num_processes > 1:  # not with DDP, which would wait for a process that ran out of memory
                average_gradients(state.weights.parameters, accelerator)
            optimizer.step()
            state.lr_scheduler.step()
            optimizer.zero_grad()
            monitor.add_loss(loss)
            if not monitor.end_step():
                break


def open_monitor(
    accelerator, folder, state, denoiser, images, held_out_latents, nouns: list[str], words: dict,
    training_args: TrainingArguments, monitoring_args: MonitoringArguments,
):  # fmt: skip
    """Return the monitor that the training loop reports to.

    It uses the same images, noise and classes each time, first with the untrained token.
    """
    from utils.style.monitor import BeforeAfter, HealthCheck, Monitor

    num_columns = monitoring_args.num_validation_images if accelerator.is_main_process else 0
    return Monitor(
        accelerator, folder, state, HealthCheck(denoiser, images, held_out_latents, training_args.train_batch_size),
        BeforeAfter(denoiser, images.real.train, nouns, num_columns) if num_columns else None,
        learning_rate=training_args.learning_rate, max_train_steps=training_args.max_train_steps,
        validation_steps=monitoring_args.validation_steps, checkpointing_steps=monitoring_args.checkpointing_steps,
        checkpoints_total_limit=monitoring_args.checkpoints_total_limit, words=words,
        early_stopping=training_args.early_stopping,
    )  # fmt: skip


def show_needs(groups: list, base_model, real_images, templates: list[str], lora) -> dict:
    """Print and return what the run needs, for `--dry_run`: load the real images, but write nothing.

    Raises:
        UserError: from loading the images and checking the prompts.
    """
    import torch

    from utils.data.real_images import load_real_images
    from utils.forecast.inputs import real_set_disk
    from utils.forecast.memory import available_bytes
    from utils.forecast.report import TimeForecast, print_forecast
    from utils.style import forecast
    from utils.style.style_images import latents_folder
    from utils.style.token import add_placeholder_tokens, find_initializers

    _, data_args, token_args, _, image_args, training_args, monitoring_args, hub_args = groups
    accelerator = start_accelerator(training_args, monitoring_args)
    disk = [*forecast.base_model_disk(base_model), *real_set_disk(real_images, hub_args.hub_token)]
    tokenizers = base_model.load_tokenizers()
    find_initializers(tokenizers, token_args.initializer_token)
    add_placeholder_tokens(tokenizers, token_args.placeholder_token, token_args.num_vectors)
    real = load_real_images(real_images, hub_args.hub_token)
    accelerator.print("\n".join(real.remarks))
    prepare_prompts(tokenizers, real.class_names, templates, token_args, accelerator.device)
    run = forecast.DsiRun(
        image_args.resolution or base_model.native_resolution, training_args.train_batch_size,
        {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32),
        token_args.num_vectors, 2 if data_args.random_flip else 1, monitoring_args.num_validation_images > 0,
        len(real.class_names) if token_args.class_tokens else 0, lora,
    )  # fmt: skip
    memory = forecast.forecast_memory(base_model, run, training_args.gradient_checkpointing, denoising_loss)
    num_encoded = len(real.train) * run.num_copies
    num_seen = training_args.max_train_steps * training_args.train_batch_size * accelerator.num_processes
    times = [
        TimeForecast(
            f"images are encoded{' (mirrored ones too)' if data_args.random_flip else ''}", num_encoded,
            forecast.time_encoding(base_model, run, accelerator),
        ),
        TimeForecast(
            f"images in {training_args.max_train_steps:,} steps, or fewer with --early_stopping",
            num_seen * training_args.gradient_accumulation_steps,
            forecast.time_training(
                base_model, run, partial(prepare_unet, training_args=training_args), denoising_loss, accelerator
            ),
        ),
    ]  # fmt: skip
    disk.append(forecast.latents_disk(base_model, run, len(real.train), latents_folder(image_args.latent_cache_dir)))
    if not accelerator.is_main_process:
        return {}
    return print_forecast(memory, available_bytes(accelerator.device), times, disk)


def main(argv: Sequence[str] | None = None) -> dict:
    started = time.time()
    groups = parse_arguments(argv)
    _, data_args, token_args, lora_args, image_args, training_args, monitoring_args, hub_args = groups
    base_model, real_images, templates, inputs = open_inputs(groups)
    lora = read_lora(lora_args, base_model)
    if training_args.dry_run:
        return show_needs(groups, base_model, real_images, templates, lora)
    folder, is_finished, hub_target = open_folder(groups, inputs)
    if is_finished:
        publish_finished(folder.path, hub_target, PUBLISHED_FILES)
        return read_record(folder.path / DSI_CONFIG)["health"]

    # these take seconds to import: only once the arguments are known to be good
    import torch

    from utils.style.checkpoints import TrainingState, find_checkpoint
    from utils.style.learned import load_models
    from utils.style.style_images import load_latents, load_style_images
    from utils.style.token import Denoiser, add_placeholder_tokens, find_initializers

    # Tokenizers, images and prompts: find every bad input before a model loads
    checkpoint = find_checkpoint(folder, monitoring_args.resume_from_checkpoint)
    accelerator = start_accelerator(training_args, monitoring_args)
    noise_scheduler, tokenizers = base_model.load_noise_scheduler(), base_model.load_tokenizers()
    token, num_vectors = token_args.placeholder_token, token_args.num_vectors
    words = find_initializers(tokenizers, token_args.initializer_token)
    add_placeholder_tokens(tokenizers, token, num_vectors)
    images = load_style_images(real_images, hub_args.hub_token)
    accelerator.print("\n".join(images.real.remarks))
    nouns, prompt_ids, of_images = prepare_all_prompts(tokenizers, images, templates, token_args, accelerator.device)

    # Latents are encoded once, into memory-mapped files; the VAE is not needed after that
    resolution = image_args.resolution or base_model.native_resolution
    latents, held_out_latents, latents_key = load_latents(
        base_model, images, resolution, data_args.random_flip, image_args.latent_cache_dir, accelerator.device
    )

    # The only trainable parameters: the rows of the tokens and, if there is one, the adapter
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    unet, weights = load_models(
        base_model, tokenizers, dtype, accelerator.device, placeholder_token=token, num_vectors=num_vectors,
        initializer_ids=next(iter(words.values())), class_nouns=nouns if token_args.class_tokens else None, lora=lora,
        seed=training_args.seed,
    )  # fmt: skip
    optimizer, lr_scheduler = prepare_optimizer(weights, training_args)
    optimizer = accelerator.prepare(optimizer)
    encoder = accelerator.prepare_model(weights.encoder, evaluation_mode=True)
    denoiser = Denoiser(base_model, unet, noise_scheduler, encoder, prompt_ids, resolution, dtype, weights.lora)
    trained = dataclasses.replace(denoiser, unet=prepare_unet(unet, training_args), prompt_ids=of_images.ids)

    # Step n is a function of the seed and n, so a checkpoint needs only the trained weights and the optimizer
    steps = prepare_steps(latents, of_images.labels, len(templates), noise_scheduler, accelerator, training_args)
    state = TrainingState(
        weights, optimizer, lr_scheduler, accelerator.scaler, options=folder.options,
        inputs=of_images.ids.key(latents_key), base_model=base_model.identity, images_per_step=steps.images_per_step,
        micro_batching=divide_steps(unet, training_args),
    )  # fmt: skip
    monitor = open_monitor(
        accelerator, folder, state, denoiser, images, held_out_latents, nouns, words, training_args, monitoring_args
    )
    with folder.working(command := public_command("train_dsi.py", argv)):
        monitor.begin(checkpoint)
        train(steps, trained, state, monitor, accelerator, training_args)
        health = monitor.health | {"num_skipped_images": images.num_skipped}
        if accelerator.is_main_process:
            folder.check_unchanged(lambda: identify_inputs(groups, base_model, real_images)[1])
            weights.save(folder.path)
            record = describe_token(
                base_model, images.real, nouns, templates, token_args.article, placeholder_token=token,
                num_vectors=num_vectors, resolution=resolution, max_train_steps=training_args.max_train_steps,
                health=health, **state.describe(), **weights.describe(folder.path), **of_images.record,
            )  # fmt: skip
            monitor.plot_training()
            write_records(folder, record, started, command, hub_target, hub_args.hub_token)
            if hub_target is not None:
                publish_folder(folder.path, hub_target, PUBLISHED_FILES)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return {**health, "loss_history": state.loss_history}


if __name__ == "__main__":
    run_script(main)
