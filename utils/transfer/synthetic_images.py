"""A synthetic set for fine-tuning: its record, its labels in the real set's order, and what its token saw."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfFileSystem

from utils.cli.contents import cached_digest, content_digest, list_files
from utils.cli.errors import UserError
from utils.cli.records import GENERATION_CONFIG, read_record
from utils.data.class_names import join_names, match_labels
from utils.hub.image_datasets import check_path, load_image_dataset
from utils.hub.repositories import Source, open_source

FLAG = "--synthetic_dataset"
HOW_TO_ALLOW = "--allow_missing_classes accepts a set that lacks some classes"
NUM_THREADS = 16  # they mostly wait for the Hub
ROWS_AT_A_TIME = 100  # of a stream; the size of a row group of generate_synthetic.py


@dataclass(frozen=True)
class SyntheticSource:
    """A synthetic set whose images are not open yet: name, pinned commit and `generation_config.json`."""

    name: str
    revision: str | None
    record: dict


def open_synthetic(name: str, revision: str | None = None, token: str | None = None) -> SyntheticSource:
    """Read the record of a synthetic set, a local folder or a dataset id.

    Raises:
        UserError: the set does not exist, or has no record or fewer images than its record says.
    """
    source = open_source(name, FLAG, "dataset", revision, token)
    record = read_record(source.file(GENERATION_CONFIG, "a synthetic set of generate_synthetic.py"))
    # the record is uploaded with the first shards, and gets num_redraws once all shards are there
    if source.is_local or ("num_redraws" not in record and source.is_reachable()):
        _refuse_unfinished(name, record, partial(_count_rows, source))
    return SyntheticSource(name, source.revision, record)


def identify_synthetic(source: SyntheticSource, max_samples_per_class: int | None = None) -> str:
    """Return what identifies the images of `load_synthetic`: the commit, or their number and hash.

    With a limit it stays the same when a folder grows, as the first images of each class do.

    Raises:
        UserError: the set is gone, or one of its files is damaged.
    """
    repository = open_source(source.name, FLAG, "dataset", source.revision)
    if not repository.is_local:
        return f"commit {source.revision}"
    names = [name for name in list_files(source.name) if name.endswith(".parquet")]
    paths = [Path(source.name, name) for name in names]
    with repository.reading("its images cannot be read", also=(pa.ArrowInvalid,)):
        if max_samples_per_class is None or not all("class_index" in pq.read_schema(path).names for path in paths):
            num_rows = sum(pq.read_metadata(path).num_rows for path in paths)
            return f"{num_rows:,} images, sha256 {content_digest(source.name, names)}"
        what = f"first {max_samples_per_class} of a class"
        read = partial(_read_first_images, paths, max_samples_per_class)
        return f"{what}, sha256 {cached_digest(source.name, names, read, what)}"


def _read_first_images(paths: list[Path], limit: int) -> Iterator[bytes]:
    """Yield class, index in the class and encoded bytes of the images within a limit, in order."""
    for path in paths:
        with pq.ParquetFile(path) as file:
            label = Features.from_arrow_schema(file.schema_arrow)["label"]
            for batch in file.iter_batches(ROWS_AT_A_TIME, columns=["image", "label", "class_index"]):
                for row in batch.filter(pc.field("class_index") < limit).to_pylist():
                    yield f"{label.int2str(row['label'])}\n{row['class_index']}\n".encode()
                    yield row["image"]["bytes"]


def num_images(source: SyntheticSource, max_samples_per_class: int | None = None) -> int | None:
    """Return how many images `load_synthetic` returns, from the record alone; None if it does not say."""
    num_all, num_per_class = source.record.get("num_images"), source.record.get("num_images_per_class")
    if num_all is None or num_per_class is None:
        return None
    return num_all // num_per_class * min(num_per_class, max_samples_per_class or num_per_class)


def load_synthetic(
    source: SyntheticSource, class_names: list[str], max_samples_per_class: int | None = None,
    token: str | None = None, *, allow_missing_classes: bool = False, streaming: bool = False,
) -> Dataset | IterableDataset:  # fmt: skip
    """Return the images with the columns `image` and `label`, in the set's order, labels as in `class_names`.

    `max_samples_per_class` keeps the images with the lowest `class_index`, so smaller limits are subsets of larger
    ones; for a set without that column, the first images of each class. `allow_missing_classes` accepts a set that
    lacks some of `class_names`, or images of them. With `streaming` nothing is downloaded in advance; the record then
    says which classes have images (`settings.classes`), and if it does not, this is not checked.

    Raises:
        UserError: the set cannot be loaded or is incomplete; its classes are not `class_names` (the message lists those
            renamed, missing, extra or empty); a stream with a limit has no `class_index`.
    """
    load = _load_stream if streaming else _load_whole
    repository = Source(source.name, FLAG, "dataset", source.revision, token or None)
    images, with_images = load(repository, source.record, class_names, max_samples_per_class, allow_missing_classes)
    empty = [name for name in class_names if name not in with_images]
    if empty and not allow_missing_classes:
        raise UserError(f"{FLAG} {source.name}: has no images of {join_names(empty)}; {HOW_TO_ALLOW}.")
    return images


def count_leaked_images(record: dict, train_indices: np.ndarray) -> int:
    """Return how many rows of the real train split outside `train_indices` the style token saw."""
    seen = record.get("train_indices") or []
    return len(set(seen) - set(train_indices.tolist()))


def _count_rows(source: Source) -> int:
    """Return how many rows a set's parquet files have, by their footers; a damaged file counts as none."""
    filesystem = LocalFileSystem() if source.is_local else HfFileSystem(token=source.token)
    root = source.name if source.is_local else f"datasets/{source.name}@{source.revision}"

    def num_rows(path: str) -> int:
        try:
            return pq.read_metadata(path, filesystem=filesystem).num_rows
        except pa.ArrowInvalid:
            return 0

    with source.reading("its images cannot be counted"), ThreadPoolExecutor(NUM_THREADS) as threads:
        return sum(threads.map(num_rows, (path for path in filesystem.find(root) if path.endswith(".parquet"))))


def _refuse_unfinished(name: str, record: dict, count: Callable[[], int]) -> None:
    """Raise if there are fewer images than the record says; records of old sets do not say."""
    expected = record.get("num_images")
    if expected is not None and (there := count()) < expected:
        raise UserError(
            f"{FLAG} {name}: incomplete, with {there:,} of {expected:,} images; wait until all are made and "
            "uploaded, or run the command that makes the set again: it resumes where it stopped."
        )


def _load_whole(
    repository: Source, record: dict, class_names: list[str], limit: int | None, allow_missing: bool
) -> tuple[Dataset, set[str]]:
    """Return the memory-mapped images, and the classes that have some."""
    images = load_image_dataset(repository, split="train")
    _refuse_unfinished(repository.name, record, lambda: len(images))
    real_labels, _ = _match_classes(repository.name, images.features, class_names, allow_missing)
    table = images.data  # whole columns of it decode no image and make no list
    labels = real_labels[table.column("label").to_numpy()]
    images = images.select_columns("image").add_column("label", labels, feature=ClassLabel(names=class_names))
    if limit is not None:
        if "class_index" in table.column_names:
            kept = np.flatnonzero(table.column("class_index").to_numpy() < limit)
        else:
            kept = np.sort(np.concatenate([np.flatnonzero(labels == label)[:limit] for label in np.unique(labels)]))
        images, labels = images.select(kept), labels[kept]
    return images, {class_names[label] for label in np.unique(labels)}


def _load_stream(
    repository: Source, record: dict, class_names: list[str], limit: int | None, allow_missing: bool
) -> tuple[IterableDataset, set[str]]:
    """Return a stream of the images, and the classes that have some according to the record."""
    if not repository.is_local and not repository.is_reachable():
        raise UserError(
            f"--streaming: {repository.name} cannot be streamed, as the Hub cannot be reached; leave the flag out to "
            "use the cache."
        )
    if repository.is_local:
        check_path(repository)
    # pyarrow skips rows that do not match the filter, and whole row groups without reading them
    options = {} if limit is None else {"filters": [("class_index", "<", limit)]}
    with repository.reading("cannot be loaded", also=(DatasetsError, ValueError, RuntimeError)):
        images = load_dataset(
            repository.name, split="train", streaming=True, revision=repository.revision, token=repository.token,
            **options,
        )  # fmt: skip
    real_labels, places = _match_classes(repository.name, images.features, class_names, allow_missing)
    if limit is not None and "class_index" not in images.features:
        raise UserError(
            f"--max_synthetic_samples_per_class {limit}: '{repository.name}' has no column 'class_index', which "
            "limiting a stream needs; leave out this flag or --streaming."
        )
    features = Features({"image": Image(), "label": ClassLabel(names=class_names)})
    images = images.select_columns(list(features)).with_format("arrow")  # as tables, so no image is decoded here
    images = images.map(
        _relabel, fn_kwargs={"real_labels": real_labels}, batched=True, batch_size=ROWS_AT_A_TIME, features=features
    )
    with_images = record.get("settings", {}).get("classes", places)  # in the set's spelling, like its labels
    return images.with_format(None), {class_names[places[name]] for name in with_images if name in places}


def _relabel(table: pa.Table, real_labels: np.ndarray) -> pa.Table:
    labels = pa.array(real_labels[table["label"].to_numpy()])
    return table.set_column(table.schema.get_field_index("label"), "label", labels)


def _match_classes(
    name: str, features: Features, class_names: list[str], allow_missing: bool
) -> tuple[np.ndarray, dict[str, int]]:
    """Return the index in `class_names` of each label of a set, as an array and by name."""
    if not isinstance(features.get("label"), ClassLabel) or "image" not in features:
        raise UserError(f"{FLAG} {name}: has no 'image' and 'label' (ClassLabel) columns.")
    names = features["label"].names
    places = match_labels(names, class_names, f"{FLAG} {name}:", "the synthetic set", allow_missing, HOW_TO_ALLOW)
    return np.array(list(places.values())), places
