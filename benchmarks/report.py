"""Write `benchmarks/<script>.md`: one section per benchmark of a script, replaced by later runs."""

import os
import re
import shlex
import sys
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown

from utils.cli.records import package_versions

FOLDER = Path(__file__).parent
INTRO = "# {what} of {script}.py\n\nWritten by `make bench`; every figure is measured.\n"


def format_table(rows: list[dict[str, str]]) -> str:
    """Return a Markdown table of rows with the same keys, which are the column titles."""
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def describe_run() -> str:
    """Return this process's command, date, machine and package versions, as a line of Markdown."""
    script = Path(sys.argv[0]).stem
    command = shlex.join(["python", "-m", f"benchmarks.{script}", *sys.argv[1:]])
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    return f"`{command}`, {date.today()}, on {name_machine()}; {versions}."


def name_machine() -> str:
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    machine = f"{len(os.sched_getaffinity(0))} cores of {cpu}"
    return f"{torch.cuda.get_device_name()} and {machine}" if torch.cuda.is_available() else machine


def publish_section(script: str, title: str, body: str, is_trial: bool = False, what: str = "Speed and memory") -> None:
    """Print a section and, unless it is from a trial run, write it into the report on `script`."""
    Console(width=120).print(Markdown(f"## {title}\n\n{body}"))
    if not is_trial:
        write_section(script, title, body, what)


def write_section(script: str, title: str, body: str, what: str = "Speed and memory") -> None:
    """Write a section into the report on `script` (without .py), replacing one with the same title."""
    path, intro = FOLDER / f"{script}.md", INTRO.format(script=script, what=what)
    report = path.read_text() if path.exists() else intro
    _, *sections = report.split("\n## ")
    by_title = {section.partition("\n")[0]: section for section in sections}
    by_title[title] = f"{title}\n\n{body}\n\n{describe_run()}\n"
    path.write_text("\n## ".join([intro, *by_title.values()]))
