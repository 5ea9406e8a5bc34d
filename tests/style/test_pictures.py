from PIL import Image

from utils.style.pictures import draw_rows


def test_dollars_in_names_are_drawn_as_they_are(tmp_path):
    draw_rows(tmp_path / "rows.png", {"$\\real$": [Image.new("RGB", (4, 4))]}, ["$\\x$"])
    assert (tmp_path / "rows.png").is_file()
