"""The results so far: a line of JSON each, and a Markdown report that is rewritten from them."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

MEASURED, FAILED, LEFT_OUT = "measured", "failed", "left out"
REACHED, MISSED = "reached", "missed"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    """A target value for one H100 or H200."""

    title: str
    value: float
    unit: str = ""
    is_upper: bool = False  # an upper limit, not a lower one

    def judge(self, measured: float) -> str:
        return REACHED if (measured <= self.value if self.is_upper else measured >= self.value) else MISSED

    def describe(self, number: float | None = None) -> str:
        """Return a number with the unit; without a number, the target with its direction."""
        text = f"{self.value if number is None else number:.3g}{self.unit}"
        return f"{'at most' if self.is_upper else 'at least'} {text}" if number is None else text


TARGETS = {
    "parity": Target("CPU and GPU in float32, largest relative difference", 1e-3, is_upper=True),
    "generation_25": Target("generation, 25 steps with guidance", 10, " images/s"),
    "generation_25_loop": Target("generation, 25 steps with guidance, compared with the loop", 2, " times"),
    "generation_4": Target("generation, 4 steps without guidance", 60, " images/s"),
    "generation_4_loop": Target("generation, 4 steps without guidance, compared with the loop", 2, " times"),
    "dsi_share": Target("DSI, of the matrix rate", 40, " %"),
    "dsi_diffusers": Target("DSI compared with diffusers' script", 2.5, " times"),
    "resnet18_transformers": Target("ResNet-18 compared with run_image_classification", 1.5, " times"),
    "resnet18_idle": Target("ResNet-18, GPU idle", 10, " %", is_upper=True),
}


@dataclass(frozen=True)
class Line:
    """A result of a part: a measurement, or why there is none. `target` is a key of `TARGETS`, `verdict` its result."""

    part: str
    name: str
    text: str
    status: str = MEASURED
    values: dict = field(default_factory=dict)
    target: str | None = None
    verdict: str | None = None

    def __str__(self) -> str:
        text = self.text if self.status == MEASURED else f"{self.status}: {self.text}"
        if self.target is not None:
            text += f" (target: {TARGETS[self.target].describe()}{f', {self.verdict}' if self.verdict else ''})"
        return f"{self.name}: {text}"


def append_line(path: Path, line: Line) -> None:
    """Append a complete line to a JSON lines file, then print it: the process may be stopped at any time."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(line)) + "\n")
    print(f"[{line.part}] {line}", flush=True)


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a file, without an incomplete last line."""
    texts = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [Line(**json.loads(text)) for text in texts if text.endswith("\n")]


def write_report(path: Path, lines: Sequence[Line], titles: dict[str, str], intro: str) -> None:
    """Write the report atomically: the targets, then a section for each part with lines."""
    sections = [f"# On a GPU\n\n{intro}\n", f"## Targets for one H100 or H200\n\n{_format_targets(lines)}\n"]
    for part, title in titles.items():
        own = [f"- {line}" for line in lines if line.part == part]
        if own:
            sections.append(f"## {title}\n\n" + "\n".join(own) + "\n")
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_text("\n".join(sections), encoding="utf-8")
    os.replace(unfinished, path)


def _format_targets(lines: Sequence[Line]) -> str:
    rows = ["| | target | measured | |", "| --- | --- | --- | --- |"]
    for name, target in TARGETS.items():
        measured, verdict = NOT_MEASURED, ""
        if own := [line for line in lines if line.target == name]:
            worst = (max if target.is_upper else min)(own, key=lambda line, name=name: line.values[name])
            measured, verdict = target.describe(worst.values[name]), worst.verdict or ""
        rows.append(f"| {target.title} | {target.describe()} | {measured} | {verdict} |")
    return "\n".join(rows)
