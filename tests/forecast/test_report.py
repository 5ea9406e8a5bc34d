"""The printed needs of a run: what is not enough, and what is unknown."""

import pytest

from utils.forecast.costs import GIB, DiskUse
from utils.forecast.memory import CONTEXT
from utils.forecast.report import MemoryForecast, Phase, TimeForecast, print_forecast


def phase(gib: float, what: str = "training") -> Phase:
    """Return a phase that needs `gib` GiB with its margin."""
    return Phase(what, 0, round((gib * GIB - CONTEXT) / 1.05))


def forecast(training: float, other_way: float | None, other: float = 1.0, is_checkpointed: bool = False):
    others = [phase(other, "encoding, 16 images at a time")]
    way = None if other_way is None else phase(other_way)
    return MemoryForecast(phase(training), others, way, is_checkpointed, 8, "--train_batch_size")


@pytest.mark.parametrize(
    ("memory", "line"),
    [
        (forecast(9.6, 6.1), "needs about 9.6 GiB at batch 8, 6.1 with --gradient_checkpointing; your GPU has 11.8."),
        (forecast(6.1, 9.6, is_checkpointed=True),
         "needs about 6.1 GiB at batch 8, 9.6 without --gradient_checkpointing; your GPU has 11.8."),
        (forecast(9.6, None), "needs about 9.6 GiB at batch 8; your GPU has 11.8."),
        (forecast(19.6, 6.1), "needs about 19.6 GiB at batch 8, 6.1 with --gradient_checkpointing; your GPU has 11.8. "
         "Not enough: add --gradient_checkpointing."),
        (forecast(19.6, 16.1), "needs about 19.6 GiB at batch 8, 16.1 with --gradient_checkpointing; your GPU has "
         "11.8. Not enough: lower --train_batch_size and raise --gradient_accumulation_steps."),
        (forecast(9.6, None, 43.2), "needs about 9.6 GiB at batch 8; your GPU has 11.8. Even more: encoding, 16 "
         "images at a time, 43.2 GiB."),
    ],
)  # fmt: skip
def test_a_line_says_what_is_needed_and_what_to_do(memory, line):
    assert memory.describe(round(11.8 * GIB), "your GPU has {}") == line


def test_the_needed_memory_is_that_of_the_largest_phase():
    assert forecast(9.6, None, 43.2).needed == pytest.approx(43.2 * GIB, rel=1e-6)


def test_unknown_sizes_and_a_full_disk_are_reported(tmp_path, capsys):
    disk = [DiskUse("download of user/model", None, tmp_path), DiskUse("latent cache", 2**60, tmp_path)]
    times = [TimeForecast("images in 10 steps", 80, 160.0), TimeForecast("images", None, None)]
    needs = print_forecast(None, (0, ""), times, disk)
    printed = capsys.readouterr().out
    assert needs == {"needed_bytes": None, "images_per_second": None, "hours": None, "disk_bytes": None}
    assert "Time: 80 images in 10 steps, 160/s: 0 s." in printed and "Time: images, unknown: unknown." in printed
    assert "without 1 of unknown size." in printed and f"The disk of {tmp_path} has too little free" in printed
    known = print_forecast(None, (0, ""), [times[0], times[0]], [DiskUse("latent cache", 5, tmp_path)])
    assert (known["images_per_second"], known["disk_bytes"]) == (160.0, 5)
    assert known["hours"] == pytest.approx(1 / 3600) and "too little free" not in capsys.readouterr().out
