import numpy as np
import pytest
from PIL import Image

from utils.data.images import centre_square, to_model_range, to_rgb


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "I", "RGB"])
def test_to_rgb_keeps_white_white_in_any_mode(mode):
    white = np.full((4, 4), 255, np.uint8)
    if mode.startswith("I"):
        image = Image.fromarray(white.astype(np.uint16) * 257)
        image = image if mode == "I;16" else image.convert("I")
    else:
        image = Image.fromarray(np.stack([white] * 3, -1)).convert(mode)
    assert np.asarray(to_rgb(image)).tolist() == np.full((4, 4, 3), 255).tolist()


def test_to_rgb_lays_transparent_pixels_on_white():
    assert to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_to_rgb_turns_an_image_upright():
    image = Image.new("RGB", (4, 2))
    image.getexif()[0x0112] = 6  # to be turned by a quarter
    assert to_rgb(image).size == (2, 4)


def test_centre_square_and_range():
    wide = Image.new("RGB", (40, 20))
    wide.paste((255, 255, 255), (10, 0, 30, 20))
    pixel_values = to_model_range([centre_square(wide, 20)])
    assert pixel_values.shape == (1, 3, 20, 20)
    assert pixel_values.min() == pixel_values.max() == 1.0
