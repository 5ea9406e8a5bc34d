"""What a set will look like and cost, before it is made."""

import shutil
import time
from pathlib import Path

from accelerate import Accelerator

from utils.synthesis.plan import GenerationPlan
from utils.synthesis.prompts import count_prompt_tokens, example_prompts
from utils.synthesis.runner import encode_image
from utils.synthesis.sampling import load_sampler
from utils.synthesis.sources import Sources

MAX_NAMES = 20
MAX_CLASSES = 5


def dry_run(
    plan: GenerationPlan, sources: Sources, settings: dict, output_dir: str | Path, accelerator: Accelerator
) -> dict:
    """Print classes and prompts, then draw two batches in every process; print and return what the set will take.

    That is speed, seconds and disk of the whole set.
    """
    if accelerator.is_main_process:
        print_prompts(plan, sources)
    sampler, seconds, sizes = load_sampler(sources, settings, accelerator), [], []
    for start in (0, plan.batch_size):
        began = time.perf_counter()
        images = [plan.image(index) for index in range(start, start + plan.batch_size)]
        prompts, seeds = [image.prompt for image in images], [image.seed for image in images]
        pixels, _ = sampler.draw(prompts, seeds, plan.guidance_scales[0])
        sizes += [len(encode_image(one, settings["image_format"], settings["image_quality"])) for one in pixels]
        seconds.append(time.perf_counter() - began)
    rate = accelerator.num_processes * plan.batch_size / seconds[1]  # the first batch also warms up
    folder = Path(output_dir).resolve()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    total, disk = plan.num_images / rate, plan.num_images * sum(sizes) / len(sizes) / 2**30
    free = shutil.disk_usage(existing).free / 2**30
    if accelerator.is_main_process:
        time_text = f"{total / 3600:.1f} h" if total >= 3600 else f"{total:.0f} s"
        disk_text = f"{disk:.1f} GiB" if disk >= 1 else f"{disk * 1024:.1f} MiB"
        print(
            f"{plan.num_images:,} images: {rate:.2f} images/s on {accelerator.num_processes} process(es), {time_text}, "
            f"{disk_text} of {free:.0f} GiB that are free. No set was written."
        )
    return {"images_per_second": rate, "seconds": total, "disk_gib": disk, "free_gib": free}


def print_prompts(plan: GenerationPlan, sources: Sources) -> None:
    """Print the classes and some prompts of the first ones, with their token counts."""
    names, _ = sources.names_of(plan.labels)
    print(f"{len(names)} classes: {', '.join(names[:MAX_NAMES])}{', ...' if len(names) > MAX_NAMES else ''}")
    examples = [prompt for label in plan.labels[:MAX_CLASSES] for prompt in example_prompts(plan.prompts, label)]
    for prompt, count in zip(examples, count_prompt_tokens(sources.generator, examples, *sources.placeholder)):
        print(f"  {prompt!r} ({count} tokens)")
