"""How good the sets of benchmarks.generate_quality are: distances to real images, and classifiers trained on each set.

The real images are the validation images of the demo; its test images are not used.
"""

import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import TrainingArguments
from transformers.utils import logging

from benchmarks.quality_sets import SetToDraw
from utils.cli.records import read_record, write_record
from utils.comparison.cells import CellRunner, run_cells
from utils.comparison.grid import Cell, Row, fingerprint, make_cell
from utils.comparison.search import read_settings
from utils.comparison.statistics import unpack_correct
from utils.data.image_set import RealImages, RealImagesRecord
from utils.data.real_images import identify_real_images, load_real_images
from utils.data.splits import balanced_indices
from utils.hub.repositories import Source
from utils.quality.distances import ClassSums, matched_rows
from utils.quality.features import FeatureModel, Part, extract_features, open_feature_model
from utils.quality.manifolds import precision_and_recall
from utils.quality.report import measure_distances
from utils.quality.vectors import UnitFeatures
from utils.transfer.methods import StageSettings
from utils.transfer.run_method import open_real_images
from utils.transfer.stage import open_pretrained
from utils.transfer.synthetic_images import load_synthetic, open_synthetic

DEMO = Path(__file__).parents[1] / "demo"
CHOSEN_SETTINGS = DEMO / "recipes" / "chosen_settings.json"
SCORES = ("frechet", "kernel", "precision", "recall", "diversity")
BATCH_SIZE = 64
METHOD = "synthetic_only"


@dataclass(frozen=True)
class Judge:
    """The real images to compare sets with, and the pretrained classifier whose features are compared."""

    real: RealImages
    identities: dict[str, str]
    classifier_dir: Path
    work_dir: Path
    num_floor_images: int  # per class
    max_eval_samples: int | None = None

    @cached_property
    def model(self) -> FeatureModel:
        return FeatureModel(self.model_source, "cpu")

    @property
    def model_source(self) -> Source:
        return open_feature_model(str(self.classifier_dir), "--classifier")

    @cached_property
    def reference(self) -> tuple[np.ndarray, Part]:
        return self._look_at(self.real.validation, "real validation images")

    @cached_property
    def floor(self) -> tuple[np.ndarray, Part]:
        rows = balanced_indices(self.real.train["label"], self.num_floor_images * len(self.real.class_names), seed=0)
        return self._look_at(self.real.train.select(rows), "real training images")

    def _look_at(self, images, what: str) -> tuple[np.ndarray, Part]:
        with tempfile.TemporaryDirectory(prefix="features-") as folder:
            features, _ = extract_features(self.model, images, what, Path(folder) / "of-it", BATCH_SIZE)
            labels = np.asarray(images["label"][:], np.int64)
            return np.array(features), Part(images, labels, np.arange(len(images)), len(images))

    def path(self, each: SetToDraw) -> Path:
        """Return the file with the scores of a set, which depends on real images and classifier."""
        asked = {"inputs": self.identities, "max_eval_samples": self.max_eval_samples}
        return self.work_dir / "scores" / f"{each.name}-{fingerprint(asked)}.json"

    def measure(self, each: SetToDraw) -> tuple[dict[str, float], dict[str, float]]:
        """Return the SCORES of a set, and as a floor those of the same number of real training images per class."""
        path = self.path(each)
        if not path.exists():
            write_record(path, self.compare(each.folder, f"{each.setting.name}, seed {each.seed}"))
        scores = read_record(path)
        return scores["set"], scores["floor"]

    def compare(self, folder: Path, what: str) -> dict[str, dict[str, float]]:
        """Return the SCORES of the `set` in a folder and of the `floor`; `what` names it in the progress bar."""
        of_set = self._look_at(load_synthetic(open_synthetic(str(folder)), self.real.class_names), what)
        return compare_features(of_set, self.reference, self.floor, len(self.real.class_names))


def open_judge(
    real_images: str, classifier_dir: Path, work_dir: Path, num_floor_images: int, max_eval_samples: int | None = None
) -> Judge:
    """Return the judge; the real images' training and validation parts are opened once."""
    logging.set_verbosity_error()  # it would list the head's weights, which features do not need
    logging.disable_progress_bar()
    record, identities = identify_real_images(RealImagesRecord(real_images))
    real = open_real_images(load_real_images(record), max_eval_samples, print, ("train", "validation"))
    pretrained = open_pretrained(str(classifier_dir), None, False, None)
    identities = {"model_name_or_path": pretrained.identity} | identities
    return Judge(real, identities, classifier_dir, work_dir, num_floor_images, max_eval_samples)


def compare_features(
    of_set: tuple[np.ndarray, Part], reference: tuple[np.ndarray, Part], floor: tuple[np.ndarray, Part],
    num_classes: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Return the SCORES of a set and of the floor against the reference, with equal numbers of images per class.

    Each is a pair of features `(n, num_features)` and the part they belong to.
    """
    sides = {"synthetic": of_set, "train": reference, "held_out": floor}
    raw, parts = ({name: side[number] for name, side in sides.items()} for number in (0, 1))
    distance = measure_distances(raw, parts)
    scores = {}
    for name, side, (features, part) in (("set", "synthetic", of_set), ("floor", "floor", floor)):
        real_rows, _ = matched_rows(reference[1].labels, of_set[1].labels)
        _, rows = matched_rows(of_set[1].labels, part.labels)
        precision, recall = precision_and_recall(reference[0][real_rows], features[rows])
        diversity = ClassSums.of(UnitFeatures(features[rows]), part.labels[rows], num_classes).diversity
        values = (
            distance["frechet"][side], distance["kernel"][side], precision, recall, float(np.nanmean(diversity))
        )  # fmt: skip
        scores[name] = dict(zip(SCORES, values))
    return scores


def train_classifiers(
    sets: list[SetToDraw], judge: Judge, num_workers: int, max_steps: int | None = None
) -> dict[SetToDraw, np.ndarray]:
    """Train a classifier on each set alone; return which validation images it gets right, `(n,)` bool.

    It is the `synthetic_only` cell of compare_transfer.py with the demo's settings of stage 1, evaluated on the
    validation part. Finished classifiers are not trained again. `max_steps` defaults to the demo's.
    """
    runner, cells = make_cells(sets, judge, max_steps)
    results = run_cells(runner, list(cells.values()), num_workers, "classifiers")
    shutil.rmtree(judge.work_dir / "stage1", ignore_errors=True)  # not needed once the cells have results
    return {each: unpack_correct(results[cell]) for each, cell in cells.items()}


def make_cells(
    sets: list[SetToDraw], judge: Judge, max_steps: int | None = None
) -> tuple[CellRunner, dict[SetToDraw, Cell]]:
    """Return the runner of the cells, and the cell of each set."""
    settings = StageSettings(max_steps=0, learning_rate=0.0)
    training_args = TrainingArguments(
        output_dir=str(judge.work_dir / "work"), per_device_eval_batch_size=128, lr_scheduler_type="cosine",
        use_cpu=True, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    sources = {(each.setting.name, each.seed): open_synthetic(str(each.folder)) for each in sets}
    runner = CellRunner(
        open_pretrained(str(judge.classifier_dir), None, False, None), judge.real, sources, settings, training_args,
        judge.work_dir, judge.max_eval_samples, shared_inputs=judge.identities,
    )  # fmt: skip
    rows = {each: Row(f"{METHOD}@{each.setting.name}", METHOD, each.setting.name) for each in sets}
    stage_1 = StageSettings(**read_settings(str(CHOSEN_SETTINGS), list(rows.values()), settings)["stage1"])
    stage_1 = replace(stage_1, max_steps=max_steps or stage_1.max_steps)
    return runner, {each: make_cell(row, None, each.seed, None, stage_1, "validation") for each, row in rows.items()}
