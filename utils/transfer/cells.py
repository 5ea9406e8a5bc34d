"""Runs the cells of a comparison: data loaded once, stage 1 trained once a synthetic set and seed, results kept."""

import dataclasses
import gc
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import TrainingArguments

from utils.cli.errors import UserError
from utils.cli.records import read_record, write_record
from utils.data.real_images import RealImages
from utils.data.splits import few_shot_indices
from utils.transfer.classifiers import load_classifier, save_classifier
from utils.transfer.comparison import ARMS, Arm, Cell, fingerprint
from utils.transfer.fine_tuning import run_stage
from utils.transfer.image_datasets import EvalImages, cache_items, take_spread
from utils.transfer.methods import StagePlan, StageSettings, plan_stages
from utils.transfer.metrics import classification_metrics
from utils.transfer.prediction import predict
from utils.transfer.synthetic_images import SyntheticSource, load_synthetic

BRIDGE_RECORD = "stage1.json"


@dataclass
class CellRunner:
    """What all cells share. `sources` maps (name of a synthetic set, seed) to the set."""

    pretrained: str
    hub_options: dict
    image_processor: object
    real: RealImages
    sources: dict[tuple[str, int], SyntheticSource]
    bridge_settings: StageSettings
    mixup_alpha: float
    training_args: TrainingArguments
    output_dir: Path
    max_eval_samples: int | None = None
    max_synthetic_samples_per_class: int | None = None
    _items: dict = field(default_factory=dict)
    _synthetic: dict = field(default_factory=dict)

    def result(self, cell: Cell) -> dict:
        """Return a cell's metrics on its split, from disk when it was run with the same settings before."""
        settings = self._settings(cell)
        shots = "" if cell.arm.name == "synthetic_only" else f"-{cell.num_shots}shots"
        name = f"{cell.arm.label}{shots}-seed{cell.seed}-{cell.split}-{fingerprint(settings)}.json"
        path = self.output_dir / "cells" / name
        if not path.exists():
            write_record(path, {"settings": settings, "results": self._run(cell)})
            gc.collect()  # a Trainer is full of cycles
        return read_record(path)["results"]

    def check(self, arms: list[Arm], shots: list[int]) -> None:
        """Check before any training that there are enough real images, and that every synthetic set has the classes.

        Raises:
            UserError: one of them does not fit.
        """
        smallest = int(np.bincount(self.real.train["label"]).min())
        if max(shots) > smallest:
            raise UserError(f"--num_shots {max(shots)}: a class of the real set has only {smallest} training images.")
        used = {arm.synthetic for arm in arms if arm.uses_synthetic}
        for key in self.sources:
            if key[0] in used:
                self._load_synthetic(key)

    def few_shot_rows(self, num_shots: int, seed: int) -> np.ndarray:
        """Return the rows of `real.train` that `load_real_images` gives for these shots."""
        return few_shot_indices(np.asarray(self.real.train["label"]), num_shots, seed)

    def _stages(self, cell: Cell) -> list[StagePlan]:
        method, head_init, match_steps = ARMS[cell.arm.name]
        factor = cell.recipe.head_learning_rate_factor
        if factor is None:
            factor = 1.0 if head_init == "keep" else 10.0
        settings = StageSettings(
            cell.recipe.max_steps, cell.recipe.learning_rate, factor, self.mixup_alpha, self.bridge_settings.batch_norm
        )
        return plan_stages(method, self.bridge_settings, settings, head_init, match_steps)

    def _settings(self, cell: Cell) -> dict:
        """Return all that decides a cell's result."""
        settings = {
            "stages": [dataclasses.asdict(stage) for stage in self._stages(cell)],
            "seed": cell.seed,
            "num_shots": None if cell.arm.name == "synthetic_only" else cell.num_shots,
            "split": cell.split,
            "max_eval_samples": self.max_eval_samples,
            "real_images": self.real.record.to_dict(),
            **self._shared_settings(),
        }
        if cell.arm.uses_synthetic:
            settings |= self._synthetic_settings(cell)
        return settings

    def _shared_settings(self) -> dict:
        args = self.training_args
        return {
            "model": self.pretrained,
            "revision": self.hub_options["revision"],
            "batch_size": args.per_device_train_batch_size,
            "weight_decay": args.weight_decay,
            "warmup_steps": args.warmup_steps,
            "lr_scheduler_type": str(args.lr_scheduler_type),
        }

    def _synthetic_settings(self, cell: Cell) -> dict:
        return {
            "synthetic_dataset": dataclasses.asdict(self.sources[cell.arm.synthetic, cell.seed]),
            "max_synthetic_samples_per_class": self.max_synthetic_samples_per_class,
        }

    def _run(self, cell: Cell) -> dict:
        """Train a cell's stages and return metrics, steps, images seen and seconds."""
        results = {}
        start, options = self.pretrained, self.hub_options
        for stage in self._stages(cell):
            if stage.name == "stage1":
                start, options = self._bridge(cell, stage), {}
                results |= read_record(start / BRIDGE_RECORD)
                model = None
            else:
                model, done = self._train(stage, start, self._images(cell, stage.images), cell.seed, options)
                results |= {f"{stage.name}_{key}": value for key, value in done.summary().items()}
        if model is None:
            model = load_classifier(str(start), self.real.class_names, False, cell.seed)
        logits, labels = predict(model, self._eval_items(cell.split))
        return results | classification_metrics(logits, labels)

    def _bridge(self, cell: Cell, stage: StagePlan) -> Path:
        """Return the folder with stage 1 of a synthetic set and seed, trained when it is not there yet."""
        settings = {"stage": dataclasses.asdict(stage), "seed": cell.seed, "class_names": self.real.class_names}
        settings |= self._shared_settings() | self._synthetic_settings(cell)
        name = f"{cell.arm.synthetic}-seed{cell.seed}-{fingerprint(settings)}"
        bridge_dir = self.output_dir / "stage1" / name
        if not (bridge_dir / BRIDGE_RECORD).exists():
            images = self._images(cell, stage.images)
            model, done = self._train(stage, self.pretrained, images, cell.seed, self.hub_options)
            save_classifier(model, self.image_processor, bridge_dir)
            # last: the folder is whole once it is there
            write_record(bridge_dir / BRIDGE_RECORD, {f"stage1_{key}": value for key, value in done.summary().items()})
        return bridge_dir

    def _train(self, stage: StagePlan, start: str | Path, images: Dataset, seed: int, hub_options: dict):
        args = dataclasses.replace(self.training_args, seed=seed)
        work_dir = self.output_dir / "work"
        return run_stage(
            stage, start, self.real.class_names, images, self.image_processor, args, work_dir, **hub_options
        )

    def _images(self, cell: Cell, kind: str) -> Dataset:
        if kind == "synthetic":
            return self._load_synthetic((cell.arm.synthetic, cell.seed))
        images = self.real.train.select(self.few_shot_rows(cell.num_shots, cell.seed))
        if kind == "both":
            images = concatenate_datasets([images, self._load_synthetic((cell.arm.synthetic, cell.seed))])
        return images

    def _load_synthetic(self, key: tuple[str, int]) -> Dataset:
        if key not in self._synthetic:
            self._synthetic[key] = load_synthetic(
                self.sources[key],
                self.real.class_names,
                self.max_synthetic_samples_per_class,
                self.hub_options.get("token"),
            )
        return self._synthetic[key]

    def _eval_items(self, split: str):
        if split not in self._items:
            images = take_spread(getattr(self.real, split), self.max_eval_samples)
            self._items[split] = cache_items(EvalImages(images, self.image_processor))
        return self._items[split]
