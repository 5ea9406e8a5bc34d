import importlib.util
import os
import sys
from types import ModuleType

import PIL.Image
import pytest

import utils.data.images
from tests.data.builders import encode
from utils.cli.errors import UserError
from utils.data.image_files import find_image_files, unreadable_kind

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


JPEG = encode(PIL.Image.new("RGB", (8, 8), "red"), "JPEG")


def write(folder, *files, content=JPEG):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)


def find(folder):
    return find_image_files(str(folder), "--train_dir")


def test_every_file_is_used_or_counted_with_its_reason(tmp_path):
    write(tmp_path, "cat/1.jpg", "cat/2.JPEG", "cat/three", "cat/4.jpg.bak")
    write(tmp_path, "notes.txt", "cat/Thumbs.db", "cat/1.jpg.txt", "dog/movie.mpg", content=b"no image")
    write(tmp_path, "cat/a.heic", "dog/b", content=HEIC)
    write(tmp_path, "cat/.DS_Store", "cat/._1.jpg", "__MACOSX/cat/._1.jpg", ".git/objects/1", "@eaDir/cat/1.jpg")
    write(tmp_path, "dog/raw.CR2", "dog/drawing.svg", "dog/new.jxl", content=b"something else")
    files = find(tmp_path)
    assert files.images[("cat",)] == ["1.jpg", "2.JPEG", "4.jpg.bak", "three"]
    assert files.by_content == ["cat/4.jpg.bak", "cat/three"]
    num_heic = 2 if "HEIF" not in PIL.Image.OPEN else 1
    assert files.describe_left_out() == (
        "left out: 4 that are not images (notes.txt, cat/1.jpg.txt, cat/Thumbs.db, ...), "
        f"{num_heic} HEIC (pip install pillow-heif), 1 JPEG XL (save them as PNG or JPEG), "
        "1 camera raw (develop them to JPEG or PNG), 1 vector graphics (draw them as PNG), 5 hidden"
    )
    used = sum(map(len, files.images.values()))
    assert used + sum(map(len, files.left_out.values())) == sum(len(names) for _, _, names in os.walk(tmp_path))


@pytest.mark.parametrize(
    "image_format_or_content",
    ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000"]
    + [b"", b"text", b"%PDF-1.7", b"P5 is not the word", b"MZ" + bytes(64), bytes(4096)],
)
def test_a_file_without_a_suffix_is_known_by_its_content(tmp_path, image_format_or_content):
    is_image = isinstance(image_format_or_content, str)
    image = PIL.Image.new("RGB", (8, 8))
    write(tmp_path, "cat/1", content=encode(image, image_format_or_content) if is_image else image_format_or_content)
    assert find(tmp_path).images[("cat",)] == (["1"] if is_image else [])


def test_a_class_may_have_a_name_with_underscores_but_not_with_a_dot(tmp_path):
    write(tmp_path, "__other__/1.jpg", "_misc/1.jpg", "__init__/1.jpg", ".cache/1.jpg")
    assert [parts for parts, names in find(tmp_path).images.items() if names] == [
        ("__init__",), ("__other__",), ("_misc",),
    ]  # fmt: skip


def test_linked_folders_are_followed_and_loops_are_not(tmp_path):
    write(tmp_path / "elsewhere", "1.jpg")
    write(tmp_path / "set", "cat/1.jpg")
    for link, target in (("dog", "../elsewhere"), ("all", "."), ("cat/up", ".."), ("gone", "nowhere"), ("me", "me")):
        (tmp_path / "set" / link).symlink_to(target, target_is_directory=True)
    files = find(tmp_path / "set")
    assert files.images == {(): [], ("cat",): ["1.jpg"], ("dog",): ["1.jpg"]}
    assert files.describe_left_out() == (
        "left out: 2 links to nothing (gone, me), 2 linked folders that form a loop (all, cat/up)"
    )


def test_folders_that_link_to_each_other_are_walked_in_finite_time(tmp_path):
    names = [f"class {number}" for number in range(9)]  # some million paths
    write(tmp_path, *(f"{name}/notes.txt" for name in names), content=b"text")
    for name in names:
        for other in names:
            (tmp_path / name / f"as {other}").symlink_to(tmp_path / other, target_is_directory=True)
    assert sum(map(len, find(tmp_path).images.values())) == 0


def test_a_named_pipe_is_left_out_without_blocking(tmp_path):
    (tmp_path / "cat").mkdir()
    for name in ("pipe", "pipe.jpg"):
        os.mkfifo(tmp_path / "cat" / name)
    found = find(tmp_path)
    assert found.images[("cat",)] == []
    assert found.describe_left_out() == "left out: 2 that are not images (cat/pipe, cat/pipe.jpg)"


def test_names_that_are_not_utf8_are_reported_with_their_bytes(tmp_path):
    write(tmp_path, "cat/1.jpg")
    (tmp_path / "cat" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(JPEG)
    files = find(tmp_path)
    assert files.images[("cat",)] == ["1.jpg"]
    assert files.describe_left_out() == r"left out: 1 whose name is not UTF-8 (cat/caf\xe9.jpg; rename with convmv)"
    (tmp_path / os.fsdecode(b"\xe9l\xe9phant")).mkdir()
    with pytest.raises(UserError) as error:
        find(tmp_path)
    assert r"the folder name '\xe9l\xe9phant' is not UTF-8; rename it, as with `convmv" in str(error.value)
    str(error.value).encode()
    with pytest.raises(UserError, match="its path is not UTF-8"):
        find(tmp_path / os.fsdecode(b"\xe9l\xe9phant"))


def test_unreadable_inputs_are_one_line(tmp_path, monkeypatch):
    write(tmp_path, "cat/1.jpg")
    with pytest.raises(UserError, match="--train_dir .*1.jpg: is a file"):
        find(tmp_path / "cat" / "1.jpg")
    with pytest.raises(UserError, match="--train_dir .*nowhere: not a directory"):
        find(tmp_path / "nowhere")
    scandir = os.scandir

    def refuse(path):  # the tests may run as root, who may read everything
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"/cat cannot be read \(Permission denied\)"):
        find(tmp_path)


def test_heic_is_opened_where_pillow_heif_is_installed(monkeypatch):
    opened = []
    plugin = ModuleType("pillow_heif")
    plugin.register_heif_opener = lambda: opened.append("HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    spec = importlib.util.spec_from_file_location("images_again", utils.data.images.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert opened == ["HEIF"]


def test_a_suffix_that_a_plugin_reads_is_an_images(tmp_path, monkeypatch):
    PIL.Image.registered_extensions()
    monkeypatch.setitem(PIL.Image.EXTENSION, ".heic", "PNG")
    write(tmp_path, "cat/1.heic")
    assert find(tmp_path).images[("cat",)] == ["1.heic"]


def test_unreadable_kinds_are_known_by_their_content():
    assert unreadable_kind(HEIC) == "HEIC"
    assert unreadable_kind(HEIC.replace(b"ftypheic", b"ftypavif")) == "AVIF"
    assert unreadable_kind(HEIC.replace(b"ftypheic", b"ftypmp42")) is None
    assert unreadable_kind(b"\xff\x0a\x10") == unreadable_kind(b"\0\0\0\x0cJXL \r\n\x87\n") == "JPEG XL"
    assert unreadable_kind(JPEG) is None
