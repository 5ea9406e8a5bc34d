"""What the benchmarks measure with."""

import sys

import pytest

import train_dsi
from benchmarks import report
from benchmarks.children import run_child
from benchmarks.commands import our_command
from benchmarks.pipelines import SCALED, SD15

BAR = """
import sys, time
from tqdm import tqdm
held = bytearray(200 * 2**20)
for _ in tqdm(range(20), desc="style token", mininterval=0):
    time.sleep(0.05)
"""


def test_a_childs_speed_is_read_from_its_bar_and_its_memory_from_the_kernel(tmp_path):
    child = run_child([sys.executable, "-c", BAR], tmp_path / "log", {})
    assert 4 < child.units_per_second("style token", 20, 5, 15) < 21  # 20 on an idle machine
    assert child.seconds > 1
    assert 200 < child.peaks["RssAnon"] < 400
    assert "style token" in (tmp_path / "log").read_text()


def test_a_child_that_fails_is_an_error_with_its_output(tmp_path):
    with pytest.raises(RuntimeError, match="exit status 3\nwhy"):
        run_child([sys.executable, "-c", "print('why'); raise SystemExit(3)"], tmp_path / "log", {})


def test_the_scaled_pipelines_vae_has_the_share_of_stable_diffusions():
    assert SCALED.cost().vae_share == pytest.approx(SD15.cost().vae_share, rel=0.03)
    assert SD15.cost().unet == pytest.approx(1.67e12, rel=0.01)  # counted before, elsewhere: PEERS
    assert SD15.cost().vae_encode == pytest.approx(1.12e12, rel=0.01)


def test_a_section_takes_the_place_of_the_one_before_and_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "REPORT", tmp_path / "report.md")
    for title, body in (("Speed", "old"), ("Memory", "flat"), ("Speed", "new")):
        report.write_section(title, body)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith(report.INTRO)
    assert text.index("## Speed\n\nnew\n") < text.index("## Memory\n\nflat\n")
    assert "old" not in text
    assert text.count("torch ") == 2


def test_the_command_is_one_that_the_script_takes(tmp_path):
    *_, templates = train_dsi.parse_arguments(our_command(tmp_path, tmp_path, tmp_path, max_train_steps=3)[2:])
    assert len(templates) == 1
