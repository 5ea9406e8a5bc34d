"""Cells one after another, or side by side in processes of their own."""

import dataclasses
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from utils.cli.errors import UserError
from utils.comparison.cells import CellRunner
from utils.comparison.grid import Cell

_runner: CellRunner | None = None  # of a worker process


def run_cells(runner: CellRunner, cells: list[Cell], num_workers: int, description: str) -> dict[Cell, dict]:
    """Return the result of every cell; equal cells are run once, finished ones not again.

    Raises:
        UserError: a cell cannot be run; no other is begun then.
    """
    cells = list(dict.fromkeys(cells))
    results = {cell: runner.result(cell) for cell in cells if runner.path(cell).exists()}
    waiting = [cell for cell in cells if cell not in results]
    with tqdm(total=len(cells), initial=len(results), unit="cell", desc=description) as progress:
        if num_workers == 1:
            for cell in waiting:
                progress.set_postfix_str(cell.title)
                results[cell] = runner.result(cell)
                progress.update()
        elif waiting:
            for cell, result in _run_side_by_side(runner, waiting, min(num_workers, len(waiting))):
                progress.set_postfix_str(cell.title)
                results[cell] = result
                progress.update()
    return results


def _run_side_by_side(runner: CellRunner, cells: list[Cell], num_workers: int) -> Iterator[tuple[Cell, dict]]:
    """Yield (cell, result) as they come."""
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
                f"--num_workers {num_workers}: a worker process was killed, perhaps for want of memory; give fewer, "
                "finished cells are kept."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def order_for_workers(runner: CellRunner, cells: list[Cell]) -> list[Cell]:
    """Return the cells so that few wait for each other: one for each stage 1, those without one, the others."""
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
    """Let this process see one of `gpus` only, before it uses any: with several, the Trainer would split batches."""
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]


def _start_worker(runner: CellRunner, numbers, num_workers: int, gpus: list[str], verbosity: int) -> None:
    global _runner
    _runner = runner
    logging.set_verbosity(verbosity)
    logging.disable_progress_bar()  # theirs would run across that of the cells
    use_one_gpu(numbers.get(), gpus)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_workers))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent says nothing to its workers, which would wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_in_worker(cell: Cell) -> dict:
    return _runner.result(cell)
