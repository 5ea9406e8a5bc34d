"""The images that a method trains on: real, synthetic, both together."""

import logging

from datasets import Dataset, IterableDataset, concatenate_datasets

from utils.data.image_set import RealImages
from utils.data.opened_images import open_synthetic
from utils.transfer.methods import mix_indices
from utils.transfer.synthetic_images import SyntheticSource, count_leaked_images, load_synthetic, num_images

logger = logging.getLogger(__name__)


def load_training_images(
    real: RealImages,
    source: SyntheticSource | None,
    method: str,
    token: str | None = None,
    *,
    max_samples_per_class: int | None = None,
    allow_missing_classes: bool = False,
    streaming: bool = False,
    mix_ratio: float | None = None,
) -> tuple[dict[str, Dataset | IterableDataset], dict[str, int | None]]:
    """Return images by kind (`real`, `synthetic`, and for mix `both`), and how many of each there are.

    The options are those of `load_synthetic`; of a stream the number is what the set's record says, None where that
    counts none. Warns of real images that the style token saw and this run does not train on.

    Raises:
        UserError: the synthetic set does not go with the real images, or cannot be loaded.
    """
    images, counts = {"real": real.train}, {"real": len(real.train)}
    if source is not None:
        images["synthetic"] = load_synthetic(
            source, real.class_names, max_samples_per_class, token,
            allow_missing_classes=allow_missing_classes, streaming=streaming,
        )  # fmt: skip
        if not streaming:
            images["synthetic"], remarks = open_synthetic(images["synthetic"], source.name, real.record.skip_bad_images)
            for remark in remarks:
                logger.warning(remark)
        counts["synthetic"] = num_images(source, max_samples_per_class) if streaming else len(images["synthetic"])
        num_leaked = count_leaked_images(source.record, real.train_indices)
        if num_leaked and method != "vanilla":
            logger.warning(
                f"Warning: the style token has seen {num_leaked} real images outside the {len(real.train)} that this "
                "run trains on, so a method without synthetic images has seen fewer real images."
            )
    if method == "mix":
        both = concatenate_datasets([images["real"], images["synthetic"]])
        images["both"] = both.select(mix_indices(counts["real"], counts["synthetic"], mix_ratio))
        counts["both"] = len(images["both"])
    return images, counts
