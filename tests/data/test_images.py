import colorsys
import io

import numpy as np
import pytest
from PIL import Image

from utils.data.images import centre_square, to_model_range, to_rgb

ORIENTATION = 0x0112
ORANGE = (200, 100, 50)


def reopen(image, file_format, **options):
    """Return the image as it comes out of a file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return Image.open(buffer)


def pixel(image):
    return to_rgb(image).getpixel((0, 0))


def grey(values, dtype):
    return Image.fromarray(np.array([values], dtype))


def levels(image):
    """Return the grey levels of the first row, which must be the same in all channels."""
    row = np.asarray(to_rgb(image))[0].astype(int)
    assert (row == row[:, :1]).all()
    return row[:, 0].tolist()


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("RGB", ORANGE, ORANGE),
        ("RGBX", (*ORANGE, 9), ORANGE),
        ("CMYK", (0, 255, 0, 0), (255, 0, 255)),
        ("CMYK", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (0, 64), (191, 191, 191)),
        ("La", (0, 64), (191, 191, 191)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("RGBa", (51, 0, 0, 51), (255, 204, 204)),  # the same, colour times opacity
        ("LAB", (255, 128, 128), (255, 255, 255)),
    ],
)
def test_to_rgb_of_a_mode_gives_its_colour(mode, colour, expected):
    assert pixel(Image.new(mode, (1, 1), colour)) == pytest.approx(expected, abs=1)


def test_to_rgb_of_hsv_and_ycbcr_agrees_with_their_formulas():
    hue, saturation, value = (v / 255 for v in (30, 200, 180))
    expected = [255 * v for v in colorsys.hsv_to_rgb(hue, saturation, value)]
    assert pixel(Image.new("HSV", (1, 1), (30, 200, 180))) == pytest.approx(expected, abs=2)

    y, cb, cr = 120, 90, 160
    expected = [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)]
    assert pixel(Image.new("YCbCr", (1, 1), (y, cb, cr))) == pytest.approx(expected, abs=2)


def test_to_rgb_of_lab_agrees_with_the_formulas_of_cie():
    # L* 56.47, a* 35, b* 45 with white D50, into sRGB by Bradford's matrix
    assert pixel(Image.new("LAB", (1, 1), (144, 163, 173))) == pytest.approx((202.4, 108.9, 57.4), abs=1)


@pytest.mark.parametrize("transparency", [None, 1, bytes([255, 0])])
def test_to_rgb_of_a_palette_gives_its_colours_and_lays_transparent_ones_on_white(transparency):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    image.putpalette([*ORANGE, 0, 0, 255])
    options = {} if transparency is None else {"transparency": transparency}
    pixels = np.asarray(to_rgb(reopen(image, "PNG", **options)))[0].tolist()
    assert pixels == [list(ORANGE), [0, 0, 255] if transparency is None else [255, 255, 255]]


def test_to_rgb_of_a_palette_with_alpha():
    image = Image.new("PA", (1, 1), (1, 0))
    image.putpalette([*ORANGE, 0, 0, 255])
    assert pixel(image) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "colour", "key"), [("L", 77, 77), ("RGB", ORANGE, ORANGE)])
def test_to_rgb_of_a_transparent_colour_is_white(mode, colour, key):
    assert pixel(reopen(Image.new(mode, (1, 1), colour), "PNG", transparency=key)) == (255, 255, 255)


SIXTEEN_BITS, EIGHT_BITS = [0, 257, 32_768, 65_535], [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_to_rgb_of_16_bits_is_scaled_whatever_the_brightest_pixel(mode):
    dtype = {"I;16": "<u2", "I;16B": ">u2"}[mode]
    image = grey(SIXTEEN_BITS, dtype)
    assert image.mode == mode
    assert levels(image) == pytest.approx(EIGHT_BITS, abs=1)
    assert levels(grey([0, 200], dtype)) == [0, 1]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_to_rgb_of_a_16_bit_file_is_scaled(file_format):
    assert levels(reopen(grey(SIXTEEN_BITS, np.uint16), file_format)) == pytest.approx(EIGHT_BITS, abs=1)


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 1, 128, 255], np.int32, [0, 1, 128, 255]),
        (SIXTEEN_BITS, np.int32, EIGHT_BITS),
        ([-5, 0, 500_000, 1_000_000], np.int32, [0, 0, 128, 255]),
        ([0, 0.25, 0.5, 1], np.float32, [0, 64, 128, 255]),
        ([0, 1, 128, 255], np.float32, [0, 1, 128, 255]),
        (SIXTEEN_BITS, np.float32, EIGHT_BITS),
        ([-0.5, np.nan, np.inf, 1], np.float32, [0, 0, 0, 255]),
        ([0, 0, 0, 0], np.float32, [0, 0, 0, 0]),
    ],
)
def test_to_rgb_of_grey_without_a_white_takes_the_next_usual_one(values, dtype, expected):
    assert levels(grey(values, dtype)) == pytest.approx(expected, abs=1)


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
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, file_format)
    with pytest.raises(OSError, match="truncated|broken"):
        to_rgb(Image.open(io.BytesIO(buffer.getvalue()[:600])))


def test_centre_square_and_range():
    wide = Image.new("RGB", (40, 20))
    wide.paste((255, 255, 255), (10, 0, 30, 20))
    pixel_values = to_model_range([centre_square(wide, 20)])
    assert pixel_values.shape == (1, 3, 20, 20)
    assert pixel_values.min() == pixel_values.max() == 1.0
