"""Draw a labelled synthetic image set in the style of a real one, as a folder that `load_dataset` takes.

    accelerate launch generate_synthetic.py --learned_embeds user/cars-style --output_dir cars-syn --push_to_hub
    accelerate launch generate_synthetic.py --learned_embeds cars-style --num_images_per_class 200 --dry_run
    accelerate launch generate_synthetic.py --learned_embeds cars-style --prompt_set diverse --guidance_scale 2 3 4
    accelerate launch generate_synthetic.py --learned_embeds cars-style --use_style_token false --output_dir cars-plain
    accelerate launch generate_synthetic.py --class_names_file names.yaml \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium --mixed_precision bf16
    accelerate launch --multi_gpu --num_processes 8 generate_synthetic.py recipe.yaml --output_dir cars-syn

Run the same command again after an interruption, or with a larger --num_images_per_class, to go on where it stopped.
"""

import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

from utils.cli.errors import UserError, graceful_interrupt, run_script
from utils.cli.options import resolve_options, without_effect
from utils.cli.parsing import ScriptArgumentParser, suggestion
from utils.cli.processes import public_command
from utils.cli.records import GENERATION_CONFIG, RUN_CONFIG, write_run_config
from utils.data.arguments import RealDataArguments
from utils.data.class_folders import check_output_outside, check_real_images_given
from utils.data.class_names import list_names, match_class_names
from utils.data.name_doctor import check_strict, diagnose, print_findings, write_class_names
from utils.data.prompts import check_template
from utils.hub.arguments import HubArguments
from utils.hub.merged_card import check_card
from utils.hub.publishing import publish_folder
from utils.hub.targets import open_target
from utils.synthesis.output_folder import (
    CHECKSUMS,
    CLASS_NAMES,
    PREVIEW,
    QUALITY_PLOTS,
    QUALITY_RECORD,
    STATE_DIR,
    check_folder_is_shared,
    check_output_folder,
    disk_full_is_said,
    settings_fingerprint,
    start_output_folder,
)
from utils.synthesis.plan import MAX_REDRAWS, GenerationPlan
from utils.synthesis.prompts import PROMPT_SETS, TemplatePrompts, build_templates, read_prompts_file
from utils.synthesis.sources import Sources, check_generator_takes, read_plain_sources, read_token_sources

# what decides, besides the sources, what image number n is; num_images_per_class only says how many there are
SAMPLING_SETTINGS = ("guidance_scale", "num_inference_steps", "negative_prompt", "seed", "batch_size", "torch_compile")
OUTPUT_SETTINGS = ("images_per_shard", "image_format", "image_quality")
SHARDS = ("data/train-*.parquet",)
PUBLISHED_FILES = (
    *SHARDS, CHECKSUMS, PREVIEW, CLASS_NAMES, QUALITY_RECORD, QUALITY_PLOTS, GENERATION_CONFIG, RUN_CONFIG, "README.md",
)  # fmt: skip


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
        metadata={"help": "Without --learned_embeds: a text-to-image pipeline, a repository id or a folder."},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of that pipeline."})


@dataclass
class PromptArguments:
    _argument_group_name = "classes and prompts"

    class_names_file: str | None = field(
        default=None,
        metadata={
            "help": "Nouns for classes: a YAML or JSON mapping of names to nouns, or one a line in label order. In "
            "place of a data set it names the classes, in the order of their label ids."
        },
    )
    write_class_names: str | None = field(
        default=None, metadata={"help": "Write the nouns to this YAML file, to edit and give as --class_names_file."}
    )
    strict_class_names: bool = field(default=False, metadata={"help": "Stop where a class name may mislead."})
    classes: list[str] | None = field(default=None, metadata={"help": "Draw these classes only; labels stay."})
    exclude_classes: list[str] | None = field(
        default=None,
        metadata={"help": "Draw no images of these classes, e.g. of one that no prompt describes; labels stay."},
    )
    prompt_templates: list[str] | None = field(
        default=None,
        metadata={
            "aliases": ["--prompt_template"],
            "help": "Prompts with {class}, and {token} for a style token; the token's own when not given.",
        },
    )
    prompt_set: str = field(
        default="single",
        metadata={
            "help": "single: the templates as they are; diverse: each varied by viewpoint, background and light.",
            "choices": list(PROMPT_SETS),
        },
    )
    prompts_file: str | None = field(
        default=None,
        metadata={"help": 'In place of templates: a JSONL file of captions, {"label": class name, "prompt": text}.'},
    )
    negative_prompt: str = field(default="", metadata={"help": "What the images should not show."})


@dataclass
class SamplingArguments:
    _argument_group_name = "sampling"

    num_images_per_class: int = field(default=1000, metadata={"help": "Images of each class; may be raised later."})
    guidance_scale: list[float] = field(
        default_factory=lambda: [3.0],
        metadata={"help": "Guidance, above 0; lower is more varied, 1 is none. Of several, each has an equal share."},
    )
    num_inference_steps: int = field(default=25, metadata={"help": "Denoising steps per image."})
    scheduler: str | None = field(
        default=None,
        metadata={
            "help": "Scheduler class of diffusers; 'default' is the pipeline's own. When not given, "
            "DPMSolverMultistepScheduler for Stable Diffusion 1.x, 2.x and XL, the pipeline's own for others, and for "
            "those of them that are distilled for few steps or trained with other noise (EDM)."
        },
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Pixels a side, a multiple of 8; the token's or generator's when not given."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of all images."})
    batch_size: int = field(default=16, metadata={"help": "Images that a process draws at a time."})
    mixed_precision: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the generator; when not given, what accelerate launch says, else bf16 on a GPU that "
            "has it.",
            "choices": ["no", "fp16", "bf16"],
        },
    )
    torch_compile: bool = field(default=False, metadata={"help": "Compile the denoiser: minutes first, then faster."})
    max_redraws: int = field(
        default=10,
        metadata={"help": f"How often a bad image (black, constant, flagged) is drawn again, 0 to {MAX_REDRAWS}."},
    )


@dataclass
class OutputArguments:
    _argument_group_name = "output"

    output_dir: str = field(default="synthetic-images", metadata=without_effect("Folder of the set."))
    overwrite_output_dir: bool = field(default=False, metadata=without_effect("Replace a synthetic set that is there."))
    images_per_shard: int = field(default=1000, metadata={"help": "Images per parquet file, the unit of resuming."})
    image_format: str = field(default="jpeg", metadata={"help": "Image encoding.", "choices": ["jpeg", "png", "webp"]})
    image_quality: int = field(
        default=95, metadata={"aliases": ["--jpeg_quality"], "help": "Quality of JPEG and WebP, 1 to 100."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Show class names, prompts, speed and disk use of two batches; write no set."}
    )
    quality_report: bool = field(
        default=False, metadata={"help": "Compare the set with the real images in the end; see quality_report.py."}
    )
    quality_model: str = field(
        default="timm/resnet18.tv_in1k", metadata={"help": "Classifier or backbone whose features it compares."}
    )


@dataclass
class PublishingArguments(HubArguments):
    hub_dataset_id: str | None = field(
        default=None,
        metadata=without_effect("Repository of the set; the output folder's name under you when not given."),
    )


def read_sources(
    source_args: SourceArguments, prompt_args: PromptArguments, data_args: RealDataArguments, output_dir: str,
    hub_token: str | None,
) -> Sources:  # fmt: skip
    """Read generator, class names and token from the record of --learned_embeds, or from the flags instead of it."""
    names_file = prompt_args.class_names_file
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
            source_args.learned_embeds, source_args.learned_embeds_revision, source_args.use_style_token, names_file,
            hub_token,
        )  # fmt: skip
    if source_args.learned_embeds_revision is not None:
        raise UserError(f"--learned_embeds_revision {source_args.learned_embeds_revision}: needs --learned_embeds.")
    has_real_images = data_args != RealDataArguments()
    if source_args.pretrained_model_name_or_path is None or not (has_real_images or names_file):
        raise UserError(
            "--learned_embeds is missing: a style token's folder or repository id; or, without a token, both "
            "--pretrained_model_name_or_path and --dataset_name (or --train_dir, or --class_names_file)."
        )
    if has_real_images:
        check_real_images_given(data_args)
        check_output_outside(output_dir, data_args)
    return read_plain_sources(
        source_args.pretrained_model_name_or_path, source_args.revision, data_args if has_real_images else None,
        names_file, hub_token,
    )  # fmt: skip


def check_arguments(
    prompt_args: PromptArguments, sampling_args: SamplingArguments, output_args: OutputArguments
) -> None:
    """Check what needs no file to be known as wrong."""
    if sampling_args.max_redraws > MAX_REDRAWS:
        raise UserError(f"--max_redraws {sampling_args.max_redraws}: must be at most {MAX_REDRAWS}.")
    if prompt_args.prompts_file is not None and (prompt_args.prompt_templates or prompt_args.prompt_set != "single"):
        raise UserError(
            f"--prompts_file {prompt_args.prompts_file}: takes the place of templates; leave --prompt_templates and "
            "--prompt_set out."
        )


def find_labels(classes: list[str] | None, excluded: list[str] | None, class_names: list[str]) -> tuple[int, ...]:
    """Return the labels of --classes, of all classes when it is not given, without --exclude_classes; in label order.

    Raises:
        UserError: there is no such class; a class is in both; no class is left.
    """
    left_out = find_classes(excluded or [], class_names, "--exclude_classes")
    chosen = set(class_names) - left_out
    if classes is not None:
        chosen = find_classes(classes, class_names, "--classes")
        if chosen & left_out:
            raise UserError(
                f"--classes {' '.join(sorted(chosen & left_out))}: also in --exclude_classes (of the flags or the "
                "recipe); name a class in one of the two."
            )
    if not chosen:
        raise UserError(f"--exclude_classes {' '.join(excluded)}: no class is left to draw.")
    return tuple(label for label, name in enumerate(class_names) if name in chosen)


def find_classes(names: list[str], class_names: list[str], flag: str) -> set[str]:
    """Return the classes that a flag names.

    Raises:
        UserError: there is no such class, or it is not clear which one is meant.
    """
    matched = match_class_names(names, class_names, flag, is_unique=False)
    for name in names:
        if name not in matched:
            raise UserError(f"{flag} {name}: no such class{suggestion(name, class_names)}.")
    return set(matched.values())


def prepare_prompts(sources: Sources, labels: tuple[int, ...], prompt_args: PromptArguments) -> tuple:
    """Return the prompts, and what decides them, for the record."""
    # the placeholder once: diffusers itself expands it to all vectors
    placeholder = sources.token.placeholder_token if sources.token else None
    if prompt_args.prompts_file is not None:
        prompts = read_prompts_file(
            prompt_args.prompts_file, sources.class_names, sources.prompt_nouns, labels, placeholder
        )
        return prompts, {"prompts_file_sha256": prompts.sha256}
    templates = prompt_args.prompt_templates or sources.prompt_templates
    for template in templates:
        check_template(template, needs_token=sources.token is not None, flag="--prompt_templates")
    varied = [variant for template in templates for variant in build_templates(prompt_args.prompt_set, template)]
    return TemplatePrompts(tuple(varied), tuple(sources.prompt_nouns), placeholder or ""), {"prompt_templates": varied}


def choose_precision(requested: str | None) -> str:
    """Return the precision asked for here or of `accelerate launch`, else bf16 where there is a GPU that has it."""
    import torch

    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if requested is None and launched == "no":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    return requested or launched


def start_accelerator(sampling_args: SamplingArguments):
    """Return the `Accelerator`: which process this is, on which device, in which precision."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    precision = choose_precision(sampling_args.mixed_precision)
    try:
        # one process may still draw its last shard, or send it, when the others are done
        return Accelerator(
            mixed_precision=precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))]
        )
    except ValueError as error:  # fp16 without a GPU, bf16 on one that has none
        raise UserError(f"--mixed_precision {precision}: {error}") from None


def collect_settings(
    sources: Sources,
    plan: GenerationPlan,
    prompt_settings: dict,
    mixed_precision: str,
    prompt_args: PromptArguments,
    sampling_args: SamplingArguments,
    output_args: OutputArguments,
) -> dict:
    """Return all that decides what image number n is: a folder holds images of one such collection."""
    options = {**asdict(prompt_args), **asdict(sampling_args), **asdict(output_args)}
    return {
        "generator": sources.generator.source.name,
        "generator_revision": sources.generator.source.revision,
        "learned_embeds_sha256": sources.token.sha256 if sources.token else None,
        "class_names": sources.class_names,
        "prompt_nouns": sources.prompt_nouns,
        "classes": [sources.class_names[label] for label in plan.labels],
        **prompt_settings,
        "resolution": sampling_args.resolution or sources.resolution,
        "scheduler": sampling_args.scheduler or sources.generator.default_scheduler,
        "mixed_precision": mixed_precision,
        **{name: options[name] for name in (*SAMPLING_SETTINGS, *OUTPUT_SETTINGS)},
    }


def warn_of_steps(generator, sampling_args: SamplingArguments) -> None:
    """Print a warning where steps and guidance are the defaults, and the generator is made for fewer."""
    from utils.synthesis.generators import few_steps_advice

    usual, given = asdict(SamplingArguments()), asdict(sampling_args)
    names = ("num_inference_steps", "guidance_scale")
    advice = few_steps_advice(generator, [name for name in names if given[name] == usual[name]])
    if advice is not None:
        print(f"WARNING: {advice}")


def make_sampler(sources: Sources, settings: dict, accelerator):
    """Load the generator onto this process's device."""
    from utils.synthesis.generators import load_pipeline
    from utils.synthesis.sampling import DTYPES, Sampler

    dtype = DTYPES[accelerator.mixed_precision]
    return Sampler(
        load_pipeline(sources.generator, sources.token, settings["scheduler"], dtype, accelerator.device),
        resolution=settings["resolution"],
        num_inference_steps=settings["num_inference_steps"],
        negative_prompt=settings["negative_prompt"],
        num_at_a_time=settings["batch_size"],
        compile_model=settings["torch_compile"],
    )


def draw_missing(missing: list[int], shards, sources: Sources, settings: dict, max_redraws: int, accelerator) -> float:
    """Draw this process's part of the missing shards, and return the seconds that took.

    A set that lacks none loads no generator.
    """
    if not missing:
        return 0.0
    from utils.synthesis.encoding import Encoders
    from utils.synthesis.progress import SharedProgress
    from utils.synthesis.runner import Runner

    mine = missing[accelerator.process_index :: accelerator.num_processes]
    sampler = make_sampler(sources, settings, accelerator) if mine else None
    progress = SharedProgress(
        shards.output_dir / STATE_DIR, accelerator.process_index, accelerator.num_processes,
        total=sum(len(shards.plan.shard(number)) for number in missing),
    )  # fmt: skip
    accelerator.wait_for_everyone()  # counts of an earlier run are gone
    started = time.perf_counter()
    with Encoders(settings["image_format"], settings["image_quality"]) as encoders:
        Runner(sampler, shards, encoders, max_redraws, progress.update).make_shards(mine)
    progress.finish()
    return time.perf_counter() - started


def open_quality_report(output_args: OutputArguments, real_images: dict | None, hub_token: str | None) -> tuple | None:
    """Return the model and the real images of the quality report, each opened once; None when there is to be none."""
    if not output_args.quality_report:
        return None
    if real_images is None:
        raise UserError("--quality_report true: needs the real images; give --dataset_name or --train_dir as well.")
    from utils.quality.features import open_feature_model
    from utils.quality.images import load_reference_images

    model = open_feature_model(output_args.quality_model, "--quality_model", token=hub_token)
    return model, load_reference_images(real_images, hub_token)


def report_quality(output_dir: str, model, real) -> None:
    """Compare the finished set with the real images."""
    from utils.hub.repositories import Source
    from utils.quality.report import make_quality_report
    from utils.quality.text import print_quality

    print_quality(make_quality_report(Source(output_dir, "--output_dir", "dataset"), real, model, output_dir))


def print_summary(output_dir: str, plan: GenerationPlan, results: dict) -> None:
    """Print what was made, how fast, where it lies, and the next command."""
    print(
        f"{plan.num_images:,} images of {len(plan.labels)} classes in {output_dir}; {results['num_drawn']:,} "
        f"drawn now at {results['images_per_second']:.1f} images/s, {sum(results['num_redraws'].values())} redrawn, "
        f"{results['seconds']:.0f} s in all. Next:"
    )
    lacks_classes = len(plan.labels) < plan.num_classes
    print(
        f"  accelerate launch train_bridged.py --synthetic_dataset {output_dir}"
        f"{' --allow_missing_classes' if lacks_classes else ''}"
    )


def main(argv=None) -> dict:
    started = time.time()
    groups = ScriptArgumentParser(
        (SourceArguments, RealDataArguments, PromptArguments, SamplingArguments, OutputArguments, PublishingArguments),
        description=__doc__,
    ).parse(argv)
    source_args, data_args, prompt_args, sampling_args, output_args, hub_args = groups
    check_arguments(prompt_args, sampling_args, output_args)
    hub_target = None
    if hub_args.push_to_hub:
        hub_target = open_target(
            output_args.output_dir, hub_args.hub_dataset_id, "dataset", hub_args.hub_private_repo,
            hub_args.hub_revision, hub_args.hub_token,
        )  # fmt: skip
    sources = read_sources(source_args, prompt_args, data_args, output_args.output_dir, hub_args.hub_token)
    labels = find_labels(prompt_args.classes, prompt_args.exclude_classes, sources.class_names)
    findings = diagnose(*sources.names_of(labels), sources.chosen_nouns)
    if prompt_args.strict_class_names:
        check_strict(findings)
    prompts, prompt_settings = prepare_prompts(sources, labels, prompt_args)
    plan = GenerationPlan(
        num_classes=len(sources.class_names),
        labels=labels,
        prompts=prompts,
        guidance_scales=tuple(sampling_args.guidance_scale),
        num_images_per_class=sampling_args.num_images_per_class,
        seed=sampling_args.seed,
        batch_size=sampling_args.batch_size,
        images_per_shard=output_args.images_per_shard,
    )

    # these take seconds to import: only once the arguments are known to be good
    from accelerate.utils import broadcast_object_list

    from utils.hub.growing import GrowingUpload
    from utils.synthesis.dry_run import estimate_cost, print_estimate, print_prompts
    from utils.synthesis.finishing import finish_set, write_card
    from utils.synthesis.shards import Shards, check_no_strangers

    # Everything that can be wrong, before a model loads
    accelerator = start_accelerator(sampling_args)
    settings = collect_settings(
        sources, plan, prompt_settings, accelerator.mixed_precision, prompt_args, sampling_args, output_args
    )
    output_dir, is_main_process = output_args.output_dir, accelerator.is_main_process
    check_output_folder(output_dir, settings, plan.num_images_per_class, output_args.overwrite_output_dir)
    check_card(Path(output_dir) / "README.md")
    check_generator_takes(
        settings, sources, plan, "--prompts_file" if prompt_args.prompts_file else "--prompt_templates"
    )
    for_report = open_quality_report(output_args, sources.real_images, hub_args.hub_token)
    if is_main_process:
        warn_of_steps(sources.generator, sampling_args)
        print_findings(findings)
        if prompt_args.exclude_classes and prompt_args.classes is None:
            left_out = [name for label, name in enumerate(sources.class_names) if label not in labels]
            print(f"No images are drawn of {list_names(left_out)} (--exclude_classes); the labels keep their numbers.")
        if prompt_args.write_class_names is not None:
            write_class_names(prompt_args.write_class_names, sources.class_names, sources.prompt_nouns, findings)
    if output_args.dry_run:
        if is_main_process:
            print_prompts(plan, sources)
        sampler = make_sampler(sources, settings, accelerator)
        estimate = estimate_cost(sampler, plan, settings, output_dir, accelerator.num_processes)
        if is_main_process:
            print_estimate(plan, estimate)
        return estimate
    shards = Shards(Path(output_dir), plan, settings_fingerprint(settings), sources.class_names)
    if not output_args.overwrite_output_dir:
        check_no_strangers(shards)

    command = public_command("generate_synthetic.py", argv)

    def advice() -> str:
        return f"{len(shards.find_finished())} of {plan.num_shards} shards are finished and kept; go on with: {command}"

    with graceful_interrupt(advice), disk_full_is_said(output_dir):
        accelerator.wait_for_everyone()  # every process has checked the folder before the main one changes it
        if is_main_process:
            start_output_folder(output_dir, settings, plan, sources, output_args.overwrite_output_dir)
            shards.remove_leftovers()
        accelerator.wait_for_everyone()
        check_folder_is_shared(output_dir, shards.fingerprint)
        # Shards are dealt to the processes by number; finished ones of an earlier run are kept
        [missing] = broadcast_object_list([shards.find_missing() if is_main_process else None])
        uploading = nullcontext()
        if hub_target is not None and is_main_process:
            uploading = GrowingUpload(output_dir, hub_target, shards.find_finished, shards.fingerprint)
        with uploading:
            seconds = draw_missing(missing, shards, sources, settings, sampling_args.max_redraws, accelerator)
        accelerator.wait_for_everyone()

        results = {}
        if is_main_process:
            record = finish_set(shards, sources, findings)
            for_card = shards, record, command, hub_target.repo_id if hub_target else None, hub_args.hub_token
            write_card(*for_card)
            if for_report is not None:  # it loads the set, which takes a card that counts its images
                report_quality(output_dir, *for_report)
                write_card(*for_card)
            run = write_run_config(output_dir, resolve_options(groups), started)
            num_drawn = sum(len(plan.shard(number)) for number in missing)
            results = {
                "num_images": plan.num_images,
                "num_drawn": num_drawn,
                "num_redraws": record["num_redraws"],
                "images_per_second": num_drawn / seconds if missing else 0.0,
                "seconds": run["seconds"],
            }
            print_summary(output_dir, plan, results)
            if hub_target is not None:
                publish_folder(output_dir, hub_target, PUBLISHED_FILES, stale_patterns=SHARDS)
    accelerator.end_training()
    return results


if __name__ == "__main__":
    run_script(main)
