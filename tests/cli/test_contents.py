import os
from pathlib import Path

import pytest

from utils.cli import contents
from utils.cli.contents import content_digest, describe_files, list_files


@pytest.fixture
def folder(tmp_path):
    for name, text in {"a/1.txt": "one", "b.txt": "two", ".hidden/3.txt": "three", "a/.4.txt": "four"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def digest(folder: Path) -> str:
    return content_digest(folder, list_files(folder))


def test_files_are_listed_in_order_with_links_and_without_hidden_ones(folder, tmp_path_factory):
    (folder / "around").symlink_to(folder)
    (folder / "dead").symlink_to(folder / "nowhere")
    (other := tmp_path_factory.mktemp("other") / "5.txt").write_text("five")
    (folder / "linked").symlink_to(other.parent)
    assert list(list_files(folder)) == ["a/1.txt", "b.txt", "linked/5.txt"]
    assert list(list_files(folder / "nowhere")) == []


def test_digest_depends_only_on_names_and_bytes(folder, tmp_path_factory):
    before = digest(folder)
    os.utime(folder / "b.txt", (1, 1))
    (folder / ".cache").write_text("not part of the input")
    assert digest(folder) == before
    assert describe_files(folder, list_files(folder)) == f"2 files, sha256 {before}"
    copied = tmp_path_factory.mktemp("copy")
    (copied / "a").mkdir()
    for name in ("a/1.txt", "b.txt"):
        (copied / name).write_text((folder / name).read_text())
    assert digest(copied) == before
    (copied / "b.txt").rename(copied / "c.txt")
    assert digest(copied) != before


@pytest.mark.parametrize("how", ["in place", "by another file"])
def test_contents_of_equal_size_and_time_have_different_digests(folder, how):
    before, status = digest(folder), os.stat(folder / "b.txt")
    written = folder / "b.txt" if how == "in place" else folder / "new"
    written.write_text("too")
    os.utime(written, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(written, folder / "b.txt")
    assert os.stat(folder / "b.txt").st_mtime_ns == status.st_mtime_ns
    assert digest(folder) != before


def test_unchanged_files_are_not_read_again_and_an_unwritable_cache_is_ignored(folder, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(contents.constants, "HF_HOME", home := str(tmp_path_factory.mktemp("home")))
    digest(folder)
    assert not list(Path(home).iterdir())  # the files are too new
    monkeypatch.setattr(contents, "SECONDS_TO_SETTLE", -1.0)
    before, read = digest(folder), []
    file_digest = contents.hashlib.file_digest
    monkeypatch.setattr(contents.hashlib, "file_digest", lambda *args: read.append(args) or file_digest(*args))
    assert digest(folder) == before and not read
    monkeypatch.setattr(contents.constants, "HF_HOME", "/dev/null")
    assert digest(folder) == before and len(read) == 2


def test_folders_that_link_to_each_other_are_listed_in_finite_time(tmp_path):
    names = "abcdefgh"
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        for other in names.replace(name, ""):
            (tmp_path / name / other).symlink_to(tmp_path / other)
    assert len(list(list_files(tmp_path))) == 8 + 8 * 7 + 8 * 7 * 6
