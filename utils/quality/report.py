"""The quality report of a synthetic set: a comparison with real images in the features of a model."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from utils.cli.errors import UserError
from utils.cli.records import write_record
from utils.data.image_set import RealImages
from utils.data.splits import evenly_spaced
from utils.hub.repositories import Source
from utils.quality.distances import (
    ClassSums,
    class_shifts,
    frechet_distances,
    kernel_distances,
    list_confusions,
    matched_rows,
    nearest_class_shares,
)
from utils.quality.duplicates import (
    MAX_CALIBRATION_IMAGES,
    closest_pairs,
    count_similar,
    find_copies,
    find_nearest,
    similarity_threshold,
)
from utils.quality.features import FeatureModel, Part, collect_parts, extract_features
from utils.quality.presentation import plot_pairs, plot_quality
from utils.quality.vectors import Thumbnails, UnitFeatures
from utils.quality.verdicts import judge, list_caveats
from utils.synthesis.output_folder import DUPLICATE_PAIRS, QUALITY_PLOTS, QUALITY_RECORD

NAMES = {
    "synthetic": "synthetic images",
    "train": "real training images",
    "held_out": "real held-out images",
    "test": "real test images",
}


def make_quality_report(
    synthetic: Source, real_images: RealImages, model: Source, output_dir: str | Path, *, batch_size: int = 64,
    max_images_per_class: int = 1000, num_pairs: int = 8, device: str | torch.device | None = None,
) -> dict:  # fmt: skip
    """Compare a synthetic set with real images; write `quality.json`, `quality.png` and `duplicates.png`.

    `synthetic` is a local folder or a dataset at a commit, `model` is from `open_feature_model`. The first
    `max_images_per_class` images per class are compared; test images are not limited. Returns the written record.

    Raises:
        UserError: the classes are not those of the real images, a class has no images, an image is damaged, or the
            model gives no usable features.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    parts = collect_parts(synthetic, real_images, max_images_per_class)
    class_names = real_images.class_names
    feature_model = FeatureModel(model, device)
    with tempfile.TemporaryDirectory(prefix="features-") as folder:
        extracted = {
            name: extract_features(feature_model, part.images, NAMES[name], Path(folder) / name, batch_size)
            for name, part in parts.items()
        }
        raw = {name: features for name, (features, _) in extracted.items()}
        thumbnails = {name: Thumbnails(pixels) for name, (_, pixels) in extracted.items()}
        centre = _find_centre(raw["train"], model)
        units = {name: UnitFeatures(features, centre) for name, features in raw.items()}
        # seen from the real centre, images of a distant set all point the same way, so it has its own centre
        own_unit = UnitFeatures(raw["synthetic"], raw["synthetic"].mean(0, dtype=np.float64).astype(np.float32))
        record = {
            "synthetic": {"id": synthetic.name, "revision": synthetic.revision},
            "real_images": real_images.record.to_dict(),
            "model": {"id": model.name, "revision": model.revision, "num_features": feature_model.num_features},
            "max_images_per_class": max_images_per_class,
            "num_images": {name: {"used": len(part.rows), "all": part.num_all} for name, part in parts.items()},
            "distance": measure_distances(raw, parts),
            **_measure_classes(units, parts, class_names),
        }
        duplicates, similarities, positions = _find_duplicates(
            units, own_unit, thumbnails, parts, class_names, num_pairs, device
        )
    record["duplicates"] = duplicates
    record |= {"verdicts": judge(record), "caveats": list_caveats(record)}
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    plot_quality(Path(output_dir) / QUALITY_PLOTS, record, similarities)
    images = {name: part.images for name, part in parts.items()}
    plot_pairs(Path(output_dir) / DUPLICATE_PAIRS, duplicates, positions, images)
    write_record(Path(output_dir) / QUALITY_RECORD, record)
    return record


def _find_centre(train: np.ndarray, model: Source) -> np.ndarray:
    """Return the mean `(num_features,)` of the real training images' features."""
    centre = train.mean(0, dtype=np.float64).astype(np.float32)
    some = np.asarray(train[evenly_spaced(len(train), MAX_CALIBRATION_IMAGES)], np.float32)
    # smaller differences are rounding, as features on disk are in half precision
    if np.linalg.norm(some - centre, axis=1).max() <= 2 * np.finfo(np.float16).eps * np.linalg.norm(centre):
        raise UserError(
            f"{model.flag} {model.name}: gives all real images the same features; choose a trained model, and two "
            "or more different real images."
        )
    return centre


def measure_distances(raw: dict[str, np.ndarray], parts: dict[str, Part]) -> dict:
    """Return the distances of synthetic and held-out images to real training images, with equal class counts."""
    rows, floor_rows = matched_rows(parts["synthetic"].labels, parts["held_out"].labels)
    # training images of classes without synthetic images would add to the distance
    train_rows = np.flatnonzero(np.isin(parts["train"].labels, parts["synthetic"].labels))
    sizes = {"num_images": len(rows), "num_train": len(train_rows)}
    if min(sizes.values()) < 2:
        nothing = {"synthetic": None, "floor": None}
        return {**sizes, "frechet": nothing, "kernel": nothing}
    train = raw["train"], train_rows
    sides = {"synthetic": (raw["synthetic"], rows), "floor": (raw["held_out"], floor_rows)}
    kernel, subset_size = kernel_distances(train, sides)
    return {
        **sizes,
        "frechet": frechet_distances(train, sides),
        "kernel": {name: mean for name, (mean, _) in kernel.items()}
        | {f"{name}_std": deviation for name, (_, deviation) in kernel.items()}
        | {"subset_size": subset_size},
    }


def _measure_classes(units: dict[str, UnitFeatures], parts: dict[str, Part], class_names: list[str]) -> dict:
    """Return the figures of each class, the one farthest from its real class first, and those of all classes."""
    sums = {name: ClassSums.of(units[name], parts[name].labels, len(class_names)) for name in units}
    shares = {
        name: nearest_class_shares(units[name], parts[name].labels, sums["train"]) for name in ("synthetic", "held_out")
    }
    diversity = {
        name: ClassSums.of(UnitFeatures(units[kind].raw), parts[kind].labels, len(class_names)).diversity
        for name, kind in (("synthetic", "synthetic"), ("real", "train"))
    }
    present = np.unique(parts["synthetic"].labels)
    columns = {
        "shift": class_shifts(sums["synthetic"], sums["train"]),
        "shift_floor": class_shifts(sums["held_out"], sums["train"]),
        "diversity": diversity["synthetic"],
        "real_diversity": diversity["real"],
        "own_share": np.diagonal(shares["synthetic"]),
        "real_own_share": np.diagonal(shares["held_out"]),
    }
    classes = [
        {
            "class": class_names[label],
            "num_images": int(sums["synthetic"].counts[label]),
            "num_train": int(sums["train"].counts[label]),
            **{name: _mean(values[[label]]) for name, values in columns.items()},
        }
        for label in present
    ]
    classes.sort(key=lambda entry: -1.0 if entry["shift"] is None else entry["shift"], reverse=True)
    return {
        "classes": classes,
        "diversity": {name: _mean(values[present]) for name, values in diversity.items()},
        "nearest_class": {
            "own_share": {name: _mean(np.diagonal(values)[present]) for name, values in shares.items()},
            "confusions": list_confusions(shares["synthetic"], shares["held_out"], class_names),
        },
    }


def _find_duplicates(
    units: dict[str, UnitFeatures], own_unit: UnitFeatures, thumbnails: dict[str, Thumbnails], parts: dict[str, Part],
    class_names: list[str], num_pairs: int, device: str | torch.device,
) -> tuple[dict, dict, dict]:  # fmt: skip
    """Return, for each kind of image, the figures of near-duplicates, their similarities, and the closest pairs.

    The threshold for look-alikes comes from real images: from the similarities of held-out images to the same training
    or test images, and of training images among themselves. Copies are found by their pixels, as networks differ in how
    similar real images are to them; copies among real images are counted by the same rule.
    """
    found, similarities, positions = {}, {}, {}
    for kind, calibrating in (("test", "held_out"), ("train", "held_out"), ("synthetic", "train")):
        within = kind == "synthetic"
        queries, targets = (own_unit, own_unit) if within else (units["synthetic"], units[kind])
        if len(targets) < 2:
            continue
        real_kind = "train" if within else kind
        rows = evenly_spaced(len(units[calibrating]), MAX_CALIBRATION_IMAGES)
        what, same = f"nearest {NAMES[kind]}", "the same for real images"
        nearest = find_nearest(queries, targets, what, device)
        copies = find_copies(thumbnails["synthetic"], thumbnails[kind], what, device)
        real = find_nearest(units[calibrating], units[real_kind], same, device, rows).similarities
        real_copies = find_copies(thumbnails[calibrating], thumbnails[real_kind], same, device, rows)
        threshold = similarity_threshold(real[real_copies < 0])
        positions[kind] = closest_pairs(nearest, copies, num_pairs, within)
        found[kind] = {
            "threshold": threshold,
            "num_calibration_images": len(real),
            "largest_of_real": float(real.max()) if len(real) else None,
            "num_copies_of_real": int((real_copies >= 0).sum()),
            **count_similar(nearest, copies, threshold),
            "pairs": [
                {
                    "similarity": float(queries.take([query])[0] @ targets.take([target])[0]),
                    "is_copy": bool(copies[query] >= 0),
                    **_describe_pair(parts, kind, query, target, class_names),
                }
                for query, target in positions[kind]
            ],
        }
        similarities[kind] = {"synthetic": nearest.similarities, "real": real}
    return found, similarities, positions


def _describe_pair(parts: dict[str, Part], kind: str, query: int, target: int, class_names: list[str]) -> dict:
    return {
        "synthetic_row": int(parts["synthetic"].rows[query]),
        "synthetic_class": class_names[parts["synthetic"].labels[query]],
        "other_row": int(parts[kind].rows[target]),
        "other_class": class_names[parts[kind].labels[target]],
    }


def _mean(values: np.ndarray) -> float | None:
    """Return the mean of all values except NaN; None if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None
