"""Finds the images below a folder; every other file is counted as left out, with a reason."""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image

import utils.data.images  # noqa: F401 (makes Pillow read HEIC where pillow-heif is installed)
from utils.cli.contents import HIDDEN_FOLDERS, MAX_LINKS
from utils.cli.errors import UserError

MAX_NAMED = 3
NOT_IMAGE, HIDDEN, BAD_NAME, NO_ACCESS, DEAD_LINK, LOOP = range(6)
# formats that Pillow knows by name only: opened, they have no pixels
NO_PIXELS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
# recognized by content; other formats have signatures so short that any file may begin with them
BY_CONTENT = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "AVIF", "HEIF", "PSD", "QOI")
# kinds of pictures that Pillow alone does not read: suffixes, and what to do
UNREADABLE_KINDS = {
    "HEIC": (".heic .heif .heics .heifs .hif", "pip install pillow-heif"),
    "AVIF": (".avif .avifs", "pip install -U pillow"),
    "JPEG XL": (".jxl", "save them as PNG or JPEG"),
    "JPEG XR": (".jxr .wdp .hdp", "save them as PNG or JPEG"),
    "camera raw": (
        ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .gpr .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl "
        ".sr2 .srf .srw .x3f",
        "develop them to JPEG or PNG",
    ),
    "vector graphics": (".ai .cdr .emf .svg .svgz .wmf", "draw them as PNG"),
    "layered pictures": (".afphoto .clip .kra .psb .xcf", "save them as PNG or JPEG"),
    "high dynamic range": (".exr .hdr", "save them as PNG"),
    "DICOM": (".dcm .dicom", "save them as PNG"),
}
KIND_OF_SUFFIX = {suffix: kind for kind, (suffixes, _) in UNREADABLE_KINDS.items() for suffix in suffixes.split()}
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@dataclass
class ImageFiles:
    """The files below `root`, the value of `flag`.

    `images` maps each folder below, as path parts, to the sorted names of its images; `left_out` maps a reason or an
    unreadable kind to relative paths; `by_content` are images without an image's suffix.
    """

    root: str
    flag: str
    images: dict[tuple[str, ...], list[str]] = field(default_factory=dict)
    left_out: dict[int | str, list[str]] = field(default_factory=lambda: defaultdict(list))
    by_content: list[str] = field(default_factory=list)

    @property
    def place(self) -> str:
        """The flag and its value, with which messages begin."""
        return f"{self.flag} {escape_name(self.root)}"

    def path(self, *names: str) -> str:
        """Return the printable path of a folder or file below `root`."""
        return escape_name(os.path.join(self.root, *names))

    def describe_left_out(self) -> str:
        """Return 'left out: 3 that are not images (notes.txt, ...), 2 HEIC (...)'; empty if all are images."""
        # the most informative first
        reasons = (NOT_IMAGE, *UNREADABLE_KINDS, BAD_NAME, NO_ACCESS, DEAD_LINK, LOOP, HIDDEN)
        parts = [_describe(reason, self.left_out[reason]) for reason in reasons if self.left_out[reason]]
        return f"left out: {', '.join(parts)}" if parts else ""


def find_image_files(folder: str, flag: str) -> ImageFiles:
    """Return the files below a folder; linked folders are followed. Only files without an image's suffix are opened.

    Raises:
        UserError: it is not a directory or not readable, or a folder's name is not UTF-8.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder}: {'is a file' if os.path.isfile(folder) else 'not a directory'}.")
    if not _is_utf8(os.path.abspath(folder)):
        raise _not_utf8(folder, flag)
    found = ImageFiles(folder, flag)
    suffixes = _image_suffixes()
    for parts, names in _walk(found):
        images = found.images[parts] = []
        for name in names:
            path = os.path.join(folder, *parts, name)
            kind = _kind_of(path, name, suffixes)
            relative = os.path.join(*parts, name)
            if kind is None:
                images.append(name)
                if Path(name).suffix.lower() not in suffixes:
                    found.by_content.append(relative)
            else:
                found.left_out[kind].append(relative)
    return found


def escape_name(name: str) -> str:
    r"""Return a name in printable form, in one line: bytes that are not UTF-8 as \xe9, a newline as \n."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def name_some(names: list[str]) -> str:
    """Return the first three names, and '...' if there are more."""
    shown = ", ".join(escape_name(name) for name in names[:MAX_NAMED])
    return f"{shown}, ..." if len(names) > MAX_NAMED else shown


def unreadable_kind(head: bytes) -> str | None:
    """Return the key in `UNREADABLE_KINDS` of an encoded image, by its first 32 bytes."""
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        return "AVIF" if brand in (b"avif", b"avis") else "HEIC" if brand in HEIC_BRANDS else None
    return "JPEG XL" if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")) else None


def _walk(found: ImageFiles) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yield each folder's path parts and files, sorted by folder; hidden ones are added to `found.left_out`."""
    pending = [((), frozenset(), 0)]
    while pending:
        parts, above, num_links = pending.pop()
        path = os.path.join(found.root, *parts)
        try:
            status = os.stat(path)
            with os.scandir(path) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{found.place}: {escape_name(path)} cannot be read ({error.strerror}).") from None
        identity = status.st_dev, status.st_ino
        if identity in above or num_links > MAX_LINKS:
            found.left_out[LOOP].append(os.path.join(*parts))
            continue
        files, folders = [], []
        for entry in entries:
            name, is_link, relative = entry.name, entry.is_symlink(), os.path.join(*parts, entry.name)
            is_folder = os.path.isdir(entry) if is_link else entry.is_dir()
            if name.startswith(".") or is_folder and name in HIDDEN_FOLDERS:
                found.left_out[HIDDEN] += _files_below(found.root, relative) if is_folder else [relative]
            elif is_folder and _is_utf8(name):
                folders.append(((*parts, name), above | {identity}, num_links + is_link))
            elif is_folder:
                raise _not_utf8(path, found.flag, name)
            elif is_link or entry.is_file():
                files.append(name)
            else:  # such as a named pipe, which would block forever
                found.left_out[NOT_IMAGE].append(relative)
        pending += reversed(folders)
        yield parts, files


def _files_below(folder: str, relative: str) -> list[str]:
    return [
        os.path.relpath(os.path.join(below, name), folder)
        for below, _, names in os.walk(os.path.join(folder, relative))
        for name in names
    ]


def _kind_of(path: str, name: str, suffixes: set[str]) -> int | str | None:
    """Return the reason why a file is left out, None for an image."""
    suffix = Path(name).suffix.lower()
    if suffix not in suffixes:
        if suffix in KIND_OF_SUFFIX:
            return KIND_OF_SUFFIX[suffix]
        if not os.path.isfile(path):  # not opened either: a named pipe would block forever
            return DEAD_LINK if os.path.islink(path) else NOT_IMAGE
        try:
            with open(path, "rb") as file:
                head = file.read(32)
                file.seek(0)
                if not _is_read_by_pillow(file):
                    return unreadable_kind(head) or NOT_IMAGE
        except OSError:
            return NO_ACCESS
    return None if _is_utf8(name) else BAD_NAME  # Arrow's strings are UTF-8


def _is_read_by_pillow(file) -> bool:
    try:
        PIL.Image.open(file, formats=[name for name in BY_CONTENT if name in PIL.Image.OPEN])
    except PIL.Image.DecompressionBombError:
        return True
    except Exception:  # Pillow raises almost any exception for damaged files
        return False
    return True


def _image_suffixes() -> set[str]:
    return {
        suffix
        for suffix, image_format in PIL.Image.registered_extensions().items()
        if image_format in PIL.Image.OPEN and image_format not in NO_PIXELS
    }


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _not_utf8(path: str, flag: str, name: str | None = None) -> UserError:
    which = "its path" if name is None else f"the folder name '{escape_name(name)}'"
    return UserError(
        f"{flag} {escape_name(path)}: {which} is not UTF-8; rename it, as with `convmv -r -f latin1 -t utf8 --notest`."
    )


def _describe(reason: int | str, paths: list[str]) -> str:
    number, names = f"{len(paths):,}", name_some(paths)
    one = len(paths) == 1
    return {
        NOT_IMAGE: f"{number} that {'is not an image' if one else 'are not images'} ({names})",
        BAD_NAME: f"{number} whose name is not UTF-8 ({names}; rename with convmv)",
        NO_ACCESS: f"{number} that cannot be read ({names})",
        DEAD_LINK: f"{number} {'link' if one else 'links'} to nothing ({names})",
        LOOP: f"{number} linked {'folder' if one else 'folders'} that form a loop ({names})",
        HIDDEN: f"{number} hidden",
    }.get(reason) or f"{number} {reason} ({UNREADABLE_KINDS[reason][1]})"
