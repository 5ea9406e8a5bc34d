"""What a set will look like and cost, before it is made."""

import shutil
import time
from pathlib import Path

from accelerate import Accelerator

from utils.synthesis.plan import GenerationPlan
from utils.synthesis.prompts import count_prompt_tokens
from utils.synthesis.runner import encode_image
from utils.synthesis.sampling import Sampler, load_sampler
from utils.synthesis.sources import Sources

MAX_NAMES = 20
MAX_CLASSES = 5


def dry_run(
    plan: GenerationPlan, sources: Sources, settings: dict, output_dir: str | Path, accelerator: Accelerator
) -> dict:
    """Print classes and prompts, and what the set will take; return that as `estimate_cost` does."""
    if accelerator.is_main_process:
        print_prompts(plan, sources)
    sampler = load_sampler(sources, settings, accelerator)
    estimate = estimate_cost(sampler, plan, settings, output_dir, accelerator.num_processes)
    if accelerator.is_main_process:
        print_estimate(plan, estimate)
    return estimate


def print_prompts(plan: GenerationPlan, sources: Sources) -> None:
    """Print the classes and some prompts of the first ones, with their token counts."""
    names, _ = sources.names_of(plan.labels)
    print(f"{len(names)} classes: {', '.join(names[:MAX_NAMES])}{', ...' if len(names) > MAX_NAMES else ''}")
    examples = [prompt for label in plan.labels[:MAX_CLASSES] for prompt in plan.prompts.examples(label)]
    for prompt, count in zip(examples, count_prompt_tokens(sources.generator, examples, *sources.placeholder)):
        print(f"  {prompt!r} ({count} tokens)")


def estimate_cost(
    sampler: Sampler, plan: GenerationPlan, settings: dict, output_dir: str | Path, num_processes: int
) -> dict:
    """Return speed, seconds and disk of the whole set, estimated from two real batches of every process."""
    seconds, sizes = [], []
    for start in (0, plan.batch_size):
        began = time.perf_counter()
        images = [plan.image(index) for index in range(start, start + plan.batch_size)]
        pixels, _ = sampler.draw(
            [image.prompt for image in images], [image.seed for image in images], plan.guidance_scales[0]
        )
        sizes += [len(encode_image(one, settings["image_format"], settings["image_quality"])) for one in pixels]
        seconds.append(time.perf_counter() - began)
    rate = num_processes * plan.batch_size / seconds[1]  # the first batch also warms up
    folder = Path(output_dir).resolve()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return {
        "num_processes": num_processes,
        "images_per_second": rate,
        "seconds": plan.num_images / rate,
        "disk_gib": plan.num_images * sum(sizes) / len(sizes) / 2**30,
        "free_gib": shutil.disk_usage(existing).free / 2**30,
    }


def print_estimate(plan: GenerationPlan, estimate: dict) -> None:
    """Print the estimate as a line."""
    seconds, gib = estimate["seconds"], estimate["disk_gib"]
    time_text = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.0f} s"
    disk_text = f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.1f} MiB"
    print(
        f"{plan.num_images:,} images: {estimate['images_per_second']:.2f} images/s on {estimate['num_processes']} "
        f"process(es), {time_text}, {disk_text} of {estimate['free_gib']:.0f} GiB that are free. No set was written."
    )
