"""Sampling: prompts and seeds into checked pixels, one noise generator an image."""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel

from utils.cli.errors import UserError
from utils.synthesis.checks import find_problems

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# what `encode_prompt` returns, in its order, by the names with which the pipeline takes it; LIBRARIES: it differs from
# pipeline to pipeline, so that others get their prompts as text
SD_EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds")
POOLED_EMBEDDINGS = (*SD_EMBEDDINGS, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
EMBEDDINGS = {
    "StableDiffusionPipeline": SD_EMBEDDINGS,
    "StableDiffusionXLPipeline": POOLED_EMBEDDINGS,
    "StableDiffusion3Pipeline": POOLED_EMBEDDINGS,
    "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds"),
}
CACHE_BYTES = 2**30
CONVOLUTIONAL = (UNet2DConditionModel, AutoencoderKL)

# the arguments of a pipeline's call that stand for a prompt, each `(1, ...)`
Embeddings = dict[str, torch.Tensor]


class PromptCache:
    """Prompts into a pipeline's embeddings, each encoded alone, so that they do not depend on a batch.

    Embeddings are kept in the host's memory until `max_bytes` are full (8,000 prompts of Stable Diffusion in half
    precision, 250 of FLUX), and then no others: classes come round in turns, where keeping the latest used would
    throw each one out just before its next use.
    """

    def __init__(self, pipe: DiffusionPipeline, negative_prompt: str, max_bytes: int = CACHE_BYTES):
        self.pipe = pipe
        self.negative_prompt = negative_prompt
        self.names = EMBEDDINGS[type(pipe).__name__]
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
        if with_negative and not self.negative:
            self.negative = self._call("", is_negative=True)
        if with_negative:
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
            # None and "" are not the same: Stable Diffusion XL takes zeros for None
            arguments["negative_prompt"] = self.negative_prompt or None
        values = dict(zip(self.names, self.pipe.encode_prompt(**arguments)))
        return {name: value for name, value in values.items() if name.startswith("negative") == is_negative}


class Sampler:
    """Draws batches with a pipeline, `num_at_a_time` images at a time: fewer from the first time that memory is short.

    Every call of the pipeline has just as many images, the last one repeated where there are fewer: another number
    would be computed by other kernels, and compiled once more.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        resolution: int,
        num_inference_steps: int,
        negative_prompt: str = "",
        num_at_a_time: int,
        compile_model: bool = False,
        compile_backend: str = "inductor",
    ):
        self.pipe = pipe
        self.negative_prompt = negative_prompt
        self.num_at_a_time = num_at_a_time
        self.settings = {"height": resolution, "width": resolution, "num_inference_steps": num_inference_steps}
        self.cache = PromptCache(pipe, negative_prompt) if type(pipe).__name__ in EMBEDDINGS else None
        self.parameters = inspect.signature(pipe.__call__).parameters
        pipe.set_progress_bar_config(disable=True)
        for part in pipe.components.values():
            # a gain for convolutions in half precision on a GPU; on a CPU it cost 0 to 5 % of a run
            if isinstance(part, CONVOLUTIONAL) and pipe.device.type == "cuda":
                part.to(memory_format=torch.channels_last)
        if compile_model:
            # Inductor's `freezing` is no faster on a CPU, and costs a copy of the weights
            denoiser = pipe.components["unet" if "unet" in pipe.components else "transformer"]
            denoiser.compile(backend=compile_backend, dynamic=False)

    def draw(self, prompts: list[str], seeds: list[int], guidance_scale: float) -> tuple[np.ndarray, list[str | None]]:
        """Return the pixels of images, uint8 `(batch, height, width, 3)`, and what is wrong with each, None if nothing.

        An image's noise comes from a CPU generator with its own seed: the same on every device and in every batch.
        A bad image's pixels mean nothing.

        Raises:
            UserError: not even one image at a time fits in memory.
        """
        pixels, problems = [], []
        while len(problems) < len(prompts):
            part = slice(len(problems), len(problems) + self.num_at_a_time)
            drawn = self._try_to_draw(prompts[part], seeds[part], guidance_scale)
            if drawn is None:
                self._halve()
                continue
            pixels.append(drawn[0])
            problems += drawn[1]
        return np.concatenate(pixels), problems

    def _try_to_draw(self, prompts: list[str], seeds: list[int], guidance_scale: float):
        """Return pixels and problems of at most `num_at_a_time` images, None where that is too many for the memory."""
        size = len(prompts)
        padding = self.num_at_a_time - size
        try:
            pixels, flags = self._call(prompts + prompts[-1:] * padding, seeds + seeds[-1:] * padding, guidance_scale)
            levels, problems = find_problems(pixels[:size], flags[:size])
            return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy(), problems
        except torch.OutOfMemoryError:
            return None  # and with the error go the references to what filled the memory

    @torch.inference_mode()
    def _call(self, prompts: list[str], seeds: list[int], guidance_scale: float) -> tuple[torch.Tensor, list[bool]]:
        """Return pixels `(batch, 3, height, width)` in [0, 1] on the device, and the safety checker's flags."""
        with _quiet():
            output = self.pipe(
                **self._prompt_arguments(prompts, guidance_scale),
                **self.settings,
                guidance_scale=guidance_scale,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                output_type="pt",
            )
        # only some pipelines have a safety checker, and not all of those have one loaded
        return output.images, output.get("nsfw_content_detected") or [False] * len(prompts)

    def _prompt_arguments(self, prompts: list[str], guidance_scale: float) -> dict:
        if self.cache is not None:
            return self.cache.batch(
                prompts, with_negative=guidance_scale > 1 and "true_cfg_scale" not in self.parameters
            )
        if self.negative_prompt:
            return {"prompt": prompts, "negative_prompt": [self.negative_prompt] * len(prompts)}
        return {"prompt": prompts}

    def _halve(self) -> None:
        if self.num_at_a_time == 1:
            raise UserError(
                f"--resolution {self.settings['height']}: not even one image at a time fits in the memory of "
                f"{self.pipe.device}; lower it, or draw in half precision (accelerate launch --mixed_precision bf16)."
            )
        logger.warning(
            "Out of memory with %d images at a time: from now on %d.", self.num_at_a_time, self.num_at_a_time // 2
        )
        self.num_at_a_time //= 2
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries from a warning at every cut prompt and flagged image: these are told once, and counted."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [library.level for library in loggers]
    for library in loggers:
        library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for library, level in zip(loggers, levels):
            library.setLevel(level)
