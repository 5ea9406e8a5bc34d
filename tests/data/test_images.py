import colorsys
import io
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin, TiffTags

from tests.data.builders import encode, image_column
from utils.cli.errors import UserError
from utils.data.images import centre_square, describe_reading, to_model_range, to_rgb, upright_size
from utils.data.opened_images import inspect_images, open_synthetic

ORIENTATION = 0x0112
ORANGE = (200, 100, 50)


def reopen(image, file_format, **options):
    """Return the image after saving and opening it."""
    return Image.open(io.BytesIO(encode(image, file_format, **options)))


def pixel(image):
    return to_rgb(image).getpixel((0, 0))


def grey(values, dtype):
    return Image.fromarray(np.array([values], dtype))


def levels(image):
    """Return the grey levels of the first row, equal in all channels."""
    row = np.asarray(to_rgb(image))[0].astype(int)
    assert (row == row[:, :1]).all()
    return row[:, 0].tolist()


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)), ("1", 0, (0, 0, 0)), ("L", 77, (77, 77, 77)), ("L", 255, (255, 255, 255)),
        ("I;16", 65_535, (255, 255, 255)), ("I;16L", 65_535, (255, 255, 255)), ("I;16B", 65_535, (255, 255, 255)),
        ("I;16N", 65_535, (255, 255, 255)), ("I", 65_535, (255, 255, 255)), ("F", 1, (255, 255, 255)),
        ("RGB", ORANGE, ORANGE), ("RGBX", (*ORANGE, 9), ORANGE), ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)), ("CMYK", (0, 255, 0, 0), (255, 0, 255)),
        ("YCbCr", (255, 128, 128), (255, 255, 255)), ("YCbCr", (0, 128, 128), (0, 0, 0)),
        ("HSV", (0, 0, 255), (255, 255, 255)), ("HSV", (0, 0, 128), (128, 128, 128)),
        ("CMYK", (0, 0, 0, 128), (127, 127, 127)), ("LA", (0, 64), (191, 191, 191)),
        ("LA", (128, 255), (128, 128, 128)), ("La", (0, 64), (191, 191, 191)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)), ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("RGBa", (51, 0, 0, 51), (255, 204, 204)),  # the same as premultiplied colour
        ("LAB", (255, 128, 128), (255, 255, 255)), ("LAB", (0, 128, 128), (0, 0, 0)),
        ("LAB", (137, 128, 128), (128, 128, 128)),  # L* 53.6
    ],
)  # fmt: skip
def test_to_rgb_of_a_mode_gives_its_colour(mode, colour, expected):
    assert pixel(Image.new(mode, (1, 1), colour)) == pytest.approx(expected, abs=1)


def test_to_rgb_of_hsv_ycbcr_and_lab_agrees_with_their_formulas():
    hue, saturation, value = (v / 255 for v in (30, 200, 180))
    expected = [255 * v for v in colorsys.hsv_to_rgb(hue, saturation, value)]
    assert pixel(Image.new("HSV", (1, 1), (30, 200, 180))) == pytest.approx(expected, abs=2)
    y, cb, cr = 120, 90, 160
    expected = [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)]
    assert pixel(Image.new("YCbCr", (1, 1), (y, cb, cr))) == pytest.approx(expected, abs=2)
    # L* 56.47, a* 35, b* 45 with white D50, into sRGB by Bradford's matrix
    assert pixel(Image.new("LAB", (1, 1), (144, 163, 173))) == pytest.approx((202.4, 108.9, 57.4), abs=1)


@pytest.mark.parametrize("transparency", [None, 1, bytes([255, 0])])
def test_to_rgb_of_a_palette_gives_its_colours_and_lays_transparent_ones_on_white(transparency):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    image.putpalette([*ORANGE, 0, 0, 255])
    options = {} if transparency is None else {"transparency": transparency}
    pixels = np.asarray(to_rgb(reopen(image, "PNG", **options)))[0].tolist()
    assert pixels == [list(ORANGE), [0, 0, 255] if transparency is None else [255, 255, 255]]
    if transparency is not None:
        image = Image.new("PA", (1, 1), (1, 0))
        image.putpalette([*ORANGE, 0, 0, 255])
        assert pixel(image) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "colour"), [("L", 77), ("RGB", ORANGE)])
def test_to_rgb_of_a_transparent_colour_is_white(mode, colour):
    assert pixel(reopen(Image.new(mode, (1, 1), colour), "PNG", transparency=colour)) == (255, 255, 255)


SIXTEEN_BITS, EIGHT_BITS = [0, 257, 32_768, 65_535], [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("dtype", "file_format"),
    [("<u2", None), (">u2", None), ("<u2", "PNG"), ("<u2", "TIFF"), ("<u2", "PPM"), ("<u2", "JPEG2000")],
)
def test_to_rgb_of_16_bits_is_scaled(dtype, file_format):
    image = grey(SIXTEEN_BITS, dtype)
    assert image.mode == {"<u2": "I;16", ">u2": "I;16B"}[dtype]
    if file_format is not None:
        image = reopen(image, file_format, **({"irreversible": False} if file_format == "JPEG2000" else {}))
    assert levels(image) == pytest.approx(EIGHT_BITS, abs=1)


@pytest.mark.parametrize("white", [255, 1023, 4095, 65_535])
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_to_rgb_of_fewer_bits_in_16_has_their_white(white, file_format):
    image = reopen(grey([0, white // 4, white // 2, white], np.uint16), file_format)
    assert levels(image) == pytest.approx([0, 63, 127, 255], abs=1)
    said = None if white == 65_535 else f"of more than 8 bits a channel, read with 0 as black and {white:,} as white"
    assert describe_reading(image) == said


def test_to_rgb_of_14_bits_in_16_is_dark_and_reported():
    image = grey([0, 8_192, 16_383], np.uint16)
    assert levels(image) == [0, 32, 64]
    assert "65,535 as white, though no pixel is a quarter as bright" in describe_reading(reopen(image, "PNG"))


@pytest.mark.parametrize(
    ("values", "dtype", "tags", "expected"),
    [
        ([0, 2047, 3000], np.uint16, {281: 4095}, [0, 127, 187]),
        ([0, 512, 1000], np.uint16, {281: 4095}, [0, 32, 62]),  # and not of 10 bits
        ([0, 100, 200], np.uint16, {281: 65_535}, [0, 0, 1]),
        ([0, 512, 1000], np.uint16, {281: 1000}, [0, 128, 249]),  # its brightest pixel, not white
        ([0, 512, 4000], np.uint16, {281: 1023}, [0, 32, 249]),  # wrong
        ([0, 25, 100], np.float32, {340: 0.0, 341: 100.0}, [0, 64, 255]),
        ([-10, 0, 30], np.float32, {340: -10.0, 341: 30.0}, [0, 64, 255]),
        ([0, 32_768, 65_535], np.uint16, {262: 0}, [255, 127, 0]),  # white is 0
        ([0, 0.25, 1], np.float32, {262: 0}, [255, 191, 0]),
        ([0, 128, 255], np.uint8, {262: 0}, [0, 128, 255]),  # Pillow inverts these on both sides
        ([0, 16_384, 32_767], np.uint16, {339: 2}, [0, 128, 255]),  # signed: white is at half of the range
    ],
)
def test_to_rgb_of_a_tiff_goes_by_its_tags(values, dtype, tags, expected):
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        directory.tagtype[tag] = TiffTags.FLOAT if isinstance(value, float) else TiffTags.SHORT
        directory[tag] = value
    assert levels(reopen(grey(values, dtype), "TIFF", tiffinfo=directory)) == pytest.approx(expected, abs=1)


def test_to_rgb_of_12_bits_packed_in_a_tiff_goes_by_their_number():
    content = encode(grey([0, 0], np.uint16), "TIFF")
    packed = content.replace(b"\x02\x01\x03\0\1\0\0\0\x10\0", b"\x02\x01\x03\0\1\0\0\0\x0c\0")
    strip = int(Image.open(io.BytesIO(content)).tag_v2[273][0])
    packed = packed[:strip] + bytes([0x40, 0x0F, 0xFF]) + packed[strip + 3 :]  # 1024, 4095
    assert levels(Image.open(io.BytesIO(packed))) == pytest.approx([64, 255], abs=1)


@pytest.mark.parametrize("file_format", ["GIF", "TIFF", "WEBP", "PNG"])
def test_to_rgb_of_several_frames_is_the_first(file_format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    image = reopen(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert image.n_frames == 2
    assert pixel(image) == (255, 255, 255)


def deep_png(values: list[int]) -> Image.Image:
    """Return an opened PNG of one pixel with 16 bits per channel, which Pillow can read but not write."""
    kind = {3: 2, 4: 6}[len(values)]
    header = (1).to_bytes(4) * 2 + bytes([16, kind, 0, 0, 0])
    pixels = zlib.compress(b"\0" + b"".join(value.to_bytes(2) for value in values))
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    parts = [len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4) for name, data in chunks]
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts)))


def test_describe_reading_says_that_12_bits_in_colour_of_16_are_nearly_black():
    assert "nearly black" in describe_reading(deep_png([4095, 1000, 0]))
    assert "nearly black" in describe_reading(deep_png([4095, 1000, 0, 65_535]))
    assert describe_reading(deep_png([65_535, 1000, 0])) is None
    assert pixel(deep_png([65_535, 32_768, 0])) == (255, 128, 0)


def test_large_images_do_not_flood_the_terminal(tmp_path):
    Image.new("L", (50, 20)).save(tmp_path / "large.png")
    code = "from utils.data.images import Image; Image.MAX_IMAGE_PIXELS = 600; Image.open(r'{}')"
    command = [sys.executable, "-c", code.format(tmp_path / "large.png")]
    assert subprocess.run(command, capture_output=True, check=True).stderr == b""  # pytest has its own warning filters


@pytest.mark.filterwarnings("ignore:Image size")
def test_images_above_pillows_limit_are_reported_as_large_and_not_damaged(monkeypatch):
    rows = [Image.new("L", size) for size in ((30, 20), (60, 30), (50, 20))] + [grey([0, 4095], np.uint16)]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    images = image_column(list(map(encode, rows)))
    hashes, problems, notes = inspect_images(images, "photos", with_digests=True)
    assert sorted(hashes) == [0, 2, 3]
    assert problems[1].startswith("too large: 1,800 pixels, more than the 1,200 that Pillow opens")
    assert notes[2].startswith("of more than 600 pixels")
    assert "4,095 as white" in notes[3]
    assert len(notes) == 2
    message = r"row 1: not read \(too large: 1,800 .*; not read in total: 1; shrink or remove them, or give"
    with pytest.raises(UserError, match=message):
        open_synthetic(images, "photos", skip_bad_images=False)


def test_sizes_are_those_of_the_upright_image():
    for file_format in ("PNG", "JPEG", "TIFF", "WEBP"):
        for orientation, expected in ((1, (16, 8)), (3, (16, 8)), (6, (8, 16))):
            exif = Image.Exif()
            exif[ORIENTATION] = orientation
            image = reopen(Image.new("RGB", (16, 8)), file_format, exif=exif)
            assert upright_size(image) == to_rgb(image).size == expected, file_format
    broken = reopen(Image.new("RGB", (16, 8)), "PNG", exif=b"Exif\0\0II")
    assert upright_size(broken) == (16, 8)


@pytest.mark.parametrize(
    ("values", "dtype", "expected", "said"),
    [
        ([0, 1, 128, 255], np.int32, [0, 1, 128, 255], "0 as black and 255 as white"),
        (SIXTEEN_BITS, np.int32, EIGHT_BITS, None),
        ([-5, 65_535], np.int32, [0, 255], "0 as black and 65,535 as white"),
        ([-5, 0, 500_000, 1_000_000], np.int32, [0, 0, 128, 255], "0 as black and the brightest pixel as white"),
        ([0, 0.25, 0.5, 1], np.float32, [0, 64, 128, 255], "0 as black and 1 as white"),
        ([0, 1, 128, 255], np.float32, [0, 1, 128, 255], "0 as black and 255 as white"),
        (SIXTEEN_BITS, np.float32, EIGHT_BITS, None),
        ([-0.5, np.nan, np.inf, 1], np.float32, [64, 0, 0, 255], "-1 as black and 1 as white"),
        ([-0.05, 0, 0.5, 1], np.float32, [0, 0, 128, 255], "0 as black and 1 as white"),  # as resizing leaves
        ([-1.5, 0, 0.5, 1], np.float32, [0, 0, 128, 255], "0 as black and 1 as white"),
        ([-1, 0, 0.5, 1], np.float32, [0, 128, 191, 255], "-1 as black and 1 as white"),
        ([-2, 0.5, 3], np.float32, [0, 0, 3], "0 as black and 255 as white"),
        ([0, 0, 0, 0], np.float32, [0, 0, 0, 0], "0 as black and 1 as white"),
        ([0, 255], np.uint8, [0, 255], None),
    ],
)
def test_grey_without_a_white_takes_the_next_usual_one_and_reports_it(values, dtype, expected, said):
    assert levels(grey(values, dtype)) == pytest.approx(expected, abs=1)
    found = describe_reading(reopen(grey(values, dtype), "TIFF"))
    assert found == (said and f"of more than 8 bits a channel, read with {said}")


def test_to_rgb_of_an_inverted_jpeg_of_adobe_is_not_inverted():
    jpeg = reopen(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert "adobe" in jpeg.info
    assert pixel(jpeg) == pytest.approx((255, 0, 0), abs=3)


CORNERS = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
UPRIGHT = {
    1: CORNERS, 2: CORNERS[:, ::-1], 3: CORNERS[::-1, ::-1], 4: CORNERS[::-1], 5: CORNERS.T,
    6: np.rot90(CORNERS, -1), 7: CORNERS[::-1, ::-1].T, 8: np.rot90(CORNERS),
}  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_to_rgb_turns_an_image_upright(orientation, dtype):
    scale = 257 if dtype == np.uint16 else 1
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = reopen(Image.fromarray(CORNERS.astype(dtype) * scale), "PNG", exif=exif)
    assert np.asarray(to_rgb(image))[..., 0].tolist() == UPRIGHT[orientation].tolist()


def exif_of(*entries: str) -> bytes:
    """Return EXIF with these entries of 12 bytes: tag, type, count, value."""
    return b"Exif\0\0II*\0\x08\0\0\0" + len(entries).to_bytes(2, "little") + bytes.fromhex("".join(entries)) + bytes(4)


TURNED, ORIENTATION_99 = "1201 0300 01000000 06000000", "1201 0300 01000000 63000000"
HEIGHT_OF_LETTERS = "0101 0200 04000000 61626300"  # Pillow reads it, but cannot write it


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0" + bytes(range(200)), b"Exif\0\0II", exif_of(ORIENTATION_99), exif_of(TURNED, HEIGHT_OF_LETTERS)],
)
@pytest.mark.filterwarnings("ignore:.*EXIF")
def test_to_rgb_ignores_unreadable_exif(exif):
    image = reopen(Image.new("RGB", (16, 8), ORANGE), "PNG", exif=exif)
    assert to_rgb(image).size == (16, 8)
    assert pixel(image) == ORANGE


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "JPEG2000"])
def test_to_rgb_of_a_truncated_file_raises(file_format):
    content = encode(Image.effect_noise((64, 64), 50), file_format)
    with pytest.raises(OSError, match="truncated|broken"):
        to_rgb(Image.open(io.BytesIO(content[:600])))


def test_centre_square_and_range():
    wide = Image.new("RGB", (40, 20))
    wide.paste((255, 255, 255), (10, 0, 30, 20))
    pixel_values = to_model_range([centre_square(wide, 20)])
    assert pixel_values.shape == (1, 3, 20, 20)
    assert pixel_values.min() == pixel_values.max() == 1.0
