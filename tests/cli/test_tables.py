import io

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from utils.cli.tables import print_table, shorten


@pytest.fixture
def printed():
    """Print a table at a width, and return the output."""

    def print_at(width: int, title: str | None = "all [b]images[/b]", name: str = "Textures (DTD)") -> str:
        table = Table("image set", "images", "steps (1, 2)", "", title=title, caption="of one\nGPU")
        table.add_row(name, "3,334", "15,625, 3,150", Text("[a]\nb"))
        table.add_row("Cars", "48,144", "30,625, 6,900", "")
        console = Console(width=width, file=io.StringIO())
        print_table(table, console)
        return console.file.getvalue()

    return print_at


@pytest.mark.parametrize("width", range(20, 70))
def test_no_figure_and_no_word_is_cut_at_any_width(printed, width):
    text = printed(width)
    assert all(word in text for word in ("Textures", "(DTD)", "3,334", "48,144", "15,625,", "3,150", "6,900", "[a]"))
    assert "…" not in text


def test_a_wide_console_has_a_table_and_a_narrow_one_lines(printed):
    assert "┃ image set      ┃ images ┃" in printed(80)
    assert printed(30) == (
        "all images\nTextures (DTD): images 3,334; steps (1, 2) 15,625, 3,150; [a], b\n"
        "Cars: images 48,144; steps (1, 2) 30,625, 6,900\nof one GPU\n"
    )
    assert printed(30, title=None).startswith("image set\nTextures")


def test_a_name_that_ends_with_an_ellipsis_is_not_taken_for_a_cut_one(printed):
    assert "┃ image set ┃" in printed(80, name="Text…")


def test_long_names_keep_their_ends():
    names = [shorten(f"bridged_replay@a_very_long_name_{number}", 26) for number in range(2)]
    assert len(set(names)) == 2 and {len(name) for name in names} == {26}
    assert shorten("bridged@plain", 26) == "bridged@plain"
