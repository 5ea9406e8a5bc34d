"""A synthetic set for fine-tuning: its record, its labels in the real set's order, and what its token has seen."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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

from utils.cli.contents import content_digest, list_files, remembered_digest
from utils.cli.errors import UserError
from utils.cli.records import GENERATION_CONFIG, read_record
from utils.data.class_names import join_names, match_labels
from utils.data.left_out import LeftOut, read_left_out
from utils.hub.data_sets import check_path, load_data_set
from utils.hub.repositories import Source, open_source

FLAG = "--synthetic_dataset"
HOW_TO_ALLOW = "--allow_missing_classes takes a set without some of the classes"
NUM_THREADS = 16  # they wait for the Hub
ROWS_AT_A_TIME = 100  # of a stream: as many as generate_synthetic.py puts into a row group


@dataclass(frozen=True)
class SyntheticSource:
    """A synthetic set before its images are opened: name, pinned commit, its `generation_config.json`, and what of its
    images is not to be trained on.
    """

    name: str
    revision: str | None
    record: dict
    left_out: LeftOut = field(default_factory=LeftOut)


def open_synthetic(
    name: str, revision: str | None = None, token: str | None = None, use_rejected: bool = False
) -> SyntheticSource:
    """Read the record of a synthetic set, a local folder or a data set id, and, unless `use_rejected`, its verdicts.

    Raises:
        UserError: there is no such set, it has no record, or fewer images than its record counts; its verdicts are
            about other images.
    """
    source = open_source(name, FLAG, "dataset", revision, token)
    record = read_record(source.file(GENERATION_CONFIG, "a synthetic set of generate_synthetic.py"))
    # Into a repository the record comes with the first shards; counted redraws come into it once all shards are there
    if source.is_local or ("num_redraws" not in record and source.is_reachable()):
        _refuse_unfinished(name, record, partial(_count_rows, source))
    left_out = LeftOut() if use_rejected else read_left_out(source, record.get("fingerprint"))
    return SyntheticSource(name, source.revision, record, left_out)


def identify_synthetic(source: SyntheticSource, max_samples_per_class: int | None = None) -> str:
    """Return what tells the images that `load_synthetic` gives from others: the commit, or their number and hash.

    With a limit it stays the same when a folder grows: the first images of each class do.

    Raises:
        UserError: the set is gone, or a file of it is torn.
    """
    repository = open_source(source.name, FLAG, "dataset", source.revision)
    if not repository.is_local:
        return f"commit {source.revision}"
    names = [name for name in list_files(source.name) if name.endswith(".parquet")]
    paths = [Path(source.name, name) for name in names]
    with repository.reading("its images cannot be read", also=(pa.ArrowInvalid,)):
        without = f", {source.left_out.identity}" if source.left_out else ""
        if max_samples_per_class is None or not all("class_index" in pq.read_schema(path).names for path in paths):
            num_rows = sum(pq.read_metadata(path).num_rows for path in paths)
            return f"{num_rows:,} images, sha256 {content_digest(source.name, names)}{without}"
        what = f"first {max_samples_per_class} of a class"
        read = partial(_read_first_images, paths, max_samples_per_class)
        return f"{what}, sha256 {remembered_digest(source.name, names, read, what)}{without}"


def _read_first_images(paths: list[Path], limit: int) -> Iterator[bytes]:
    """Yield class, place in it and encoded bytes of the images that a limit keeps, in order."""
    for path in paths:
        with pq.ParquetFile(path) as file:
            label = Features.from_arrow_schema(file.schema_arrow)["label"]
            for batch in file.iter_batches(ROWS_AT_A_TIME, columns=["image", "label", "class_index"]):
                for row in batch.filter(pc.field("class_index") < limit).to_pylist():
                    yield f"{label.int2str(row['label'])}\n{row['class_index']}\n".encode()
                    yield row["image"]["bytes"]


def num_images(source: SyntheticSource, max_samples_per_class: int | None = None) -> int | None:
    """Return how many images `load_synthetic` gives, from the record alone; None where it does not count them."""
    num_all, num_per_class = source.record.get("num_images"), source.record.get("num_images_per_class")
    if num_all is None or num_per_class is None:
        return None
    limit = min(num_per_class, max_samples_per_class or num_per_class)
    num_left_out = sum(int((indices < limit).sum()) for indices in source.left_out.by_class.values())
    return num_all // num_per_class * limit - num_left_out


def load_synthetic(
    source: SyntheticSource, class_names: list[str], max_samples_per_class: int | None = None,
    token: str | None = None, *, allow_missing_classes: bool = False, streaming: bool = False,
) -> Dataset | IterableDataset:  # fmt: skip
    """Return the images with the columns `image` and `label`, in the set's order, labels as in `class_names`.

    `max_samples_per_class` keeps those with the lowest `class_index`: they are among those of any higher limit. A set
    without that column gives the first of each class. `allow_missing_classes` takes a set that lacks some of
    `class_names`, or has no images of them. With `streaming` nothing is downloaded ahead; which classes have images is
    then what the record says (`settings.classes`), and where it says nothing only the names are compared.

    What `source.left_out` names is left out of these; a limit counts it.

    Raises:
        UserError: the set cannot be loaded, or is not whole; its classes are not `class_names` (the message lists what
            is renamed, missing, extra or empty); a stream is to be limited and has no `class_index`.
    """
    load = _load_stream if streaming else _load_whole
    repository = Source(source.name, FLAG, "dataset", source.revision, token or None)
    images, with_images = load(repository, source, class_names, max_samples_per_class, allow_missing_classes)
    empty = [name for name in class_names if name not in with_images]
    if empty and not allow_missing_classes:
        raise UserError(f"{FLAG} {source.name}: has no images of {join_names(empty)}; {HOW_TO_ALLOW}.")
    return images


def count_leaked_images(record: dict, train_indices: np.ndarray) -> int:
    """Return how many rows of the real train split the style token saw outside `train_indices`."""
    seen = record.get("train_indices") or []
    return len(set(seen) - set(train_indices.tolist()))


def _count_rows(source: Source) -> int:
    """Return how many rows a set's parquet files hold, by their footers; a torn file holds none."""
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
    """Raise where there are fewer images than the record counts; those of old sets count none."""
    expected = record.get("num_images")
    if expected is not None and (there := count()) < expected:
        raise UserError(
            f"{FLAG} {name}: is not whole, {there:,} of {expected:,} images are there; wait until all are made and "
            "uploaded, or run the command that makes the set again: it goes on where it stopped."
        )


def _load_whole(
    repository: Source, source: SyntheticSource, class_names: list[str], limit: int | None, allow_missing: bool
) -> tuple[Dataset, set[str]]:
    """Return the images, in a memory map, and which classes have some."""
    images = load_data_set(repository, split="train")
    _refuse_unfinished(repository.name, source.record, lambda: len(images))
    own_names = images.features["label"].names if isinstance(images.features.get("label"), ClassLabel) else []
    real_labels, _ = _match_classes(repository.name, images.features, class_names, allow_missing)
    table = images.data  # of its whole columns neither an image is decoded nor a list made
    own_labels = table.column("label").to_numpy()
    labels = real_labels[own_labels]
    images = images.select_columns("image").add_column("label", labels, feature=ClassLabel(names=class_names))
    if limit is not None or source.left_out:
        kept = _kept_rows(table, own_names, own_labels, limit, source.left_out)
        images, labels = images.select(kept), labels[kept]
    return images, {class_names[label] for label in np.unique(labels)}


def _kept_rows(
    table: pa.Table, own_names: list[str], labels: np.ndarray, limit: int | None, left_out: LeftOut
) -> np.ndarray:
    """Return the rows of the first `limit` images of each class, without those that are left out."""
    if "class_index" not in table.column_names:  # then none can be left out
        return np.sort(np.concatenate([np.flatnonzero(labels == label)[:limit] for label in np.unique(labels)]))
    class_indices = table.column("class_index").to_numpy()
    is_kept = ~left_out.mask(own_names, labels, class_indices)
    return np.flatnonzero(is_kept if limit is None else is_kept & (class_indices < limit))


def _load_stream(
    repository: Source, source: SyntheticSource, class_names: list[str], limit: int | None, allow_missing: bool
) -> tuple[IterableDataset, set[str]]:
    """Return the images as they come out of the files, and which classes have some as far as the record says."""
    if not repository.is_local and not repository.is_reachable():
        raise UserError(
            f"--streaming: {repository.name} cannot be streamed, the Hub cannot be reached; without --streaming the "
            "cache is used."
        )
    if repository.is_local:
        check_path(repository)
    # pyarrow passes over what does not fit the filter, and over whole row groups without reading them
    options = {} if limit is None else {"filters": [("class_index", "<", limit)]}
    with repository.reading("cannot be loaded", also=(DatasetsError, ValueError, RuntimeError)):
        images = load_dataset(
            repository.name, split="train", streaming=True, revision=repository.revision, token=repository.token,
            **options,
        )  # fmt: skip
    real_labels, places = _match_classes(repository.name, images.features, class_names, allow_missing)
    if limit is not None and "class_index" not in images.features:
        raise UserError(
            f"--max_synthetic_samples_per_class {limit}: '{repository.name}' has no column 'class_index', by which a "
            "stream is limited; leave out one of this and --streaming."
        )
    features = Features({"image": Image(), "label": ClassLabel(names=class_names)})
    columns = [*features, "class_index"] if source.left_out else [*features]
    relabel = partial(
        _relabel, real_labels=real_labels, own_names=images.features["label"].names, left_out=source.left_out
    )
    images = images.select_columns(columns).with_format("arrow")  # tables, so that no image is decoded here
    images = images.map(relabel, batched=True, batch_size=ROWS_AT_A_TIME, features=features, remove_columns=columns[2:])
    with_images = source.record.get("settings", {}).get("classes", places)  # in the set's spelling, as its labels are
    return images.with_format(None), {class_names[places[name]] for name in with_images if name in places}


def _relabel(table: pa.Table, real_labels: np.ndarray, own_names: list[str], left_out: LeftOut) -> pa.Table:
    """Return the rows that are not left out, with the real set's labels."""
    own_labels = table["label"].to_numpy()
    if left_out:
        is_kept = ~left_out.mask(own_names, own_labels, table["class_index"].to_numpy())
        table, own_labels = table.filter(pa.array(is_kept)).drop_columns("class_index"), own_labels[is_kept]
    return table.set_column(table.schema.get_field_index("label"), "label", pa.array(real_labels[own_labels]))


def _match_classes(
    name: str, features: Features, class_names: list[str], allow_missing: bool
) -> tuple[np.ndarray, dict[str, int]]:
    """Return the place in `class_names` of each of a set's labels, and the same by their names."""
    if not isinstance(features.get("label"), ClassLabel) or "image" not in features:
        raise UserError(f"{FLAG} {name}: has no 'image' and 'label' (ClassLabel) columns.")
    names = features["label"].names
    places = match_labels(names, class_names, f"{FLAG} {name}:", "the synthetic set", allow_missing, HOW_TO_ALLOW)
    return np.array(list(places.values())), places
