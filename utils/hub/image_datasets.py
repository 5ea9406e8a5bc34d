"""Labelled image datasets from a folder or a Hub repository, at the commit of their source."""

import fnmatch
import os
import re
import shutil
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, DatasetInfo, exceptions
from datasets.arrow_reader import ArrowReader
from huggingface_hub import HfFileSystem, constants, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from utils.cli.contents import list_files
from utils.cli.errors import UserError
from utils.cli.processes import is_main_process, warn_once
from utils.hub.file_classes import reordered_names, unify_class_names
from utils.hub.repositories import CLIENT_ERRORS, Source, is_saved_to_disk

PATTERN = r"::|[*?]|\[.+\]"  # paths that `datasets` takes for a file in an archive, or for a pattern
SPLIT_SIZE = r"SplitInfo\(name='(.*?)', num_bytes=\d+, num_examples=(\d+)"
SPLIT_SIZES = re.compile(f"'expected': {SPLIT_SIZE}.*?'recorded': {SPLIT_SIZE}", re.DOTALL)
NO_TABLES = ("metadata.parquet", "scores.parquet")  # about images, without holding any


def load_image_dataset(
    source: Source, config_name: str | None = None, split: str | None = None
) -> DatasetDict | Dataset:
    """Return the splits of a dataset, or one of them; from the cache if the Hub is unreachable.

    Raises:
        UserError: it is not accessible, neither reachable nor in the cache, not a dataset, or has no such split.
    """
    if source.is_local:
        check_path(source)
    if source.is_local and is_saved_to_disk(source.name):
        loaded = _load_saved(source, config_name)
    elif source.is_local or source.is_reachable():
        loaded = _build(source, config_name, is_all_asked=split is None and config_name is None)
    else:
        loaded = _load_from_cache(source, config_name)
    if split is None:
        return loaded
    if split not in loaded:
        raise UserError(f"{source.flag} {source.name}: has no split '{split}'; it has {', '.join(loaded)}.")
    return loaded[split]


def _build(source: Source, config_name: str | None, is_all_asked: bool) -> DatasetDict:
    """Let `datasets` read a dataset; warn if it skips images although all are wanted."""
    where = f"{source.flag} {source.name}"
    try:
        builder, cache_dir = open_builder(source, config_name)
        builder.download_and_prepare()
        loaded = builder.as_dataset()
        if builder.name in ("parquet", "arrow"):
            loaded = unify_class_names(loaded, _data_files(builder.config.data_files, source), where)
    except exceptions.SplitsVerificationError as error:
        raise UserError(f"{where}: {_describe_mismatch(error)}.") from None
    except (*CLIENT_ERRORS, exceptions.DatasetsError, ValueError, RuntimeError) as error:
        # datasets gives the same message for missing, private and gated datasets, without the cause
        if not source.is_local and not isinstance(error, ValueError):
            source.check_access()
        raise UserError(f"{where}: cannot be loaded ({_innermost(error)}).") from None
    if not source.is_local:
        _check_commit(loaded, source)
    elif _cache_dir(source) != cache_dir:
        shutil.rmtree(cache_dir)
        raise UserError(f"{where}: its files changed while they were read; run the same command again.")
    if is_all_asked and builder.name == "imagefolder" and is_main_process():
        _warn_about_skipped_images(loaded, builder, source)
    return loaded


def open_builder(source: Source, config_name: str | None) -> tuple[datasets.DatasetBuilder, str | None]:
    """Return the builder of a dataset, and the cache folder that only this local folder uses.

    Only file names and the card are read, no image.
    """
    cache_dir = _cache_dir(source)
    builder = datasets.load_dataset_builder(
        source.name, config_name, cache_dir=cache_dir, revision=source.revision, token=source.token
    )
    return builder, cache_dir


def list_data_files(folder: str) -> list[str]:
    """Return the data files of a local folder: its tables if there are any, else all but text files.

    Cache files of `datasets` are left out.
    """
    names = [
        name for name in list_files(folder)
        if not name.endswith((".md", ".txt", ".lock")) and not fnmatch.fnmatchcase(Path(name).name, "cache-*.arrow")
    ]  # fmt: skip
    tables = [name for name in names if name.endswith(".parquet") and Path(name).name not in NO_TABLES]
    return names if is_saved_to_disk(folder) else tables or names


def _cache_dir(source: Source) -> str | None:
    """Return the cache folder for a local folder, by its contents: `datasets` compares names and times only."""
    if not source.is_local:
        return None
    digest = source.identity(list_data_files).rpartition(" ")[2]
    return os.path.join(datasets.config.HF_DATASETS_CACHE, "bridged-transfer", digest)


def check_path(source: Source) -> None:
    """Check that `datasets` does not take a folder's path for a pattern.

    Raises:
        UserError: it does.
    """
    path = str(Path(source.name).resolve())
    if found := re.search("::" if is_saved_to_disk(source.name) else PATTERN, path):
        raise UserError(
            f"{source.flag} {source.name}: datasets cannot read folders with {found.group()} in their path ({path}); "
            "rename or move it."
        )


def _load_saved(source: Source, config_name: str | None) -> DatasetDict:
    """Load the output of `save_to_disk`; a single `Dataset` becomes the split `train`."""
    where = f"{source.flag} {source.name}: was written by save_to_disk"
    if config_name is not None:
        raise UserError(f"{where}, which has no configurations ('{config_name}').")
    try:
        loaded = datasets.load_from_disk(os.path.abspath(source.name))
        return (DatasetDict({"train": loaded}) if isinstance(loaded, Dataset) else loaded).with_format(None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} and cannot be loaded ({error}).") from None


def _data_files(data_files: dict[str, list[str]], source: Source) -> dict[str, list]:
    """Return the files of each split, to read their schemas; of a repository, those in the cache."""

    def find(url: str) -> str | object:
        if source.is_local:
            return str(url)
        filename = url.partition(f"@{source.revision}/")[2]
        cached = try_to_load_from_cache(source.name, filename, repo_type="dataset", revision=source.revision)
        return cached if isinstance(cached, str) else HfFileSystem(token=source.token).open(url)

    return {str(split): [find(url) for url in urls] for split, urls in data_files.items()}


def _describe_mismatch(error: exceptions.SplitsVerificationError) -> str:
    """Return what a dataset's card says and what its files hold, parsed from the error's text."""
    message = str(error)
    advice = "wait until the dataset is complete, or correct dataset_info in its README.md"
    if isinstance(error, exceptions.NonMatchingSplitsSizesError):
        counts = [
            f"{int(there):,} in its files and {int(expected):,} in its card for split '{split}'"
            for split, expected, _, there in SPLIT_SIZES.findall(message)
        ]
        return f"the numbers of images differ, {'; '.join(counts) or message}; {advice}"
    splits = message.strip("{}").replace("'", "")
    if isinstance(error, exceptions.ExpectedMoreSplitsError):
        return f"its card lists splits without files: {splits}; {advice}"
    return f"its files have splits that its card does not list: {splits}; {advice}"


def _load_from_cache(source: Source, config_name: str | None) -> DatasetDict:
    """Load this commit from the cache of `datasets`; `load_dataset` would take the latest in the cache."""
    out_of_reach = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
    where, cache = f"{source.flag} {source.name}:", Path(datasets.config.HF_DATASETS_CACHE)
    namespace, _ = source.name.split("/")
    folders = sorted(cache.glob(f"{namespace}___*/{config_name or '*'}/*/{source.revision}"))
    if config_name is None and len(folders) > 1:
        folders = [folder for folder in folders if folder.parts[-3] == "default"]
    if not folders:
        which = f"'{config_name}'" if config_name else "the images"
        raise UserError(
            f"{where} {out_of_reach}, and the cache ({cache}) does not have {which} of commit {source.revision}."
        )
    if not constants.HF_HUB_OFFLINE:
        warn_once(f"{where} {out_of_reach}, reading commit {source.revision} from the cache.")
    info = DatasetInfo.from_directory(str(folders[-1]))
    reader, splits = ArrowReader(str(folders[-1]), info), list(info.splits.values())
    loaded = DatasetDict({name: Dataset(**reader.read(info.dataset_name, name, splits)) for name in info.splits})
    repository = repo_folder_name(repo_id=source.name, repo_type="dataset")
    files = Path(constants.HF_HUB_CACHE, repository, "snapshots", source.revision).rglob("*.parquet")
    if column := reordered_names(next(iter(loaded.values())).features, files):
        raise UserError(
            f"{where} its files list the classes of '{column}' in different orders, and {out_of_reach}: the class of "
            "an image is ambiguous; load it while the Hub is reachable."
        )
    return loaded


def _check_commit(splits: dict[str, Dataset], source: Source) -> None:
    """Check that the images are of the source's commit: if the Hub fails, datasets takes the latest in its cache."""
    files = [Path(file["filename"]) for images in splits.values() for file in images.cache_files]
    others = {path.parent.name for path in files} - {source.revision}
    if others:
        raise UserError(
            f"{source.flag} {source.name}: the Hub failed, and the cache last stored commit "
            f"{', '.join(sorted(others))}, not {source.revision}; try again later."
        )


def _warn_about_skipped_images(splits: DatasetDict, builder: datasets.DatasetBuilder, source: Source) -> None:
    """Warn if `datasets` skipped image files.

    It chooses splits by words in file names: cat/a test.png becomes the test split, and images without such a word are
    skipped, as are those missing from a metadata file.
    """
    num_read = sum(map(len, splits.values()))
    if source.is_local:
        paths = [path.relative_to(source.name).as_posix() for path in Path(source.name).rglob("*")]
    else:
        root = f"datasets/{source.name}@{source.revision}/"
        with source.reading("its files cannot be listed"):  # datasets has just listed them, so the Hub is not asked
            paths = [path.removeprefix(root) for path in HfFileSystem(token=source.token).find(root)]
    num_files = sum(
        Path(path).suffix.lower() in builder.EXTENSIONS and not re.search(r"(^|/)(\.|__)", path) for path in paths
    )
    if num_read < num_files:
        warn_once(
            f"{source.flag} {source.name}: only {num_read:,} of its {num_files:,} images are read: datasets selects "
            "them by words such as train and test in their names, and by metadata files. To read all, use class "
            "folders without other data files."
        )


def _innermost(error: BaseException) -> BaseException:
    """Return the cause of a failed build: 'An error occurred while generating the dataset' helps nobody."""
    while isinstance(error, exceptions.DatasetsError) and error.__cause__ is not None:
        error = error.__cause__
    return error
