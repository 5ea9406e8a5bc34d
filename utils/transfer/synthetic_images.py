"""A synthetic set for fine-tuning: its record, its labels in the real set's order, and what its token saw."""

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

from utils.cli.contents import cached_digest, content_digest, list_files
from utils.cli.errors import UserError
from utils.cli.records import GENERATION_CONFIG, read_record
from utils.data.class_names import join_names, match_labels
from utils.data.left_out import SCORES, LeftOut, read_left_out
from utils.hub.image_datasets import check_path, load_image_dataset
from utils.hub.repositories import Source, open_source
from utils.synthesis.counts import NUM_OF_CLASS
from utils.synthesis.plan import INIT_IMAGE_ROWS

FLAG = "--synthetic_dataset"
HOW_TO_ALLOW = "--allow_missing_classes accepts a set that lacks some classes"
NUM_THREADS = 16  # they mostly wait for the Hub
ROWS_AT_A_TIME = 100  # of a stream; the size of a row group of generate_synthetic.py


@dataclass(frozen=True)
class SyntheticSource:
    """A synthetic set whose images are not open yet: name, pinned commit, `generation_config.json`, and the images that
    training leaves out.
    """

    name: str
    revision: str | None
    record: dict
    left_out: LeftOut = field(default_factory=LeftOut)

    @property
    def key(self) -> tuple[str, str | None, str]:
        """What tells the images from those of other sources."""
        return self.name, self.revision, self.left_out.identity if self.left_out else ""

    def to_dict(self) -> dict:
        """Return it as records hold it; `left_out` only if images are left out."""
        left_out = {"left_out": self.left_out.counts() | {"identity": self.left_out.identity}} if self.left_out else {}
        return {"name": self.name, "revision": self.revision, "record": self.record} | left_out


def open_synthetic(
    name: str, revision: str | None = None, token: str | None = None, use_rejected: bool = False
) -> SyntheticSource:
    """Read the record of a synthetic set, a local folder or a dataset id, and its verdicts unless `use_rejected`.

    Raises:
        UserError: the set does not exist, or has no record or fewer images than its record says; its verdicts are about
            other images.
    """
    source = open_source(name, FLAG, "dataset", revision, token)
    record = read_record(source.file(GENERATION_CONFIG, "a synthetic set of generate_synthetic.py"))
    # the record is uploaded with the first shards, and gets num_redraws once all shards are there
    if source.is_local or ("num_redraws" not in record and source.is_reachable()):
        _refuse_unfinished(name, record, partial(_count_rows, source))
    left_out = LeftOut() if use_rejected else read_left_out(source, record.get("fingerprint"))
    return SyntheticSource(name, source.revision, record, left_out)


def identify_synthetic(source: SyntheticSource, max_samples_per_class: int | None = None) -> str:
    """Return what identifies the images of `load_synthetic`: the commit, or their number and hash.

    With a limit it stays the same when a folder grows, as the first images of each class do.

    Raises:
        UserError: the set is gone, or one of its files is damaged.
    """
    repository = open_source(source.name, FLAG, "dataset", source.revision)
    if not repository.is_local:
        return f"commit {source.revision}"
    names = list(filter(_holds_images, list_files(source.name)))
    paths = [Path(source.name, name) for name in names]
    with repository.reading("its images cannot be read", also=(pa.ArrowInvalid,)):
        without = f", {source.left_out.identity}" if source.left_out else ""
        if max_samples_per_class is None or not all("class_index" in pq.read_schema(path).names for path in paths):
            num_rows = sum(pq.read_metadata(path).num_rows for path in paths)
            return f"{num_rows:,} images, sha256 {content_digest(source.name, names)}{without}"
        what = f"first {max_samples_per_class} of a class"
        read = partial(_read_first_images, paths, max_samples_per_class)
        return f"{what}, sha256 {cached_digest(source.name, names, read, what)}{without}"


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
    per_class = source.record.get(NUM_OF_CLASS)  # of sets with more images of some classes
    counts = list(per_class.values()) if per_class else [num_per_class] * (num_all // num_per_class)
    limit = max_samples_per_class or max(counts, default=0)
    num_left_out = sum(int((indices < limit).sum()) for indices in source.left_out.by_class.values())
    return sum(min(count, limit) for count in counts) - num_left_out


def describe_limit(source: SyntheticSource, max_samples_per_class: int | None) -> str | None:
    """Return a warning if a limit takes images from a set that has more of rare classes, else None."""
    counts = source.record.get(NUM_OF_CLASS)
    if not counts or max_samples_per_class is None or max_samples_per_class >= max(counts.values()):
        return None
    kept = {min(count, max_samples_per_class) for count in counts.values()}
    numbers = f"{min(kept):,}" if len(kept) == 1 else f"{min(kept):,} to {max(kept):,}"
    return (
        f"Warning: {source.name} has {min(counts.values()):,} to {max(counts.values()):,} images per class, more of "
        f"those with fewer real images; at most {max_samples_per_class:,} per class leaves {numbers}, so real and "
        "synthetic images together are no longer as many of each class."
    )


def load_synthetic(
    source: SyntheticSource, class_names: list[str], max_samples_per_class: int | None = None,
    token: str | None = None, *, allow_missing_classes: bool = False, streaming: bool = False,
) -> Dataset | IterableDataset:  # fmt: skip
    """Return the images with the columns `image` and `label`, in the set's order, labels as in `class_names`.

    `max_samples_per_class` keeps the images with the lowest `class_index`, so smaller limits are subsets of larger
    ones; for a set without that column, the first images of each class. `allow_missing_classes` accepts a set that
    lacks some of `class_names`, or images of them. With `streaming` nothing is downloaded in advance; the record then
    says which classes have images (`settings.classes`), and if it does not, this is not checked.

    The images in `source.left_out` are removed after the limit is applied.

    Raises:
        UserError: the set cannot be loaded or is incomplete; its classes are not `class_names` (the message lists those
            renamed, missing, extra or empty); a stream with a limit has no `class_index`.
    """
    load = _load_stream if streaming else _load_whole
    repository = Source(source.name, FLAG, "dataset", source.revision, token or None)
    images, with_images = load(repository, source, class_names, max_samples_per_class, allow_missing_classes)
    empty = [name for name in class_names if name not in with_images]
    if empty and not allow_missing_classes:
        raise UserError(f"{FLAG} {source.name}: has no images of {join_names(empty)}; {HOW_TO_ALLOW}.")
    return images


def count_leaked_images(record: dict, train_indices: np.ndarray) -> int:
    """Return how many rows of the real train split outside `train_indices` the generation of a set has seen."""
    return len(seen_rows(record) - set(train_indices.tolist()))


def seen_rows(record: dict) -> set[int]:
    """Return the rows of the real train split that a set's style token was trained on, or its images are made from."""
    return {*(record.get("train_indices") or []), *(record.get(INIT_IMAGE_ROWS) or [])}


def describe_seeing(record: dict, name: str | None = None) -> str:
    """Return what has seen real images in the making of a set, with a verb: "the style token of cars-syn has seen"."""
    of_set = f" of {name}" if name else ""
    if record.get(INIT_IMAGE_ROWS) is None:
        return f"the style token{of_set} has seen"
    if record.get("train_indices"):
        return f"the style token and image-to-image{of_set} have seen"
    return f"image-to-image{of_set} has seen"


def _holds_images(path: str) -> bool:
    return path.endswith(".parquet") and not path.endswith(SCORES)


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
        return sum(threads.map(num_rows, filter(_holds_images, filesystem.find(root))))


def _refuse_unfinished(name: str, record: dict, count: Callable[[], int]) -> None:
    """Raise if there are fewer images than the record says; records of old sets do not say."""
    expected = record.get("num_images")
    if expected is not None and (there := count()) < expected:
        raise UserError(
            f"{FLAG} {name}: incomplete, with {there:,} of {expected:,} images; wait until all are made and "
            "uploaded, or run the command that makes the set again: it resumes where it stopped."
        )


def _load_whole(
    repository: Source, source: SyntheticSource, class_names: list[str], limit: int | None, allow_missing: bool
) -> tuple[Dataset, set[str]]:
    """Return the memory-mapped images, and the classes that have some."""
    images = load_image_dataset(repository, split="train")
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
    """Return the index in `class_names` of each label of a set, as an array and by name."""
    if not isinstance(features.get("label"), ClassLabel) or "image" not in features:
        raise UserError(f"{FLAG} {name}: has no 'image' and 'label' (ClassLabel) columns.")
    names = features["label"].names
    places = match_labels(names, class_names, f"{FLAG} {name}:", "the synthetic set", allow_missing, HOW_TO_ALLOW)
    return np.array(list(places.values())), places
