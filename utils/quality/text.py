"""A quality report on the terminal: the figures as a table, then the verdicts."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

MAX_ROWS = 10
COLOURS = {"good": "green", "look": "yellow", "bad": "red", "unknown": "dim"}


def print_quality(record: dict) -> None:
    """Print the classes that are farthest from their real ones, the verdicts, and what they cannot tell."""
    console = Console(markup=False, emoji=False)  # names may have brackets
    classes = record["classes"]
    shown = f"the {MAX_ROWS} farthest of {len(classes)}" if len(classes) > MAX_ROWS else "farthest first"
    counts = {name: f"{count['used']:,}" for name, count in record["num_images"].items()}
    table = Table(
        # Text: brackets in names are no markup
        title=Text(f"{record['synthetic']['id']}: classes, {shown}; real images in brackets", "table.title"),
        caption=Text(
            f"{counts['synthetic']} synthetic images; real: {counts['train']} training, {counts['held_out']} "
            f"held-out, {counts['test']} test; features of {record['model']['id']}",
            "table.caption",
        ),
    )
    table.add_column("class")
    for name in ("images", "shift (0: as real)", "diversity", "nearest to own class"):
        table.add_column(name, justify="right")
    for entry in classes[:MAX_ROWS]:
        table.add_row(
            Text(entry["class"]),
            f"{entry['num_images']:,}",
            _beside(entry["shift"], entry["shift_floor"], ".2f"),
            _beside(entry["diversity"], entry["real_diversity"], ".2f"),
            _beside(entry["own_share"], entry["real_own_share"], ".0%"),
        )
    console.print(table)
    for verdict in record["verdicts"]:
        console.print(f"{verdict['level']:>7}  ", style=COLOURS[verdict["level"]], end="")
        console.print(f"{verdict['subject']}: {verdict['text']}", highlight=False, soft_wrap=True)
    for caveat in record["caveats"]:
        console.print(f"   note  {caveat}", highlight=False, soft_wrap=True)


def _beside(value: float | None, real: float | None, form: str) -> str:
    texts = ["-" if number is None else format(number, form) for number in (value, real)]
    return f"{texts[0]} ({texts[1]})"
