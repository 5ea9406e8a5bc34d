"""The disk space of a run's inputs: downloads, and Arrow copies of image datasets."""

from collections.abc import Iterable
from pathlib import Path

import datasets
from huggingface_hub import HfApi, constants
from huggingface_hub import try_to_load_from_cache as find_in_cache
from huggingface_hub.hf_api import RepoFile

from utils.cli.errors import UserError
from utils.data.class_folders import read_local_set
from utils.data.image_set import RealImagesRecord
from utils.forecast.costs import BYTES_PER_ROW, COPIED_SUFFIXES, DiskUse, arrow_bytes
from utils.hub.image_datasets import open_builder
from utils.hub.repositories import CLIENT_ERRORS, Source, is_saved_to_disk, open_source


def missing_bytes(source: Source, filenames: Iterable[str]) -> int | None:
    """Return the bytes of some files of a repository that are not in the cache yet; 0 for a folder.

    None if the Hub, which knows their sizes, is unreachable.
    """
    sizes = file_sizes(source, [name for name in filenames if not _is_cached(source, name)])
    return None if sizes is None else sum(sizes.values())


def file_sizes(source: Source, filenames: Iterable[str]) -> dict[str, int] | None:
    """Return the bytes of some files of a repository, as the Hub lists them; None if it is unreachable."""
    wanted = set(filenames)
    if source.is_local or not wanted:
        return {}
    try:
        if not source.is_reachable():
            return None
        tree = HfApi().list_repo_tree(
            source.name, recursive=True, repo_type=source.repo_type, revision=source.revision, token=source.token
        )
        return {file.path: file.size for file in tree if isinstance(file, RepoFile) and file.path in wanted}
    except CLIENT_ERRORS:
        return None


def _is_cached(source: Source, filename: str) -> bool:
    place = {"repo_type": source.repo_type, "revision": source.revision}
    return source.is_local or isinstance(find_in_cache(source.name, filename, **place), str)


def model_download(source: Source, filenames: Iterable[str]) -> list[DiskUse]:
    """Return the download of a model's files: none for a folder, unknown if `filenames` is empty."""
    if source.is_local:
        return []
    filenames = list(filenames)
    number = missing_bytes(source, filenames) if filenames else None
    return [DiskUse(f"download of {source.name}", number, constants.HF_HUB_CACHE)] if number != 0 else []


def real_set_disk(record: RealImagesRecord, token: str | None = None) -> list[DiskUse]:
    """Return what loading the real images writes; nothing for class folders, which are read in place.

    Raises:
        UserError: there is no such dataset.
    """
    if record.train_dir is not None:
        return []
    source = open_source(record.dataset_name, "--dataset_name", "dataset", record.dataset_revision, token)
    if source.is_local and read_local_set(source.name) is not None:
        return []
    return dataset_disk(source, record.dataset_config_name)


def dataset_disk(source: Source, config_name: str | None = None) -> list[DiskUse]:
    """Return the download and the Arrow copy of a dataset that `datasets` loads; none if they exist already.

    Sizes are None if the Hub is unreachable.

    Raises:
        UserError: `datasets` cannot read the folder's path.
    """
    if source.is_local and is_saved_to_disk(source.name):  # read in place
        return []
    download, copy = (
        DiskUse(f"{what} of {source.name}", None, folder)
        for what, folder in (
            ("download", constants.HF_HUB_CACHE), ("Arrow copy", datasets.config.HF_DATASETS_CACHE),
        )
    )  # fmt: skip
    try:
        builder, _ = open_builder(source, config_name)
    except UserError:
        raise
    except (*CLIENT_ERRORS, datasets.exceptions.DatasetsError, ValueError):
        return [copy] if source.is_local else [download, copy]
    if Path(builder.cache_dir).is_dir():
        return []
    files = [str(path) for paths in builder.config.data_files.values() for path in paths]
    if source.is_local:
        return [DiskUse(copy.what, arrow_bytes(files), copy.folder)]
    names = [path.partition(f"@{source.revision}/")[2] for path in files]
    sizes, missing = file_sizes(source, names), missing_bytes(source, names)
    copied = None if sizes is None else sum(
        size if name.endswith(COPIED_SUFFIXES) else BYTES_PER_ROW + len(name) for name, size in sizes.items()
    )  # fmt: skip
    return [DiskUse(download.what, missing, download.folder), DiskUse(copy.what, copied, copy.folder)]
