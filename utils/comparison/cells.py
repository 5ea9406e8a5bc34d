"""The cells of a comparison: data opened once, stage 1 trained once and shared, results kept, cells in parallel."""

import atexit
import dataclasses
import gc
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers import TrainingArguments
from transformers.utils import logging

from utils.cli.errors import DivergedError, UserError
from utils.cli.records import read_record, write_record
from utils.cli.threads import num_threads
from utils.comparison.grid import Cell, Row, fingerprint, plan_cell, shots_key
from utils.comparison.statistics import pack_correct
from utils.data.folds import Folds
from utils.data.image_set import PLACES, RealImages, RealImagesRecord
from utils.data.opened_images import open_synthetic
from utils.data.real_images import identify_real_images
from utils.data.splits import balanced_indices
from utils.transfer.evaluation import classification_metrics
from utils.transfer.guard import guard_stages
from utils.transfer.image_cache import cache_images, describe_cache
from utils.transfer.image_format import EvalImages, read_image_format
from utils.transfer.methods import StagePlan, StageSettings
from utils.transfer.run_method import images_per_class, run_method, select_images
from utils.transfer.stage import Pretrained
from utils.transfer.synthetic_images import SyntheticSource, describe_limit, identify_synthetic, load_synthetic

MAX_BYTES_IN_MEMORY = 2**30  # of images that cells are evaluated on repeatedly
_runner: "CellRunner | None" = None  # of a worker process


@dataclass
class CellRunner:
    """What all cells share. `sources` maps (name of a synthetic set, seed), with folds also the fold, to the set.

    With `folds`, all images of `real` are in its training part, and each cell tests on a fold.
    `settings` has the values that recipes and methods do not set, `shared_inputs` what identified the contents of model
    and real images before these were loaded. Runners in several processes may share `output_dir`: each cell and each
    stage 1 has a lock, and is run once. `classifier` names `pretrained` if there are several. `caches_images` is None
    until `decode_once` has decided.
    """

    pretrained: Pretrained
    real: RealImages
    sources: dict[tuple, SyntheticSource]
    settings: StageSettings
    training_args: TrainingArguments
    output_dir: Path
    max_eval_samples: int | None = None
    allow_missing_classes: bool = False
    shared_inputs: dict[str, str] = field(default_factory=dict)
    classifier: str | None = None
    folds: Folds | None = None
    caches_images: bool | None = False
    _items: dict = field(default_factory=dict)
    _synthetic: dict = field(default_factory=dict)
    _identities: dict = field(default_factory=dict)

    def result(self, cell: Cell) -> dict:
        """Return a cell's metrics on its split, from disk if it was run with the same settings before.

        Also returned: which images were right (`unpack_correct`), and the costs of each stage as `<stage>_<cost>`.

        Raises:
            UserError: a stage cannot be run, or diverged; the message names the cell. In a search, a cell that diverged
                has a result, with an accuracy of None and the message as `diverged`.
        """
        path = self.path(cell)
        with self._lock(path.stem):
            if not path.exists():
                try:
                    results = self._run(cell)
                    self._check_unchanged(cell)
                except UserError as error:
                    message = f"{error} (in the cell '{cell.title}'{self.classifier_suffix})"
                    if not isinstance(error, DivergedError) or cell.split != "validation":
                        raise UserError(message) from None
                    results = {"accuracy": None, "diverged": message}
                write_record(path, {"settings": self._cell_settings(cell), "results": results})
                gc.collect()  # a Trainer has reference cycles
        return read_record(path)["results"]

    @property
    def classifier_suffix(self) -> str:
        """The end of a message: ` of <classifier>` if there are several."""
        return f" of {self.classifier}" if self.classifier else ""

    def release_images(self) -> None:
        """Free the memory of the images that cells are evaluated on."""
        self._items.clear()

    def plan(self, cell: Cell, weight: float = 1.0) -> list[StagePlan]:
        """Return the stages of a cell; `weight` is the weight of synthetic images, if a guard has measured it."""
        return plan_cell(cell, self.settings, self._images_per_class, weight)

    @cached_property
    def _images_per_class(self) -> float:
        return images_per_class(self.real.train.select(self.few_shot_rows(None, 0, self.first_fold)))

    @property
    def first_fold(self) -> str | None:
        return self.folds and self.folds.names[0]

    def path(self, cell: Cell) -> Path:
        """Return the file with a cell's result, which exists once the cell is finished."""
        parts = [cell.row.label]
        if cell.row.method.uses_real:
            parts.append(f"{shots_key(cell.num_shots)}shots")
        if cell.row.volume is not None:
            parts.append(f"{cell.row.volume}volume")
        parts.append(f"seed{cell.seed}")
        if cell.fold is not None:
            parts.append(f"fold{cell.fold.replace('/', 'of')}")
        parts += [cell.split, fingerprint(self._cell_settings(cell))]
        return self.output_dir / "cells" / f"{'-'.join(parts)}.json"

    def bridge_dir(self, cell: Cell) -> Path | None:
        """Return the folder with the stage 1 that a cell shares with others, or None without a stage 1."""
        stages = [stage for stage in self.plan(cell) if stage.images == "synthetic"]
        if not stages:
            return None
        settings = self._shared_settings(cell) | self._synthetic_settings(cell)
        settings["stages"] = [stage.to_dict() for stage in stages]
        if cell.row.method.alignment is not None:  # stage 1 sees the cell's real images too
            settings |= self._real_settings(cell)
        return self.output_dir / "stage1" / f"{cell.row.synthetic}-seed{cell.seed}-{fingerprint(settings)}"

    def check(self, rows: list[Row], shots: list[int | None], volumes: list[int | None]) -> None:
        """Check before training that there are enough images, and that every synthetic set has the classes.

        Raises:
            UserError: there are too few images, classes differ, or a synthetic image is damaged.
        """
        draws = {(seed, *fold) for _, seed, *fold in self.sources}
        trained = [self.real.train.select(self.few_shot_rows(None, *draw)) for draw in draws]
        smallest = min(map(_smallest_class, trained))
        most = max(count or 0 for count in shots)
        if most > smallest:
            raise UserError(f"--num_shots {most}: a class of the real set has only {smallest} training images.")
        most = max(volume or 0 for volume in volumes)
        for source in self._used_sources(rows):
            images = self.load_synthetic(source)
            open_synthetic(images, source.name, skip_bad_images=False)
            smallest = _smallest_class(images)
            if most > smallest:
                raise UserError(f"--volumes {most}: {source.name} has only {smallest} images of a class.")

    def describe_limits(self, rows: list[Row], volumes: list[int | None]) -> list[str]:
        """Return warnings about volumes that take images from sets with more images of rare classes."""
        lines = [describe_limit(source, volume) for source in self._used_sources(rows) for volume in volumes]
        return [line for line in lines if line is not None]

    def decode_once(self, rows: list[Row], volumes: list[int | None]) -> str | None:
        """Decode all training images if `caches_images` is true, or None and they fit; return a line if so, else None.

        Raises:
            UserError: `caches_images` is true, and they do not fit on the disk.
        """
        if self.caches_images is False:
            return None
        sets = [self.real.train] if any(row.method.uses_real for row in rows) else []
        sets += [self.load_synthetic(source, volume) for source in self._used_sources(rows) for volume in volumes]
        line = describe_cache(sets, self._crop_size, is_asked_for=bool(self.caches_images))
        self.caches_images = line is not None
        for images in sets:
            self._training_images(images)
        return line

    def _used_sources(self, rows: list[Row]) -> list[SyntheticSource]:
        """Return the synthetic sets of these rows, each once; several seeds may share one."""
        used = {row.synthetic for row in rows if row.method.uses_synthetic}
        sources = [source for (name, *_), source in self.sources.items() if name in used]
        return list({source.key: source for source in sources}.values())

    @property
    def _crop_size(self) -> tuple[int, int] | None:
        return read_image_format(self.pretrained.image_processor).crop_size

    def _training_images(self, images: Dataset) -> Dataset:
        """Return the images for training, with decoded images if these are cached."""
        return cache_images(images, self._crop_size) if self.caches_images else images

    def load_synthetic(self, source: SyntheticSource, volume: int | None = None) -> Dataset:
        """Return the images of a set with the real set's labels, at most `volume` per class."""
        key = *source.key, volume
        if key not in self._synthetic:
            self.synthetic_identity(source, volume)  # before it is loaded
            self._synthetic[key] = load_synthetic(
                source, self.real.class_names, volume, self.pretrained.hub_options.get("token"),
                allow_missing_classes=self.allow_missing_classes,
            )  # fmt: skip
        return self._synthetic[key]

    def few_shot_rows(self, num_shots: int | None, seed: int, fold: str | None = None) -> np.ndarray:
        """Return the rows of `real.train` that `load_real_images` selects for these shots; None is all.

        With a fold, they are from its training part.
        """
        labels = np.asarray(self.real.train["label"])
        rows = np.arange(len(labels)) if fold is None else self.folds.split(fold, seed)[0]
        return rows[balanced_indices(labels[rows], num_shots and num_shots * len(np.unique(labels[rows])), seed)]

    def _cell_settings(self, cell: Cell) -> dict:
        """Return everything that determines a cell's result."""
        settings = self._shared_settings(cell) | {
            "stages": [stage.to_dict() for stage in self.plan(cell)],
            "split": cell.split,
            "max_eval_samples": self.max_eval_samples,
            **self._real_settings(cell),
        }
        if {"recalibrate", "domain"} & {stage["settings"]["batch_norm"] for stage in settings["stages"]}:
            settings["statistics_batch_size"] = self.training_args.per_device_eval_batch_size
        if cell.row.method.uses_synthetic:
            settings |= self._synthetic_settings(cell) | {"mix_ratio": cell.row.method.mix_ratio}
        return settings

    def _record(self, cell: Cell) -> RealImagesRecord:
        return self.real.record if cell.fold is None else self.folds.record(cell.fold, cell.seed)

    def _shared_settings(self, cell: Cell) -> dict:
        precision = self.training_args.mixed_precision
        settings = {
            "model": self.pretrained.name, "revision": self.pretrained.hub_options["revision"], "seed": cell.seed,
            "class_names": self.real.class_names, "lr_scheduler_type": str(self.training_args.lr_scheduler_type),
            **self._contents(cell, ["model_name_or_path"]),
        }  # fmt: skip
        # keeps the cells of earlier versions, which had no precision
        return settings if precision == "no" else settings | {"mixed_precision": precision}

    def _real_settings(self, cell: Cell) -> dict:
        num_shots = shots_key(cell.num_shots) if cell.row.method.uses_real else None
        return {
            "num_shots": num_shots, "real_images": self._record(cell).to_dict(), **self._contents(cell, PLACES),
        }  # fmt: skip

    def _synthetic_settings(self, cell: Cell) -> dict:
        source = self.sources[cell.source]
        # not the record of a folder, as it changes when the set grows, and its first images do not
        described = source.to_dict() if source.revision else self.inputs(cell)["synthetic_dataset"]
        return {"synthetic_dataset": described, "volume": cell.row.volume}

    def inputs(self, cell: Cell) -> dict[str, str]:
        """Return what identifies the contents of a cell's inputs, by flag, as of the first look."""
        if not cell.row.method.uses_synthetic:
            return self.shared_inputs
        source = self.sources[cell.source]
        return self.shared_inputs | {"synthetic_dataset": self.synthetic_identity(source, cell.row.volume)}

    def synthetic_identity(self, source: SyntheticSource, volume: int | None) -> str:
        """Return what identifies a set's images, at most `volume` per class, as of the first look."""
        key = *source.key, volume
        if key not in self._identities:
            self._identities[key] = identify_synthetic(source, volume)
        return self._identities[key]

    def _identify(self, cell: Cell) -> dict[str, str]:
        _, inputs = identify_real_images(self.real.record, self.pretrained.hub_options.get("token"))
        inputs["model_name_or_path"] = self.pretrained.identity
        if cell.row.method.uses_synthetic:
            source = self.sources[cell.source]
            inputs["synthetic_dataset"] = identify_synthetic(source, cell.row.volume)
        return inputs

    def _contents(self, cell: Cell, names: Iterable[str]) -> dict[str, str]:
        """Return entries for the inputs that are folders; commits of others are in the settings already."""
        inputs = self.inputs(cell)
        return {
            f"{name}_contents": inputs[name]
            for name in names
            if name in inputs and not inputs[name].startswith("commit ")
        }

    def _check_unchanged(self, cell: Cell) -> None:
        before, now = self.inputs(cell), self._identify(cell)
        if changed := [f"--{name} was {before[name]}, now {now[name]}" for name in now if before[name] != now[name]]:
            raise UserError(f"{'; '.join(changed)}: changed during the run; run the same command again.")

    def _run(self, cell: Cell) -> dict:
        """Train a cell's stages and return metrics, steps, images seen and seconds."""
        work_dir = self.output_dir / "work" / self.path(cell).stem
        shutil.rmtree(work_dir, ignore_errors=True)  # of a run that was killed
        method, shared_dir = cell.row.method, self.bridge_dir(cell)
        real, synthetic = None, None
        if method.uses_real:
            rows = self.few_shot_rows(cell.num_shots, cell.seed, cell.fold)
            real = self._training_images(self.real.train).select(rows)
        if method.uses_synthetic:
            synthetic = self._training_images(self.load_synthetic(self.sources[cell.source], cell.row.volume))
        planned, images, guard = self.plan(cell), select_images(method, real, synthetic), {}
        stages = planned
        if planned[-1].guarded_by_probe:
            loading = self.training_args.per_device_eval_batch_size, self.training_args.dataloader_num_workers
            stages, guard = guard_stages(
                partial(self.plan, cell), images["replayed"], self.pretrained, self.real.class_names, cell.seed,
                *loading,
            )  # fmt: skip
        done = run_method(
            stages, images, self._eval_items(cell),
            self.pretrained, self.real.class_names, dataclasses.replace(self.training_args, seed=cell.seed),
            lambda stage: shared_dir if stage.images == "synthetic" and stage in planned else work_dir,
            resume=True, inputs=self.inputs(cell),
            exclusive=lambda folder: self._lock(f"{folder.parent.name}-{folder.name}"),
        )  # fmt: skip
        shutil.rmtree(work_dir, ignore_errors=True)
        metrics = classification_metrics(done.logits, done.labels)
        return guard | done.results | metrics | pack_correct(done.logits.argmax(1) == done.labels)

    def _lock(self, name: str) -> FileLock:
        folder = self.output_dir / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name}.lock")

    def _eval_items(self, cell: Cell) -> EvalImages | Subset | list[dict]:
        """Return the images to evaluate a cell on; their items are in memory if these are not too large."""
        split = cell.split if cell.fold is None else "train"
        if split not in self._items:
            images = EvalImages(getattr(self.real, split), self.pretrained.image_processor)
            num_bytes = len(images) * images[0]["pixel_values"].nbytes
            self._items[split] = list(images) if num_bytes <= MAX_BYTES_IN_MEMORY else images
        items = self._items[split]
        if cell.fold is None:
            return items
        _, tested = self.folds.split(cell.fold, cell.seed)
        return [items[place] for place in tested] if isinstance(items, list) else Subset(items, tested)


def _smallest_class(images: Dataset) -> int:
    """Return the number of images of the smallest class that has any."""
    return min(Counter(images["label"]).values())


def run_cells(runner: CellRunner, cells: list[Cell], num_workers: int, description: str) -> dict[Cell, dict]:
    """Return the result of every cell; equal cells are run once, finished ones not again.

    Raises:
        UserError: a cell cannot be run; then no other is started.
    """
    cells = list(dict.fromkeys(cells))
    results = {cell: runner.result(cell) for cell in cells if runner.path(cell).exists()}
    waiting = [cell for cell in cells if cell not in results]
    with tqdm(
        total=len(cells), initial=len(results), unit="cell", desc=f"{description}{runner.classifier_suffix}"
    ) as progress:
        if num_workers == 1:
            for cell in waiting:
                progress.set_postfix_str(cell.title)
                results[cell] = runner.result(cell)
                progress.update()
        elif waiting:
            for cell, result in _run_in_parallel(runner, waiting, min(num_workers, len(waiting))):
                progress.set_postfix_str(cell.title)
                results[cell] = result
                progress.update()
    return results


def _run_in_parallel(runner: CellRunner, cells: list[Cell], num_workers: int) -> Iterator[tuple[Cell, dict]]:
    """Yield (cell, result) in the order of completion."""
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used CUDA cannot use it
    numbers = context.SimpleQueue()
    for number in range(num_workers):
        numbers.put(number)
    fresh = dataclasses.replace(runner, _items={}, _synthetic={})
    arguments = fresh, numbers, num_workers, visible_gpus(), logging.get_verbosity()
    with ProcessPoolExecutor(num_workers, context, _start_worker, arguments) as pool:
        futures = {pool.submit(_run_in_worker, cell): cell for cell in order_for_workers(runner, cells)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                f"--num_workers {num_workers}: a worker process was killed, perhaps out of memory; give fewer workers. "
                "Finished runs are kept."
            ) from None
        except KeyboardInterrupt:  # a cell may take hours
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def order_for_workers(runner: CellRunner, cells: list[Cell]) -> list[Cell]:
    """Return the cells in an order with little waiting: one per stage 1, then those without one, then the rest."""
    seen, keys = Counter(), {}
    for cell in cells:
        bridge_dir = runner.bridge_dir(cell)
        keys[cell] = 0.5 if bridge_dir is None else seen[bridge_dir]
        seen[bridge_dir] += 1
    return sorted(cells, key=keys.get)


def visible_gpus() -> list[str]:
    """Return the GPUs of this process as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]


def use_one_gpu(number: int, gpus: list[str]) -> None:
    """Let this process see only one of `gpus`, before it uses any: with several, the Trainer would split batches."""
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]


def _start_worker(runner: CellRunner, numbers, num_workers: int, gpus: list[str], verbosity: int) -> None:
    global _runner
    _runner = runner
    logging.set_verbosity(verbosity)
    logging.disable_progress_bar()  # they would interfere with the bar of the cells
    use_one_gpu(numbers.get(), gpus)
    torch.set_num_threads(num_threads(num_workers))
    gc.freeze()  # imported objects: else each collection, of which a stage has several, takes half a second
    atexit.register(gc.unfreeze)  # else a library reports leaks
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End with the parent: a killed one does not tell its workers, which would wait forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_in_worker(cell: Cell) -> dict:
    return _runner.result(cell)
