"""Draw a labeled synthetic image set in the style of a real one, as a folder that `load_dataset` reads.

    accelerate launch generate_synthetic.py --learned_embeds user/cars-style --output_dir cars-syn --push_to_hub
    accelerate launch generate_synthetic.py --learned_embeds cars-style --num_images_per_class 200 --dry_run
    accelerate launch generate_synthetic.py --learned_embeds cars-style --prompt_set diverse --guidance_scale 2 3 4
    accelerate launch generate_synthetic.py --learned_embeds cars-style --use_style_token false --output_dir cars-plain
    accelerate launch generate_synthetic.py --learned_embeds cars-style --lora user/watercolour:0.6 user/lcm-lora
    accelerate launch generate_synthetic.py --learned_embeds cars-style --init_images real --strength 0.5 0.7
    accelerate launch generate_synthetic.py --class_names_file names.yaml \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium --mixed_precision bf16
    accelerate launch --multi_gpu --num_processes 8 generate_synthetic.py recipe.yaml --output_dir cars-syn

After an interruption, or with a larger --num_images_per_class, run the same command again to continue the set.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace

from utils.cli.errors import UserError, report_how_to_resume, run_script
from utils.cli.options import Need, option, resolve_options, with_flag, with_value, without_flag
from utils.cli.parsing import ScriptArgumentParser
from utils.cli.processes import public_command, without_overwrite_flag
from utils.cli.records import write_run_config
from utils.data.arguments import RealDataArguments, check_output_outside, check_real_images_given, explain_recorded_name
from utils.data.class_names import list_names
from utils.data.name_doctor import check_strict, diagnose, print_findings, write_class_names
from utils.data.prompts import ARTICLE_HELP, ARTICLES, AS_WRITTEN
from utils.hub.cards import check_card
from utils.hub.publishing import publish_folder
from utils.hub.targets import WITH_PUSH_TO_HUB, HubArguments, open_target
from utils.synthesis.contexts import ALL, OWN, add_contexts
from utils.synthesis.counts import BALANCE, FLAG, missing_to_largest, parse_number, split_number
from utils.synthesis.few_steps import NO_GUIDANCE
from utils.synthesis.generators import GUIDANCE_INTERVAL, GUIDANCE_PARAMETER, GUIDANCE_SCALE
from utils.synthesis.init_images import FLAG as INIT_FLAG
from utils.synthesis.init_images import (
    INIT_IMAGES,
    STRENGTH,
    check_image_to_image,
    count_by_class,
    load_training_images,
    open_init_images,
)
from utils.synthesis.learned import CLASS_EMBEDS
from utils.synthesis.lora import open_loras, record_adapters
from utils.synthesis.output_folder import (
    PUBLISHED_FILES,
    begin_set,
    has_setting,
    lacks_setting,
    open_output_folder,
    recorded_setting,
    settings_fingerprint,
)
from utils.synthesis.plan import GUIDANCE_SHARES, MAX_REDRAWS, GenerationPlan
from utils.synthesis.prompts import ARTICLE, PROMPT_SETS, Prompts, check_prompts_fit, make_prompts
from utils.synthesis.sources import (
    GENERATOR_CONTENTS,
    SCHEDULER_CONFIG,
    Sources,
    find_labels,
    read_plain_sources,
    read_token_sources,
)

# what decides image number n, besides sources and prompts; num_images_per_class only says how many there are
SETTINGS = (
    "guidance_scale", "num_inference_steps", "negative_prompt", "seed", "batch_size", "torch_compile",
    "images_per_shard", "image_format", "image_quality",
)  # fmt: skip
WITH_TOKEN = [with_flag("learned_embeds")]
WITH_STYLE_TOKEN = Need("with --use_style_token false", lambda values: values["use_style_token"])
WITH_IMAGES = Need(
    "without --dataset_name or --train_dir",
    lambda values: any(values[name] for name in ("learned_embeds", "dataset_name", "train_dir")), "add one or ",
)  # fmt: skip
WITH_TEMPLATES = [without_flag("prompts_file")]
GUIDED = Need(
    "with --guidance_scale {guidance_scale}, which turns guidance off",
    lambda values: max(values["guidance_scale"]) > 1, "give one above 1, or ",
)  # fmt: skip


@dataclass
class SourceArguments:
    _argument_group_name = "style token, or generator without one"

    learned_embeds: str | None = option(None, "Style token of train_dsi.py: a folder or a repository id.")
    learned_embeds_revision: str | None = option(None, "Branch, tag or commit of the style token.", needs=WITH_TOKEN)
    use_style_token: bool = option(
        True, "Whether the style token is used, with what was learned along with it; false takes everything else from "
        "its record.", needs=WITH_TOKEN,
    )  # fmt: skip
    use_learned_lora: bool = option(
        True, "Whether the LoRA that was learned with the style token is fused into the generator.",
        needs=[*WITH_TOKEN, WITH_STYLE_TOKEN],
    )  # fmt: skip
    pretrained_model_name_or_path: str | None = option(
        None, "Text-to-image pipeline to use without --learned_embeds: a repository id or a folder."
    )
    revision: str | None = option(None, "Branch, tag or commit of that pipeline.")
    lora: list[str] | None = option(
        None, "LoRA adapters to fuse into the generator, each as ID_OR_FOLDER[/FILE.safetensors][:SCALE], such as "
        "latent-consistency/lcm-lora-sdv1-5. An adapter distilled for few steps (LCM, Hyper-SD, Lightning, TCD, DMD2, "
        "PCM, Turbo) also sets scheduler, steps and guidance, unless their flags are given.",
    )  # fmt: skip
    lora_revision: list[str] | None = option(
        None, "Branch, tag or commit of each adapter, in their order.", needs=[with_flag("lora")]
    )


@dataclass
class ImagesArguments(RealDataArguments):
    """The labelled real images whose classes are drawn; with a style token, its record names them."""

    # with a style token, they are refused with an error that names its record
    _inherited_needs = {
        field.name: [WITH_IMAGES]
        for field in fields(RealDataArguments)
        if field.name not in ("dataset_name", "train_dir")
    }


@dataclass
class PromptArguments:
    _argument_group_name = "classes and prompts"

    class_names_file: str | None = option(
        None, "Nouns for the classes: a YAML or JSON mapping of class names to nouns, or one per line in label order. "
        "Without a dataset, it also defines the classes, in the order of their label ids.",
    )  # fmt: skip
    write_class_names: str | None = option(
        None, "Write the nouns to this YAML file, to edit and pass as --class_names_file."
    )
    strict_class_names: bool = option(False, "Stop if a class name may mislead the generator.")
    classes: list[str] | None = option(None, "Draw only these classes; the labels keep their numbers.")
    exclude_classes: list[str] | None = option(
        None, "Do not draw these classes, such as one that no prompt describes; the labels keep their numbers.",
        needs=[without_flag("classes")],
    )  # fmt: skip
    prompt_templates: list[str] | None = option(
        None, "Prompts with {class}, and with {token} for a style token (default: the token's own).",
        aliases=["--prompt_template"], needs=WITH_TEMPLATES,
    )  # fmt: skip
    prompt_set: str = option(
        "single", "single: the templates as they are; diverse: each with varied viewpoint, background and light.",
        choices=list(PROMPT_SETS), needs=WITH_TEMPLATES,
    )  # fmt: skip
    article: str | None = option(
        None, f"{ARTICLE_HELP} (default: as in the training of the style token; auto without one).",
        choices=ARTICLES, needs=WITH_TEMPLATES,
    )  # fmt: skip
    prompts_file: str | None = option(
        None, 'Instead of templates: a JSONL file of captions, {"label": class name, "prompt": text}.'
    )
    contexts_file: str | None = option(
        None, "File of describe_images.py: the context of a real image fills {context} in each prompt.",
        needs=[without_flag("prompts_file"), with_value("prompt_set", "single")],
    )  # fmt: skip
    contexts_of: str = option(
        ALL, "all: contexts of images of all classes, so that class and context are independent; own: of the image's "
        "own class, for comparison.", choices=[ALL, OWN], needs=[with_flag("contexts_file")],
    )  # fmt: skip
    negative_prompt: str = option("", "What the images should not show, in words.", needs=[GUIDED])


@dataclass
class SamplingArguments:
    _argument_group_name = "sampling"

    num_images_per_class: int | str = option(
        1000, "Images per class; can be raised later. balance:500 draws 500 or more: as many as bring real training "
        "images and synthetic ones together to the same number for each class.", parse=parse_number,
    )  # fmt: skip
    init_images: str = option(
        "none", "real: image-to-image from the real training images of the class, each used about equally often.",
        choices=["none", "real"],
    )  # fmt: skip
    strength: list[float] = option(
        [0.5, 0.7],
        "How much of a real image is replaced by noise, above 0 and at most 1; this share of the steps is taken. "
        "Several strengths are used for equal shares of each class's images, to within one.",
        needs=[with_value("init_images", "real")],
    )
    guidance_scale: list[float] = option(
        [3.0],
        "Guidance scale; lower is more varied, 1 (or 0) is no guidance and takes half the time. Several scales are "
        "used for equal shares of each class's images, to within one.",
    )
    guidance_interval: list[float] | None = option(
        None, "LOW HIGH: use guidance only between these fractions of the steps, such as 0.2 0.8; a step without "
        "guidance takes half the time.", needs=[GUIDED],
    )  # fmt: skip
    num_inference_steps: int = option(
        25, "Denoising steps per image; a generator or adapter distilled for few steps sets its own number."
    )
    scheduler: str | None = option(
        None, "Scheduler class of diffusers, or 'default' for the pipeline's own (default: DPMSolverMultistepScheduler "
        "for Stable Diffusion 1.x, 2.x and XL; the pipeline's own for other models, and for those distilled for few "
        "steps or trained with other noise (EDM); a distilled adapter sets one).",
    )  # fmt: skip
    resolution: int | None = option(
        None, "Side of the images in pixels, a multiple of 8 (default: the token's or the generator's)."
    )
    seed: int = option(0, "Random seed, 0 or more.")
    batch_size: int = option(16, "Images that each process draws at a time.")
    mixed_precision: str | None = option(
        None,
        "Precision of the generator; no is float32 (default: that of `accelerate launch`, else bf16 on GPUs that "
        "support it, fp16 on others, no on a CPU).",
        choices=["no", "fp16", "bf16"],
    )
    torch_compile: bool = option(False, "Compile the denoiser: takes minutes at the start, then draws faster.")
    max_redraws: int = option(
        10, f"How many times a bad image (black, one color, flagged) is drawn again, 0 to {MAX_REDRAWS}."
    )


@dataclass
class OutputArguments:
    _argument_group_name = "output"

    output_dir: str = option("synthetic-images", "Folder for the set, its record and its card.", affects_result=False)
    overwrite_output_dir: bool = option(False, "Replace the set that is already in --output_dir.", affects_result=False)
    images_per_shard: int = option(1000, "Images per parquet file, the unit of resuming.")
    image_format: str = option("jpeg", "Image encoding.", choices=["jpeg", "png", "webp"])
    image_quality: int = option(
        95, "Quality of JPEG and WebP, 1 to 100.", aliases=["--jpeg_quality"],
        needs=[with_value("image_format", "jpeg", "webp")],
    )  # fmt: skip
    dry_run: bool = option(
        False, "Print class names, prompts, and the speed and disk use of two batches; write no set."
    )
    quality_report: bool = option(False, "Compare the finished set with the real images; see quality_report.py.")
    quality_model: str = option(
        "timm/resnet18.tv_in1k",
        "Image model whose features the quality report compares.",
        needs=[with_flag("quality_report")],
    )


@dataclass
class PublishingArguments(HubArguments):
    hub_dataset_id: str | None = option(
        None, "Repository of the set (default: the output folder's name, in your account).", affects_result=False,
        needs=WITH_PUSH_TO_HUB,
    )  # fmt: skip


def parse_arguments(argv) -> tuple[tuple, set[str]]:
    """Return the argument groups and the names of the given flags, after every check that needs no file."""
    parser = ScriptArgumentParser(
        (SourceArguments, ImagesArguments, PromptArguments, SamplingArguments, OutputArguments, PublishingArguments),
        description=__doc__,
    )
    groups = parser.parse(argv)
    _, _, _, sampling_args, _, _ = groups
    if sampling_args.max_redraws > MAX_REDRAWS:
        raise UserError(f"--max_redraws {sampling_args.max_redraws}: must be at most {MAX_REDRAWS}.")
    sampling_args.guidance_scale = [scale or NO_GUIDANCE for scale in sampling_args.guidance_scale]
    check_interval(sampling_args.guidance_interval)
    strengths = sampling_args.strength
    if len(set(strengths)) < len(strengths):
        raise UserError(f"--strength {' '.join(map(str, strengths))}: duplicate values.")
    return groups, parser.given


def check_interval(interval: list[float] | None) -> None:
    """Check that an interval has two values, the lower one first.

    Raises:
        UserError: it does not.
    """
    if interval is not None and (len(interval) != 2 or interval[0] >= interval[1]):
        raise UserError(
            f"--guidance_interval {' '.join(map(str, interval))}: must be two fractions of the steps, the lower "
            "one first, such as 0.2 0.8."
        )


def read_sources(
    source_args: SourceArguments, data_args: RealDataArguments, class_names_file: str | None, output_dir: str,
    hub_token: str | None, resolution: int | None,
) -> Sources:  # fmt: skip
    """Read generator, class names and token from the record of --learned_embeds, or from the flags without one."""
    generator, token = source_args.pretrained_model_name_or_path, source_args.learned_embeds
    usual = asdict(RealDataArguments())
    real_images = {name: value for name, value in asdict(data_args).items() if value != usual[name]}
    if token is not None:
        # the record names the generator and the real images: flags for them would be ignored
        named = {"pretrained_model_name_or_path": generator, "revision": source_args.revision, **real_images}
        for name, value in named.items():
            if value is not None:
                raise UserError(
                    f"--{name} {value}: not together with --learned_embeds, whose record names the generator and the "
                    "real images."
                )
        return read_token_sources(
            token, source_args.learned_embeds_revision, source_args.use_style_token, class_names_file, hub_token,
            source_args.use_learned_lora,
        )  # fmt: skip
    if generator is None or not (real_images or class_names_file):
        raise UserError(
            "--learned_embeds is missing: a style token's folder or repository id; or, without a token, both "
            "--pretrained_model_name_or_path and --dataset_name (or --train_dir, or --class_names_file)."
        )
    if real_images:
        check_real_images_given(data_args)
        check_output_outside(output_dir, data_args)
    return read_plain_sources(
        generator, source_args.revision, data_args if real_images else None, class_names_file, hub_token, resolution
    )


def add_adapters(sources: Sources, source_args: SourceArguments, hub_token: str | None) -> Sources:
    """Return the sources with the checked adapters of --lora."""
    loras = open_loras(source_args.lora or [], source_args.lora_revision, sources.generator, hub_token)
    return sources.with_loras(loras)


def prepare_prompts(
    sources: Sources, labels: tuple[int, ...], prompt_args: PromptArguments, output_args: OutputArguments
) -> tuple[Prompts, dict]:
    """Return the prompts and their settings; a set of an earlier version keeps its articles."""
    has_no_article = lacks_setting(ARTICLE, output_args.output_dir, output_args.overwrite_output_dir)
    article = prompt_args.article or (AS_WRITTEN if has_no_article else sources.article)
    prompts, settings = make_prompts(
        sources, labels, prompt_args.prompt_templates, prompt_args.prompt_set, prompt_args.prompts_file, article,
        with_contexts=prompt_args.contexts_file is not None,
    )  # fmt: skip
    if prompt_args.contexts_file is not None:
        prompts, more = add_contexts(prompts, sources, labels, prompt_args.contexts_file, prompt_args.contexts_of)
        settings |= more
    if has_no_article and article == AS_WRITTEN:
        settings.pop(ARTICLE, None)
    return prompts, settings


def plan_images(
    sources: Sources, labels: tuple[int, ...], prompts: Prompts, sampling_args: SamplingArguments,
    output_args: OutputArguments, recorded_in: str | None, hub_token: str | None,
) -> tuple[Sources, GenerationPlan]:  # fmt: skip
    """Return the sources, with the real images if the set is made from them, and the plan of the set.

    An existing set keeps the rule for guidance scales that it was begun with. `recorded_in` is the style token whose
    record names the real images.
    """
    number, is_balanced = split_number(sampling_args.num_images_per_class)
    from_real, extra = sampling_args.init_images == "real", ()
    if from_real:
        steps, strengths = sampling_args.num_inference_steps, tuple(sampling_args.strength)
        scheduler = sampling_args.scheduler or sources.default_scheduler
        check_image_to_image(sources.generator, scheduler, steps, strengths)
    if from_real or is_balanced:
        flag = INIT_FLAG if from_real else f"{FLAG} {sampling_args.num_images_per_class}"
        real = load_training_images(sources.real_images, sources.class_names, flag, recorded_in, hub_token)
        if is_balanced:
            extra = missing_to_largest(count_by_class(real), labels)
        if from_real:
            opened = open_init_images(real, labels, strengths, sources.train_indices)
            sources = replace(sources, init_images=opened)
    init = sources.init_images
    return sources, GenerationPlan(
        num_classes=len(sources.class_names), labels=labels, prompts=prompts,
        guidance_scales=tuple(sampling_args.guidance_scale), num_images_per_class=number,
        seed=sampling_args.seed, batch_size=sampling_args.batch_size, images_per_shard=output_args.images_per_shard,
        scales_by_batch=lacks_setting(GUIDANCE_SHARES, output_args.output_dir, output_args.overwrite_output_dir),
        extra_images=extra, **({"strengths": init.strengths, "init_rows": init.rows} if init else {}),
    )  # fmt: skip


def collect_settings(sources: Sources, plan: GenerationPlan, prompt_settings: dict, precision: str, options: dict):
    """Return everything that decides image number n: a folder holds images of a single such collection."""
    source, output = sources.generator.source, (options["output_dir"], options["overwrite_output_dir"])
    few_steps = sources.few_steps if options["scheduler"] is None else None
    later = {
        GUIDANCE_INTERVAL: options[GUIDANCE_INTERVAL], **record_adapters(sources.loras),
        SCHEDULER_CONFIG: few_steps and few_steps.scheduler_config or None,
    }  # fmt: skip
    later = {name: value for name, value in later.items() if value is not None or not lacks_setting(name, *output)}
    newest = plan.count_settings | (sources.init_images.settings if sources.init_images else {})
    # of a set that has them, so that it does not go on without
    newest |= {
        name: None for name in (BALANCE, INIT_IMAGES, STRENGTH)
        if name not in newest and recorded_setting(name, *output) is not None
    }  # fmt: skip
    # a repository is identified by its commit
    if source.is_local and not lacks_setting(GENERATOR_CONTENTS, *output):
        later[GENERATOR_CONTENTS] = sources.generator.identity
    learned = sources.learned_settings | ({} if plan.prompts.class_tokens else {CLASS_EMBEDS: None})
    parameter = sources.generator.guidance_parameter
    learned[GUIDANCE_PARAMETER] = parameter if parameter != GUIDANCE_SCALE and max(plan.guidance_scales) > 1 else None
    later |= {name: value for name, value in learned.items() if value is not None or has_setting(name, *output)}
    return {
        "generator": source.name, "generator_revision": source.revision, **later,
        "learned_embeds_sha256": sources.token.sha256 if sources.token else None,
        "class_names": sources.class_names, "prompt_nouns": sources.prompt_nouns,
        "classes": [sources.class_names[label] for label in plan.labels], **prompt_settings,
        "resolution": options["resolution"] or sources.resolution,
        "scheduler": options["scheduler"] or sources.default_scheduler,
        "mixed_precision": precision, **{name: options[name] for name in SETTINGS}, **plan.guidance_settings, **newest,
    }  # fmt: skip


def choose_sampling(
    sources: Sources, sampling_args: SamplingArguments, output_args: OutputArguments, given: set[str]
) -> list[str]:
    """Set the flags that are not given as a generator distilled for few steps needs them; return lines about it.

    Guidance that has no effect is turned off, except in a set that was begun with it.
    """
    lines = []
    if sources.few_steps is not None:
        values = {name: value for name, value in vars(sampling_args).items() if name in given}
        chosen, line = sources.few_steps.choose(values)
        vars(sampling_args).update(chosen)
        lines += filter(None, [line])
    scales, name = sampling_args.guidance_scale, sources.generator.source.name
    there = recorded_setting(GUIDANCE_SCALE, output_args.output_dir, output_args.overwrite_output_dir)
    if sources.generator.guidance_parameter is None and max(scales) > 1 and scales != there:
        sampling_args.guidance_scale = [NO_GUIDANCE]
        lines.append(
            f"--guidance_scale {' '.join(f'{scale:g}' for scale in scales)}: no effect on {name}, which "
            "takes no guidance; the set is recorded without it"
        )
    return lines


def print_notes(
    sources: Sources, labels: tuple[int, ...], findings: list, given: set[str], sampling_notes: list[str]
) -> None:  # fmt: skip
    """Print what to know before images are drawn: sampling settings, doubtful class names, excluded classes."""
    for note in sampling_notes:
        print(f"{note}.")
    print_findings(findings)
    if "exclude_classes" in given and "classes" not in given:
        left_out = [name for label, name in enumerate(sources.class_names) if label not in labels]
        print(f"No images are drawn of {list_names(left_out)} (--exclude_classes); the labels keep their numbers.")


def open_quality_report(
    output_args: OutputArguments, real_images: dict | None, recorded_in: str | None, hub_token: str | None
) -> Callable[[], None] | None:
    """Return a function that compares the finished set with the real images; None without `--quality_report`.

    Model and images are opened now, so that errors come early. `recorded_in` is the style token whose record names the
    images.
    """
    if not output_args.quality_report:
        return None
    if real_images is None:
        raise UserError("--quality_report true: needs the real images; add --dataset_name or --train_dir.")
    from utils.hub.repositories import Source
    from utils.quality.features import load_reference_images, open_feature_model
    from utils.quality.presentation import print_quality
    from utils.quality.report import make_quality_report

    model = open_feature_model(output_args.quality_model, "--quality_model", token=hub_token)
    with explain_recorded_name(RealDataArguments(**real_images), recorded_in):
        real, output_dir = load_reference_images(real_images, hub_token), output_args.output_dir
    images = Source(output_dir, "--output_dir", "dataset")
    return lambda: print_quality(make_quality_report(images, real, model, output_dir))


def main(argv=None) -> dict:
    started = time.time()
    groups, given = parse_arguments(argv)
    source_args, data_args, prompt_args, sampling_args, output_args, hub_args = groups
    output_dir, hub_token, hub_target = output_args.output_dir, hub_args.hub_token, None
    if hub_args.push_to_hub:
        hub_target = open_target(
            output_dir, hub_args.hub_dataset_id, "dataset", hub_args.hub_private_repo, hub_args.hub_revision, hub_token
        )

    # What image number n is made from
    names_file, resolution = prompt_args.class_names_file, sampling_args.resolution
    sources = read_sources(source_args, data_args, names_file, output_dir, hub_token, resolution)
    sources = add_adapters(sources, source_args, hub_token)
    sampling_notes = choose_sampling(sources, sampling_args, output_args, given)
    labels = find_labels(prompt_args.classes, prompt_args.exclude_classes, sources.class_names)
    findings = diagnose(*sources.names_of(labels), sources.chosen_nouns)
    if prompt_args.strict_class_names:
        check_strict(findings)
    prompts, prompt_settings = prepare_prompts(sources, labels, prompt_args, output_args)

    # these take seconds to import: only once the arguments are known to be good
    from utils.hub.growing import GrowingUpload
    from utils.synthesis.dry_run import dry_run
    from utils.synthesis.finishing import finish_set, print_summary, write_card
    from utils.synthesis.runner import draw_missing, start_accelerator
    from utils.synthesis.shards import Shards

    # Find every bad input before a model loads
    there = recorded_setting("mixed_precision", output_dir, output_args.overwrite_output_dir)
    accelerator, options = start_accelerator(sampling_args.mixed_precision, there, output_dir), resolve_options(groups)
    sources, plan = plan_images(
        sources, labels, prompts, sampling_args, output_args, source_args.learned_embeds, hub_token
    )
    settings = collect_settings(sources, plan, prompt_settings, accelerator.mixed_precision, options)
    folder = open_output_folder(output_dir, settings, plan.num_images_per_class, output_args.overwrite_output_dir)
    check_card(folder.path / "README.md")
    sources.generator.check(settings)
    check_prompts_fit(
        sources.generator, prompts.longest(), *sources.placeholder, prompts.flag, sources.class_token_names
    )
    report_quality = open_quality_report(output_args, sources.real_images, source_args.learned_embeds, hub_token)
    if accelerator.is_main_process:
        print_notes(sources, labels, findings, given, sampling_notes)
        if prompt_args.write_class_names is not None:
            write_class_names(prompt_args.write_class_names, sources.class_names, sources.prompt_nouns, findings)
    if output_args.dry_run:
        return dry_run(plan, sources, settings, output_dir, accelerator)
    shards = Shards(folder.path, plan, settings_fingerprint(settings), sources.class_names)
    if not folder.overwrite:
        shards.check_no_foreign_files()

    command = public_command("generate_synthetic.py", argv)
    go_on = without_overwrite_flag(command) if folder.overwrite else command
    with report_how_to_resume(output_dir, lambda: f"{shards.describe_progress()}; resume with: {go_on}"):
        begin_set(folder, plan, sources)
        uploading = nullcontext()
        if hub_target is not None and accelerator.is_main_process:
            uploading = GrowingUpload(output_dir, hub_target, shards.find_finished, shards.fingerprint)
        with uploading:
            num_drawn, seconds = draw_missing(shards, sources, settings, sampling_args.max_redraws, accelerator)

        results = {}
        if accelerator.is_main_process:
            record = finish_set(shards, sources, findings)
            write_card(shards, record, command, hub_target, hub_token)
            if report_quality is not None:  # it loads the set, which needs a card that counts its images
                report_quality()
                write_card(shards, record, command, hub_target, hub_token)
            partial = {} if num_drawn == plan.num_images else {"num_drawn": num_drawn}  # which the seconds are for
            run = write_run_config(output_dir, options, started, **partial)
            results = {
                "num_images": plan.num_images, "num_drawn": num_drawn, "num_redraws": record["num_redraws"],
                "images_per_second": num_drawn / seconds if num_drawn else 0.0, "seconds": run["seconds"],
            }  # fmt: skip
            print_summary(output_dir, plan, results)
            if hub_target is not None:
                publish_folder(output_dir, hub_target, PUBLISHED_FILES)
    accelerator.end_training()
    return results


if __name__ == "__main__":
    run_script(main)
