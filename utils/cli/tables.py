"""Tables on the terminal, never with a cut number: if it is too narrow, rows become lines of text."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 2**16
CUT = "…"  # how rich ends a word that it cuts


def print_table(table: Table, console: Console) -> None:
    """Print a table; if a word would be cut (pipe, narrow terminal), print `first cell: head value; head value` lines.

    The lines come below the table's title, or else the head of its first column.
    """

    def num_cut(width: int) -> int:
        segments = console.render(table, console.options.update_width(width))
        return sum(segment.text.count(CUT) for segment in segments)

    if num_cut(console.width) == num_cut(WIDE):  # a cell may contain that character itself
        console.print(table)
        return

    def plain(cell: str | Text, separator: str = ", ") -> str:
        text = cell if isinstance(cell, Text) else console.render_str(cell)
        return separator.join(text.plain.splitlines())

    first, *heads = (plain(column.header) for column in table.columns)
    lines = [plain(table.title) if table.title else first]
    for name, *cells in zip(*(map(plain, column.cells) for column in table.columns)):
        lines.append(f"{name}: " + "; ".join(f"{head} {cell}".strip() for head, cell in zip(heads, cells) if cell))
    lines += [plain(table.caption, " ")] if table.caption else []
    console.print(Text("\n".join(lines)), soft_wrap=True)


def shorten(name: str, length: int) -> str:
    """Return a name of at most `length` characters, cut in the middle: long names often begin alike."""
    num_last = (length - 1) // 3
    return name if len(name) <= length else f"{name[: length - 1 - num_last]}…{name[-num_last:]}"
