"""The seconds for making synthetic images, from the records of sets and style tokens."""

import hashlib

import pytest

from utils.cli.records import RUN_CONFIG, write_record
from utils.comparison.costs import add_preparation
from utils.comparison.grid import Row
from utils.transfer.synthetic_images import SyntheticSource

NUM_IMAGES = {"num_images": 600, "num_images_per_class": 200}


def row(label, volume=None) -> Row:
    name, _, synthetic = label.partition("@")
    return Row(label, name, synthetic or "dsi", volume)


@pytest.fixture
def make_source(tmp_path):
    """Write the records of a synthetic set, and of its style token if seconds are given for it."""

    def make(name: str, run: dict | None, token_seconds: float | None = None, weights: bytes = b"rows"):
        token = None
        (tmp_path / name).mkdir()
        if run is not None:
            write_record(tmp_path / name / RUN_CONFIG, run)
        if token_seconds is not None:
            folder = tmp_path / f"{name}-token"
            folder.mkdir()
            write_record(folder / RUN_CONFIG, {"seconds": token_seconds})
            (folder / "learned_embeds.safetensors").write_bytes(weights)
            token = {"id": str(folder), "revision": None, "sha256": hashlib.sha256(b"rows").hexdigest()}
        return SyntheticSource(str(tmp_path / name), None, {**NUM_IMAGES, "token": token})

    return make


def costs_of(rows: list[Row], sources: dict, seeds=(0,)) -> list[dict]:
    summary = [{"method": row.label, "volume": row.volume} for row in rows]
    add_preparation(summary, rows, sources, list(seeds))
    return [{name: value for name, value in entry.items() if name.endswith("seconds")} for entry in summary]


def test_seconds_are_the_mean_over_the_seeds_that_are_compared(make_source):
    sources = {
        ("dsi", seed): make_source(f"set-{seed}", {"seconds": 100.0 * (seed + 1)}, 10.0 * seed) for seed in range(3)
    }
    vanilla, mix = costs_of([row("vanilla"), row("mix")], sources, seeds=(0, 1))
    assert vanilla == {} and mix == {"generator_seconds": 150, "style_token_seconds": 5}


def test_a_set_that_seeds_share_counts_once_and_a_smaller_volume_has_its_share(make_source):
    shared, plain = make_source("shared", {"seconds": 90.0}, 7.0), make_source("plain", {"seconds": 60.0})
    sources = {("dsi", seed): shared for seed in (0, 1)} | {("plain", seed): plain for seed in (0, 1)}
    small, large, other = costs_of([row("mix", 50), row("mix", 200), row("mix@plain", 100)], sources, seeds=(0, 1))
    assert small == {"generator_seconds": 22.5, "style_token_seconds": 7}
    assert large == {"generator_seconds": 90, "style_token_seconds": 7}
    assert other == {"generator_seconds": 30}, "a set without a style token has none of its seconds"


@pytest.mark.parametrize(
    ("run", "expected"),
    [(None, None), ({"seconds": 20.0, "num_drawn": 100}, 120), ({"seconds": 3.0, "num_drawn": 0}, None)],
)
def test_seconds_of_a_run_that_drew_a_part_are_scaled_to_the_whole_set_or_unknown(run, expected, make_source):
    (found,) = costs_of([row("mix")], {("dsi", 0): make_source("set", run)})
    assert found == {"generator_seconds": expected}


def test_seconds_without_a_record_are_unknown(make_source):
    known, unknown = make_source("known", {"seconds": 20.0}, 5.0), make_source("unknown", None, 5.0, b"other rows")
    (found,) = costs_of([row("mix")], {("dsi", 0): known, ("dsi", 1): unknown}, seeds=(0, 1))
    assert found == {"generator_seconds": None, "style_token_seconds": None}
