"""Run a method, from images to a finished classifier: its stages one after another, then the evaluation."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch import nn
from transformers import TrainingArguments

from utils.data.image_set import PARTS, RealImages
from utils.data.opened_images import open_all
from utils.data.real_images import check_held_out, limit_held_out
from utils.transfer.alignment import AlignedImages
from utils.transfer.averaging import average_weights
from utils.transfer.classifiers import load_classifier
from utils.transfer.evaluation import predict
from utils.transfer.methods import Method, StagePlan, mix_indices
from utils.transfer.replay import ReplayedImages
from utils.transfer.stage import Pretrained, run_stage
from utils.transfer.waiting import advise_on_waiting

logger = logging.getLogger(__name__)

Images = Mapping[str, Dataset | IterableDataset]


@dataclass(frozen=True)
class MethodResult:
    """A trained classifier, the results of its stages, and its outputs on the evaluated images.

    `results` maps `<stage>_<cost>` to steps, images seen, seconds and GPU-hours; `log_histories` maps stages to the
    Trainer's logs. `logits` is `(n, classes)`, `labels` `(n,)`.
    """

    model: nn.Module
    results: dict
    log_histories: dict[str, list[dict]]
    logits: np.ndarray
    labels: np.ndarray


def select_images(method: Method, real: Dataset | None, synthetic: Dataset | IterableDataset | None) -> Images:
    """Return the images of a method's stages by kind: `real`, `synthetic`, `both`, `replayed`.

    With an alignment, or if synthetic images may be left out, `real` is always included.
    """
    images = {"real": real, "synthetic": synthetic}
    if "both" in method.kinds:
        rows = mix_indices(len(real), len(synthetic), method.mix_ratio)
        images["both"] = concatenate_datasets([real, synthetic]).select(rows)
    if "replayed" in method.kinds:
        images["replayed"] = ReplayedImages(real, synthetic)
    sees_real = method.alignment is not None or "replayed" in method.kinds
    return {kind: images[kind] for kind in method.kinds | ({"real"} if sees_real else set())}


def images_per_class(images: Dataset) -> float:
    """Return the median number of images per class, over classes that have some."""
    return float(np.median(list(Counter(images["label"]).values())))


def open_real_images(
    real: RealImages, max_eval_samples: int | None, say: Callable[[str], None], parts: tuple[str, ...] = PARTS
) -> RealImages:
    """Return the images after opening each image of `parts` once, with at most `max_eval_samples` per held-out part.

    `say` is called with each remark for the user.

    Raises:
        UserError: an image is damaged, or one of `parts` has no images left.
    """
    for remark in real.remarks:
        say(remark)
    real = limit_held_out(real, max_eval_samples)
    check_held_out(real, parts)
    opened = open_all(real, parts)
    for remark in opened.remarks:
        say(remark)
    check_held_out(opened.images, parts)  # all images of a part may have been left out
    return opened.images


def average_with_earlier(
    stages: list[StagePlan], model: nn.Module, pretrained: Pretrained, class_names: list[str],
    stage_dir: Callable[[StagePlan], Path],
) -> None:  # fmt: skip
    """Average the last stage's weights, in place, with those of an earlier stage, if planned."""
    last = stages[-1]
    if last.average is None:
        return
    origin = next(stage for stage in stages if stage.name == last.averaged_with)
    folder = stage_dir(origin) / origin.name
    earlier = load_classifier(str(folder), class_names, False, 0, **pretrained.hub_options)
    average_weights(model, earlier.state_dict(), last.average)
    logger.info(f"{last.name}: its weights have share {last.average:g}, those of {origin.name} {1 - last.average:g}")


def run_method(
    stages: list[StagePlan], images: Images, evaluated, pretrained: Pretrained, class_names: list[str],
    training_args: TrainingArguments, stage_dir: Callable[[StagePlan], Path], *, validation: Dataset | None = None,
    resume: bool = False, inputs: Mapping[str, str] | None = None,
    exclusive: Callable[[Path], AbstractContextManager] = lambda folder: nullcontext(),
    after_stage: Callable[[StagePlan, nn.Module], None] = lambda stage, model: None,
) -> MethodResult:  # fmt: skip
    """Train the stages of `plan_stages` on the images of `select_images`, and evaluate the last one's model.

    `evaluated` are `EvalImages` or a list of their items. `stage_dir` returns the parent folder of a stage; methods
    that share a first stage use the same folder, and `exclusive` returns a lock for it. With `resume`, finished stages
    are loaded and unfinished ones resumed. `inputs` maps flags to what identifies the contents of models and images, as
    in a `RunFolder`; each stage records those it depends on. `after_stage` is called with each trained model. The other
    arguments are those of `run_stage`.

    Raises:
        UserError: what `run_stage` and `predict` raise.
    """
    model, results, log_histories = None, {}, {}
    for stage in stages:
        start = next((stage_dir(earlier) / earlier.name for earlier in stages if earlier.name == stage.start), None)
        folder, seen = stage_dir(stage) / stage.name, images[stage.images]
        if isinstance(seen, ReplayedImages):
            seen = replace(seen, share=stage.synthetic_share)
        number = "streamed" if isinstance(seen, IterableDataset) else len(seen)
        if stage.alignment is not None:
            seen = AlignedImages(images["real"], seen, stage.alignment)
        logger.info(f"{stage.name}: {stage.settings.max_steps} steps on {number} images ({stage.images})")
        with exclusive(folder):
            model, done = run_stage(
                stage, start, seen, pretrained, class_names, training_args, folder,
                validation=validation, resume=resume, inputs=inputs,
            )  # fmt: skip
        advice = advise_on_waiting(done.seconds_waiting or 0, done.seconds, training_args.dataloader_num_workers)
        if advice and done.num_gpus:
            logger.warning(f"Warning: {stage.name}: {advice}")
        results |= {f"{stage.name}_{cost}": value for cost, value in done.summary().items()}
        log_histories[stage.name] = done.log_history
        after_stage(stage, model)
    average_with_earlier(stages, model, pretrained, class_names, stage_dir)
    batch_size, num_workers = training_args.per_device_eval_batch_size, training_args.dataloader_num_workers
    logits, labels = predict(model, evaluated, batch_size, 0 if isinstance(evaluated, list) else num_workers)
    return MethodResult(model, results, log_histories, logits, labels)
