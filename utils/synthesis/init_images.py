"""The real training images of a set's record: to make images from them, and to count them by class."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from utils.cli.errors import UserError
from utils.data.arguments import RealDataArguments, explain_recorded_name
from utils.data.class_names import list_names
from utils.style.families import FAMILIES, OWN_SCHEDULER

if TYPE_CHECKING:  # datasets and torch take seconds to import
    from datasets import Dataset
    from PIL.Image import Image

    from utils.data.image_set import RealImages
    from utils.synthesis.generators import Generator

FLAG = "--init_images real"
INIT_IMAGES, STRENGTH = "init_images", "strength"  # among a set's settings; the second is a column too


@dataclass(frozen=True, eq=False)
class InitImages:
    """The real images that a set is made from, `images`, and the content hash of each.

    `rows` has their rows in the training split, by label. `where` is the flag that names them, and its value.
    """

    images: "Dataset"
    digests: list[str]
    rows: Mapping[int, tuple[int, ...]]
    places: Mapping[int, int]
    strengths: tuple[float, ...]
    where: str

    @cached_property
    def settings(self) -> dict:
        """The entries for a set's settings: what decides the image, and the strength, that image number n is from."""
        used = [[label, row, self.digests[self.places[row]]] for label, rows in self.rows.items() for row in rows]
        digest = hashlib.sha256(json.dumps(used).encode()).hexdigest()
        return {INIT_IMAGES: "real", STRENGTH: list(self.strengths), "init_images_sha256": digest}

    def square(self, row: int, resolution: int) -> "Image":
        """Return the square of a real image that the training of a style token takes, of `resolution` pixels a side.

        Raises:
            UserError: the image was replaced since the set was begun.
        """
        from utils.data.images import centre_square
        from utils.data.opened_images import check_digests

        place = self.places[row]
        check_digests(self.images, self.digests, range(place, place + 1), self.where)
        return centre_square(self.images[place]["image"], resolution)


def num_steps(num_inference_steps: int, strength: float) -> int:
    """Return how many of the steps image-to-image takes: the last ones.

    Source: diffusers, `StableDiffusionImg2ImgPipeline.get_timesteps`.
    """
    return min(int(num_inference_steps * strength), num_inference_steps)


def check_image_to_image(
    generator: "Generator", scheduler: str, num_inference_steps: int, strengths: Sequence[float]
) -> None:
    """Check that a generator can make images from images with these settings, without loading it.

    Raises:
        UserError: it is of another family, its scheduler cannot start between two steps, or a strength leaves no step.
    """
    if not generator.family.draws_from_images:
        titles = " and ".join(family.title for family in FAMILIES.values() if family.draws_from_images)
        raise UserError(
            f"{FLAG}: not supported by {generator.source.name}, a {generator.pipeline_class}; it is for {titles}."
        )
    for strength in strengths:
        if num_steps(num_inference_steps, strength) < 1:
            raise UserError(
                f"--strength {strength:g}: less than one of --num_inference_steps {num_inference_steps}; must be at "
                f"least {math.ceil(100 / num_inference_steps) / 100:g}."
            )
    generator.check_scheduler(scheduler, num_inference_steps)
    import torch

    made = generator.scheduler.make(generator.scheduler.class_name if scheduler == OWN_SCHEDULER else scheduler)
    try:
        made.set_timesteps(num_inference_steps)
        start = (num_inference_steps - num_steps(num_inference_steps, strengths[0])) * made.order
        if hasattr(made, "set_begin_index"):
            made.set_begin_index(start)
        latents, timestep = torch.ones(1, 4, 8, 8), made.timesteps[start]
        noisy = made.add_noise(latents, latents, made.timesteps[start : start + 1])
        with torch.random.fork_rng(devices=[]):
            made.step(made.scale_model_input(noisy, timestep), timestep, noisy)
    except (AttributeError, TypeError, ValueError, LookupError, NotImplementedError) as error:
        raise UserError(
            f"--scheduler {scheduler}: cannot start from an image ({error}); try DDIMScheduler or "
            "EulerDiscreteScheduler."
        ) from None


def load_training_images(
    record: dict | None, class_names: list[str], flag: str, recorded_in: str | None = None, hub_token: str | None = None
) -> "RealImages":
    """Load the real images that the record of a set or token names: its training part is the few-shot subset.

    `flag` needs them; `recorded_in` is the style token whose record names them.

    Raises:
        UserError: there is no record, the images cannot be loaded, or their classes are not `class_names`.
    """
    if record is None:
        raise UserError(f"{flag}: needs the real images; add --dataset_name or --train_dir.")
    from utils.data.image_set import RealImagesRecord
    from utils.data.real_images import load_real_images

    with explain_recorded_name(RealDataArguments(**record), recorded_in):
        real = load_real_images(RealImagesRecord(**record), hub_token)
    if real.class_names != class_names:
        raise UserError(
            f"{flag}: the classes of {real.record.name} are now {list_names(real.class_names)}, in the record "
            f"{list_names(class_names)}; restore the images, or learn the style token again."
        )
    return real


def count_by_class(real: "RealImages") -> list[int]:
    """Return the number of training images of each class, by label."""
    return np.bincount(np.asarray(real.train["label"], int), minlength=len(real.class_names)).tolist()


def open_init_images(
    real: "RealImages", labels: Sequence[int], strengths: Sequence[float], seen: Sequence[int] | None = None
) -> InitImages:
    """Open each training image once, and return those of `labels`; with `seen`, only rows that the token has seen.

    Raises:
        UserError: a class has no such image, or an image is damaged and must not be left out.
    """
    from utils.data.opened_images import open_all

    if seen is not None:
        real = real.select({"train": np.flatnonzero(np.isin(real.train_indices, list(seen)))})
    found = _rows_by_label(real, labels)
    if empty := [real.class_names[label] for label in labels if not found[label]]:
        raise UserError(
            f"{FLAG}: {real.record.name} has no training images of {list_names(empty)}; leave such classes out with "
            "--exclude_classes, or this flag."
        )
    opened = open_all(real, ("train",), with_digests=True)
    flag = "train_dir" if real.record.train_dir is not None else "dataset_name"
    return InitImages(
        opened.images.train, opened.digests["train"], _rows_by_label(opened.images, labels),
        {int(row): place for place, row in enumerate(opened.images.train_indices)}, tuple(strengths),
        f"--{flag} {real.record.name}",
    )  # fmt: skip


def _rows_by_label(real: "RealImages", labels: Sequence[int]) -> dict[int, tuple[int, ...]]:
    of_images = np.asarray(real.train["label"], int)
    return {label: tuple(real.train_indices[of_images == label].tolist()) for label in labels}
