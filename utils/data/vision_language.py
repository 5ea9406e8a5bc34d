"""A vision-language model that answers a question about each image, and a cache of its answers."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from huggingface_hub import constants
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from utils.cli.contents import list_files
from utils.cli.errors import UserError
from utils.cli.memory import is_out_of_memory, try_in_memory
from utils.cli.precision import device_precision
from utils.data.images import to_rgb
from utils.hub.repositories import Source, open_source

MODEL_KIND = "a vision-language model of transformers"
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# greedy: nothing is drawn at random; without the rest, models whose own settings sample warn
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Question:
    """A question about an image, given by the SHA-256 of its bytes and its row in the set."""

    key: str
    text: str
    row: int

    @property
    def place(self) -> tuple[str, str]:
        """What an answer is filed under."""
        return self.key, self.text


def open_vision_language_model(name: str, flag: str, revision: str | None, token: str | None) -> Source:
    """Return a model that takes images and text, pinned to a commit, without loading it.

    Raises:
        UserError: it is neither a folder nor a repository, another kind of model, or has no safetensors weights.
    """
    source = open_source(name, flag, "model", revision, token)
    with source.reading("has no usable config.json", also=(ValueError,)):
        config = json.loads(source.file("config.json", MODEL_KIND).read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        own_code = " that comes with code of its own, which is not run" if "auto_map" in config else ""
        raise UserError(
            f"{flag} {name}: must be {MODEL_KIND} (image-text-to-text), but its model type is {kind}{own_code}; try "
            "HuggingFaceTB/SmolVLM-500M-Instruct."
        )
    if not source.has_one_of([SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]):
        raise UserError(f"{flag} {name}: has no {SAFE_WEIGHTS_NAME}; only safetensors weights are loaded.")
    return source


class VisionLanguageModel:
    """A model with its processor, in the device's default precision; it answers greedily.

    Images are shrunk to `resolution` pixels on their longer side, and not split into tiles: a background needs no
    details, and tiles take ten times as long.
    """

    def __init__(self, source: Source, device: torch.device, resolution: int, max_new_tokens: int):
        """Load processor and weights.

        Raises:
            UserError: the processor or the weights do not load, or the model is not made for chats.
        """
        self.resolution = resolution
        options = source.load_options()
        # ImportError: a processor needs a package that is not installed
        with source.reading("has no usable processor", also=(ValueError, KeyError, TypeError, ImportError)):
            processor = AutoProcessor.from_pretrained(source.name, **options)
        if not isinstance(processor, ProcessorMixin):  # without a processor's config, it is a tokenizer
            raise UserError(f"{source.flag} {source.name}: has no processor of images and text.")
        if processor.chat_template is None:
            raise UserError(f"{source.flag} {source.name}: has no chat template; choose a model made for instructions.")
        if hasattr(processor.image_processor, "do_image_splitting"):  # of Idefics, SmolVLM and LFM2
            processor.image_processor.do_image_splitting = False
        processor.tokenizer.padding_side = "left"  # of a batch; answers continue the questions
        processor.tokenizer.pad_token = processor.tokenizer.pad_token or processor.tokenizer.eos_token
        with source.reading("does not load as a model", also=(ValueError, KeyError, RuntimeError)):
            model = AutoModelForImageTextToText.from_pretrained(
                source.name, use_safetensors=True, dtype=DTYPES[device_precision()], **options
            )
        self.pipe = pipeline("image-text-to-text", model=model.eval(), processor=processor, device=device)
        self.generate_kwargs = GREEDY | {"max_new_tokens": max_new_tokens}

    def ask(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        """Return the answer to a question about each image, all in one batch.

        Raises:
            UserError: the model does not take these images in one batch.
        """
        chats = []
        for image, question in zip(images, questions, strict=True):
            image = to_rgb(image)
            image.thumbnail((self.resolution, self.resolution))
            content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
            chats.append([{"role": "user", "content": content}])
        options = {"batch_size": len(chats), "return_full_text": False, "generate_kwargs": self.generate_kwargs}
        try:
            answers = self.pipe(chats, **options)
        except (RuntimeError, ValueError) as error:
            if len(chats) == 1 or is_out_of_memory(error):
                raise
            raise UserError(
                f"--batch_size {len(chats)}: the model does not take these images at once ({error}); try 1."
            ) from None
        # a list for each chat, or for each of a list of one
        return [answer[0]["generated_text"] if isinstance(answer, list) else answer["generated_text"]
                for answer in answers]  # fmt: skip


class AnswerCache:
    """The answers of one model with one set of settings: a folder of JSON Lines files, one for each process.

    A line is written at once and never changed, so that a run can be stopped at any time; an incomplete line is
    ignored.
    """

    def __init__(self, cache_dir: str | Path | None, settings: dict):
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(cache_dir or Path(constants.HF_HOME) / "bridged-transfer" / "answers") / name
        self.settings = settings

    def read(self) -> dict[tuple[str, str], str]:
        """Return (image key, question) -> answer."""
        answers = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    entry = json.loads(line)
                    answers[entry["image_sha256"], entry["question"]] = entry["answer"]
                except (ValueError, KeyError, TypeError):  # of a run that was killed
                    continue
        return answers

    def add(self, questions: Sequence[Question], answers: Sequence[str], rank: int) -> None:
        """Append answers to the file of a process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"image_sha256": question.key, "question": question.text, "answer": answer}, ensure_ascii=False)
            for question, answer in zip(questions, answers, strict=True)
        ]
        # it begins with a new line: the last one may be incomplete
        data = "".join(f"\n{line}" for line in lines) + "\n"
        descriptor = os.open(self.folder / f"{rank}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, data.encode())
        finally:
            os.close(descriptor)


def answer_all(
    questions: Sequence[Question], images: Dataset, source: Source, cache: AnswerCache, batch_size: int,
    resolution: int, max_new_tokens: int,
) -> tuple[dict[tuple[str, str], str], int]:  # fmt: skip
    """Return (image key, question) -> answer, and how many were not in the cache.

    Batches are fixed parts of `questions`, divided over the processes, so that an answer depends neither on their
    number nor on what is in the cache. If all are in the cache, no model loads.

    Raises:
        UserError: memory runs out; or from `VisionLanguageModel`.
    """
    state = PartialState()
    [answers] = broadcast_object_list([cache.read() if state.is_main_process else None])
    batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
    missing = [batch for batch in batches if any(question.place not in answers for question in batch)]
    mine, new = missing[state.process_index :: state.num_processes], {}
    if mine:
        model = VisionLanguageModel(source, state.device, resolution, max_new_tokens)
        for batch in _show_progress(mine, state):
            pictures = [images[question.row]["image"] for question in batch]
            texts = [question.text for question in batch]
            found = try_in_memory(lambda pictures=pictures, texts=texts: model.ask(pictures, texts))
            if found is None:
                raise UserError(
                    f"--batch_size {batch_size}: out of memory; lower it or --resolution, or choose a smaller --model."
                )
            cache.add(batch, found, state.process_index)
            new |= {question.place: answer for question, answer in zip(batch, found)}
    gathered = gather_object([new])
    new = {place: answer for of_process in gathered for place, answer in of_process.items()}
    return answers | new, len(new)


def _show_progress(batches: list[list[Question]], state: PartialState) -> Iterator[list[Question]]:
    """Yield batches with a progress bar of the main process, which counts its own share of the images."""
    what = "describing images" if state.num_processes == 1 else f"describing images, 1/{state.num_processes} of them"
    total = sum(map(len, batches))
    with tqdm(total=total, desc=what, unit="image", disable=not state.is_local_main_process) as progress:
        for batch in batches:
            yield batch
            progress.update(len(batch))


def describe_settings(source: Source, batch_size: int, resolution: int, max_new_tokens: int) -> dict:
    """Return all that an answer depends on, besides image and question."""
    contents = source.identity(list_files) if source.is_local else f"{source.name}, commit {source.revision}"
    return {
        "model_contents": contents,
        "batch_size": batch_size, "resolution": resolution, "max_new_tokens": max_new_tokens,
        "precision": device_precision(),
    }  # fmt: skip
