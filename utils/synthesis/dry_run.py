"""A preview of a set and its cost, and of the cost with other settings."""

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from utils.synthesis.few_steps import NO_GUIDANCE
from utils.synthesis.generators import GUIDANCE_INTERVAL
from utils.synthesis.guidance import find_denoiser
from utils.synthesis.plan import GenerationPlan
from utils.synthesis.prompts import count_prompt_tokens, example_prompts
from utils.synthesis.runner import draw_planned, encode_image
from utils.synthesis.sampling import Sampler, load_sampler
from utils.synthesis.sources import Sources

MAX_NAMES = 20
MAX_CLASSES = 5
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Alternative:
    """Settings that determine the number of passes of the denoiser."""

    num_inference_steps: int
    guidance_scale: float
    with_adapter: bool = False

    def __str__(self) -> str:
        adapter = " with an acceleration adapter (--lora)" if self.with_adapter else ""
        guidance = "no guidance" if self.guidance_scale == NO_GUIDANCE else f"guidance {self.guidance_scale:g}"
        return f"{self.num_inference_steps} steps{adapter}, {guidance}"


# the default, half its steps, those without guidance, and an adapter distilled for few steps
ALTERNATIVES = (
    Alternative(25, 3.0), Alternative(12, 3.0), Alternative(12, NO_GUIDANCE),
    Alternative(4, NO_GUIDANCE, with_adapter=True),
)  # fmt: skip


@dataclass
class BatchCost:
    """The cost of a batch: all `seconds`, those of the denoiser, and the number of images that it computed.

    With guidance, it computes each image twice per step.
    """

    num_images: int
    seconds: float = 0.0
    denoiser_seconds: float = 0.0
    num_seen: int = 0

    @property
    def seconds_per_pass(self) -> float:
        """The denoiser's seconds per image and pass."""
        return self.denoiser_seconds / self.num_seen

    def seconds_per_image(self, alternative: Alternative, doubles: bool) -> float:
        """Return the seconds per image; `doubles` says whether guidance needs a second pass."""
        num_passes = alternative.num_inference_steps * (2 if doubles and alternative.guidance_scale > 1 else 1)
        rest = (self.seconds - self.denoiser_seconds) / self.num_images
        return rest + num_passes * self.seconds_per_pass


@contextmanager
def watch_denoiser(sampler: Sampler, cost: BatchCost) -> Iterator[None]:
    """Add the time of the denoiser's passes to `cost`."""
    holder = sampler.interval or find_denoiser(sampler.pipe)  # an interval calls the denoiser's forward
    forward = holder.forward

    def timed(*args, **kwargs):
        began = _now(sampler)
        output = forward(*args, **kwargs)
        cost.denoiser_seconds += _now(sampler) - began
        cost.num_seen += len(args[0] if args else next(iter(kwargs.values())))  # noisy images come first
        return output

    holder.forward = timed
    try:
        yield
    finally:
        holder.forward = forward


def _now(sampler: Sampler) -> float:
    if sampler.pipe.device.type != "cpu":  # calls return long before the GPU is done
        torch.accelerator.synchronize()
    return time.perf_counter()


def dry_run(
    plan: GenerationPlan, sources: Sources, settings: dict, output_dir: str | Path, accelerator: Accelerator
) -> dict:
    """Print classes and prompts, draw batches in every process, then print and return the cost of the set.

    The cost is the speed, seconds and disk space of the whole set, and the seconds with other settings. If only some of
    several guidance scales use guidance, batches of both kinds are drawn: they take one or two passes per step. So are
    batches of each strength, which take other numbers of steps.
    """
    if accelerator.is_main_process:
        print_prompts(plan, sources)
    sampler, sizes, shares = load_sampler(sources, settings, accelerator), [], []
    kinds = Counter((scale > 1, strength) for scale, strength in plan.kinds)
    for (is_guided, strength), count in kinds.items():
        scale = next(scale for scale in plan.guidance_scales if (scale > 1) == is_guided)
        of_strength = {} if strength is None else {"strength": strength}
        for start in (0, plan.batch_size):
            cost = draw_batch(plan, start, scale, sampler, settings, sizes, **of_strength)
        shares.append((count / kinds.total(), cost))  # of the second batch, as the first one warms up
    seconds_per_image = sum(share * cost.seconds for share, cost in shares) / plan.batch_size
    rate = accelerator.num_processes / seconds_per_image
    folder = Path(output_dir).resolve()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    total, disk = plan.num_images / rate, plan.num_images * sum(sizes) / len(sizes) / 2**30
    free = shutil.disk_usage(existing).free / 2**30
    others = estimate_alternatives(plan, sources, settings, cost)
    others = {text: seconds / accelerator.num_processes for text, seconds in others.items()}
    if accelerator.is_main_process:
        disk_text = f"{disk:.1f} GiB" if disk >= 1 else f"{disk * 1024:.1f} MiB"
        print(
            f"{plan.num_images:,} images: {rate:.2f} images/s on {accelerator.num_processes} process(es), "
            f"{format_time(total)}, {disk_text} of {free:.0f} GiB free. No set was written."
        )
        print_alternatives({describe_own(plan, settings): total}, others, cost)
    return {"images_per_second": rate, "seconds": total, "disk_gib": disk, "free_gib": free, "alternatives": others}


def draw_batch(
    plan: GenerationPlan, start: int, scale: float, sampler: Sampler, settings: dict, sizes: list[int],
    strength: float | None = None,
) -> BatchCost:  # fmt: skip
    """Draw and encode a batch of the plan, from image `start` on, all with one guidance scale and strength.

    Append the sizes in bytes to `sizes`.
    """
    images = [plan.image(index) for index in range(start, start + plan.batch_size)]
    images = [replace(image, guidance_scale=scale, strength=strength) for image in images]
    cost, began = BatchCost(len(images)), time.perf_counter()
    with watch_denoiser(sampler, cost):
        pixels, _ = draw_planned(sampler, images)
    sizes += [len(encode_image(one, settings["image_format"], settings["image_quality"])) for one in pixels]
    cost.seconds = time.perf_counter() - began
    return cost


def estimate_alternatives(plan: GenerationPlan, sources: Sources, settings: dict, cost: BatchCost) -> dict[str, float]:
    """Return the seconds of the whole set in one process with each of `ALTERNATIVES`, except the current settings.

    A generator that is itself distilled for few steps has none, nor have images that are made from real ones.
    """
    if sources.generator.few_steps is not None or plan.has_init_images or not cost.num_seen:
        return {}
    doubles = sources.generator.takes_guidance_interval or sources.generator.family.negative_prompts is None
    scales, with_adapter = set(plan.guidance_scales), sources.few_steps is not None
    own = Alternative(settings["num_inference_steps"], max(scales), with_adapter)
    is_plain = len(scales) == 1 and settings.get(GUIDANCE_INTERVAL) is None
    others = [other for other in ALTERNATIVES if other != own or not is_plain]
    return {str(other): plan.num_images * cost.seconds_per_image(other, doubles) for other in others}


def describe_own(plan: GenerationPlan, settings: dict) -> str:
    """Describe the settings of a set that determine the number of passes of the denoiser."""
    scales = " ".join(f"{scale:g}" for scale in plan.guidance_scales)
    guidance = "no guidance" if max(plan.guidance_scales) <= 1 else f"guidance {scales}"
    if interval := settings.get(GUIDANCE_INTERVAL):
        guidance += " from {:g} to {:g} of the steps".format(*interval)
    return f"as requested: {settings['num_inference_steps']} steps, {guidance}"


def print_alternatives(own: dict[str, float], others: dict[str, float], cost: BatchCost) -> None:
    """Print the time of the set with its own and with other settings, given as text -> seconds."""
    if not others:
        return
    rest = (cost.seconds - cost.denoiser_seconds) / cost.num_images
    print(
        f"With other settings, at {cost.seconds_per_pass:.3g} s per pass of the denoiser and {rest:.3g} s for the rest "
        "of an image (the images differ too: docs/defaults.md):"
    )
    width = max(map(len, {**own, **others}))
    for text, seconds in (own | others).items():
        print(f"  {text:{width}}  {format_time(seconds)}")


def format_time(seconds: float) -> str:
    return f"{seconds / SECONDS_PER_HOUR:.1f} h" if seconds >= SECONDS_PER_HOUR else f"{seconds:.0f} s"


def print_prompts(plan: GenerationPlan, sources: Sources) -> None:
    """Print the classes, and example prompts of the first ones with their token counts."""
    names, _ = sources.names_of(plan.labels)
    print(f"{len(names)} classes: {', '.join(names[:MAX_NAMES])}{', ...' if len(names) > MAX_NAMES else ''}")
    examples = [prompt for label in plan.labels[:MAX_CLASSES] for prompt in example_prompts(plan.prompts, label)]
    counts = count_prompt_tokens(sources.generator, examples, *sources.placeholder, sources.class_token_names)
    for prompt, count in zip(examples, counts):
        print(f"  {prompt!r} ({count} tokens)")
