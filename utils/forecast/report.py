"""What a run needs, printed before it starts: memory by phase, time and disk space."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from utils.cli.tables import print_table
from utils.forecast.costs import GIB, DiskUse, estimate_hours
from utils.forecast.memory import CONTEXT, MARGIN, needed_bytes

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Phase:
    """A part of a run, and its peak bytes on the device."""

    what: str
    weights: int
    activations: int
    gradients: int = 0
    optimizer: int = 0

    @property
    def needed(self) -> int:
        """The free device memory that it needs, with the margin of `needed_bytes`."""
        return needed_bytes(self.weights + self.activations + self.gradients + self.optimizer)


@dataclass(frozen=True)
class MemoryForecast:
    """The memory of a run: training, the other phases, and training with the opposite --gradient_checkpointing.

    `other_way` is None if the model has no gradient checkpointing. `batch_size` is the number of images in a forward
    pass, `batch_flag` the flag for it.
    """

    training: Phase
    others: list[Phase]
    other_way: Phase | None
    is_checkpointed: bool
    batch_size: int
    batch_flag: str

    @property
    def needed(self) -> int:
        return max(phase.needed for phase in (self.training, *self.others))

    def describe(self, available: int, device: str) -> str:
        """Return in one line the needed and available memory, and what to do if it is not enough.

        `device` has {} for the GiB.
        """
        line = f"needs about {gib(self.training.needed)} GiB at batch {self.batch_size}"
        if self.other_way is not None:
            way = "without" if self.is_checkpointed else "with"
            line += f", {gib(self.other_way.needed)} {way} --gradient_checkpointing"
        line += f"; {device.format(gib(available))}."
        more = [phase for phase in self.others if phase.needed > max(self.training.needed, available)]
        for phase in more:
            line += f" Even more: {phase.what}, {gib(phase.needed)} GiB."
        if self.training.needed > available:
            if self.other_way is not None and not self.is_checkpointed and self.other_way.needed <= available:
                line += " Not enough: add --gradient_checkpointing."
            else:
                line += f" Not enough: lower {self.batch_flag} and raise --gradient_accumulation_steps."
        return line


@dataclass(frozen=True)
class TimeForecast:
    """How long a run takes: a kind of images, their number, and the rate per second of all processes together.

    Unknown values are None.
    """

    what: str
    number: int | None
    per_second: float | None

    @property
    def hours(self) -> float | None:
        return None if None in (self.per_second, self.number) else estimate_hours(self.number, self.per_second)


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"


def format_bytes(num_bytes: int) -> str:
    """Return a size as `1.5 GiB` or `12 MiB`."""
    if num_bytes >= GIB / 10:
        return f"{gib(num_bytes)} GiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 / 10 else f"{num_bytes / 2**10:.1f} KiB"


def describe_hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 3600:.0f} s"


def print_forecast(
    memory: MemoryForecast | None, device: tuple[int, str], times: list[TimeForecast], disk: list[DiskUse],
    say: Callable[[str], None] = print,
) -> dict:  # fmt: skip
    """Print what a run needs, and return it: `needed_bytes`, `images_per_second`, `hours`, `disk_bytes`.

    `device` is from `available_bytes`. The rate is that of the last kind of images; unknown values are None.
    """
    if memory is not None:
        say(f"Memory: {memory.describe(*device)}")
        _print_phases(memory)
    for time in times:
        rate = UNKNOWN if time.per_second is None else f"{_three_digits(time.per_second)}/s"
        hours = UNKNOWN if time.hours is None else describe_hours(time.hours)
        number = "" if time.number is None else f"{time.number:,} "
        say(f"Time: {number}{time.what}, {rate}: {hours}.")
    _print_disk(disk, say)
    known = [time.hours for time in times]
    sizes = [use.num_bytes for use in disk]
    return {
        "needed_bytes": None if memory is None else memory.needed,
        "images_per_second": times[-1].per_second if times else None,
        "hours": None if None in known or not times else sum(known),
        "disk_bytes": None if None in sizes else sum(sizes),
    }


def _three_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _print_phases(memory: MemoryForecast) -> None:
    title = f"device memory by phase (needed: {MARGIN:.0%} more, and {gib(CONTEXT)} GiB for the context)"
    table = Table("phase", "weights", "activations", "gradients", "optimiser", "needed", title=title)
    for phase in (memory.training, *memory.others):
        parts = phase.weights, phase.activations, phase.gradients, phase.optimizer, phase.needed
        table.add_row(phase.what, *map(format_bytes, parts))
    print_table(table, Console())


def _print_disk(disk: list[DiskUse], say: Callable[[str], None]) -> None:
    if not disk:
        return
    table = Table("what is written", "size", "where", "free", title="disk space still needed")
    for use in disk:
        size = UNKNOWN if use.num_bytes is None else format_bytes(use.num_bytes)
        table.add_row(use.what, size, str(Path(use.folder)), format_bytes(use.free))
    print_table(table, Console())
    known = [use.num_bytes for use in disk if use.num_bytes is not None]
    line = f"Disk: {format_bytes(sum(known))} in total"
    line += f", without {len(disk) - len(known)} of unknown size." if len(known) < len(disk) else "."
    for number in {use.disk for use in disk}:
        uses = [use for use in disk if use.disk == number]
        if sum(use.num_bytes or 0 for use in uses) > uses[0].free:
            line += f" The disk of {uses[0].folder} has too little free space; HF_HOME moves downloads and copies."
    say(line)
