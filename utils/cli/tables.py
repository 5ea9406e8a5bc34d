"""Tables on the terminal, without a cut figure: where it is too narrow for one, the rows are lines of text."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 2**16
CUT = "…"  # how rich ends a word that it cuts


def print_table(table: Table, console: Console) -> None:
    """Print a table, in a pipe or on a narrow terminal as `first cell: head value; head value` if a word would be cut.

    Above these lines stands the table's title, or the head of its first column.
    """

    def num_cut(width: int) -> int:
        segments = console.render(table, console.options.update_width(width))
        return sum(segment.text.count(CUT) for segment in segments)

    if num_cut(console.width) == num_cut(WIDE):  # a cell may have that character of its own
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
