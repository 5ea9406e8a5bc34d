"""Sampling planned images with a Stable Diffusion pipeline: one generator an image, bad images drawn again."""

from collections.abc import Callable

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPTokenizer

from utils.cli.errors import UserError
from utils.data.prompts import token_text
from utils.hub.repositories import Source
from utils.synthesis.checks import find_problem
from utils.synthesis.plan import GenerationPlan, PlannedImage
from utils.synthesis.sources import StyleToken

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OWN_SCHEDULER = "default"

# planned images -> pixels `(batch, height, width, 3)` float32 in [0, 1], and the safety checker's flags
Draw = Callable[[list[PlannedImage]], tuple[np.ndarray, list[bool]]]


def check_scheduler(scheduler: str) -> None:
    """Check that Stable Diffusion can sample with a scheduler.

    Raises:
        UserError: diffusers has no such scheduler, or it does not fit.
    """
    known = [OWN_SCHEDULER, *KarrasDiffusionSchedulers.__members__]
    if scheduler not in known:
        raise UserError(f"--scheduler {scheduler}: not among {', '.join(known)}.")


def count_prompt_tokens(
    prompts: tuple[str, ...], template: str, generator: Source, token: StyleToken | None
) -> list[int]:
    """Return the tokens of each prompt with start and end; every vector of the style token counts as one.

    Raises:
        UserError: a prompt is longer than the text encoder takes; the message shows where it would be cut.
    """
    with generator.reading("has no usable tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(generator.name, subfolder="tokenizer", **generator.load_options())
    if token is not None:
        vectors = token_text(token.placeholder_token, token.num_vectors)
        tokenizer.add_tokens(vectors.split())
        prompts = tuple(prompt.replace(token.placeholder_token, vectors) for prompt in prompts)
    counts, limit = [], tokenizer.model_max_length
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids
        if len(ids) > limit:
            cut = tokenizer.decode(ids[1 : limit - 1])
            raise UserError(
                f"--prompt_template '{template}': '{prompt}' has {len(ids)} tokens, the text encoder takes {limit}; "
                f"it would be cut to '{cut}'."
            )
        counts.append(len(ids))
    return counts


def load_pipeline(
    generator: Source, token: StyleToken | None, scheduler: str, dtype: torch.dtype, device: torch.device
) -> StableDiffusionPipeline:
    """Return the generator with the style token in its vocabulary and the scheduler built from its own config."""
    with generator.reading("does not load as a Stable Diffusion pipeline"):
        pipe = StableDiffusionPipeline.from_pretrained(generator.name, dtype=dtype, **generator.load_options())
    if token is not None:
        pipe.load_textual_inversion(str(token.path))
    if scheduler != OWN_SCHEDULER:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def make_draw(
    pipe: StableDiffusionPipeline,
    prompts: tuple[str, ...],
    resolution: int,
    num_inference_steps: int,
    guidance_scale: float,
) -> Draw:
    """Return the function that draws a batch of planned images. Every prompt is encoded once, here.

    The noise of an image comes from a CPU generator of its own: the same on every device and in every batch.
    """
    with torch.no_grad():
        embeds = {prompt: pipe.encode_prompt(prompt, pipe.device, 1, True) for prompt in set(prompts)}

    def draw(images: list[PlannedImage]) -> tuple[np.ndarray, list[bool]]:
        output = pipe(
            prompt_embeds=torch.cat([embeds[image.prompt][0] for image in images]),
            negative_prompt_embeds=torch.cat([embeds[image.prompt][1] for image in images]),
            generator=[torch.Generator("cpu").manual_seed(image.seed) for image in images],
            height=resolution,
            width=resolution,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="np",
        )
        return output.images, output.nsfw_content_detected or [False] * len(images)

    return draw


def draw_batch(
    draw: Draw, plan: GenerationPlan, batch: range, kept: range, max_redraws: int
) -> list[tuple[PlannedImage, np.ndarray]]:
    """Draw a batch of the plan until none of its images is bad; those outside `kept` are padding and left out.

    A redraw repeats the whole batch with new seeds for the bad images only, so that the batch keeps its size.

    Raises:
        UserError: images stay bad after `max_redraws` redraws; the message lists classes and prompts.
    """
    images = [plan.image(index) for index in batch]
    pending = [position for position, index in enumerate(batch) if index in kept]
    good = {}
    for redraw in range(max_redraws + 1):
        pixels, flags = draw(images)
        problems = {position: find_problem(pixels[position], flags[position]) for position in pending}
        good.update({i: (images[i], pixels[i]) for i in pending if problems[i] is None})
        pending = [i for i in pending if problems[i] is not None]
        if not pending:
            return [good[position] for position in sorted(good)]
        for i in pending:
            images[i] = plan.image(batch[i], redraw + 1)
    listed = sorted({f"{plan.class_names[images[i].label]} ('{images[i].prompt}'): {problems[i]}" for i in pending})
    raise UserError(f"--max_redraws {max_redraws}: after as many redraws images are still bad; {'; '.join(listed)}.")
