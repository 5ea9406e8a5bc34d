"""Signals end a script with one line, an exit status that says which, and nothing half done."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils.cli import interruptions
from utils.cli.interruptions import Interrupted, ending_cleanly

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, time
from utils.cli.errors import run_script
from utils.cli.interruptions import ending_cleanly

def main():
    with ending_cleanly(lambda: "Go on with: the command"):
        try:
            print("working", flush=True)
            time.sleep(60)
        finally:
            time.sleep(0.5)  # what must be finished, whatever comes meanwhile
            print("cleaned up", flush=True)

run_script(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_script_cleanly_and_a_second_one_does_not_disturb(number):
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "working\n"
    child.send_signal(number)
    child.send_signal(signal.SIGTERM)
    output, errors = child.communicate(timeout=300)
    assert output == "cleaned up\n"
    assert errors == "-c: interrupted. Go on with: the command\n"
    assert child.returncode == 128 + number


def test_handlers_are_what_they_were_afterwards():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="advice") as caught, ending_cleanly(lambda: "advice"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.signal_number == signal.SIGTERM
    with ending_cleanly(lambda: "advice"):
        pass
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize(("seconds_to_end", "is_ignored"), [(10.0, True), (0.0, False)])
def test_a_signal_long_after_one_that_got_lost_ends_the_block(seconds_to_end, is_ignored, monkeypatch):
    monkeypatch.setattr(interruptions, "SECONDS_TO_END", seconds_to_end)
    reached = []
    with pytest.raises(Interrupted), ending_cleanly(lambda: ""):
        with contextlib.suppress(KeyboardInterrupt):  # as where it is raised in a destructor
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append(True)
        raise KeyboardInterrupt
    assert bool(reached) is is_ignored
