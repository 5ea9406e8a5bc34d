"""Labelled image sets out of a folder or a Hub repository, at the commit of their source."""

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

PATTERN = r"::|[*?]|\[.+\]"  # in a path, to datasets: a file in an archive, or a pattern
SPLIT_SIZE = r"SplitInfo\(name='(.*?)', num_bytes=\d+, num_examples=(\d+)"
SPLIT_SIZES = re.compile(f"'expected': {SPLIT_SIZE}.*?'recorded': {SPLIT_SIZE}", re.DOTALL)


def load_data_set(source: Source, config_name: str | None = None, split: str | None = None) -> DatasetDict | Dataset:
    """Return the splits of a data set, or one of them; from the cache where the Hub is out of reach.

    Raises:
        UserError: it may not be read, cannot be reached and is not in the cache, is no data set, or has no such split.
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
    """Have `datasets` read a set; warn where that leaves out images though all are asked for."""
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
        # datasets says the same of a missing, a private and a gated set, and drops the cause
        if not source.is_local and not isinstance(error, ValueError):
            source.check_access()
        raise UserError(f"{where}: cannot be loaded ({_innermost(error)}).") from None
    if not source.is_local:
        _check_commit(loaded, source)
    elif _cache_dir(source) != cache_dir:
        shutil.rmtree(cache_dir)
        raise UserError(f"{where}: its files have changed while they were read; run the same command again.")
    if is_all_asked and builder.name == "imagefolder" and is_main_process():
        _warn_about_skipped_images(loaded, builder, source)
    return loaded


def open_builder(source: Source, config_name: str | None) -> tuple[datasets.DatasetBuilder, str | None]:
    """Return what reads a set, once it is asked to, and the cache folder that is a local folder's alone.

    Files are listed and a card is read; no image is.
    """
    cache_dir = _cache_dir(source)
    builder = datasets.load_dataset_builder(
        source.name, config_name, cache_dir=cache_dir, revision=source.revision, token=source.token
    )
    return builder, cache_dir


def list_data_files(folder: str) -> list[str]:
    """Return the files of a local folder that are its data: its tables, where it has some, else all but texts.

    What `datasets` caches there is left out.
    """
    names = [
        name for name in list_files(folder)
        if not name.endswith((".md", ".txt", ".lock")) and not fnmatch.fnmatchcase(Path(name).name, "cache-*.arrow")
    ]  # fmt: skip
    tables = [name for name in names if name.endswith(".parquet") and Path(name).name != "metadata.parquet"]
    return names if is_saved_to_disk(folder) else tables or names


def _cache_dir(source: Source) -> str | None:
    """Return where `datasets` keeps what it makes of a folder: by contents, as it looks at names and times only."""
    if not source.is_local:
        return None
    digest = source.identity(list_data_files).rpartition(" ")[2]
    return os.path.join(datasets.config.HF_DATASETS_CACHE, "bridged-transfer", digest)


def check_path(source: Source) -> None:
    """Check that `datasets` takes a folder's path for what it is, and not for all folders that fit a pattern.

    Raises:
        UserError: it does not.
    """
    path = str(Path(source.name).resolve())
    if found := re.search("::" if is_saved_to_disk(source.name) else PATTERN, path):
        raise UserError(
            f"{source.flag} {source.name}: datasets does not read folders with {found.group()} in their path ({path}); "
            "rename or move it."
        )


def _load_saved(source: Source, config_name: str | None) -> DatasetDict:
    """Load what `save_to_disk` wrote; a single `Dataset` is the split `train`."""
    where = f"{source.flag} {source.name}: is a folder of save_to_disk"
    if config_name is not None:
        raise UserError(f"{where}, which has no configurations ('{config_name}').")
    try:
        loaded = datasets.load_from_disk(os.path.abspath(source.name))
        return (DatasetDict({"train": loaded}) if isinstance(loaded, Dataset) else loaded).with_format(None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} that cannot be loaded ({error}).") from None


def _data_files(data_files: dict[str, list[str]], source: Source) -> dict[str, list]:
    """Return the files of each split, to read what they say of themselves; of a repository those in the cache."""

    def find(url: str) -> str | object:
        if source.is_local:
            return str(url)
        filename = url.partition(f"@{source.revision}/")[2]
        cached = try_to_load_from_cache(source.name, filename, repo_type="dataset", revision=source.revision)
        return cached if isinstance(cached, str) else HfFileSystem(token=source.token).open(url)

    return {str(split): [find(url) for url in urls] for split, urls in data_files.items()}


def _describe_mismatch(error: exceptions.SplitsVerificationError) -> str:
    """Return what a set's card says and what its files hold, out of an error that holds them as text."""
    message = str(error)
    advice = "wait until the set is whole, or correct dataset_info in its README.md"
    if isinstance(error, exceptions.NonMatchingSplitsSizesError):
        counts = [
            f"{int(there):,} in its files and {int(expected):,} in its card for split '{split}'"
            for split, expected, _, there in SPLIT_SIZES.findall(message)
        ]
        return f"the images do not add up, {'; '.join(counts) or message}; {advice}"
    splits = message.strip("{}").replace("'", "")
    if isinstance(error, exceptions.ExpectedMoreSplitsError):
        return f"its card names splits of which there are no files: {splits}; {advice}"
    return f"its files have splits that its card does not name: {splits}; {advice}"


def _load_from_cache(source: Source, config_name: str | None) -> DatasetDict:
    """Load what datasets has cached of this very commit; `load_dataset` would take the last that it cached."""
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
        warn_once(f"{where} {out_of_reach}, commit {source.revision} is read from the cache.")
    info = DatasetInfo.from_directory(str(folders[-1]))
    reader, splits = ArrowReader(str(folders[-1]), info), list(info.splits.values())
    loaded = DatasetDict({name: Dataset(**reader.read(info.dataset_name, name, splits)) for name in info.splits})
    repository = repo_folder_name(repo_id=source.name, repo_type="dataset")
    files = Path(constants.HF_HUB_CACHE, repository, "snapshots", source.revision).rglob("*.parquet")
    if column := reordered_names(next(iter(loaded.values())).features, files):
        raise UserError(
            f"{where} its files have the classes of '{column}' in different orders, and {out_of_reach}: which class an "
            "image has cannot be told; load it with the Hub in reach."
        )
    return loaded


def _check_commit(splits: dict[str, Dataset], source: Source) -> None:
    """Check that the images are those of the source's commit: when the Hub fails, datasets takes the last it cached."""
    files = [Path(file["filename"]) for images in splits.values() for file in images.cache_files]
    others = {path.parent.name for path in files} - {source.revision}
    if others:
        raise UserError(
            f"{source.flag} {source.name}: the Hub failed, and the cache has the images of commit "
            f"{', '.join(sorted(others))} last, not those of {source.revision}; try again later."
        )


def _warn_about_skipped_images(splits: DatasetDict, builder: datasets.DatasetBuilder, source: Source) -> None:
    """Warn where a set of image files has more than were read: datasets chooses splits by words in file names, so that
    cat/a test.png is the test split, and all images without such a word are left out, as those not in a metadata file.
    """
    num_read = sum(map(len, splits.values()))
    if source.is_local:
        paths = [path.relative_to(source.name).as_posix() for path in Path(source.name).rglob("*")]
    else:
        root = f"datasets/{source.name}@{source.revision}/"
        with source.reading("its files cannot be listed"):  # datasets has just listed them: the Hub is not asked
            paths = [path.removeprefix(root) for path in HfFileSystem(token=source.token).find(root)]
    num_files = sum(
        Path(path).suffix.lower() in builder.EXTENSIONS and not re.search(r"(^|/)(\.|__)", path) for path in paths
    )
    if num_read < num_files:
        warn_once(
            f"{source.flag} {source.name}: {num_read:,} of its {num_files:,} images are read; datasets chooses them by "
            "words such as train and test in their names, and by metadata files. To read all, give a folder of class "
            "folders without other data files."
        )


def _innermost(error: BaseException) -> BaseException:
    """Return what stopped the building of a set: 'An error occurred while generating the dataset' helps nobody."""
    while isinstance(error, exceptions.DatasetsError) and error.__cause__ is not None:
        error = error.__cause__
    return error
