"""Sampling: a pipeline with its style token turns prompts and seeds into checked pixels."""

import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    UNet2DConditionModel,
)

from utils.cli.errors import UserError
from utils.cli.memory import try_in_memory
from utils.style.families import FAMILIES, OTHER, OWN_SCHEDULER, WITH_STYLE_TOKENS, Family
from utils.style.saved_pipelines import PROBLEMS
from utils.style.token import load_learned_embeds
from utils.synthesis.generators import GUIDANCE_INTERVAL, GUIDANCE_SCALE, TRUE_CFG_SCALE, Generator
from utils.synthesis.guidance import GuidanceInterval, find_denoiser
from utils.synthesis.init_images import InitImages, num_steps
from utils.synthesis.learned import CLASS_EMBEDS, ClassTokens
from utils.synthesis.lora import LoraAdapter
from utils.synthesis.sources import SCHEDULER_CONFIG, Sources, StyleToken

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CACHE_BYTES = 2**30
CONVOLUTIONAL = (UNet2DConditionModel, AutoencoderKL)
MAX_LEVELS_APART = 1  # of 255, in a constant image

# the arguments of a pipeline's call for a prompt, each `(1, ...)`
Embeddings = dict[str, torch.Tensor]


def load_pipeline(
    generator: Generator, token: StyleToken | None, scheduler: str, dtype: torch.dtype, device: torch.device,
    loras: Sequence[LoraAdapter] = (), scheduler_config: dict | None = None, class_tokens: ClassTokens | None = None,
) -> DiffusionPipeline:  # fmt: skip
    """Return the pipeline with the style token in its vocabulary and a scheduler made from its own config.

    Adapters are fused into the weights, one after another. Class tokens follow the style token in the vocabulary.
    `scheduler_config` updates the scheduler's config. NaN and infinite weights are found here, as redraws would not
    help. The VAE is in float32 if it overflows in float16. A safety checker stays. Only safetensors are loaded.

    Raises:
        UserError: a part of the pipeline cannot be loaded; tokens or adapters do not fit it; a weight is not finite.
    """
    source = generator.source
    if token is not None and not generator.family.takes_style_tokens:
        titles = [family.title for family in WITH_STYLE_TOKENS.values()]
        raise UserError(
            f"--learned_embeds {token.id}: {source.name} is a {generator.pipeline_class}, which takes no style tokens; "
            f"they are for {' and '.join(titles)}."
        )
    dtypes = {"default": dtype}
    # true is the default of the VAE's class; bfloat16 has the range of float32
    if dtype == torch.float16 and "vae" in generator.parts and generator.config("vae").get("force_upcast", True):
        dtypes["vae"] = torch.float32
    # for parts that have both, diffusers loads this variant
    variant = next((variant for variant in generator.variants.values() if variant), None)
    with source.reading("its pipeline cannot be loaded from safetensors", also=PROBLEMS):
        pipe = AutoPipelineForText2Image.from_pretrained(
            source.name, dtype=dtypes, use_safetensors=True, variant=variant, **source.load_options()
        )
        pipe.to(device)  # fails if weights are missing
    if "vae" in dtypes:
        for part in pipe.vae.children():
            part.register_forward_pre_hook(_in_float32)
    if (part := find_broken_part(pipe)) is not None:
        raise UserError(
            f"{generator.prefix} its {part} has NaN or infinite weights in {str(dtype).removeprefix('torch.')}: the "
            "file is damaged, or its training diverged."
        )
    for lora in loras:
        with _quiet(logging.CRITICAL):  # logged errors are also raised
            lora.fuse(pipe)
        if (part := find_broken_part(pipe)) is not None:
            remedy = "train it again" if lora.is_learned else "give a smaller scale after the colon"
            raise UserError(
                f"{lora.source.flag} {lora.source.name}{'' if lora.is_learned else f':{lora.scale:g}'}: with it the "
                f"{part} has NaN or infinite weights; {remedy}."
            )
    if token is not None:
        _add_style_token(pipe, generator.family, token)
    if class_tokens is not None:
        with _quiet():  # transformers describes how the new rows start
            _add_class_tokens(pipe, generator.family, class_tokens)
    if scheduler != OWN_SCHEDULER:
        pipe.scheduler = generator.scheduler.make(scheduler, **(scheduler_config or {}))
    return pipe.to(device)


def find_broken_part(pipe: DiffusionPipeline) -> str | None:
    """Return the name of a part with NaN or infinite weights; None if there is none."""
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            weights = [weight for weight in part.parameters() if weight.is_floating_point() and weight.numel()]
            # extremes show NaN too, in a tenth of the time of `isfinite` on a CPU
            extremes = [extreme.float() for weight in weights for extreme in torch.aminmax(weight.detach())]
            if extremes and not torch.stack(extremes).isfinite().all():
                return name
    return None


def _in_float32(part, arguments: tuple) -> tuple:
    """Cast the inputs of a part of the VAE: most pipelines pass latents in their own precision."""
    return tuple(value.float() if value.is_floating_point() else value for value in arguments)


def _add_style_token(pipe: DiffusionPipeline, family: Family, token: StyleToken) -> None:
    parts = [(getattr(pipe, each.tokenizer), getattr(pipe, each.part)) for each in family.text_encoders]
    rows = load_learned_embeds(token.path)
    if not all(value.isfinite().all() for value in rows):
        raise UserError(
            f"--learned_embeds {token.id}: has NaN or infinite embeddings: the file is damaged, or its training "
            "diverged; train it again."
        )
    shapes = [tuple(value.shape) for value in rows]
    wanted = [(token.num_vectors, text_encoder.config.hidden_size) for _, text_encoder in parts]
    if shapes != wanted:
        raise UserError(
            f"--learned_embeds {token.id}: has embeddings of shape {shapes}, the text encoders take {wanted}; choose "
            "a token that was learned for this generator."
        )
    for value, (tokenizer, text_encoder) in zip(rows, parts):
        pipe.load_textual_inversion(
            value, token=token.placeholder_token, tokenizer=tokenizer, text_encoder=text_encoder
        )


def _add_class_tokens(pipe: DiffusionPipeline, family: Family, class_tokens: ClassTokens) -> None:
    for encoder, rows in zip(family.text_encoders, load_learned_embeds(class_tokens.path), strict=True):
        pipe.load_textual_inversion(
            list(rows), token=list(class_tokens.names), tokenizer=getattr(pipe, encoder.tokenizer),
            text_encoder=getattr(pipe, encoder.part),
        )  # fmt: skip


class PromptCache:
    """Encodes prompts, each one alone, so that embeddings do not depend on the batch.

    The first `max_bytes` of embeddings are kept in host memory (8,000 prompts of Stable Diffusion in half precision,
    250 of FLUX). As classes alternate, a cache of the latest ones would drop each embedding just before its next use.
    """

    def __init__(self, pipe: DiffusionPipeline, negative_prompt: str, max_bytes: int = CACHE_BYTES):
        self.pipe = pipe
        self.negative_prompt = negative_prompt
        self.names = FAMILIES[type(pipe).__name__].prompt_embeddings
        self.free_bytes = max_bytes
        self.kept: dict[str, Embeddings] = {}
        self.negative: Embeddings = {}

    def batch(self, prompts: list[str], with_negative: bool) -> Embeddings:
        """Return the pipeline's arguments for prompts, `(batch, ...)` on its device."""
        encoded = {prompt: self._encode(prompt) for prompt in dict.fromkeys(prompts)}
        arguments = {
            name: torch.cat([encoded[prompt][name] for prompt in prompts]).to(self.pipe.device)
            for name in encoded[prompts[0]]
        }
        if with_negative:
            self.negative = self.negative or self._call("", is_negative=True)
            size = len(prompts)
            arguments |= {name: value.expand(size, *value.shape[1:]) for name, value in self.negative.items()}
        return arguments

    def _encode(self, prompt: str) -> Embeddings:
        if prompt in self.kept:
            return self.kept[prompt]
        embeddings = {name: value.cpu() for name, value in self._call(prompt, is_negative=False).items()}
        num_bytes = sum(value.nbytes for value in embeddings.values())
        if num_bytes <= self.free_bytes:
            self.free_bytes -= num_bytes
            self.kept[prompt] = embeddings
        return embeddings

    def _call(self, prompt: str, is_negative: bool) -> Embeddings:
        """Return the embeddings of `prompt`, or of the negative prompt, on the device."""
        arguments = {"prompt": prompt, "device": self.pipe.device, "num_images_per_prompt": 1}
        parameters = inspect.signature(self.pipe.encode_prompt).parameters
        arguments |= {name: None for name in ("prompt_2", "prompt_3") if name in parameters}
        if "do_classifier_free_guidance" in parameters:
            arguments["do_classifier_free_guidance"] = is_negative
        if is_negative:
            # None and "" differ: Stable Diffusion XL uses zeros for None
            arguments["negative_prompt"] = self.negative_prompt or None
        values = dict(zip(self.names, self.pipe.encode_prompt(**arguments)))
        return {name: value for name, value in values.items() if name.startswith("negative") == is_negative}


class Sampler:
    """Draws batches with a pipeline, `num_at_a_time` images at a time, and fewer once memory runs out.

    Every call of the pipeline has exactly that number, with the last image repeated if needed: another number would use
    other kernels, and be compiled again. `guidance_parameter` is the argument of the call that the guidance scale is.
    With `init_images`, images can be made from real ones.
    """

    def __init__(
        self, pipe: DiffusionPipeline, *, resolution: int, num_inference_steps: int, num_at_a_time: int,
        negative_prompt: str = "", guidance_interval: tuple[float, float] | None = None, compile_model: bool = False,
        compile_backend: str = "inductor", guidance_parameter: str = GUIDANCE_SCALE,
        init_images: InitImages | None = None,
    ):  # fmt: skip
        self.pipe = pipe
        self.negative_prompt = negative_prompt
        self.guidance_parameter = guidance_parameter
        self.num_at_a_time = num_at_a_time
        self.settings = {"height": resolution, "width": resolution, "num_inference_steps": num_inference_steps}
        self.family = FAMILIES.get(type(pipe).__name__, OTHER)
        # results of `encode_prompt` differ between pipelines: unknown ones get their prompts as text
        self.cache = PromptCache(pipe, negative_prompt) if self.family.prompt_embeddings else None
        pipe.set_progress_bar_config(disable=True)
        self.init_images, self.image_pipe = init_images, None
        if init_images is not None:
            self.image_pipe = image_to_image_pipeline(pipe)
        for part in pipe.components.values():
            # faster for convolutions in half precision on a GPU; on a CPU it was 0 to 5% slower
            if isinstance(part, CONVOLUTIONAL) and pipe.device.type == "cuda":
                part.to(memory_format=torch.channels_last)
        if compile_model:
            # Inductor's `freezing` is not faster on a CPU, and needs a copy of the weights
            denoiser = find_denoiser(pipe)
            denoiser.forward = torch.compile(denoiser.forward, backend=compile_backend, dynamic=False)
        # outside the compiled part, as it counts steps
        self.interval = GuidanceInterval(pipe, *guidance_interval) if guidance_interval else None

    def draw(
        self, prompts: list[str], seeds: list[int], guidance_scale: float, strength: float | None = None,
        init_rows: list[int] | None = None,
    ) -> tuple[np.ndarray, list[str | None]]:  # fmt: skip
        """Return the pixels of images, uint8 `(batch, height, width, 3)`, and the problem of each (None: a good image).

        An image's noise comes from a CPU generator with its own seed, so it is the same on every device and in every
        batch. With a `strength`, image-to-image starts from the real images in `init_rows` of the training split. The
        pixels of bad images are undefined.

        Raises:
            UserError: a single image does not fit in memory.
        """
        pixels, problems = [], []
        while len(problems) < len(prompts):
            part = slice(len(problems), len(problems) + self.num_at_a_time)
            rows = init_rows[part] if init_rows is not None else None
            drawn = self._try_to_draw(prompts[part], seeds[part], guidance_scale, strength, rows)
            if drawn is None:
                self._halve()
                continue
            pixels.append(drawn[0])
            problems += drawn[1]
        return np.concatenate(pixels), problems

    def _try_to_draw(
        self, prompts: list[str], seeds: list[int], scale: float, strength: float | None, rows: list[int] | None
    ):
        """Return pixels and problems of at most `num_at_a_time` images; None if memory runs out."""
        size, padding = len(prompts), self.num_at_a_time - len(prompts)

        def draw() -> tuple[np.ndarray, list[str | None]]:
            padded = [values and values + values[-1:] * padding for values in (prompts, seeds, rows)]
            pixels, flags = self._call(*padded[:2], scale, strength, padded[2])
            levels, problems = find_problems(pixels[:size], flags[:size])
            return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy(), problems

        return try_in_memory(draw)

    @torch.inference_mode()
    def _call(
        self, prompts: list[str], seeds: list[int], scale: float, strength: float | None, rows: list[int] | None
    ) -> tuple[torch.Tensor, list[bool]]:
        """Return pixels `(batch, 3, height, width)` in [0, 1] on the device, and the safety checker's flags."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        pipe, settings, num_skipped = self.pipe, self.settings, 0
        if strength is not None:
            num = self.settings["num_inference_steps"]
            pipe, num_skipped = self.image_pipe, (num - num_steps(num, strength)) * self.pipe.scheduler.order
            image = [self.init_images.square(row, self.settings["height"]) for row in rows]
            settings = {"num_inference_steps": num, "strength": strength, "image": image}
        if self.interval is not None:
            self.interval.begin(scale > 1, num_skipped)
        with _quiet():
            output = pipe(
                **self._prompt_arguments(prompts, scale), **settings, **{self.guidance_parameter: scale},
                generator=generators, output_type="pt",
            )  # fmt: skip
        # not all pipelines have a safety checker
        return output.images, output.get("nsfw_content_detected") or [False] * len(prompts)

    def _prompt_arguments(self, prompts: list[str], guidance_scale: float) -> dict:
        if self.cache is not None:
            return self.cache.batch(prompts, with_negative=guidance_scale > 1 and self.family.negative_prompts)
        negative_prompt = self.negative_prompt
        if self.guidance_parameter == TRUE_CFG_SCALE:  # without a negative prompt, it has no effect
            negative_prompt = (negative_prompt or " ") if guidance_scale > 1 else ""
        if negative_prompt:
            return {"prompt": prompts, "negative_prompt": [negative_prompt] * len(prompts)}
        return {"prompt": prompts}

    def _halve(self) -> None:
        if self.num_at_a_time == 1:
            raise UserError(
                f"--resolution {self.settings['height']}: a single image does not fit in the memory of "
                f"{self.pipe.device}; lower it, or draw in half precision (--mixed_precision bf16)."
            )
        fewer = self.num_at_a_time // 2
        logger.warning("Out of memory with %d images at a time; continuing with %d.", self.num_at_a_time, fewer)
        self.num_at_a_time = fewer


def image_to_image_pipeline(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Return the image-to-image pipeline of the same parts; it also works with a VAE in float32 beside float16."""
    if pipe.vae.dtype == torch.float32:  # else that of XL would convert it to half precision after each batch
        pipe.vae.register_to_config(force_upcast=False)
    image_pipe = AutoPipelineForImage2Image.from_pipe(pipe)
    image_pipe.set_progress_bar_config(disable=True)
    prepare_latents, dtype = image_pipe.prepare_latents, find_denoiser(pipe).dtype

    def in_own_precision(*args, **kwargs) -> torch.Tensor:
        return prepare_latents(*args, **kwargs).to(dtype)

    image_pipe.prepare_latents = in_own_precision
    return image_pipe


def load_sampler(sources: Sources, settings: dict, accelerator: Accelerator) -> Sampler:
    """Load the generator with the style token on this process's device; `settings` are those of the set."""
    dtype = DTYPES[accelerator.mixed_precision]
    pipe = load_pipeline(
        sources.generator, sources.token, settings["scheduler"], dtype, accelerator.device, sources.adapters,
        settings.get(SCHEDULER_CONFIG), sources.class_tokens if settings.get(CLASS_EMBEDS) else None,
    )  # fmt: skip
    names = ("resolution", "num_inference_steps", "negative_prompt")
    return Sampler(
        pipe, **{name: settings[name] for name in names}, num_at_a_time=settings["batch_size"],
        guidance_interval=settings.get(GUIDANCE_INTERVAL), compile_model=settings["torch_compile"],
        guidance_parameter=sources.generator.guidance_parameter or GUIDANCE_SCALE, init_images=sources.init_images,
    )  # fmt: skip


def find_problems(pixels: torch.Tensor, flags: list[bool]) -> tuple[torch.Tensor, list[str | None]]:
    """Return a batch's levels and the problem of each image (None: a good image).

    `pixels` are `(batch, 3, height, width)` in [0, 1], of any dtype on any device; the levels are uint8, rounded to the
    nearest. `flags` are the safety checker's. An image counts as constant only if each channel is equal to within one
    of 255 levels, as dark and pale images can be real. The levels of an image with NaN are undefined.
    """
    # not in half precision, which has fewer levels than a byte
    levels = (pixels.float() * 255).round()
    highest, lowest = levels.amax((2, 3)), levels.amin((2, 3))
    # one copy to the host for all figures; NaN and infinity show in the extremes
    figures = torch.stack([highest.amax(1), (highest - lowest).amax(1)]).tolist()
    problems = [_describe(*values, flagged) for *values, flagged in zip(*figures, flags, strict=True)]
    return levels.nan_to_num(0).to(torch.uint8), problems


def _describe(highest: float, spread: float, flagged: bool) -> str | None:
    if flagged:
        return "flagged by the safety checker"
    if not math.isfinite(spread):
        return "not a number"
    if spread > MAX_LEVELS_APART:
        return None
    return "black" if highest <= MAX_LEVELS_APART else "constant"


@contextmanager
def _quiet(level: int = logging.ERROR) -> Iterator[None]:
    """Silence the libraries' warnings at every truncated prompt and flagged image, which are counted instead."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [library.level for library in loggers]
    for library in loggers:
        library.setLevel(level)
    try:
        yield
    finally:
        for library, level in zip(loggers, levels):
            library.setLevel(level)
