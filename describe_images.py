"""Describe what surrounds the object in each real training image, for prompts: background, pose, view.

    python describe_images.py --dataset_name user/cars --num_shots 16 --output_file contexts.jsonl
    accelerate launch describe_images.py --train_dir photos --model Qwen/Qwen3-VL-2B-Instruct --batch_size 8
    accelerate launch --multi_gpu --num_processes 8 describe_images.py --dataset_name user/cars

A vision-language model answers a question about each image. The answer becomes the image's context: short, and without
the name of its class. train_dsi.py --contexts_file puts it in the image's prompt; generate_synthetic.py --contexts_file
gives each synthetic image the context of a real image of any class. Only the images that training takes are described.
Answers are kept by image: an interrupted run continues, and a run on more images asks about the new ones only.
"""

import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from utils.cli.errors import UserError, graceful_interrupt, run_script
from utils.cli.options import option
from utils.cli.parsing import ScriptArgumentParser
from utils.cli.processes import check_processes_joined
from utils.cli.records import package_versions
from utils.cli.run_folder import check_writable
from utils.data.arguments import RealDataArguments, check_real_images_given
from utils.data.class_names import list_names, prompt_nouns, read_class_names_file
from utils.data.contexts import Contexts, ImageContext, clean_answer, read_contexts, write_contexts

# {class} helps a small model to tell the object from the rest; it names it rarely then
QUESTION = (
    "This is a photo of a {class}. Describe everything but the {class}: the background, the light, and from which side "
    "it is seen. Answer with a few short phrases, separated by commas, and do not mention the {class}."
)
NUM_SHOWN = 5


@dataclass
class DescriptionArguments:
    _argument_group_name = "description"

    model: str = option(
        "HuggingFaceTB/SmolVLM-500M-Instruct",
        "Vision-language model of transformers (image-text-to-text): an id or a folder.",
    )
    model_revision: str | None = option(None, "Branch, tag or commit of that model.")
    question: str = option(QUESTION, "What the model is asked about each image; {class} is the noun of its class.")
    max_words: int = option(20, "Words of a context at most; the rest of an answer is cut.")
    max_new_tokens: int = option(60, "Tokens of an answer at most.")
    resolution: int = option(512, "Longer side in pixels of the images that the model sees; larger ones are shrunk.")
    batch_size: int = option(1, "Images that a process asks about at a time.")
    class_names_file: str | None = option(
        None, "Nouns for the classes: a JSON or YAML mapping of class names to nouns, or a list; as in train_dsi.py."
    )
    answer_cache_dir: str | None = option(None, "Folder for the answers (default: in the Hugging Face cache).")
    hub_token: str | None = option(None, "Access token (default: HF_TOKEN or that of `hf auth login`).")


@dataclass
class OutputArguments:
    _argument_group_name = "output"

    output_file: str = option("contexts.jsonl", "File for the contexts: JSON Lines, one image per line.")
    overwrite_output_file: bool = option(False, "Replace an --output_file of other images or other settings.")


def check_arguments(real_args: RealDataArguments, args: DescriptionArguments, output_args: OutputArguments) -> Path:
    """Check what needs no images; return the path of the output file.

    Raises:
        UserError: a value is wrong, or the file cannot be written.
    """
    check_real_images_given(real_args)
    if not args.question.strip():
        raise UserError("--question: is empty; leave it out for the default.")
    path = Path(output_args.output_file)
    if path.is_dir():
        raise UserError(f"--output_file {path}: is a folder; name a file.")
    if path.suffix != ".jsonl":
        raise UserError(f"--output_file {path}: must end in .jsonl.")
    check_writable(path.parent)
    return path


def check_output(path: Path, about: dict, keys: set, overwrite: bool) -> Contexts | None:
    """Return the contexts that an earlier run with these settings wrote for these images; None if there are none.

    They may have been corrected by hand since.

    Raises:
        UserError: the file is of other settings or images, or no contexts file.
    """
    if overwrite or not path.exists():
        return None
    there = read_contexts(path)
    differing = [name for name in about if there.about.get(name) != about[name]]
    if not differing and {(image.key, image.label) for image in there.images} == keys:
        return there
    what = f"has other settings ({', '.join(differing)})" if differing else "is of other images"
    raise UserError(f"--output_file {path}: {what}; choose another file or give --overwrite_output_file.")


def print_contexts(path: Path, contexts: Contexts, class_names: list[str]) -> None:
    """Print a few contexts, how many are empty or had to be cut, and the classes without any.

    Raises:
        UserError: all are empty.
    """
    for image in contexts.images[:NUM_SHOWN]:
        print(f"  {image.label}: {image.context or '(none)'}")
    empty = sum(not image.context for image in contexts.images)
    print(
        f"{len(contexts.images):,} contexts in {path}. {contexts.about.get('num_named', 0):,} answers named the class, "
        f"which was cut out; {empty:,} images have no context. Read them, and edit what is wrong."
    )
    if empty == len(contexts.images):
        raise UserError(f"--output_file {path}: all contexts are empty; try another --model or --question.")
    described = {image.label for image in contexts.images if image.context}
    if absent := [name for name in class_names if name not in described]:
        print(f"Warning: no context of {list_names(absent)}.")


def write_question(question: str, noun: str) -> str:
    return " ".join(question.replace("{class}", noun).split())


def make_contexts(rows: dict, class_names: list[str], nouns: list[str], answers: dict, args) -> tuple[list, int]:
    """Return the context of each image, given as (key, label), and how many answers named the class."""
    images, num_named = [], 0
    for key, label in rows:
        answer = answers[key, write_question(args.question, nouns[label])]
        context, is_named = clean_answer(answer, nouns[label], args.max_words)
        images.append(ImageContext(key, class_names[label], context))
        num_named += is_named
    return images, num_named


def main(argv=None) -> dict:
    started = time.time()
    parser = ScriptArgumentParser((RealDataArguments, DescriptionArguments, OutputArguments), description=__doc__)
    real_args, args, output_args = parser.parse(argv)
    path = check_arguments(real_args, args, output_args)
    # these take seconds to import: only once the arguments are known to be good
    import transformers
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from utils.data.image_set import RealImagesRecord
    from utils.data.opened_images import open_all
    from utils.data.real_images import load_real_images
    from utils.data.vision_language import (
        AnswerCache,
        Question,
        answer_all,
        describe_settings,
        open_vision_language_model,
    )

    transformers.utils.logging.set_verbosity_error()
    source = open_vision_language_model(args.model, "--model", args.model_revision, args.hub_token)
    # processes that are done wait for the others
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(days=7))
    check_processes_joined(state.num_processes)
    real = load_real_images(RealImagesRecord.from_arguments(real_args), args.hub_token)
    opened = open_all(real, ("train",), with_digests=True)
    real, keys = opened.images, opened.digests["train"]
    state.print("\n".join([*real.remarks, *opened.remarks]))
    chosen = read_class_names_file(args.class_names_file, real.class_names) if args.class_names_file else {}
    nouns, rows = prompt_nouns(real.class_names, chosen), {}
    for row, place in enumerate(zip(keys, real.train["label"])):
        rows.setdefault(place, row)  # a copy of an image in another class has a line of its own

    settings = describe_settings(source, args.batch_size, args.resolution, args.max_new_tokens)
    about = settings | {
        "model": {"id": source.name, "revision": source.revision}, "question": args.question,
        "max_words": args.max_words,
    }  # fmt: skip
    named = {(key, real.class_names[label]) for key, label in rows}
    contexts, num_asked = check_output(path, about, named, output_args.overwrite_output_file), 0
    if contexts is None:
        asked = [Question(key, write_question(args.question, nouns[label]), row) for (key, label), row in rows.items()]
        with graceful_interrupt(lambda: "Finished answers are kept; run the same command again."):
            answers, num_asked = answer_all(
                list({question.place: question for question in asked}.values()), real.train, source,
                AnswerCache(args.answer_cache_dir, settings), args.batch_size, args.resolution, args.max_new_tokens,
            )  # fmt: skip
        images, num_named = make_contexts(rows, real.class_names, nouns, answers, args)
        counts = {"num_images": len(images), "num_named": num_named, "num_duplicates": len(keys) - len(images)}
        facts = {"real_images": real.record.to_dict(), "versions": package_versions()}
        contexts = Contexts(tuple(images), about | counts | facts)
        if state.is_main_process:
            write_contexts(path, contexts)
    if state.is_main_process:
        print_contexts(path, contexts, real.class_names)
    counts = {name: contexts.about.get(name) for name in ("num_images", "num_named", "num_duplicates")}
    return {**counts, "num_asked": num_asked, "seconds": time.time() - started}


if __name__ == "__main__":
    run_script(main)
