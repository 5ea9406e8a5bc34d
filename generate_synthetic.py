"""Draw a labelled synthetic image set in the style of a real one, as a folder that `load_dataset` takes.

    accelerate launch generate_synthetic.py --learned_embeds user/cars-style --output_dir cars-syn --push_to_hub
    accelerate launch generate_synthetic.py --learned_embeds cars-style --num_images_per_class 200 --dry_run
    accelerate launch generate_synthetic.py --learned_embeds cars-style --use_style_token false --output_dir cars-plain
    accelerate launch generate_synthetic.py --dataset_name user/cars \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5
    accelerate launch generate_synthetic.py recipe.yaml --output_dir cars-syn

Run the same command again after an interruption, or with a larger --num_images_per_class, to go on where it stopped.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from utils.cli.arguments import HubArguments, RealDataArguments
from utils.cli.commands import public_command
from utils.cli.errors import UserError, run_script
from utils.cli.parsing import ScriptArgumentParser, require_positive
from utils.cli.records import (
    GENERATION_CONFIG,
    RUN_CONFIG,
    image_set_name,
    read_record,
    resolve_options,
    write_run_config,
)
from utils.data.class_folders import check_real_images_given
from utils.data.prompts import check_template, render_prompt
from utils.hub.merged_card import check_card
from utils.hub.publishing import publish_folder
from utils.hub.targets import open_target
from utils.synthesis.output_folder import PREVIEW, check_output_folder, start_output_folder
from utils.synthesis.plan import GenerationPlan
from utils.synthesis.sources import Sources, read_plain_sources, read_token_sources

# what decides, besides the sources, what image number n is; num_images_per_class only says how many there are
SAMPLING_SETTINGS = ("guidance_scale", "num_inference_steps", "scheduler", "seed", "batch_size")
OUTPUT_SETTINGS = ("images_per_shard", "image_format", "jpeg_quality")
SHARDS = ("data/train-*.parquet",)
PUBLISHED_FILES = (*SHARDS, PREVIEW, GENERATION_CONFIG, RUN_CONFIG, "README.md")


@dataclass
class SourceArguments:
    _argument_group_name = "style token, or generator without one"

    learned_embeds: str | None = field(
        default=None, metadata={"help": "Style token of train_dsi.py: a folder or a repository id."}
    )
    learned_embeds_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the style token."}
    )
    use_style_token: bool = field(
        default=True,
        metadata={"help": "When false, take all from the token's record but leave the token itself out."},
    )
    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Without --learned_embeds: a Stable Diffusion pipeline, a repository id or a folder."},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of that pipeline."})


@dataclass
class SamplingArguments:
    _argument_group_name = "sampling"

    prompt_template: str | None = field(
        default=None,
        metadata={"help": "Prompt with {class}, and {token} for a style token; the token's own when not given."},
    )
    num_images_per_class: int = field(default=1000, metadata={"help": "Images of each class; may be raised later."})
    guidance_scale: float = field(
        default=3.0, metadata={"help": "Classifier-free guidance, above 0; lower is more varied, 1 is none."}
    )
    num_inference_steps: int = field(default=25, metadata={"help": "Denoising steps per image."})
    scheduler: str = field(
        default="DPMSolverMultistepScheduler",
        metadata={"help": "Scheduler class of diffusers; 'default' keeps the pipeline's own."},
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Pixels a side, a multiple of 8; the token's or generator's when not given."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of all images."})
    batch_size: int = field(default=16, metadata={"help": "Images that a process draws at a time."})
    max_redraws: int = field(
        default=10, metadata={"help": "How often a bad image (black, constant, flagged) is drawn again, 0 or more."}
    )


@dataclass
class OutputArguments:
    _argument_group_name = "output"

    output_dir: str = field(default="synthetic-images", metadata={"help": "Folder of the set."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a synthetic set that is there."})
    images_per_shard: int = field(default=1000, metadata={"help": "Images per parquet file, the unit of resuming."})
    image_format: str = field(default="jpeg", metadata={"help": "Image encoding.", "choices": ["jpeg", "png"]})
    jpeg_quality: int = field(default=95, metadata={"help": "JPEG quality, 1 to 100."})
    dry_run: bool = field(
        default=False, metadata={"help": "Show prompts, speed and disk use of two batches; write nothing."}
    )


@dataclass
class PublishingArguments(HubArguments):
    hub_dataset_id: str | None = field(
        default=None, metadata={"help": "Repository of the set; the output folder's name under you when not given."}
    )


def read_sources(source_args: SourceArguments, data_args: RealDataArguments, hub_token: str | None) -> Sources:
    """Read generator, class names and token from the record of --learned_embeds, or from the flags instead of it."""
    if source_args.learned_embeds is not None:
        # the record names the generator and the real images: other ones beside it would be ignored
        flags = {name: getattr(source_args, name) for name in ("pretrained_model_name_or_path", "revision")}
        defaults = asdict(RealDataArguments())
        for name, value in {**flags, **asdict(data_args)}.items():
            if value != defaults.get(name):
                raise UserError(
                    f"--{name} {value}: not together with --learned_embeds, whose record names the generator and the "
                    "real images."
                )
        return read_token_sources(
            source_args.learned_embeds, source_args.learned_embeds_revision, source_args.use_style_token, hub_token
        )
    if source_args.learned_embeds_revision is not None:
        raise UserError(f"--learned_embeds_revision {source_args.learned_embeds_revision}: needs --learned_embeds.")
    if None in (source_args.pretrained_model_name_or_path, data_args.dataset_name or data_args.train_dir):
        raise UserError(
            "--learned_embeds is missing: a style token's folder or repository id; or, without a token, both "
            "--pretrained_model_name_or_path and --dataset_name (or --train_dir)."
        )
    check_real_images_given(data_args)
    return read_plain_sources(source_args.pretrained_model_name_or_path, source_args.revision, data_args, hub_token)


def check_arguments(sampling_args: SamplingArguments, output_args: OutputArguments) -> None:
    """Check the numbers."""
    require_positive(
        num_images_per_class=sampling_args.num_images_per_class, guidance_scale=sampling_args.guidance_scale,
        num_inference_steps=sampling_args.num_inference_steps, resolution=sampling_args.resolution,
        batch_size=sampling_args.batch_size, images_per_shard=output_args.images_per_shard,
    )  # fmt: skip
    if sampling_args.max_redraws < 0:
        raise UserError(f"--max_redraws {sampling_args.max_redraws}: must be 0 or more.")
    if not 1 <= output_args.jpeg_quality <= 100:
        raise UserError(f"--jpeg_quality {output_args.jpeg_quality}: must be from 1 to 100.")
    if sampling_args.resolution is not None and sampling_args.resolution % 8:
        raise UserError(f"--resolution {sampling_args.resolution}: must be a multiple of 8.")


def collect_settings(
    sources: Sources,
    template: str,
    resolution: int,
    mixed_precision: str,
    sampling_args: SamplingArguments,
    output_args: OutputArguments,
) -> dict:
    """Return all that decides what image number n is: a folder holds images of one such collection."""
    return {
        "generator": sources.generator.name,
        "generator_revision": sources.generator.revision,
        "learned_embeds_sha256": sources.token.sha256 if sources.token else None,
        "class_names": sources.class_names,
        "prompt_template": template,
        "resolution": resolution,
        "mixed_precision": mixed_precision,
        **{name: getattr(sampling_args, name) for name in SAMPLING_SETTINGS},
        **{name: getattr(output_args, name) for name in OUTPUT_SETTINGS},
    }


def print_dry_run(draw, plan: GenerationPlan, token_counts: list[int], encode, accelerator) -> dict:
    """Print class names, prompts, and the cost of the whole set, estimated from two real batches."""
    if not accelerator.is_main_process:
        return {}
    print(f"{len(plan.class_names)} classes: {', '.join(plan.class_names)}")
    for prompt, count in list(zip(plan.prompts, token_counts))[:5]:
        print(f"  {prompt!r} ({count} tokens)")
    seconds, sizes = [], []
    for start in (0, plan.batch_size):
        began = time.perf_counter()
        pixels, _ = draw([plan.image(index) for index in range(start, start + plan.batch_size)])
        sizes += [len(encode(image)) for image in pixels]
        seconds.append(time.perf_counter() - began)
    rate = accelerator.num_processes * plan.batch_size / min(seconds)  # the first batch also warms up
    estimate = {
        "images_per_second": rate,
        "hours": plan.num_images / rate / 3600,
        "disk_gib": plan.num_images * sum(sizes) / len(sizes) / 2**30,
    }
    print(
        f"{plan.num_images:,} images: {rate:.2f} images/s on {accelerator.num_processes} process(es), "
        f"{estimate['hours']:.2f} h, {estimate['disk_gib']:.3f} GiB. Nothing was written."
    )
    return estimate


def write_card(
    output_dir: str,
    features,
    plan: GenerationPlan,
    num_redraws: dict[str, int],
    command: str,
    hub_id: str | None,
    hub_token: str | None,
) -> None:
    """Write the dataset card from the folder's own record, with the licences that the sources' cards name."""
    from utils.hub.dataset_card import write_dataset_card
    from utils.hub.licenses import read_licenses

    record = read_record(Path(output_dir) / GENERATION_CONFIG)
    generator, real = record["generator"], record["real_images"]
    licenses = read_licenses(
        [
            (generator["id"], "model", generator["revision"]),
            (image_set_name(real), "dataset", real["dataset_revision"]),
        ],
        hub_token,
    )
    write_dataset_card(output_dir, features, record, plan.prompts, num_redraws, licenses, command, hub_id)


def print_summary(output_dir: str, plan: GenerationPlan, results: dict) -> None:
    """Print what was made, how fast, where it lies, and the next command."""
    print(
        f"{plan.num_images:,} images of {len(plan.class_names)} classes in {output_dir}; {results['num_drawn']:,} "
        f"drawn now at {results['images_per_second']:.1f} images/s, {sum(results['num_redraws'].values())} redrawn, "
        f"{results['seconds']:.0f} s in all. Next:"
    )
    print(f"  accelerate launch train_bridged.py --synthetic_dataset {output_dir}")


def main(argv=None) -> dict:
    started = time.time()
    source_args, data_args, sampling_args, output_args, hub_args = groups = ScriptArgumentParser(
        (SourceArguments, RealDataArguments, SamplingArguments, OutputArguments, PublishingArguments),
        description=__doc__,
    ).parse(argv)
    check_arguments(sampling_args, output_args)
    hub_target = None
    if hub_args.push_to_hub:
        hub_target = open_target(
            output_args.output_dir, hub_args.hub_dataset_id, "dataset", hub_args.hub_private_repo,
            hub_args.hub_revision, hub_args.hub_token,
        )  # fmt: skip
    sources = read_sources(source_args, data_args, hub_args.hub_token)
    template = sampling_args.prompt_template or sources.prompt_template
    check_template(template, needs_token=sources.token is not None)

    # these take seconds to import: only once the arguments are known to be good
    from accelerate import Accelerator

    from utils.synthesis import sampling, shards
    from utils.synthesis.preview import draw_contact_sheet

    # Everything that can be wrong, before a model loads
    accelerator = Accelerator()
    resolution = sampling_args.resolution or sources.resolution
    settings = collect_settings(sources, template, resolution, accelerator.mixed_precision, sampling_args, output_args)
    output_dir = output_args.output_dir
    check_output_folder(output_dir, settings, sampling_args.num_images_per_class, output_args.overwrite_output_dir)
    check_card(Path(output_dir) / "README.md")
    placeholder = sources.token.placeholder_token if sources.token else ""
    plan = GenerationPlan(
        class_names=tuple(sources.class_names),
        # the placeholder once: diffusers itself expands it to all vectors
        prompts=tuple(render_prompt(template, noun, placeholder) for noun in sources.prompt_nouns),
        num_images_per_class=sampling_args.num_images_per_class,
        seed=sampling_args.seed,
        batch_size=sampling_args.batch_size,
        images_per_shard=output_args.images_per_shard,
    )
    sampling.check_scheduler(sampling_args.scheduler)
    token_counts = sampling.count_prompt_tokens(plan.prompts, template, sources.generator, sources.token)

    pipe = sampling.load_pipeline(
        sources.generator,
        sources.token,
        sampling_args.scheduler,
        sampling.DTYPES[accelerator.mixed_precision],
        accelerator.device,
    )
    draw = sampling.make_draw(
        pipe, plan.prompts, resolution, sampling_args.num_inference_steps, sampling_args.guidance_scale
    )

    features = shards.synthetic_features(sources.class_names)

    def encode(pixels) -> bytes:
        return shards.encode_image(pixels, output_args.image_format, output_args.jpeg_quality)

    if output_args.dry_run:
        return print_dry_run(draw, plan, token_counts, encode, accelerator)

    # every process has checked the folder before the main one changes it
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        start_output_folder(output_dir, settings, plan, sources, output_args.overwrite_output_dir)
        shards.remove_leftovers(output_dir)
    accelerator.wait_for_everyone()

    # Shards are dealt to the processes; finished ones of an earlier run are kept
    max_redraws = sampling_args.max_redraws
    missing = [
        number for number in range(plan.num_shards)
        if shards.count_redraws(shards.shard_path(output_dir, number), plan, number, max_redraws) is None
    ]  # fmt: skip
    accelerator.wait_for_everyone()
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    sampling_started = time.time()
    with tqdm(
        total=sum(len(plan.shard(number)) for number in mine), desc="synthetic images", unit="image",
        disable=not accelerator.is_main_process,
    ) as progress:  # fmt: skip
        for number in mine:
            rows = []
            for batch in plan.batches(number):
                drawn = sampling.draw_batch(draw, plan, batch, plan.shard(number), max_redraws)
                rows += [
                    shards.make_row(image, encode(pixels), sampling_args.guidance_scale) for image, pixels in drawn
                ]
                progress.update(len(drawn))
            shards.write_shard(shards.shard_path(output_dir, number), rows, features)
    sampling_seconds = time.time() - sampling_started
    accelerator.wait_for_everyone()

    results = {}
    if accelerator.is_main_process:
        draw_contact_sheet(output_dir, plan).save(Path(output_dir) / PREVIEW)
        num_redraws = shards.count_class_redraws(output_dir, plan, max_redraws)
        command = public_command("generate_synthetic.py", argv)
        hub_id = hub_target.repo_id if hub_target else None
        write_card(output_dir, features, plan, num_redraws, command, hub_id, hub_args.hub_token)
        run = write_run_config(output_dir, resolve_options(groups), started)
        num_drawn = sum(len(plan.shard(number)) for number in missing)
        results = {
            "num_images": plan.num_images,
            "num_drawn": num_drawn,
            "num_redraws": num_redraws,
            "images_per_second": num_drawn / sampling_seconds,
            "seconds": run["seconds"],
        }
        print_summary(output_dir, plan, results)
        if hub_target is not None:
            publish_folder(output_dir, hub_target, PUBLISHED_FILES, stale_patterns=SHARDS)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


if __name__ == "__main__":
    run_script(main)
