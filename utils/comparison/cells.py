"""Runs the cells of a comparison: data opened once, stage 1 trained once and shared, results kept."""

import dataclasses
import gc
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from filelock import FileLock
from transformers import TrainingArguments

from utils.cli.errors import DivergedError, UserError
from utils.cli.records import read_record, write_record
from utils.comparison.grid import Arm, Cell, fingerprint, plan_cell, shots_key
from utils.comparison.statistics import pack_correct
from utils.data.image_set import RealImages
from utils.data.opened_images import open_synthetic
from utils.data.splits import few_shot_indices
from utils.transfer.evaluation import classification_metrics, predict
from utils.transfer.fine_tuning import run_stage
from utils.transfer.image_format import EvalImages, cache_items
from utils.transfer.methods import StagePlan, StageSettings, mix_indices
from utils.transfer.synthetic_images import SyntheticSource, load_synthetic


@dataclass
class CellRunner:
    """What all cells share. `sources` maps (name of a synthetic set, seed) to the set.

    `settings` has what recipes and methods leave open. Several runners, in as many processes, may share `output_dir`:
    each cell and each stage 1 has a lock, and is run once.
    """

    pretrained: str
    hub_options: dict
    image_processor: object
    real: RealImages
    sources: dict[tuple[str, int], SyntheticSource]
    settings: StageSettings
    training_args: TrainingArguments
    output_dir: Path
    max_eval_samples: int | None = None
    allow_missing_classes: bool = False
    _items: dict = field(default_factory=dict)
    _synthetic: dict = field(default_factory=dict)

    def result(self, cell: Cell) -> dict:
        """Return a cell's metrics on its split, from disk when it was run with the same settings before.

        Beside them: which images were right (`unpack_correct`), and the costs of each stage as `<stage>_<cost>`.

        Raises:
            UserError: a stage cannot be run, or diverged; the message names the cell. A cell of a search that diverged
                has a result, with an accuracy of None and the message as `diverged`.
        """
        path = self.path(cell)
        with self._lock(path.stem):
            if not path.exists():
                try:
                    results = self._run(cell)
                except UserError as error:
                    message = f"{error} (in the cell '{cell.title}')"
                    if not isinstance(error, DivergedError) or cell.split != "validation":
                        raise UserError(message) from None
                    results = {"accuracy": None, "diverged": message}
                write_record(path, {"settings": self._cell_settings(cell), "results": results})
                gc.collect()  # a Trainer is full of cycles
        return read_record(path)["results"]

    def path(self, cell: Cell) -> Path:
        """Return the file with a cell's result, which is there once the cell is finished."""
        parts = [cell.arm.label]
        if cell.arm.uses_real:
            parts.append(f"{shots_key(cell.num_shots)}shots")
        if cell.volume is not None:
            parts.append(f"{cell.volume}volume")
        parts += [f"seed{cell.seed}", cell.split, fingerprint(self._cell_settings(cell))]
        return self.output_dir / "cells" / f"{'-'.join(parts)}.json"

    def bridge_dir(self, cell: Cell) -> Path | None:
        """Return the folder with the stage 1 that a cell shares with others; None where it has none."""
        stages = [stage for stage in plan_cell(cell, self.settings) if stage.images == "synthetic"]
        if not stages:
            return None
        settings = self._shared_settings(cell) | self._synthetic_settings(cell)
        settings["stages"] = [dataclasses.asdict(stage) for stage in stages]
        return self.output_dir / "stage1" / f"{cell.arm.synthetic}-seed{cell.seed}-{fingerprint(settings)}"

    def check(self, arms: list[Arm], shots: list[int | None], volumes: list[int | None]) -> None:
        """Check before any training that there are enough images, and that every synthetic set has the classes.

        Raises:
            UserError: one of them does not fit, or a synthetic image is damaged.
        """
        counts = np.bincount(self.real.train["label"])
        smallest = int(counts[counts > 0].min())
        most = max(count or 0 for count in shots)
        if most > smallest:
            raise UserError(f"--num_shots {most}: a class of the real set has only {smallest} training images.")
        most = max(volume or 0 for volume in volumes)
        used = {arm.synthetic for arm in arms if arm.uses_synthetic}
        sources = {(source.name, source.revision): source for (name, _), source in self.sources.items() if name in used}
        for source in sources.values():  # several seeds may share one
            images = self.load_synthetic(source)
            open_synthetic(images, source.name, skip_bad_images=False)
            counts = np.bincount(images["label"])
            smallest = int(counts[counts > 0].min())
            if most > smallest:
                raise UserError(f"--volumes {most}: {source.name} has only {smallest} images of a class.")

    def load_synthetic(self, source: SyntheticSource, volume: int | None = None) -> Dataset:
        """Return the images of a set with the real set's labels, at most `volume` a class."""
        key = source.name, source.revision, volume
        if key not in self._synthetic:
            self._synthetic[key] = load_synthetic(
                source,
                self.real.class_names,
                volume,
                self.hub_options.get("token"),
                allow_missing_classes=self.allow_missing_classes,
            )
        return self._synthetic[key]

    def few_shot_rows(self, num_shots: int | None, seed: int) -> np.ndarray:
        """Return the rows of `real.train` that `load_real_images` gives for these shots; None is all."""
        labels = np.asarray(self.real.train["label"])
        return np.arange(len(labels)) if num_shots is None else few_shot_indices(labels, num_shots, seed)

    def _cell_settings(self, cell: Cell) -> dict:
        """Return all that decides a cell's result."""
        settings = self._shared_settings(cell) | {
            "stages": [dataclasses.asdict(stage) for stage in plan_cell(cell, self.settings)],
            "num_shots": shots_key(cell.num_shots) if cell.arm.uses_real else None,
            "split": cell.split,
            "max_eval_samples": self.max_eval_samples,
            "real_images": self.real.record.to_dict(),
        }
        if cell.arm.uses_synthetic:
            settings |= self._synthetic_settings(cell) | {"mix_ratio": cell.arm.variant.mix_ratio}
        return settings

    def _shared_settings(self, cell: Cell) -> dict:
        return {
            "model": self.pretrained,
            "revision": self.hub_options["revision"],
            "class_names": self.real.class_names,
            "lr_scheduler_type": str(self.training_args.lr_scheduler_type),
            "seed": cell.seed,
        }

    def _synthetic_settings(self, cell: Cell) -> dict:
        source = self.sources[cell.arm.synthetic, cell.seed]
        return {"synthetic_dataset": dataclasses.asdict(source), "volume": cell.volume}

    def _run(self, cell: Cell) -> dict:
        """Train a cell's stages and return metrics, steps, images seen and seconds."""
        work_dir = self.output_dir / "work" / self.path(cell).stem
        shutil.rmtree(work_dir, ignore_errors=True)  # of a run that was killed
        results, folders = {}, {}
        for stage in plan_cell(cell, self.settings):
            parent = self.bridge_dir(cell) if stage.images == "synthetic" else work_dir
            folders[stage.name] = parent / stage.name
            model, done = self._run_stage(cell, stage, folders)
            results |= {f"{stage.name}_{key}": value for key, value in done.summary().items()}
        logits, labels = predict(model, self._eval_items(cell.split))
        shutil.rmtree(work_dir, ignore_errors=True)
        return results | classification_metrics(logits, labels) | pack_correct(logits.argmax(1) == labels)

    def _run_stage(self, cell: Cell, stage: StagePlan, folders: dict[str, Path]):
        start, options = self.pretrained, self.hub_options
        if stage.start is not None:
            start, options = folders[stage.start], {"trust_remote_code": self.hub_options["trust_remote_code"]}
        args = dataclasses.replace(self.training_args, seed=cell.seed)
        folder = folders[stage.name]
        with self._lock(f"{folder.parent.name}-{stage.name}"):
            return run_stage(
                stage, start, self.real.class_names, self._images(cell, stage.images), self.image_processor, args,
                folder, resume=True, **options,
            )  # fmt: skip

    def _lock(self, name: str) -> FileLock:
        folder = self.output_dir / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name}.lock")

    def _images(self, cell: Cell, kind: str) -> Dataset:
        if kind == "real":
            return self.real.train.select(self.few_shot_rows(cell.num_shots, cell.seed))
        synthetic = self.load_synthetic(self.sources[cell.arm.synthetic, cell.seed], cell.volume)
        if kind == "synthetic":
            return synthetic
        real = self._images(cell, "real")
        rows = mix_indices(len(real), len(synthetic), cell.arm.variant.mix_ratio)
        return concatenate_datasets([real, synthetic]).select(rows)

    def _eval_items(self, split: str):
        if split not in self._items:
            self._items[split] = cache_items(EvalImages(getattr(self.real, split), self.image_processor))
        return self._items[split]
